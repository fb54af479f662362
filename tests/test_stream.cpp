// Text on its way out: no half characters, nothing of a stop string, nothing lost.
#include <doctest/doctest.h>

#include "ggml-lite/text/stream.h"

using qn::TextStream;

TEST_CASE("characters come out whole") {
  TextStream s({});
  CHECK(s.add("a\xe2\x82") == "a");
  CHECK(s.add("\xac!") == "\xe2\x82\xac!");
  CHECK(s.add("\xf0\x9f") == "");
  CHECK(s.finish() == "\xef\xbf\xbd");
  CHECK(s.taken() == s.given());
}

TEST_CASE("stop strings are held back, cut, or let go") {
  TextStream s({"STOP", "<|end|>", ""});
  CHECK(s.add("go ST") == "go ");
  CHECK(s.add("A") == "STA");
  CHECK(s.add("x<|en") == "x");
  CHECK(s.add("<|end") == "<|en");
  CHECK(s.given() == 11);
  CHECK(s.add("|> more") == "");
  CHECK(s.stopped());
  CHECK(s.add("more") == "");
  CHECK(s.finish() == "");
  CHECK(s.given() == 11);
}

TEST_CASE("the earliest stop string wins, byte by byte as at once") {
  const std::string text = "abcabdabcabcx\xc3\xa9 end";
  for (const std::string& stop : {std::string("abcabcx"), std::string("bd"), std::string("\xc3\xa9"), std::string("zz")}) {
    TextStream slow({stop});
    std::string out;
    for (char c : text) out += slow.add(std::string(1, c));
    out += slow.finish();
    CHECK(out == text.substr(0, text.find(stop)));
    CHECK(slow.stopped() == (text.find(stop) != std::string::npos));
  }
}
