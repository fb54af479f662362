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

// The text of an answer while its tokens come, and which of them stay when a stop string ends it.
class AnswerText : public TextStream {
 public:
  explicit AnswerText(const std::vector<std::string>& stop) : TextStream(stop), stops_(!stop.empty()) {}
  std::string add(std::string_view bytes);  // of the next token
  // The token added last began what may become a stop string, and all before it had been shown: what comes may be taken back to before it.
  bool opened() const { return stops_ && had_all_ && taken() != given(); }
  void keep() { ends_.push_back(taken()); }  // the token added last is one of the answer
  // Of those kept, the tokens whose text was delivered whole; at a boundary also those without any text that follow
  size_t delivered() const;

 private:
  std::vector<size_t> ends_;  // bytes of text after each token
  bool stops_, had_all_ = false;
};

}  // namespace qn
