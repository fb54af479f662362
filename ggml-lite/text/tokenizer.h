// Byte-level BPE: added tokens, NFC, the pre-tokeniser of model-spec 7.1 (digits split singly), merges by rank.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qn {

// What a model file stores; pack() and Tokenizer(packed) are the only two that know the byte layout (drawn in tokenizer.cpp).
struct TokenizerData {
  struct Added {
    int32_t id;
    std::string text;
    bool special;  // special tokens are not shown as text; the others (<think>, <tool_call>) are
  };
  std::vector<std::string> tokens;                 // id -> its bytes (real bytes, not the printable alphabet); "" = no token
  std::vector<std::pair<int32_t, int32_t>> merges; // by rank: left id, right id; their joined bytes are a token
  std::vector<Added> added;
  bool nfc = true;
};
std::vector<uint8_t> pack(const TokenizerData& data);

// A stretch of a prompt. Added tokens ("<|im_start|>") are recognised only where `control` is set: text of a user never becomes
// a control token. Neighbouring pieces are tokenised as one text, so boundaries do not change merges. Pieces with `ids` are
// inserted as they are (an answer as the model generated it); their text is ignored.
struct TextPiece {
  std::string text;
  bool control = false;
  std::vector<int32_t> ids;
};

class Tokenizer {
 public:
  // Believes nothing in `packed`: throws Error. Copies what it needs. Every one of the 256 bytes must have a token.
  explicit Tokenizer(std::span<const uint8_t> packed);
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;

  int32_t size() const;                                  // 1 + largest id that has a token
  // Bytes that are not UTF-8 are kept, as tokens of single bytes if need be. Safe to call from several threads at once.
  std::vector<int32_t> encode(std::string_view text, bool control) const;
  std::vector<int32_t> encode(std::span<const TextPiece> pieces) const;
  std::string_view bytes(int32_t id) const;              // of any token, added ones included; "" for ids without one
  bool has(int32_t id) const;
  std::vector<uint8_t> ids(int32_t vocab) const;         // (vocab): whether each has a token
  bool special(int32_t id) const;                        // an added token with special = true
  int32_t find_added(std::string_view text) const;       // id or -1
  std::string decode(std::span<const int32_t> ids) const;  // joined bytes (may be invalid UTF-8), special tokens included

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qn
