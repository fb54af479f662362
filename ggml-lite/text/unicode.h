// The little of Unicode that a byte-level BPE tokenizer needs: UTF-8, categories L and N, White_Space, NFC. The tables are in
// unicode_tables.inc (made by tests/data/make_unicode_tables.py, which says which versions of Unicode and why).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace qn {

enum class CharClass : uint8_t { Other, Letter, Number, Space };  // L*, N*, White_Space
CharClass char_class(char32_t c);

// Decodes one code point at text[at]; sets `len` (1..4). An invalid byte gives U+FFFD with len 1.
char32_t utf8_decode(std::string_view text, size_t at, int& len);
void utf8_append(std::string& out, char32_t c);
bool utf8_valid(std::string_view text);
// Length of the longest prefix that ends at a character boundary (for streaming: the rest may still become a character;
// at most 3 bytes are held back, and only when they can begin a valid character).
size_t utf8_complete(std::string_view text);
// Every invalid byte sequence replaced by U+FFFD (one for the longest beginning of a character, as Python and browsers do).
std::string utf8_replace_invalid(std::string_view text);

// Canonical composition. Characters that cannot change (all below U+0300) are copied; so are invalid bytes.
std::string nfc(std::string_view text);

}  // namespace qn
