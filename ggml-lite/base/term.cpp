#include "ggml-lite/base/term.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <iostream>

#include "ggml-lite/base/check.h"

namespace qn {

bool stdin_is_terminal() { return isatty(0); }
bool stdout_is_terminal() { return isatty(1); }
bool stderr_is_terminal() { return isatty(2); }

static bool colours_on = true;
void colours(bool on) { colours_on = on; }

std::string_view style_on(Style s, int fd) {
  static constexpr std::string_view codes[] = {"", "\033[2m", "\033[1m", "\033[31m", "\033[32m", "\033[36m"};
  return colours_on && isatty(fd) ? codes[static_cast<int>(s)] : "";
}

std::string_view style_off(int fd) { return colours_on && isatty(fd) ? "\033[0m" : ""; }

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static int screen_size(bool rows) {
  winsize w{};
  if (ioctl(2, TIOCGWINSZ, &w) != 0) w = {};
  if (rows) return w.ws_row ? w.ws_row : 24;
  return w.ws_col ? w.ws_col : 80;
}

static void put(std::string_view s) {
  while (!s.empty()) {
    const ssize_t n = write(2, s.data(), s.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // nowhere to tell it
    s.remove_prefix(n);
  }
}

// ---- numbers --------------------------------------------------------------------------------------------------------

static std::string scaled(double v, double base, const char* const* units, int n) {
  int u = 0;
  while (u + 1 < n && v >= base - (u ? 0.05 : 0.5)) v /= base, u++;  // 999.96 kB would print as 1000.0 kB
  return format(u == 0 || v >= 99.95 ? "%.0f %s" : "%.1f %s", v, units[u]);
}

std::string human_bytes(uint64_t bytes) {
  static const char* const units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  return scaled(static_cast<double>(bytes), 1000, units, 7);
}

std::string human_gib(uint64_t bytes) {
  static const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  return scaled(static_cast<double>(bytes), 1024, units, 7);
}

std::string human_seconds(double seconds) {
  if (!(seconds >= 0) || seconds > 1e9) return "?";
  if (seconds < 9.95) return format("%.1f s", seconds);
  const long s = std::lround(seconds);
  if (s < 60) return format("%ld s", s);
  if (s < 3600) return format("%ld min %ld s", s / 60, s % 60);
  return format("%ld h %ld min", s / 3600, s % 3600 / 60);
}

uint64_t parse_size(const std::string& text, const std::string& option) {
  double v = 0;
  const char* const end = text.data() + text.size();
  const auto [p, error] = std::from_chars(text.data(), end, v, std::chars_format::fixed);
  std::string_view unit(p, end - p);
  int shift = 0;
  if (!unit.empty()) {
    static constexpr std::string_view letters = "KMGT";
    const size_t i = letters.find(unit[0] & ~0x20);
    shift = i == letters.npos ? -1 : 10 * (static_cast<int>(i) + 1);
    if (unit.size() > 1 && unit.substr(1) != "iB") shift = -1;
  }
  const double bytes = shift < 0 ? -1 : std::ldexp(v, shift);
  if (error != std::errc() || !(bytes >= 0) || bytes >= 0x1p62)
    fail("%s: expected a size such as 24G (GiB), 800M or bytes, got \"%s\"", option.c_str(), text.c_str());
  return static_cast<uint64_t>(bytes);
}

int parse_count(const std::string& text, const char* option, int min, int max) {
  int v = 0;
  const char* const end = text.data() + text.size();
  const auto [p, error] = std::from_chars(text.data(), end, v);
  if (error != std::errc() || p != end || v < min || v > max) fail("%s: expected a whole number from %d to %d, got \"%s\"", option, min, max, text.c_str());
  return v;
}

std::vector<int> parse_counts(const std::string& text, const char* option, int min, int max) {
  std::vector<int> list;
  for (size_t at = 0, end = 0; at <= text.size(); at = end + 1) {
    end = std::min(text.find(',', at), text.size());
    list.push_back(parse_count(text.substr(at, end - at), option, min, max));
  }
  return list;
}

std::vector<uint64_t> parse_sizes(const std::string& text, const char* option) {
  std::vector<uint64_t> list;
  for (size_t at = 0, end = 0; at <= text.size(); at = end + 1) {
    end = std::min(text.find(',', at), text.size());
    list.push_back(parse_size(text.substr(at, end - at), option));
  }
  return list;
}

int exit_code(const char* program, int code) {
  std::cout.flush();
  if (std::cout && std::fflush(stdout) == 0 && !std::ferror(stdout)) return code;
  std::fprintf(stderr, "%s: standard output: what was printed could not be written\n", program);
  return 1;
}

double parse_number(const std::string& text, const char* option, double min, double max) {
  double v = 0;
  const char* const end = text.data() + text.size();
  const auto [p, error] = std::from_chars(text.data(), end, v);
  if (error != std::errc() || p != end || !(v >= min && v <= max)) fail("%s: expected a number from %g to %g, got \"%s\"", option, min, max, text.c_str());
  return v;
}

std::string parse_choice(const std::string& text, const char* option, std::initializer_list<const char*> choices) {
  std::string all;
  for (const char* c : choices) {
    if (text == c) return text;
    all += (all.empty() ? "" : ", ") + std::string(c);
  }
  fail("%s: expected one of %s, got \"%s\"", option, all.c_str(), text.c_str());
}

// ---- characters -----------------------------------------------------------------------------------------------------

// One character at s[at]; an invalid byte counts as a character of its own. (text/unicode has the strict reader; base may not
// include it, and for columns this is enough.)
static char32_t decode(std::string_view s, size_t at, int& len) {
  const unsigned char c = s[at];
  len = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 1;
  if (c < 0x80) return c;
  if (len == 1 || at + len > s.size()) return len = 1, 0xfffd;
  char32_t r = c & (0xff >> (len + 1));
  for (int i = 1; i < len; i++) {
    const unsigned char d = s[at + i];
    if ((d & 0xc0) != 0x80) return len = 1, 0xfffd;
    r = r << 6 | (d & 0x3f);
  }
  return r;
}

static int columns_of(char32_t c) {
  if (c < 0x20 || c == 0x7f) return 2;  // shown as ^X
  if ((c >= 0x300 && c < 0x370) || (c >= 0x483 && c < 0x48a) || (c >= 0x591 && c < 0x5be) || (c >= 0x610 && c < 0x61b) ||
      (c >= 0x64b && c < 0x660) || (c >= 0xe31 && c < 0xe3b && c != 0xe32 && c != 0xe33) || (c >= 0x1ab0 && c < 0x1b00) ||
      (c >= 0x1dc0 && c < 0x1e00) || (c >= 0x200b && c < 0x2010) || (c >= 0x20d0 && c < 0x2100) ||
      (c >= 0xfe00 && c < 0xfe10) || (c >= 0xfe20 && c < 0xfe30) || (c >= 0x1f3fb && c < 0x1f400) || c >= 0xe0000)
    return 0;
  if ((c >= 0x1100 && c < 0x1160) || (c >= 0x2e80 && c < 0x303f) || (c >= 0x3041 && c < 0xa4d0) || (c >= 0xa960 && c < 0xa980) ||
      (c >= 0xac00 && c < 0xd7a4) || (c >= 0xf900 && c < 0xfb00) || (c >= 0xfe30 && c < 0xfe70) || (c >= 0xff00 && c < 0xff61) ||
      (c >= 0xffe0 && c < 0xffe7) || (c >= 0x1f300 && c < 0x1f650) || (c >= 0x1f680 && c < 0x1f700) ||
      (c >= 0x1f900 && c < 0x1fb00) || (c >= 0x20000 && c < 0x40000))
    return 2;
  return 1;
}

int text_columns(std::string_view text) {
  int columns = 0, len;
  for (size_t i = 0; i < text.size(); i += len) columns += columns_of(decode(text, i, len));
  return columns;
}

// ---- progress -------------------------------------------------------------------------------------------------------

struct ProgressBar::State {
  std::string what, unit;
  double quiet, start = now(), shown = -1;  // shown: when something was last printed; < 0: nothing yet
  uint64_t done = 0, total = 0;
  bool terminal = stderr_is_terminal(), finished = false;

  std::string amount(uint64_t n) const {
    return unit == "B" ? human_bytes(n) : format("%llu", static_cast<unsigned long long>(n));
  }
  std::string line(double t, bool end) const {
    const double rate = t > start ? done / (t - start) : 0;
    std::string s = amount(done);
    if (total && !end) s += " of " + amount(total);
    if (unit != "B") s += " " + unit;
    if (unit == "B") s += ", " + human_bytes(static_cast<uint64_t>(rate)) + "/s";
    else s += format(rate < 10 ? ", %.1f/s" : ", %.0f/s", rate);
    if (end) s += ", " + human_seconds(t - start);
    else if (total > done && rate > 0 && done >= total / 100) s += ", " + human_seconds((total - done) / rate) + " left";
    return s;
  }
};

ProgressBar::ProgressBar(std::string what, std::string unit, double quiet_seconds) : s_(std::make_unique<State>()) {
  s_->what = std::move(what), s_->unit = std::move(unit), s_->quiet = quiet_seconds;
}

ProgressBar::~ProgressBar() { finish(); }

void ProgressBar::update(uint64_t done, uint64_t total) {
  State& s = *s_;
  if (s.finished) return;
  s.done = done, s.total = total;
  const double t = now();
  if (t - s.start < s.quiet || (s.shown >= 0 && t - s.shown < (s.terminal ? 0.1 : 5.0))) return;
  s.shown = t;
  if (!s.terminal) return put(s.what + ": " + s.line(t, false) + "\n");
  const std::string tail = s.line(t, false);
  const int room = std::min(40, screen_size(false) - text_columns(s.what) - text_columns(tail) - 6);
  std::string bar;
  if (room >= 8 && total) {
    const int full = static_cast<int>(room * std::min(1.0, static_cast<double>(done) / total));
    bar = "[" + std::string(full, '#') + std::string(room - full, '.') + "] ";
  }
  put("\r\033[K" + s.what + " " + bar + tail);
}

void ProgressBar::finish() {
  State& s = *s_;
  if (s.finished) return;
  s.finished = true;
  if (s.shown < 0) return;
  put(s.terminal ? "\r\033[K" : s.what + ": " + s.line(now(), true) + "\n");
}

Progress progress_bars(std::string unit, double quiet_seconds) {
  auto bar = std::make_shared<std::unique_ptr<ProgressBar>>();
  auto current = std::make_shared<std::string>();
  return [=](std::string_view what, uint64_t done, uint64_t total) {
    if (!*bar || *current != what) {
      *current = what;
      bar->reset();  // ends the last one before the next begins
      *bar = std::make_unique<ProgressBar>(*current, unit, quiet_seconds);
    }
    (*bar)->update(done, total);
    if (done >= total) (*bar)->finish();
  };
}

// ---- line editor ----------------------------------------------------------------------------------------------------

namespace {

// Reads standard input byte by byte; what a terminal or pipe sent too early stays for the next line.
struct Input {
  unsigned char buffer[4096];
  ssize_t at = 0, size = 0;
  enum { End = -1, Interrupted = -2 };

  int get() {
    if (at == size) {
      at = 0, size = read(0, buffer, sizeof buffer);
      if (size < 0) return size = 0, errno == EINTR ? Interrupted : End;
      if (size == 0) return End;
    }
    return buffer[at++];
  }
  bool ready(int milliseconds) const {
    pollfd p{0, POLLIN, 0};
    return at < size || poll(&p, 1, milliseconds) > 0;
  }
} input;

class RawMode {
 public:
  RawMode() {
    ok_ = tcgetattr(0, &old_) == 0;
    termios raw = old_;
    raw.c_iflag &= ~(BRKINT | ICRNL | INLCR | INPCK | ISTRIP | IXON);
    raw.c_lflag &= ~(ECHO | ICANON | IEXTEN | ISIG);
    raw.c_cflag |= CS8;
    raw.c_cc[VMIN] = 1, raw.c_cc[VTIME] = 0;
    ok_ = ok_ && tcsetattr(0, TCSADRAIN, &raw) == 0;
    if (ok_) put("\033[?2004h");  // bracketed paste
  }
  ~RawMode() {
    if (!ok_) return;
    put("\033[?2004l");
    tcsetattr(0, TCSADRAIN, &old_);
  }
  bool ok() const { return ok_; }

 private:
  termios old_{};
  bool ok_;
};

// The text under edit and its picture on the screen.
class Editor {
 public:
  Editor(const std::string& prompt, std::vector<std::string>& history) : prompt_(prompt), history_(history), at_history_(history.size()) {}

  enum class Result { Line, End, Interrupted };
  Result run();
  std::string text;

 private:
  size_t left(size_t p) const {
    int len;
    while (p > 0) {
      do p--;
      while (p > 0 && (text[p] & 0xc0) == 0x80);
      if (columns_of(decode(text, p, len)) > 0) break;  // combining marks go with their letter
    }
    return p;
  }
  size_t right(size_t p) const {
    int len;
    if (p < text.size()) decode(text, p, len), p += len;
    while (p < text.size() && columns_of(decode(text, p, len)) == 0) p += len;
    return p;
  }
  size_t word_left(size_t p) const {
    while (p > 0 && is_space(p - 1)) p--;
    while (p > 0 && !is_space(p - 1)) p--;
    return p;
  }
  size_t word_right(size_t p) const {
    while (p < text.size() && is_space(p)) p++;
    while (p < text.size() && !is_space(p)) p++;
    return p;
  }
  bool is_space(size_t p) const { return text[p] == ' ' || text[p] == '\n' || text[p] == '\t'; }
  size_t line_begin() const { return cursor_ == 0 ? 0 : text.rfind('\n', cursor_ - 1) + 1; }  // npos + 1 == 0
  size_t line_end() const { return std::min(text.find('\n', cursor_), text.size()); }
  void erase(size_t begin, size_t end) { text.erase(begin, end - begin), cursor_ = begin; }
  void insert(std::string_view s) { text.insert(cursor_, s), cursor_ += s.size(); }
  void recall(size_t index) {
    if (at_history_ == history_.size()) draft_ = text;
    at_history_ = index;
    text = index == history_.size() ? draft_ : history_[index];
    cursor_ = text.size();
  }
  void vertical(bool up);
  void escape();
  void paste();
  void draw();
  void close_picture();

  const std::string& prompt_;
  std::vector<std::string>& history_;
  size_t at_history_, cursor_ = 0;
  std::string draft_;
  int drawn_row_ = 0, drawn_rows_ = 1;  // of the picture: where the cursor stands, and its height
};

// The text broken into screen rows; redrawn as a whole. A picture higher than the screen is cut to the part round the cursor.
void Editor::draw() {
  const int width = screen_size(false), height = screen_size(true);
  std::vector<std::string> rows(1);
  int column = text_columns(prompt_), row = 0, cursor_row = 0, cursor_column = 0, len;
  rows[0] = std::string(style_on(Style::Bold)) + prompt_ + std::string(style_off());
  auto new_row = [&] { rows.emplace_back(), row++, column = 0; };
  for (size_t i = 0;; i += len) {
    const bool end = i >= text.size();
    const char32_t c = end ? ' ' : decode(text, i, len);
    const int w = c == '\t' ? 4 : c == '\n' ? 1 : columns_of(c);
    if (column + w > width && w <= width) new_row();
    if (i == cursor_) cursor_row = row, cursor_column = column;
    if (end) break;
    column += w;
    if (c == '\n') new_row();
    else if (c == '\t') rows[row] += "    ";
    else if (c < 0x20 || c == 0x7f) rows[row] += {'^', static_cast<char>(c ^ 0x40)};
    else if (c == 0xfffd || (c >= 0x80 && c < 0xa0)) rows[row] += "\xef\xbf\xbd";
    else rows[row] += text.substr(i, len);
  }
  const int first = std::clamp(cursor_row - height + 1, 0, std::max(0, static_cast<int>(rows.size()) - height));
  const int last = std::min(static_cast<int>(rows.size()), first + height);
  std::string out = "\r";
  if (drawn_row_ > 0) out += "\033[" + std::to_string(drawn_row_) + "A";
  out += "\033[J";
  for (int i = first; i < last; i++) out += (i > first ? "\r\n" : "") + rows[i];
  out += '\r';
  if (last - 1 > cursor_row) out += "\033[" + std::to_string(last - 1 - cursor_row) + "A";
  if (cursor_column > 0) out += "\033[" + std::to_string(cursor_column) + "C";
  put(out);
  drawn_row_ = cursor_row - first, drawn_rows_ = last - first;
}

void Editor::close_picture() {
  draw();
  std::string out;
  if (drawn_rows_ - 1 > drawn_row_) out = "\033[" + std::to_string(drawn_rows_ - 1 - drawn_row_) + "B";
  put(out + "\r\n");
  drawn_row_ = 0, drawn_rows_ = 1;
}

void Editor::vertical(bool up) {
  const size_t begin = line_begin(), end = line_end();
  if (up ? begin == 0 : end == text.size()) {
    if (up ? at_history_ > 0 : at_history_ < history_.size()) recall(up ? at_history_ - 1 : at_history_ + 1);
    return;
  }
  const int column = text_columns(std::string_view(text).substr(begin, cursor_ - begin));
  cursor_ = up ? begin - 1 : end + 1;
  cursor_ = up ? line_begin() : cursor_;
  for (const size_t stop = line_end(), from = cursor_; cursor_ < stop; cursor_ = right(cursor_))
    if (text_columns(std::string_view(text).substr(from, cursor_ - from)) >= column) break;
}

void Editor::paste() {
  static constexpr std::string_view end = "\033[201~";
  std::string s;
  for (int c; s.size() < end.size() || s.compare(s.size() - end.size(), end.size(), end) != 0; s += static_cast<char>(c))
    if ((c = input.get()) < 0) return;
  s.resize(s.size() - end.size());
  std::string clean;
  for (size_t i = 0; i < s.size(); i++)
    if (s[i] != '\r') clean += s[i];
    else if (i + 1 == s.size() || s[i + 1] != '\n') clean += '\n';
  insert(clean);
}

// After ESC: "[" or "O", parameters, a final character; or alt with a key; or the key ESC alone.
void Editor::escape() {
  if (!input.ready(50)) return;
  int c = input.get();
  if (c == '\r' || c == '\n') return insert("\n");
  if (c == 'b') cursor_ = word_left(cursor_);
  if (c == 'f') cursor_ = word_right(cursor_);
  if (c == 'd') text.erase(cursor_, word_right(cursor_) - cursor_);
  if (c == 0x7f) erase(word_left(cursor_), cursor_);
  if (c != '[' && c != 'O') return;
  std::string parameters;
  for (c = input.get(); c >= 0x20 && c < 0x40 && parameters.size() < 16; c = input.get()) parameters += static_cast<char>(c);
  const bool word = parameters.ends_with(";5") || parameters.ends_with(";3");
  const int key = c == '~' ? std::atoi(parameters.c_str()) : 0;
  if (c == 'A' || c == 'B') vertical(c == 'A');
  if (c == 'C') cursor_ = word ? word_right(cursor_) : right(cursor_);
  if (c == 'D') cursor_ = word ? word_left(cursor_) : left(cursor_);
  if (c == 'H' || key == 1 || key == 7) cursor_ = line_begin();
  if (c == 'F' || key == 4 || key == 8) cursor_ = line_end();
  if (key == 3) text.erase(cursor_, right(cursor_) - cursor_);
  if (key == 200) paste();
}

Editor::Result Editor::run() {
  for (;;) {
    if (!input.ready(0)) draw();  // a burst of input is drawn once
    const int c = input.get();
    if (c == Input::Interrupted) continue;
    if (c == Input::End) return close_picture(), Result::End;
    switch (c) {
      case '\r': case '\n':
        if (!text.ends_with('\\')) {
          cursor_ = text.size();
          return close_picture(), Result::Line;
        }
        text.back() = '\n', cursor_ = text.size();
        break;
      case 1: cursor_ = line_begin(); break;
      case 2: cursor_ = left(cursor_); break;
      case 3:
        if (text.empty()) return close_picture(), Result::Interrupted;
        erase(0, text.size()), at_history_ = history_.size();
        break;
      case 4:
        if (text.empty()) return close_picture(), Result::End;
        text.erase(cursor_, right(cursor_) - cursor_);
        break;
      case 5: cursor_ = line_end(); break;
      case 6: cursor_ = right(cursor_); break;
      case 8: case 0x7f: erase(left(cursor_), cursor_); break;
      case 11: text.erase(cursor_, line_end() - cursor_); break;
      case 12: put("\033[H\033[2J"), drawn_row_ = 0; break;
      case 14: case 16: vertical(c == 16); break;
      case 21: erase(line_begin(), cursor_); break;
      case 23: erase(word_left(cursor_), cursor_); break;
      case 27: escape(); break;
      default:
        if (c >= 0x20 || c == '\t') {
          std::string s(1, static_cast<char>(c));
          for (int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0; more > 0 && input.ready(50); more--) {
            const int next = input.get();
            if (next < 0) break;
            s += static_cast<char>(next);
          }
          insert(s);
        }
    }
  }
}

}  // namespace

bool LineEditor::read_line(const std::string& prompt, std::string& line, bool& interrupted) {
  line.clear(), interrupted = false;
  if (stdin_is_terminal() && stderr_is_terminal()) {
    Editor editor(prompt, history);
    Editor::Result result = Editor::Result::End;
    {
      RawMode raw;
      if (!raw.ok()) return false;
      result = editor.run();
    }
    line = std::move(editor.text);
    interrupted = result == Editor::Result::Interrupted;
    if (!line.empty() && (history.empty() || history.back() != line)) history.push_back(line);
    return result != Editor::Result::End;
  }
  for (bool any = false;;) {
    const int c = input.get();
    if (c == Input::Interrupted) return line.clear(), interrupted = true;
    if (c == Input::End && !any) return false;
    if (c == Input::End) break;
    any = true;
    if (c != '\n') line += static_cast<char>(c);
    else if (line.ends_with('\\')) line.back() = '\n';
    else break;
  }
  if (line.ends_with('\r')) line.pop_back();
  return true;
}

}  // namespace qn
