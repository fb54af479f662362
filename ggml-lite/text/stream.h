// Text on its way to a reader: bytes of tokens go in, whole characters come out, up to but not including a stop string.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace qn {

class TextStream {
 public:
  explicit TextStream(std::vector<std::string> stop);  // empty strings are ignored
  // Returns what can be shown now. Held back: an incomplete character, and the longest end that may begin a stop string.
  std::string add(std::string_view bytes);
  bool stopped() const { return stopped_; }            // a stop string has come; what follows is dropped
  // Everything held back, at the end of the text (incomplete characters become U+FFFD); nothing when stopped.
  std::string finish();
  // Bytes that went in, and how many of them have come out (or were the end of what may come out when stopped).
  size_t taken() const { return taken_; }
  size_t given() const { return given_; }

 private:
  std::vector<std::string> stop_;
  std::string held_;
  size_t taken_ = 0, given_ = 0;
  bool stopped_ = false;
};

}  // namespace qn
