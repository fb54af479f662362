#include "ggml-lite/text/unicode.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <vector>

namespace qn {

struct Decomposition {
  uint32_t composed, first, second;  // second is 0 when one code point replaces another
};
#include "ggml-lite/text/unicode_tables.inc"

// combining class << 3 | unstable << 2 | CharClass. Unstable: the code point may change, move or join its left neighbour in NFC.
static uint32_t properties(char32_t c) {
  if (c > 0x10ffff) return 0;
  const size_t blocks = std::size(kRunOfBlock), block = std::min<size_t>(c >> 8, blocks - 1);
  const uint32_t* low = kRuns + kRunOfBlock[block];
  const uint32_t* high = block + 1 < blocks ? kRuns + kRunOfBlock[block + 1] + 1 : std::end(kRuns);
  return std::upper_bound(low, high, static_cast<uint32_t>(c) << 11 | 0x7ff)[-1] & 0x7ff;
}
static bool unstable(char32_t c) { return c >= 0x300 ? (properties(c) & 4) != 0 : false; }  // the first one is U+0300
static uint32_t combining_class(char32_t c) { return properties(c) >> 3; }

CharClass char_class(char32_t c) { return static_cast<CharClass>(properties(c) & 3); }

struct Scan {
  char32_t c;  // U+FFFD when not valid
  int len;     // when not valid: of the longest beginning of a character (at least 1)
  bool valid;
  bool cut;  // not valid, but more bytes after the end of the text could make it so
};

static Scan scan(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(at);
  if (lead < 0x80) return {lead, 1, true, false};
  const int len = lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : lead >= 0xf0 && lead < 0xf5 ? 4 : 1;
  if (len == 1) return {0xfffd, 1, false, false};
  // The second byte excludes overlong forms (E0, F0), surrogates (ED) and what lies beyond U+10FFFF (F4).
  const unsigned low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80, high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  char32_t c = lead & (0x7f >> len);
  for (int i = 1; i < len; i++) {
    if (at + i >= text.size()) return {0xfffd, i, false, true};
    const unsigned b = byte(at + i);
    if (i == 1 ? b < low || b > high : (b & 0xc0) != 0x80) return {0xfffd, i, false, false};
    c = c << 6 | (b & 0x3f);
  }
  return {c, len, true, false};
}

char32_t utf8_decode(std::string_view text, size_t at, int& len) {
  const Scan s = scan(text, at);
  len = s.valid ? s.len : 1;
  return s.c;
}

void utf8_append(std::string& out, char32_t c) {
  const auto put = [&](char32_t b) { out += static_cast<char>(b); };
  if (c < 0x80) return put(c);
  if (c < 0x800)
    put(0xc0 | c >> 6);
  else {
    if (c < 0x10000)
      put(0xe0 | c >> 12);
    else
      put(0xf0 | c >> 18), put(0x80 | (c >> 12 & 0x3f));
    put(0x80 | (c >> 6 & 0x3f));
  }
  put(0x80 | (c & 0x3f));
}

// First byte from `at` on that is not ASCII.
static size_t skip_ascii(std::string_view text, size_t at) {
  for (uint64_t w; at + 8 <= text.size(); at += 8) {
    std::memcpy(&w, text.data() + at, 8);
    if (w & 0x8080808080808080ull) break;
  }
  while (at < text.size() && !(text[at] & 0x80)) at++;
  return at;
}

bool utf8_valid(std::string_view text) {
  for (size_t p = 0; (p = skip_ascii(text, p)) < text.size();) {
    const Scan s = scan(text, p);
    if (!s.valid) return false;
    p += s.len;
  }
  return true;
}

size_t utf8_complete(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); back++) {
    const size_t at = text.size() - back;
    if ((text[at] & 0xc0) == 0x80) continue;  // inside a character
    return scan(text, at).cut ? at : text.size();
  }
  return text.size();
}

std::string utf8_replace_invalid(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t p = 0; p < text.size();) {
    const size_t e = skip_ascii(text, p);
    out.append(text, p, e - p);
    if (e == text.size()) break;
    const Scan s = scan(text, e);
    utf8_append(out, s.c);
    p = e + s.len;
  }
  return out;
}

// Hangul: syllable = kS + (l * 21 + v) * 28 + t, with t = 0 for none.
static constexpr char32_t kS = 0xac00, kL = 0x1100, kV = 0x1161, kT = 0x11a7;

struct Marked {
  char32_t c;
  uint32_t ccc;
};

static void decompose(char32_t c, std::vector<Marked>& out) {
  if (c >= kS && c < kS + 11172) {
    const char32_t s = c - kS;
    out.push_back({kL + s / 588, 0});
    out.push_back({kV + s % 588 / 28, 0});
    if (s % 28) out.push_back({kT + s % 28, 0});
    return;
  }
  const auto less = [](const Decomposition& d, char32_t key) { return d.composed < key; };
  const auto d = std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), c, less);
  if (d == std::end(kDecompositions) || d->composed != c) {
    out.push_back({c, combining_class(c)});
    return;
  }
  decompose(d->first, out);
  if (d->second) decompose(d->second, out);
}

static char32_t compose(char32_t a, char32_t b) {  // 0: they do not
  if (a >= kL && a < kL + 19 && b >= kV && b < kV + 21) return kS + ((a - kL) * 21 + (b - kV)) * 28;
  if (a >= kS && a < kS + 11172 && (a - kS) % 28 == 0 && b > kT && b < kT + 28) return a + (b - kT);
  const auto less = [](uint16_t i, const std::pair<char32_t, char32_t>& key) {
    return std::pair<char32_t, char32_t>(kDecompositions[i].first, kDecompositions[i].second) < key;
  };
  const auto i = std::lower_bound(std::begin(kCompositions), std::end(kCompositions), std::pair(a, b), less);
  if (i == std::end(kCompositions) || kDecompositions[*i].first != a || kDecompositions[*i].second != b) return 0;
  return kDecompositions[*i].composed;
}

// The whole of canonical composition, for a stretch of valid UTF-8.
static void normalise(std::string_view text, std::string& out, std::vector<Marked>& chars) {
  chars.clear();
  for (size_t p = 0; p < text.size();) {
    int len;
    decompose(utf8_decode(text, p, len), chars);
    p += len;
  }
  for (auto i = chars.begin(); i != chars.end();) {  // marks between two starters are put in the order of their classes
    auto e = std::find_if(i, chars.end(), [](const Marked& m) { return m.ccc == 0; });
    std::stable_sort(i, e, [](const Marked& a, const Marked& b) { return a.ccc < b.ccc; });
    i = e == chars.end() ? e : e + 1;
  }
  size_t kept = 0, starter = SIZE_MAX;
  for (const Marked m : chars) {
    // A mark joins the starter unless something of its class, or a starter that did not join, stands between.
    const uint32_t between = kept ? chars[kept - 1].ccc : 0;
    if (starter != SIZE_MAX && (starter + 1 == kept || between < m.ccc)) {
      if (const char32_t joined = compose(chars[starter].c, m.c)) {
        chars[starter].c = joined;
        continue;
      }
    }
    if (m.ccc == 0) starter = kept;
    chars[kept++] = m;
  }
  for (size_t i = 0; i < kept; i++) utf8_append(out, chars[i].c);
}

std::string nfc(std::string_view text) {
  std::string out;
  std::vector<Marked> chars;
  size_t done = 0, last = 0;  // text before `done` is in `out`; `last` begins the last character, or follows an invalid byte
  for (size_t p = 0; p < text.size();) {
    const size_t e = skip_ascii(text, p);
    if (e > p) last = e - 1;
    if ((p = e) == text.size()) break;
    Scan s = scan(text, p);
    if (!s.valid || !unstable(s.c)) {
      last = s.valid ? p : p + 1;
      p += s.valid ? s.len : 1;
      continue;
    }
    // What an unstable character can touch begins at the stable one before it and ends before the next.
    for (; p < text.size(); p += s.len) {
      s = scan(text, p);
      if (!s.valid || !unstable(s.c)) break;
    }
    if (done == 0) out.reserve(text.size() + text.size() / 8);
    out.append(text, done, last - done);
    normalise(text.substr(last, p - last), out, chars);
    done = last = p;
  }
  out.append(text, done);
  return out;
}

}  // namespace qn
