#include "ggml-lite/text/stream.h"

#include <algorithm>

#include "ggml-lite/text/unicode.h"

namespace qn {

TextStream::TextStream(std::vector<std::string> stop) : stop_(std::move(stop)) {
  std::erase(stop_, std::string());
}

std::string TextStream::add(std::string_view bytes) {
  if (stopped_) return {};
  held_ += bytes;
  taken_ += bytes.size();
  size_t end = utf8_complete(held_), cut = std::string::npos;
  for (const std::string& s : stop_) cut = std::min(cut, held_.find(s));
  if (cut != std::string::npos) {
    stopped_ = true;
    end = cut;
  } else {
    for (const std::string& s : stop_)  // the earliest place from which a stop string may still grow
      for (size_t n = std::min(s.size() - 1, held_.size()); n > 0; n--)
        if (held_.compare(held_.size() - n, n, s, 0, n) == 0) {
          end = std::min(end, held_.size() - n);
          break;
        }
    while (end > 0 && utf8_complete(std::string_view(held_).substr(0, end)) != end) end--;
  }
  std::string out = held_.substr(0, end);
  held_.erase(0, end);
  given_ += end;
  return utf8_replace_invalid(out);
}

std::string TextStream::finish() {
  if (stopped_) return {};
  std::string out = utf8_replace_invalid(held_);
  given_ += held_.size();
  held_.clear();
  return out;
}

std::string AnswerText::add(std::string_view bytes) {
  had_all_ = taken() == given();
  return TextStream::add(bytes);
}

size_t AnswerText::delivered() const {
  size_t keep = 0;
  while (keep < ends_.size() && ends_[keep] <= given()) keep++;
  return keep;
}

}  // namespace qn
