// base/term: sizes and units in both directions; the line editor on a pseudo-terminal, typed at as a person would.
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>
#include <fcntl.h>
#include <stdlib.h>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/term.h"

using namespace qn;

TEST_CASE("term: parse_size") {
  CHECK(parse_size("24G", "--ram") == 24ull << 30);
  CHECK(parse_size("1.5g", "--ram") == 3ull << 29);
  CHECK(parse_size("800M", "--ram") == 800ull << 20);
  CHECK(parse_size("16KiB", "--ram") == 16384);
  CHECK(parse_size("2T", "--ram") == 2ull << 40);
  CHECK(parse_size("123", "--ram") == 123);
  CHECK(parse_size("0", "--ram") == 0);
  for (const char* bad : {"", "G", "-1", "-1G", "24X", "24GB", "24 G", " 24G", "1e3G", "inf", "nan", "0x10", "99999999T", "24G ", "24.5.1G"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(parse_size(bad, "--ram"), Error);
  }
  CHECK_THROWS_WITH(parse_size("24X", "--ram"), "--ram: expected a size such as 24G (GiB), 800M or bytes, got \"24X\"");
}

TEST_CASE("term: parse_count and parse_choice") {
  CHECK(parse_count("1", "-n", 1, 9) == 1);
  CHECK(parse_count("9", "-n", 1, 9) == 9);
  for (const char* bad : {"", "0", "10", "-1", "+1", "1 ", " 1", "1.0", "x", "99999999999999999999"}) {
    CAPTURE(bad);
    CHECK_THROWS_AS(parse_count(bad, "-n", 1, 9), Error);
  }
  CHECK_THROWS_WITH(parse_count("x", "-n", 1, 9), "-n: expected a whole number from 1 to 9, got \"x\"");
  CHECK(parse_choice("b", "-o", {"a", "b"}) == "b");
  CHECK_THROWS_WITH(parse_choice("c", "-o", {"a", "b"}), "-o: expected one of a, b, got \"c\"");
}

TEST_CASE("term: numbers for people") {
  CHECK(human_bytes(0) == "0 B");
  CHECK(human_bytes(17) == "17 B");
  CHECK(human_bytes(999) == "999 B");
  CHECK(human_bytes(1000) == "1.0 kB");
  CHECK(human_bytes(812345) == "812 kB");
  CHECK(human_bytes(999960) == "1.0 MB");
  CHECK(human_bytes(45500000000) == "45.5 GB");
  CHECK(human_bytes(159350000000) == "159 GB");
  CHECK(human_bytes(UINT64_MAX) == "18.4 EB");
  CHECK(human_gib(45500000000) == "42.4 GiB");
  CHECK(human_gib(812ull << 20) == "812 MiB");
  CHECK(human_gib(0) == "0 B");
  CHECK(human_seconds(0.84) == "0.8 s");
  CHECK(human_seconds(9.97) == "10 s");
  CHECK(human_seconds(59.7) == "1 min 0 s");
  CHECK(human_seconds(200) == "3 min 20 s");
  CHECK(human_seconds(7500) == "2 h 5 min");
  CHECK(human_seconds(-1) == "?");
}

TEST_CASE("term: columns") {
  CHECK(text_columns("") == 0);
  CHECK(text_columns("abc") == 3);
  CHECK(text_columns("\xc3\xa9") == 1);
  CHECK(text_columns("e\xcc\x81") == 1);              // e, combining acute
  CHECK(text_columns("\xe4\xbd\xa0\xe5\xa5\xbd") == 4);  // two ideographs
  CHECK(text_columns("\xf0\x9f\x98\x80") == 2);        // an emoji
  CHECK(text_columns("\xff\xe4") == 2);                // each invalid byte is one sign
}

namespace {

// Runs a LineEditor in a child on a pseudo-terminal, types `keys`, returns what read_line gave: one line each,
// '\n' inside shown as '/'; "^C" for an interrupt, "EOF" for the end of input.
std::string typed(const std::string& keys) {
  int result[2], terminal = -1;
  REQUIRE(pipe(result) == 0);
  winsize size{.ws_row = 10, .ws_col = 20, .ws_xpixel = 0, .ws_ypixel = 0};
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  REQUIRE(child >= 0);
  if (child == 0) {
    LineEditor editor;
    std::string line, all;
    for (bool interrupted;;) {
      const bool more = editor.read_line("> ", line, interrupted);
      for (char& c : line)
        if (c == '\n') c = '/';
      all += !more ? "EOF" : interrupted ? "^C\n" : line + "\n";
      if (!more) break;
    }
    const ssize_t n = write(result[1], all.data(), all.size());
    _exit(n == static_cast<ssize_t>(all.size()) ? 0 : 1);
  }
  close(result[1]);
  // Wait for the first prompt: what is typed before raw mode would meet the terminal's own line discipline.
  char sink[4096];
  std::string screen;
  while (screen.find("> ") == screen.npos) {
    const ssize_t n = read(terminal, sink, sizeof sink);
    if (n <= 0) break;
    screen.append(sink, n);
  }
  for (size_t at = 0; at < keys.size();) {  // in pieces, draining the echo: neither side's buffer may fill up
    const ssize_t n = write(terminal, keys.data() + at, std::min<size_t>(64, keys.size() - at));
    REQUIRE(n > 0);
    at += n;
    pollfd p{terminal, POLLIN, 0};
    while (poll(&p, 1, 5) > 0 && read(terminal, sink, sizeof sink) > 0) {}
  }
  std::string got;
  pollfd both[2] = {{terminal, POLLIN, 0}, {result[0], POLLIN, 0}};
  while (poll(both, 2, 5000) > 0) {
    if (both[0].revents && read(terminal, sink, sizeof sink) <= 0) both[0].fd = -1;
    if (!both[1].revents) continue;
    const ssize_t n = read(result[0], sink, sizeof sink);
    if (n <= 0) break;
    got.append(sink, n);
  }
  close(terminal), close(result[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  return got;
}

}  // namespace

TEST_CASE("term: line editor") {
  if (const int terminal = posix_openpt(O_RDWR | O_NOCTTY); terminal < 0 || ptsname(terminal) == nullptr) {
    MESSAGE("SKIPPED: no pseudo-terminals here");
    return;
  } else {
    close(terminal);
  }
  const std::string up = "\033[A", down = "\033[B", right = "\033[C", left = "\033[D", home = "\033[H", end = "\033OF", del = "\033[3~";
  const std::string eof = "\x04";
  CHECK(typed("hello\r" + eof) == "hello\nEOF");
  CHECK(typed("helo" + left + "l\r" + eof) == "hello\nEOF");
  CHECK(typed("bc" + home + "a" + end + "d\r" + eof) == "abcd\nEOF");
  CHECK(typed("abcd" + home + right + del + "\r" + eof) == "acd\nEOF");
  CHECK(typed("one two" + std::string("\x17") + "three\r" + eof) == "one three\nEOF");       // ctrl-w
  CHECK(typed("one two\033[1;5D\x0b" "x\r" + eof) == "one x\nEOF");                             // ctrl-left, ctrl-k
  CHECK(typed("gone\x15kept\r" + eof) == "kept\nEOF");                                         // ctrl-u
  CHECK(typed("\xc3\xa4\xe4\xbd\xa0\x7f\xf0\x9f\x98\x80" + left + "x\r" + eof) == "\xc3\xa4x\xf0\x9f\x98\x80\nEOF");
  CHECK(typed("e\xcc\x81q" + left + left + "a\r" + eof) == "ae\xcc\x81q\nEOF");              // a mark goes with its letter
  CHECK(typed("first\rsecond\r" + up + up + "!\r" + up + up + down + "?\r" + eof) == "first\nsecond\nfirst!\nfirst!?\nEOF");
  CHECK(typed("draft" + up + down + "!\r" + eof) == "draft!\nEOF");
  CHECK(typed("a\\\rb\r" + eof) == "a/b\nEOF");                                              // goes on after a backslash
  CHECK(typed("a\033\rb\r" + eof) == "a/b\nEOF");                                            // alt-enter
  CHECK(typed("\033[200~one\r\ntwo\rthree\nfour\033[201~!\r" + eof) == "one/two/three/four!\nEOF");
  CHECK(typed("ab\033\rcd" + up + "x" + down + "y\r" + eof) == "abx/cdy\nEOF");              // up and down inside the text
  CHECK(typed("lost\x03kept\r\x03" + eof) == "kept\n^C\nEOF");                                // ctrl-c empties, then interrupts
  CHECK(typed("ab" + left + eof + "\r" + eof) == "a\nEOF");                                  // ctrl-d deletes, then ends
  const std::string lines(700, 'w');                                                          // far more than the screen holds
  CHECK(typed(lines + home + "x" + end + "y\r" + eof) == "x" + lines + "y\nEOF");
}

TEST_CASE("term: plain lines without a terminal") {
  int in[2], out[2];
  REQUIRE(pipe(in) == 0);
  REQUIRE(pipe(out) == 0);
  const std::string text = "one\r\ntwo \\\nthree\n\nlast";
  REQUIRE(write(in[1], text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  close(in[1]);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(in[0], 0);
    LineEditor editor;
    std::string line, all;
    for (bool interrupted; editor.read_line("> ", line, interrupted);) all += "[" + line + "]";
    const ssize_t n = write(out[1], all.data(), all.size());
    _exit(n == static_cast<ssize_t>(all.size()) ? 0 : 1);
  }
  close(out[1]), close(in[0]);
  char buffer[256];
  const ssize_t n = read(out[0], buffer, sizeof buffer);
  close(out[0]);
  waitpid(child, nullptr, 0);
  CHECK(std::string(buffer, std::max<ssize_t>(0, n)) == "[one][two \nthree][][last]");
}
