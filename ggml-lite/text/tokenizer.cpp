// The packed table, little-endian, without gaps; its size is exactly 24 + 4 T + 8 M + 12 A + B:
//
//    0  u32 magic "QTK1"    4  u32 flags (bit 0: NFC)
//    8  u32 T tokens       12  u32 M merges    16  u32 A added tokens    20  u32 B bytes
//   24  u32 end [T]                  token i is bytes[end[i-1] .. end[i]) (0 before the first); empty: the id has no token
//       u32 {left, right} [M]        ids, by rank
//       u32 {id, special, end} [A]   texts of added tokens follow those of the tokens: `end` goes on from end[T-1]
//       u8  bytes [B]
#include "ggml-lite/text/tokenizer.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>

#include "ggml-lite/base/check.h"
#include "ggml-lite/text/unicode.h"

namespace qn {

static constexpr uint32_t kMagic = 0x314b5451;
static constexpr size_t kHeader = 24;
// Limits of what is believed; the largest tables known have a quarter of it. They bound what a hostile one can cost.
static constexpr uint32_t kMaxTokens = 1 << 20, kMaxMerges = 1 << 20, kMaxAdded = 1 << 12, kMaxTokenBytes = 4096, kMaxProbes = 1000;
static constexpr size_t kMaxText = size_t{1} << 30;  // positions are 32 bits wide

std::vector<uint8_t> pack(const TokenizerData& data) {
  std::vector<uint8_t> out;
  const auto put = [&](uint64_t v) {
    QN_CHECK(v <= UINT32_MAX, "tokenizer table: %llu does not fit 32 bits", static_cast<unsigned long long>(v));
    for (int i = 0; i < 32; i += 8) out.push_back(static_cast<uint8_t>(v >> i));
  };
  uint64_t bytes = 0;
  for (const auto& t : data.tokens) bytes += t.size();
  for (const auto& a : data.added) bytes += a.text.size();
  out.reserve(kHeader + 4 * data.tokens.size() + 8 * data.merges.size() + 12 * data.added.size() + bytes);
  for (const uint64_t v : {uint64_t{kMagic}, uint64_t{data.nfc}, data.tokens.size(), data.merges.size(), data.added.size(), bytes}) put(v);
  uint64_t end = 0;
  for (const auto& t : data.tokens) put(end += t.size());
  for (const auto& [left, right] : data.merges) put(static_cast<uint32_t>(left)), put(static_cast<uint32_t>(right));
  for (const auto& a : data.added) put(static_cast<uint32_t>(a.id)), put(a.special), put(end += a.text.size());
  for (const auto& t : data.tokens) out.insert(out.end(), t.begin(), t.end());
  for (const auto& a : data.added) out.insert(out.end(), a.text.begin(), a.text.end());
  return out;
}

// ---- pre-tokeniser: the seven rules of the model's regular expression, without an engine for them ----

enum Kind : uint8_t { Other, Letter, Number, Space, Newline };  // as CharClass, but CR and LF apart from other spaces

static constexpr std::array<Kind, 128> kAscii = [] {
  std::array<Kind, 128> k{};
  for (int c = 0; c < 26; c++) k['a' + c] = k['A' + c] = Letter;
  for (int c = '0'; c <= '9'; c++) k[c] = Number;
  for (int c : {'\t', '\v', '\f', ' '}) k[c] = Space;
  k['\r'] = k['\n'] = Newline;
  return k;
}();

static Kind kind(std::string_view text, size_t at, int& len) {
  const auto b = static_cast<unsigned char>(text[at]);
  if (b < 0x80) {
    len = 1;
    return kAscii[b];
  }
  return static_cast<Kind>(char_class(utf8_decode(text, at, len)));
}

static size_t run_of(Kind wanted, std::string_view text, size_t at) {
  for (int len; at < text.size() && kind(text, at, len) == wanted;) at += len;
  return at;
}

// Length of s, t, re, ve, m, ll or d at text[at], any case; 0 for none of them. U+017F (C5 BF) is a small s under case folding.
static int contraction(std::string_view text, size_t at) {
  const auto lower = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) | 0x20 : 0; };
  const int a = lower(at), b = lower(at + 1);
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 1;
  if (((a == 'r' || a == 'v') && b == 'e') || (a == 'l' && b == 'l')) return 2;
  return text.substr(at, 2) == "\u017f" ? 2 : 0;
}

// End of the piece that begins at text[p].
static size_t piece_end(std::string_view text, size_t p) {
  int len, next_len = 0;
  const Kind k = kind(text, p, len);
  const size_t q = p + len;
  if (k == Letter) return run_of(Letter, text, q);
  if (k == Number) return q;
  if (text[p] == '\'') {
    if (const int n = contraction(text, q)) return q + n;
  }
  const Kind next = q < text.size() ? kind(text, q, next_len) : Space;
  if (next == Letter && k != Newline) return run_of(Letter, text, q + next_len);
  if (k == Other || (text[p] == ' ' && next == Other)) return run_of(Newline, text, run_of(Other, text, q));
  size_t e = p, last = p, line_end = 0;  // white space: [p, e) is the run, `last` its last character
  for (Kind s; e < text.size() && ((s = kind(text, e, len)) == Space || s == Newline); e += len) {
    last = e;
    if (s == Newline) line_end = e + 1;
  }
  if (line_end) return line_end;
  return e == text.size() || last == p ? e : last;  // the last space belongs to the word after it
}

// ---- tables ----

// Quality matters little here (tables are at most half full), speed does: most words are 3 to 8 bytes.
static uint64_t hash_bytes(std::string_view s) {
  constexpr uint64_t m = 0x9e3779b97f4a7c15ull;
  const char* p = s.data();
  size_t n = s.size();
  uint64_t h = n * m, w;
  for (; n > 8; p += 8, n -= 8) {
    std::memcpy(&w, p, 8);
    h = (h ^ w) * m;
    h ^= h >> 29;
  }
  if (n >= 4) {
    uint32_t a, b;
    std::memcpy(&a, p, 4);
    std::memcpy(&b, p + n - 4, 4);
    w = a | static_cast<uint64_t>(b) << 32;
  } else {
    w = n ? static_cast<unsigned char>(p[0]) | static_cast<unsigned char>(p[n / 2]) << 8 | static_cast<unsigned char>(p[n - 1]) << 16 : 0;
  }
  h = (h ^ w) * m;
  return h ^ h >> 32;
}

struct Token {
  uint32_t begin = 0, size = 0;
};
struct Word {  // slot of an open-addressing table: bytes -> id
  uint32_t tag = 0;
  int32_t id = -1;
};
struct Merge {  // the same for (left, right) -> (rank, id)
  int32_t left = -1, right = -1;
  uint32_t rank = UINT32_MAX;
  int32_t id = -1;
};
struct Node {  // of the list of symbols of a long piece
  int32_t id;  // -1: swallowed by its left neighbour
  uint32_t prev, next;
  uint32_t rank;  // of the merge with the next symbol; UINT32_MAX: there is none
  int32_t merged;
};
struct Scratch {
  std::vector<Node> nodes;
  std::vector<uint64_t> heap;  // rank << 32 | node
};
struct Stretch {
  size_t begin, end;
};

struct Tokenizer::Impl {
  bool nfc = true;
  std::string blob;
  std::vector<Token> tokens;  // by id, added ones included
  std::vector<uint8_t> role;  // by id: 0 of the vocabulary, 1 added, 2 added and special
  std::array<int32_t, 256> start{};
  std::vector<Word> words;
  std::vector<Merge> merges;
  struct Added {
    std::string_view text;
    int32_t id;
  };
  std::vector<Added> added;  // ordered by text
  std::array<bool, 256> begins_added{};
  // Whether merging the bytes of token i gives back token i: 0 not known yet, 1 yes, 2 no. A memo, hence the same from any thread.
  mutable std::vector<std::atomic<uint8_t>> whole;

  std::string_view bytes(size_t id) const { return {blob.data() + tokens[id].begin, tokens[id].size}; }

  void read(std::span<const uint8_t> packed);
  void index_words(uint32_t count);
  void index_merges(const std::function<uint32_t(size_t)>& u32, size_t at, uint32_t count);
  void index_added(const std::function<uint32_t(size_t)>& u32, size_t at, uint32_t count, uint32_t end);

  size_t find_word(std::string_view text) const {  // slot that holds it, or the free one where it belongs
    const uint64_t h = hash_bytes(text);
    const uint32_t tag = static_cast<uint32_t>(h >> 32);
    size_t slot = h & (words.size() - 1);
    for (uint32_t probes = 0; words[slot].id >= 0; slot = (slot + 1) & (words.size() - 1)) {
      if (words[slot].tag == tag && bytes(words[slot].id) == text) break;
      if (++probes > kMaxProbes) fail("tokenizer table: too many tokens collide");
    }
    return slot;
  }
  size_t find_merge(int32_t left, int32_t right) const {
    const uint64_t h = (static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right)) * 0x9e3779b97f4a7c15ull;
    size_t slot = (h ^ h >> 32) & (merges.size() - 1);
    for (uint32_t probes = 0; merges[slot].left >= 0; slot = (slot + 1) & (merges.size() - 1)) {
      if (merges[slot].left == left && merges[slot].right == right) break;
      if (++probes > kMaxProbes) fail("tokenizer table: too many merges collide");
    }
    return slot;
  }

  void encode_text(std::string_view text, std::span<const Stretch> control, std::vector<int32_t>& out) const;
  void encode_segment(std::string_view text, std::vector<int32_t>& out, Scratch& scratch) const;
  void merge_short(std::string_view piece, std::vector<int32_t>& out) const;
  void merge_long(std::string_view piece, std::vector<int32_t>& out, Scratch& scratch) const;
  const Added* match_added(std::string_view text) const;
};

void Tokenizer::Impl::read(std::span<const uint8_t> packed) {
  const std::function<uint32_t(size_t)> u32 = [&](size_t at) {
    return packed[at] | packed[at + 1] << 8 | packed[at + 2] << 16 | static_cast<uint32_t>(packed[at + 3]) << 24;
  };
  if (packed.size() < kHeader || u32(0) != kMagic) fail("tokenizer table: no table of this version (%zu bytes)", packed.size());
  const uint32_t flags = u32(4), n_tokens = u32(8), n_merges = u32(12), n_added = u32(16), n_bytes = u32(20);
  if (flags > 1) fail("tokenizer table: unknown flags %u", flags);
  if (n_tokens > kMaxTokens || n_merges > kMaxMerges || n_added > kMaxAdded)
    fail("tokenizer table: %u tokens, %u merges, %u added tokens; at most %u, %u, %u", n_tokens, n_merges, n_added, kMaxTokens, kMaxMerges,
         kMaxAdded);
  const uint64_t size = kHeader + 4ull * n_tokens + 8ull * n_merges + 12ull * n_added + n_bytes;
  if (size != packed.size())
    fail("tokenizer table: its counts make %llu bytes, there are %zu", static_cast<unsigned long long>(size), packed.size());
  nfc = flags & 1;
  blob.assign(reinterpret_cast<const char*>(packed.data() + packed.size() - n_bytes), n_bytes);
  tokens.resize(n_tokens);
  uint32_t end = 0;
  for (uint32_t i = 0; i < n_tokens; i++) {
    const uint32_t begin = end;
    end = u32(kHeader + 4 * size_t{i});
    if (end < begin || end > n_bytes || end - begin > kMaxTokenBytes)
      fail("tokenizer table: token %u lies at bytes %u to %u of %u", i, begin, end, n_bytes);
    tokens[i] = {begin, end - begin};
  }
  index_words(n_tokens);
  const size_t merges_at = kHeader + 4 * size_t{n_tokens}, added_at = merges_at + 8 * size_t{n_merges};
  index_added(u32, added_at, n_added, end);
  index_merges(u32, merges_at, n_merges);
}

static size_t table_size(uint32_t entries) {
  size_t n = 2;
  while (n < 2 * size_t{entries}) n *= 2;
  return n;
}

void Tokenizer::Impl::index_words(uint32_t count) {
  words.resize(table_size(count));
  for (uint32_t i = 0; i < count; i++) {
    if (tokens[i].size == 0) continue;
    Word& w = words[find_word(bytes(i))];
    if (w.id >= 0) fail("tokenizer table: tokens %d and %u are the same bytes", w.id, i);
    w = {static_cast<uint32_t>(hash_bytes(bytes(i)) >> 32), static_cast<int32_t>(i)};
  }
  for (int b = 0; b < 256; b++) {
    const char c = static_cast<char>(b);
    start[b] = words[find_word({&c, 1})].id;
    if (start[b] < 0) fail("tokenizer table: byte 0x%02x has no token", b);
  }
  whole = std::vector<std::atomic<uint8_t>>(count);
}

void Tokenizer::Impl::index_added(const std::function<uint32_t(size_t)>& u32, size_t at, uint32_t count, uint32_t end) {
  role.resize(tokens.size());
  for (uint32_t i = 0; i < count; i++, at += 12) {
    const uint32_t id = u32(at), is_special = u32(at + 4), begin = end;
    end = u32(at + 8);
    if (id >= kMaxTokens || is_special > 1) fail("tokenizer table: added token %u has id %u, special %u", i, id, is_special);
    if (end <= begin || end > blob.size() || end - begin > kMaxTokenBytes)
      fail("tokenizer table: added token %u lies at bytes %u to %u of %zu", i, begin, end, blob.size());
    if (id >= tokens.size()) tokens.resize(id + 1), role.resize(id + 1);
    const std::string_view text(blob.data() + begin, end - begin);
    if (role[id] || (tokens[id].size && bytes(id) != text)) fail("tokenizer table: added token %u has the id %u of another token", i, id);
    tokens[id] = {begin, end - begin};
    role[id] = static_cast<uint8_t>(1 + is_special);
    added.push_back({text, static_cast<int32_t>(id)});
    begins_added[static_cast<unsigned char>(text[0])] = true;
  }
  if (end != blob.size()) fail("tokenizer table: %u of %zu bytes are used", end, blob.size());
  std::sort(added.begin(), added.end(), [](const Added& a, const Added& b) { return a.text < b.text; });
  for (size_t i = 1; i < added.size(); i++)
    if (added[i].text == added[i - 1].text) fail("tokenizer table: added tokens %d and %d are the same text", added[i - 1].id, added[i].id);
  while (!tokens.empty() && tokens.back().size == 0) tokens.pop_back();
}

void Tokenizer::Impl::index_merges(const std::function<uint32_t(size_t)>& u32, size_t at, uint32_t count) {
  merges.resize(table_size(count));
  const auto in_vocabulary = [&](uint32_t id) { return id < whole.size() && id < tokens.size() && tokens[id].size; };
  std::string joined;
  for (uint32_t rank = 0; rank < count; rank++, at += 8) {
    const uint32_t left = u32(at), right = u32(at + 4);
    if (!in_vocabulary(left) || !in_vocabulary(right)) fail("tokenizer table: merge %u joins ids %u and %u: not tokens", rank, left, right);
    joined.assign(bytes(left)).append(bytes(right));
    const int32_t id = joined.size() <= kMaxTokenBytes ? words[find_word(joined)].id : -1;
    if (id < 0) fail("tokenizer table: merge %u joins ids %u and %u to something that is no token", rank, left, right);
    if (role[id]) fail("tokenizer table: merge %u makes the added token %d: any text could", rank, id);
    const auto l = static_cast<int32_t>(left), r = static_cast<int32_t>(right);
    merges[find_merge(l, r)] = {l, r, rank, id};  // of equal pairs the last counts
  }
}

// ---- merging ----

// A piece of at most kShort bytes: look for the lowest rank again and again.
static constexpr size_t kShort = 32;
void Tokenizer::Impl::merge_short(std::string_view piece, std::vector<int32_t>& out) const {
  int32_t ids[kShort], merged[kShort];
  uint32_t rank[kShort];
  size_t n = piece.size();
  for (size_t i = 0; i < n; i++) ids[i] = start[static_cast<unsigned char>(piece[i])];
  const auto look = [&](size_t i) {
    const Merge& m = merges[find_merge(ids[i], ids[i + 1])];
    rank[i] = m.rank, merged[i] = m.id;
  };
  for (size_t i = 0; i + 1 < n; i++) look(i);
  while (n > 1) {
    const size_t i = std::min_element(rank, rank + n - 1) - rank;
    if (rank[i] == UINT32_MAX) break;
    ids[i] = merged[i];
    n--;
    for (size_t k = i + 1; k < n; k++) ids[k] = ids[k + 1], rank[k] = rank[k + 1], merged[k] = merged[k + 1];
    if (i) look(i - 1);
    if (i + 1 < n) look(i);
  }
  out.insert(out.end(), ids, ids + n);
}

// A longer one: a list of symbols and a heap of merges, so that a megabyte of one letter takes n log n steps.
void Tokenizer::Impl::merge_long(std::string_view piece, std::vector<int32_t>& out, Scratch& scratch) const {
  auto& nodes = scratch.nodes;
  auto& heap = scratch.heap;
  const auto n = static_cast<uint32_t>(piece.size());
  const auto look = [&](uint32_t i) {
    Node& a = nodes[i];
    a.rank = UINT32_MAX;
    if (a.next == n) return false;
    const Merge& m = merges[find_merge(a.id, nodes[a.next].id)];
    a.rank = m.rank, a.merged = m.id;
    return m.rank != UINT32_MAX;
  };
  nodes.resize(n);
  for (uint32_t i = 0; i < n; i++) nodes[i] = {start[static_cast<unsigned char>(piece[i])], i - 1, i + 1, UINT32_MAX, -1};
  heap.clear();
  for (uint32_t i = 0; i < n; i++)
    if (look(i)) heap.push_back(static_cast<uint64_t>(nodes[i].rank) << 32 | i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  const auto push = [&](uint32_t i) {
    if (!look(i)) return;
    heap.push_back(static_cast<uint64_t>(nodes[i].rank) << 32 | i);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const uint64_t top = heap.back();
    heap.pop_back();
    const auto i = static_cast<uint32_t>(top);
    Node& a = nodes[i];
    if (a.id < 0 || a.rank != top >> 32) continue;  // a neighbour was merged meanwhile
    Node& b = nodes[a.next];
    a.id = a.merged;
    a.next = b.next;
    b.id = -1;
    if (a.next < n) nodes[a.next].prev = i;
    push(i);
    if (i > 0) push(a.prev);
  }
  for (uint32_t i = 0; i < n; i = nodes[i].next) out.push_back(nodes[i].id);
}

void Tokenizer::Impl::encode_segment(std::string_view text, std::vector<int32_t>& out, Scratch& scratch) const {
  for (size_t p = 0, e; p < text.size(); p = e) {
    e = piece_end(text, p);
    const std::string_view piece = text.substr(p, e - p);
    if (piece.size() > kShort) {
      merge_long(piece, out, scratch);
      continue;
    }
    const int32_t id = words[find_word(piece)].id;
    const int known = id < 0 ? 2 : whole[id].load(std::memory_order_relaxed);
    if (known == 1) {
      out.push_back(id);
      continue;
    }
    const size_t before = out.size();
    merge_short(piece, out);
    if (known == 0) whole[id].store(out.size() == before + 1 && out.back() == id ? 1 : 2, std::memory_order_relaxed);
  }
}

// The longest added token at the beginning of the text.
const Tokenizer::Impl::Added* Tokenizer::Impl::match_added(std::string_view text) const {
  auto low = added.begin(), high = added.end();  // those that begin with text[0 .. depth)
  const Added* best = nullptr;
  for (size_t depth = 0; depth < text.size() && low < high; depth++) {
    const auto c = static_cast<unsigned char>(text[depth]);
    const auto at = [&](const Added& a) { return a.text.size() > depth ? static_cast<unsigned char>(a.text[depth]) : -1; };
    low = std::lower_bound(low, high, c, [&](const Added& a, int key) { return at(a) < key; });
    high = std::upper_bound(low, high, c, [&](int key, const Added& a) { return key < at(a); });
    if (low < high && low->text.size() == depth + 1) best = &*low;
  }
  return best;
}

void Tokenizer::Impl::encode_text(std::string_view text, std::span<const Stretch> control, std::vector<int32_t>& out) const {
  if (text.size() > kMaxText) fail("text to tokenise: %zu bytes, at most %zu", text.size(), kMaxText);
  Scratch scratch;
  const auto segment = [&](size_t begin, size_t end) {
    if (begin == end) return;
    const std::string_view s = text.substr(begin, end - begin);
    if (nfc)
      encode_segment(qn::nfc(s), out, scratch);
    else
      encode_segment(s, out, scratch);
  };
  size_t done = 0;
  for (const Stretch& c : control) {
    for (size_t p = c.begin; p < c.end;) {
      const Added* a = begins_added[static_cast<unsigned char>(text[p])] ? match_added(text.substr(p, c.end - p)) : nullptr;
      if (!a) {
        p++;
        continue;
      }
      segment(done, p);
      out.push_back(a->id);
      done = p += a->text.size();
    }
  }
  segment(done, text.size());
}

// ---- the class ----

Tokenizer::Tokenizer(std::span<const uint8_t> packed) : impl_(std::make_unique<Impl>()) { impl_->read(packed); }
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;

int32_t Tokenizer::size() const { return static_cast<int32_t>(impl_->tokens.size()); }
bool Tokenizer::has(int32_t id) const { return !bytes(id).empty(); }
std::vector<uint8_t> Tokenizer::ids(int32_t vocab) const {
  std::vector<uint8_t> known(static_cast<size_t>(vocab));
  for (int32_t id = 0; id < vocab; id++) known[static_cast<size_t>(id)] = has(id);
  return known;
}
bool Tokenizer::special(int32_t id) const { return has(id) && impl_->role[id] == 2; }
std::string_view Tokenizer::bytes(int32_t id) const { return id >= 0 && id < size() ? impl_->bytes(id) : std::string_view(); }

int32_t Tokenizer::find_added(std::string_view text) const {
  const Impl::Added* a = impl_->match_added(text);
  return a && a->text == text ? a->id : -1;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool control) const {
  std::vector<int32_t> out;
  out.reserve(text.size() / 4 + 1);
  const Stretch all{0, text.size()};
  impl_->encode_text(text, {&all, control ? size_t{1} : size_t{0}}, out);
  return out;
}

std::vector<int32_t> Tokenizer::encode(std::span<const TextPiece> pieces) const {
  std::vector<int32_t> out;
  std::string text;  // of the pieces since the last one with ids
  std::vector<Stretch> control;
  for (const TextPiece& piece : pieces) {
    if (!piece.ids.empty()) {
      impl_->encode_text(text, control, out);
      text.clear();
      control.clear();
      out.insert(out.end(), piece.ids.begin(), piece.ids.end());
      continue;
    }
    if (piece.control) {
      if (control.empty() || control.back().end != text.size()) control.push_back({text.size(), text.size()});
      control.back().end += piece.text.size();
    }
    text += piece.text;
  }
  impl_->encode_text(text, control, out);
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  for (const int32_t id : ids) out += bytes(id);
  return out;
}

}  // namespace qn
