// The tokenizer against Hugging Face tokenizers 0.23 (cases.jsonl and the ids and fingerprints below were made with it), against a
// merge loop that anybody can check, and against tables that lie.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <random>
#include <set>

#include "convert/tokenizer_json.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/base/json.h"
#include "ggml-lite/text/tokenizer.h"
#include "ggml-lite/text/unicode.h"
#include "tests/temp_dir.h"

using namespace qn;
using Ids = std::vector<int32_t>;

// Times mean nothing in a build for debugging or with a sanitizer.
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
static constexpr bool kTimed = true;
#else
static constexpr bool kTimed = false;
#endif

static const Tokenizer& real() {
  static const Tokenizer t(pack(read_tokenizer(QN_TOKENIZER)));
  return t;
}

static double seconds(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

static std::string repeated(std::string_view s, size_t bytes) {
  std::string out;
  while (out.size() < bytes) out += s;
  return out;
}

// 256 tokens of one byte, id = byte; then what `merges` make.
static TokenizerData small(const std::vector<std::pair<std::string, std::string>>& merges) {
  TokenizerData d;
  for (int b = 0; b < 256; b++) d.tokens.emplace_back(1, static_cast<char>(b));
  const auto find = [&](const std::string& s) {
    const auto at = std::find(d.tokens.begin(), d.tokens.end(), s);
    if (at == d.tokens.end()) return d.tokens.push_back(s), static_cast<int32_t>(d.tokens.size() - 1);
    return static_cast<int32_t>(at - d.tokens.begin());
  };
  for (const auto& [a, b] : merges) {
    const int32_t left = find(a), right = find(b);
    find(a + b);
    d.merges.emplace_back(left, right);
  }
  return d;
}

TEST_CASE("tokenizer: every case of Hugging Face tokenizers") {
  const std::string cases = read_text(QN_TEST_DATA "/cases.jsonl", 16 << 20);
  int n = 0;
  for (size_t at = 0, end; at < cases.size(); at = end + 1, n++) {
    end = std::min(cases.find('\n', at), cases.size());
    const Json c = Json::parse(std::string_view(cases).substr(at, end - at), "cases.jsonl");
    const std::string& text = c.find("text")->as_string("text");
    Ids expected;
    for (const Json& id : c.find("ids")->items()) expected.push_back(static_cast<int32_t>(id.as_int("id")));
    const Ids got = real().encode(text, true);
    if (got != expected) FAIL_CHECK(text);
    if (real().decode(got) != nfc(text)) FAIL_CHECK("round trip: " << text);  // no added token of the real table changes under NFC
  }
  CHECK(n == 1546);
}

struct Case {
  std::string text;
  Ids ids;
};

TEST_CASE("tokenizer: examples of the specification") {
  const Case cases[] = {
      {"Hello world", {9707, 1879}},
      {" Hello world", {21927, 1879}},
      {"assistant", {77091}},
      {"user", {872}},
      {"system", {8948}},
      {"\n", {198}},
      {"\n\n", {271}},
      {"\n\n\n", {1406}},
      {" \n x", {715, 856}},
      {"The year 2025 costs $1,234.50!", {785, 1042, 220, 17, 15, 17, 20, 7049, 400, 16, 11, 17, 18, 19, 13, 20, 15, 0}},
      {"e\u0301t\u00e9", {38783}},
      {"  indented\n\n\tif (x) {\r\n", {220, 1257, 15864, 271, 743, 320, 87, 8, 972}},
      {"I'm HERE'LL don't", {40, 2776, 19249, 6, 4086, 1513, 944}},
      {"\u4f60\u597d\uff0c\u4e16\u754c\U0001f600", {108386, 3837, 99489, 141334}},
      {"", {}},
  };
  for (const Case& c : cases) CHECK_MESSAGE(real().encode(c.text, false) == c.ids, c.text);
}

TEST_CASE("tokenizer: corners of the seven rules and of NFC") {
  const Case cases[] = {
      // 1: contractions, any case
      {"don't", {15007, 944}},
      {"DON'T we'LL you'Re I'VE he'D I'M it'S", {84641, 17323, 582, 6, 4086, 498, 49427, 358, 6, 4491, 566, 27705, 358, 27603, 432, 13272}},
      {"'sword 'tis 're-do 'velvet", {594, 1158, 364, 83, 285, 364, 265, 29559, 364, 889, 17115}},
      {"'l 'r 'v 'lx", {63866, 364, 81, 364, 85, 364, 31447}},
      {"a'\u017ft", {64, 6, 144815, 83}},
      {"'", {6}},
      {"''s", {4605, 82}},
      {" 's", {364, 82}},
      {"'\u212a", {6, 42}},
      // 2: words and the one character before them
      {"abc  def", {13683, 220, 707}},
      {"abc   def", {13683, 256, 707}},
      {"abc \tdef", {13683, 220, 7452}},
      {"x\u00a0y", {87, 4102, 88}},
      {"x\u00a0\u00a0y", {87, 4102, 4102, 88}},
      {"\u3000\u3000z", {22441, 22441, 89}},
      {"\t\tif", {197, 743}},
      {"\x0bq", {199, 80}},
      {"a\u0085b", {64, 126, 227, 65}},
      {"x\u2028y", {87, 378, 101, 88}},
      {" (a)", {320, 64, 8}},
      {"(a", {2877}},
      {"\nabc", {198, 13683}},
      {"\rabc", {201, 13683}},
      {"#\u0301x", {2, 53839, 87}},
      {" \u0301a", {220, 53839, 64}},
      {"\u093f\u0915", {42311, 243}},
      {"\ufeffa", {3225, 64}},
      // 3: numbers one by one
      {"12 345", {16, 17, 220, 18, 19, 20}},
      {"1.5 2,000", {16, 13, 20, 220, 17, 11, 15, 15, 15}},
      {"\u00bd\u0663x", {26062, 149, 96, 87}},
      {"\u2460\u2461", {48312, 254, 48312, 94}},
      {"x2y", {87, 17, 88}},
      {"\u00b2", {29456}},
      {" 1", {220, 16}},
      {"  1", {220, 220, 16}},
      // 4: everything else, with the ends of lines after it
      {"!!!\n\nfoo", {32057, 7975}},
      {" \?\?\?\r\n\n bar", {51317, 80823, 3619}},
      {"...\n...", {9338, 1112}},
      {"-\nb", {6913, 65}},
      {"\u200b \u200d", {15692, 636, 235}},
      {"\U0001f468\u200d\U0001f469\u200d\U0001f467", {145367, 378, 235, 145233, 378, 235, 145665}},
      {"\U000e0100a", {175, 254, 226, 222, 64}},
      {"\U0001e900b", {172, 252, 97, 222, 65}},
      // 5, 6: white space
      {"  ", {256}},
      {"   ", {262}},
      {"a  ", {64, 256}},
      {"a \n", {64, 715}},
      {"a\n b", {64, 198, 293}},
      {"a \n \n  b", {64, 31906, 220, 293}},
      {"\n\n\n  \n x", {1406, 2303, 856}},
      {"\r\n\r\nx", {871, 87}},
      {" \r\n", {2529}},
      // NFC: composition, order of marks, exclusions, Hangul, singletons
      {"a\u0300b", {6362, 65}},
      {"\u0301\u0302", {53839, 136, 224}},
      {"\u1e9b\u0323", {149616, 136, 96}},
      {"\u212b\u2126", {144044, 144572}},
      {"\u1100\u1161\u11a8", {126317}},
      {"\uac00\u11a8", {126317}},
      {"\u1100\u1161\u1161", {19969, 146679}},
      {"\u0344", {136, 230, 53839}},
      {"a\u0323\u0307\u0301", {20229, 136, 229, 53839}},
      {"q\u0307\u0323", {80, 136, 96, 136, 229}},
      {"\u0958", {64704, 5502, 120}},
      {"\ufb01\u2460", {144300, 48312, 254}},
      {"\U0001d15e", {128242, 245, 128242, 98}},
      {"\uf900", {43410, 230}},
      {"\U00011938", {128240, 97, 116}},
  };
  for (const Case& c : cases) CHECK_MESSAGE(real().encode(c.text, false) == c.ids, json_quote(c.text));
}

// With a merge for every two neighbouring stretches of the text, each piece of the pre-tokeniser becomes one token: its bytes.
static std::vector<std::string> pieces_of(const std::string& text) {
  std::set<std::pair<std::string, std::string>> merges;
  for (size_t i = 0; i < text.size(); i++)
    for (size_t k = i + 1; k < text.size(); k++)
      for (size_t j = k + 1; j <= text.size(); j++) merges.emplace(text.substr(i, k - i), text.substr(k, j - k));
  const Tokenizer t(pack(small({merges.begin(), merges.end()})));
  std::vector<std::string> out;
  for (const int32_t id : t.encode(text, false)) out.emplace_back(t.bytes(id));
  return out;
}

TEST_CASE("tokenizer: the pieces themselves") {
  const std::vector<std::vector<std::string>> texts = {
      {"a", "'s", "t"},
      {"'t", "is"},
      {"''", "rex"},
      {"'Ll", "'vE"},
      {"'lx"},
      {"a", "'\u017f", "t"},
      {"1", "2", "\u00bd", "\u0663"},
      {"x", "1", "y"},
      {"\n", "ab"},
      {"\r", "a"},
      {"\tab"},
      {"\u00a0ab", "\u3000", "\u3000b"},
      {" ab", " ", " cd"},
      {"(ab", ")"},
      {" (", "ab"},
      {"1", "\u0301b"},
      {"a", "!?\r\n\n", "b"},
      {" .\n", " ", "1"},
      {"\t", "!"},
      {"a", "  "},
      {"a", " ", "\t", "!"},
      {"a", " \n", " ", " b"},
      {" \n \r\n", "  "},
      {"\x85\x80"},
  };
  for (const auto& expected : texts) {
    std::string text;
    for (const std::string& piece : expected) text += piece;
    CHECK_MESSAGE(pieces_of(text) == expected, json_quote(text));
  }
}

TEST_CASE("unicode: every code point as Hugging Face tokenizers sees it") {
  std::string classes;
  for (char32_t c = 0; c < 0x110000; c++) classes += static_cast<char>(char_class(c));
  CHECK(fnv1a64(classes) == 0x48b1698009766d10ull);
  CHECK(char_class(0x110000) == CharClass::Other);
  CHECK(char_class(0xffffffff) == CharClass::Other);

  uint64_t h = fnv1a64("");
  bool stays = true;
  for (char32_t c = 0; c < 0xe1000; c = c == 0x2ffff ? 0xe0000 : c + 1) {
    if (c >= 0xd800 && c < 0xe000) continue;
    std::string x, s;
    utf8_append(x, c);
    s = x + "a\u0345" + x + "\u0334\u0345" + x + "\u0301" + x + "\u0316";  // marks of four classes, out of order
    const std::string n = nfc(s);
    h = fnv1a64(n, h);
    stays = stays && nfc(n) == n;
  }
  CHECK(h == 0x69a5cb586e1ccbf6ull);
  CHECK(stays);
}

TEST_CASE("unicode: NFC by hand") {
  CHECK(nfc("") == "");
  CHECK(nfc("plain") == "plain");
  CHECK(nfc("e\u0301") == "\u00e9");
  CHECK(nfc("a e\u0301 b e\u0301") == "a \u00e9 b \u00e9");
  CHECK(nfc("\u00e9") == "\u00e9");
  CHECK(nfc("\u0301e") == "\u0301e");
  CHECK(nfc("s\u0307\u0323") == "\u1e69");         // marks are ordered (dot below first), then both join
  CHECK(nfc("a\u0305\u0301") == "a\u0305\u0301");  // blocked: same class between
  CHECK(nfc("a\u0316\u0301") == "\u00e1\u0316");   // not blocked: other class
  CHECK(nfc("\u0915\u093c") == "\u0915\u093c");    // excluded from composition
  CHECK(nfc("\u0958") == "\u0915\u093c");
  CHECK(nfc("\u2126") == "\u03a9");
  CHECK(nfc("\u1112\u1161\u11ab") == "\ud55c");
  CHECK(nfc("\ud55c\u11ab") == "\ud55c\u11ab");  // has its final already
  CHECK(nfc("\u1112\u1161a\u11ab") == "\ud558a\u11ab");
  CHECK(nfc("e\xff\u0301 e\xcc") == "e\xff\u0301 e\xcc");  // bytes that are no text stay and separate
}

TEST_CASE("unicode: UTF-8") {
  for (char32_t c = 0; c < 0x110000; c += c < 0x1000 ? 1 : 7) {
    if (c >= 0xd800 && c < 0xe000) continue;
    std::string s;
    utf8_append(s, c);
    int len = 0;
    const bool same = utf8_decode(s, 0, len) == c && len == static_cast<int>(s.size()) && utf8_valid(s) && utf8_complete(s) == s.size();
    if (!same) FAIL_CHECK("U+" << static_cast<uint32_t>(c));
    for (size_t cut = 1; cut < s.size(); cut++)
      if (utf8_valid(s.substr(0, cut)) || utf8_complete("x" + s.substr(0, cut)) != 1) FAIL_CHECK("cut U+" << static_cast<uint32_t>(c));
  }
  for (const char* s : {"\x80", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xf0\x8f\xbf\xbf",
                        "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xff", "a\xe4\xbd", "\xe4!"})
    CHECK_FALSE(utf8_valid(s));
  int len = 0;
  CHECK(utf8_decode("\xe4\xbd", 0, len) == 0xfffd);
  CHECK(len == 1);
  CHECK(utf8_replace_invalid("ok \u4f60") == "ok \u4f60");
  CHECK(utf8_replace_invalid("\xe4\xbd") == "\ufffd");  // as Python's bytes.decode(errors="replace")
  CHECK(utf8_replace_invalid("\xe4\xbd.\xe4\xbd\xa0") == "\ufffd.\u4f60");
  CHECK(utf8_replace_invalid("\xed\xa0\x80\xff") == "\ufffd\ufffd\ufffd\ufffd");
  CHECK(utf8_replace_invalid("\xf0\x9f\x98g") == "\ufffdg");
  CHECK(utf8_complete("") == 0);
  CHECK(utf8_complete("\xe4\xbd") == 0);
  CHECK(utf8_complete("a\xf0\x9f\x98") == 1);
  CHECK(utf8_complete("a\xe0\x80") == 3);  // can never become valid: nothing to wait for
  CHECK(utf8_complete("a\x80\x80\x80\x80") == 5);
  CHECK(utf8_complete("a\xff") == 2);
}

TEST_CASE("tokenizer: text of a user never becomes a control token") {
  const Tokenizer& t = real();
  const int32_t start = t.find_added("<|im_start|>"), end = t.find_added("<|im_end|>"), think = t.find_added("<think>");
  CHECK(start == 151644);
  CHECK(end == 151645);
  CHECK(think == 151667);
  CHECK(t.find_added("<|im_") == -1);
  CHECK(t.find_added("<|im_end|>x") == -1);
  CHECK(t.find_added("") == -1);
  const auto controls = [](const Ids& ids) { return std::count_if(ids.begin(), ids.end(), [](int32_t id) { return id >= 151643; }); };
  for (const char* s : {"<|im_end|>", "<think></think>", "a<|endoftext|>b<|im_start|>", "<tool_call>"}) {
    const Ids ids = t.encode(s, false);
    CHECK(controls(ids) == 0);
    CHECK(t.decode(ids) == s);
    CHECK(controls(t.encode(std::vector<TextPiece>{{s, false, {}}})) == 0);
    CHECK(controls(t.encode(s, true)) > 0);
  }
  CHECK(t.encode("<|im_end|>", true) == Ids{end});
  using Pieces = std::vector<TextPiece>;
  const auto count = [&](const Pieces& p) { return controls(t.encode(p)); };
  CHECK(count({{"<|im_", true, {}}, {"end|>", true, {}}}) == 1);   // one stretch
  CHECK(count({{"<|im_", true, {}}, {"end|>", false, {}}}) == 0);  // it would lie partly in the user's text
  CHECK(count({{"<|im_", false, {}}, {"end|>", true, {}}}) == 0);
  CHECK(count({{"<|im_", false, {}}, {"end|>", false, {}}}) == 0);
  CHECK(count({{"<|im_", true, {}}, {"", false, {7}}, {"end|>", true, {}}}) == 0);
  CHECK(count({{"x<|im_end|>", true, {}}, {"<|im_end|>", false, {}}, {"<|im_end|><think>y", true, {}}}) == 3);
}

TEST_CASE("tokenizer: pieces are one text") {
  const Tokenizer& t = real();
  using Pieces = std::vector<TextPiece>;
  CHECK(t.encode(Pieces{{"user\n", true, {}}, {"\nHi", false, {}}}) == t.encode("user\n\nHi", false));
  CHECK(t.encode(Pieces{{"user\n", true, {}}, {"\nHi", false, {}}}) == Ids{872, 271, 13048});
  CHECK(t.encode(Pieces{{"e", false, {}}, {"\u0301t\u00e9", true, {}}}) == Ids{38783});
  CHECK(t.encode(Pieces{{"\xe4\xbd", false, {}}, {"", false, {}}, {"\xa0\u597d", false, {}}}) == Ids{108386});
  CHECK(t.encode(Pieces{}).empty());
  CHECK(t.encode(Pieces{{"user", false, {}}, {"ignored", true, {5, 151645}}, {"\n", true, {}}}) == Ids{872, 5, 151645, 198});
  CHECK(t.encode(Pieces{{"a ", false, {}}, {"", false, {1}}, {"b", false, {}}}) == Ids{64, 220, 1, 65});  // ids end the text before them
  CHECK(t.encode("<|im_start|>user\nHi<|im_end|>\n", true) == Ids{151644, 872, 198, 13048, 151645, 198});
}

TEST_CASE("tokenizer: added tokens are taken leftmost, then longest") {
  TokenizerData d = small({});
  d.added = {{300, "<a", true}, {301, "<a>b", false}, {302, "a>", false}, {303, "<a>bcd", true}, {304, "x", false}};
  const Tokenizer t(pack(d));
  CHECK(t.size() == 305);
  CHECK(t.has(303));
  CHECK_FALSE(t.has(299));
  CHECK_FALSE(t.has(-1));
  CHECK_FALSE(t.has(305));
  CHECK(t.special(300));
  CHECK_FALSE(t.special(301));
  CHECK_FALSE(t.special('a'));
  CHECK_FALSE(t.special(299));
  CHECK(t.bytes(303) == "<a>bcd");
  CHECK(t.bytes(299).empty());
  CHECK(t.bytes('a') == "a");
  CHECK(t.encode("<a>bcd", true) == Ids{303});
  CHECK(t.encode("<a>bc", true) == Ids{301, 'c'});
  CHECK(t.encode("<a>", true) == Ids{300, '>'});
  CHECK(t.encode("a><", true) == Ids{302, '<'});
  CHECK(t.encode("x<ax", true) == Ids{304, 300, 304});
  CHECK(t.decode(Ids{300, 299, -5, 1 << 30, 'z'}) == "<az");
}

// The definition: join the leftmost pair of the lowest rank until there is none.
static Ids merge_by_definition(const TokenizerData& d, std::string_view piece) {
  Ids ids;
  for (const char c : piece) ids.push_back(static_cast<unsigned char>(c));
  for (;;) {
    size_t best = d.merges.size(), at = 0;
    for (size_t i = 0; i + 1 < ids.size(); i++) {
      const size_t rank = std::find(d.merges.begin(), d.merges.end(), std::pair(ids[i], ids[i + 1])) - d.merges.begin();
      if (rank < best) best = rank, at = i;
    }
    if (best == d.merges.size()) return ids;
    const std::string joined = d.tokens[ids[at]] + d.tokens[ids[at + 1]];
    ids[at] = static_cast<int32_t>(std::find(d.tokens.begin(), d.tokens.end(), joined) - d.tokens.begin());
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST_CASE("tokenizer: merges as defined, whatever their order and the length of the piece") {
  std::mt19937 rng(7);
  for (int round = 0; round < 12; round++) {
    std::vector<std::string> made = {"a", "b", "c"};
    std::set<std::pair<std::string, std::string>> used;
    std::vector<std::pair<std::string, std::string>> merges;
    while (merges.size() < 20u + round) {
      const auto pair = std::pair(made[rng() % made.size()], made[rng() % made.size()]);
      if (pair.first.size() + pair.second.size() > 40 || !used.insert(pair).second) continue;
      merges.push_back(pair);
      made.push_back(pair.first + pair.second);
    }
    std::shuffle(merges.begin(), merges.end(), rng);  // tokens exist that their own bytes do not merge to
    const TokenizerData d = small(merges);
    const Tokenizer t(pack(d));
    for (int i = 0; i < 60; i++) {
      std::string piece;
      for (size_t n = 1 + rng() % (i < 50 ? 40 : 200); n > 0; n--) piece += "aaabbc"[rng() % 6];
      const Ids expected = merge_by_definition(d, piece);
      for (int again = 0; again < 2; again++)  // the second time words are remembered
        if (t.encode(piece, false) != expected) FAIL_CHECK(piece);
    }
    for (const std::string& token : d.tokens)
      if (token.size() > 1 && t.encode(token, false) != merge_by_definition(d, token)) FAIL_CHECK(token);
  }
}

TEST_CASE("tokenizer: decode(encode(x)) is x in NFC, for any bytes") {
  std::mt19937 rng(11);
  const Tokenizer& t = real();
  for (int i = 0; i < 3000; i++) {
    std::string s;
    for (size_t n = rng() % 30; n > 0; n--) {
      if (i % 2)
        s += static_cast<char>(rng());
      else
        utf8_append(s, rng() % 3 ? rng() % 0x3000 : rng() % 0x20000);  // surrogates too: three bytes that are no text
    }
    const Ids ids = t.encode(s, false);
    if (t.decode(ids) != nfc(s)) FAIL_CHECK(json_quote(s));
  }
}

TEST_CASE("tokenizer: speed, and no text takes long") {
  const Tokenizer& t = real();
  const std::string english = repeated(read_text(QN_STORIES "/heldout.txt", 1 << 20), kTimed ? 4 << 20 : 1 << 18);
  double best = 1e9;
  size_t n = 0;
  for (int i = 0; i < 5 && best > 0.1; i++) best = std::min(best, seconds([&] { n = t.encode(english, true).size(); }));
  MESSAGE("tokenizer: ", static_cast<double>(english.size()) / best / 1e6, " MB/s of English, ", n, " tokens");
  if (kTimed) CHECK(static_cast<double>(english.size()) / best >= 5e6);
  for (const char* unit : {"a", " ", "\u0301", "\u0316\u0301", "\n", "ab", "<|im_", "1", "\u4f60", "\u1100\u1161\u11a8", "\xff", "'"}) {
    const std::string text = repeated(unit, kTimed ? 1000000 : 50000);
    double took = 1e9;
    for (int i = 0; i < 3 && took > 2; i++) took = std::min(took, seconds([&] { n = t.encode(text, true).size(); }));
    CHECK(n > 0);
    if (kTimed) CHECK_MESSAGE(took < 2, json_quote(unit), " repeated: ", took, " s");
  }
}

static std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST_CASE("tokenizer: tables that lie are refused") {
  TokenizerData good = small({{"t", "h"}, {"th", "e"}});
  good.added = {{300, "<end>", true}};
  const auto refused = [&](const std::function<void(TokenizerData&)>& change, const char* why) {
    TokenizerData d = good;
    change(d);
    const std::string e = error_of([&] { Tokenizer t(pack(d)); });
    CHECK_MESSAGE(e.find(why) != e.npos, e, " / ", why);
  };
  CHECK(Tokenizer(pack(good)).encode("the", false) == Ids{257});
  refused([](auto& d) { d.tokens[7] = ""; }, "byte 0x07 has no token");
  refused([](auto& d) { d.tokens.push_back("th"); }, "same bytes");
  refused([](auto& d) { d.tokens.emplace_back(5000, 'x'); }, "token 258");
  refused([](auto& d) { d.merges.push_back({'q', 'q'}); }, "merge 2");
  refused([](auto& d) { d.merges.push_back({'q', 258}); }, "merge 2");
  refused([](auto& d) { d.merges.push_back({-1, 'q'}); }, "merge 2");
  refused([](auto& d) { d.merges.push_back({300, 'q'}); }, "merge 2");
  refused([](auto& d) { d.added.push_back({301, "<end>", true}); }, "same text");
  refused([](auto& d) { d.added.push_back({300, "<e>", true}); }, "id 300");
  refused([](auto& d) { d.added.push_back({'t', "<e>", true}); }, "id 116");
  refused([](auto& d) { d.added.push_back({257, "the", true}); }, "makes the added token 257");
  refused([](auto& d) { d.added.push_back({-1, "<e>", true}); }, "added token 1");
  refused([](auto& d) { d.added.push_back({1 << 30, "<e>", true}); }, "added token 1");
  refused([](auto& d) { d.added.push_back({301, "", true}); }, "added token 1");
  refused([](auto& d) { d.added.resize(5000, {301, "y", true}); }, "at most");
}

TEST_CASE("tokenizer: damaged tables are refused or loaded, never worse") {
  TokenizerData d = small({{"t", "h"}, {"th", "e"}, {" ", "the"}, {"a", "a"}, {"aa", "aa"}});
  d.added = {{300, "<end>", true}, {310, "<e", false}};
  const std::vector<uint8_t> good = pack(d);
  for (size_t n = 0; n < good.size(); n++)
    if (error_of([&] { Tokenizer t(std::span<const uint8_t>(good).first(n)); }).empty()) FAIL_CHECK("cut to " << n);
  for (const size_t at : {good.size(), size_t{24}, size_t{24 + 4 * 261 + 8 * 5 + 12 * 2}}) {  // also before the table, before the bytes
    auto longer = good;
    longer.insert(longer.begin() + static_cast<std::ptrdiff_t>(at), 0);
    CHECK_FALSE(error_of([&] { Tokenizer t(longer); }).empty());
  }
  int loaded = 0, refused = 0;
  const auto attempt = [&](const std::vector<uint8_t>& bytes) {
    const std::string e = error_of([&] {
      const Tokenizer t(bytes);
      const std::string text = " the <end> aaaaaaa " + std::string(40, 'a') + "<e\xff";
      if (t.decode(t.encode(text, true)) != text) FAIL_CHECK("a table that loads loses bytes");
      loaded++;
    });
    if (!e.empty()) refused++;
  };
  for (size_t i = 0; i < good.size(); i++)
    for (const uint8_t flip : {0x01, 0x80, 0xff}) {
      auto bytes = good;
      bytes[i] ^= flip;
      attempt(bytes);
    }
  std::mt19937 rng(5);
  for (int i = 0; i < 3000; i++) {
    auto bytes = good;
    for (size_t n = 1 + rng() % 4; n > 0; n--) {  // 32-bit fields with numbers from the edges
      const size_t at = rng() % (bytes.size() / 4) * 4;
      const uint32_t v[] = {0, 1, 0xff, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffffffc, 1 << 20, static_cast<uint32_t>(rng())};
      const uint32_t x = v[rng() % 9];
      for (int k = 0; k < 4; k++) bytes[at + k] = static_cast<uint8_t>(x >> 8 * k);
    }
    attempt(bytes);
  }
  CHECK(loaded > 0);
  CHECK(refused > 3000);
}

// ---- tokenizer.json ----

// The 256 byte tokens in GPT-2's alphabet, then "th", "the", and an added token. `merges` as JSON.
static std::string small_json(const std::string& merges) {
  std::string vocab;
  int next = 0x100;
  for (int b = 0; b < 256; b++) {
    const bool prints = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
    std::string letter;
    utf8_append(letter, prints ? b : next++);
    vocab += json_quote(letter) + ":" + std::to_string(b) + ",";
  }
  return R"({"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":260,"content":"<end>","single_word":false,)"
         R"("lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},)"
         R"("pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":)"
         R"("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},)"
         R"("behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false}]},)"
         R"("post_processor":{"type":"ByteLevel"},"decoder":{"type":"ByteLevel"},)"
         R"("model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":"","end_of_word_suffix":"",)"
         R"("fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{)" +
         vocab + "\"th\":256,\"the\":257,\"\u0120the\":258},\"merges\":" + merges + "}}";
}

TEST_CASE("tokenizer.json: both spellings of merges") {
  const TempDir dir;
  const auto read = [&](const std::string& text) {
    put_file(dir / "tokenizer.json", {text.begin(), text.end()});
    return pack(read_tokenizer(dir.path));
  };
  const auto strings = read(small_json("[\"t h\",\"th e\",\"\u0120 the\"]"));
  CHECK(strings == read(small_json("[[\"t\",\"h\"],[\"th\",\"e\"],[\"\u0120\",\"the\"]]")));
  const Tokenizer t(strings);
  CHECK(t.encode("the the<end>\n\x80", true) == Ids{257, 258, 260, '\n', 0x80});
  CHECK(t.special(260));
  CHECK(t.size() == 261);
}

TEST_CASE("tokenizer.json: anything else is refused by name") {
  const TempDir dir;
  const std::string good = small_json("[\"t h\",\"th e\"]");
  const auto error = [&](const std::string& text) {
    put_file(dir / "tokenizer.json", {text.begin(), text.end()});
    return error_of([&] { read_tokenizer(dir.path); });
  };
  CHECK(error(good) == "");
  const struct {
    const char *from, *to, *named;
  } changes[] = {
      {R"({"type":"NFC"})", "null", ""},
      {R"({"type":"NFC"})", R"({"type":"NFKC"})", "normalizer.type: expected \"NFC\", got \"NFKC\""},
      {R"({"type":"NFC"})", "3", "normalizer.type"},
      {"'s|'t", "'t|'s", "pretokenizers[0].pattern"},
      {R"(\\p{N}|)", R"(\\p{N}{1,3}|)", "pretokenizers[0].pattern"},
      {"Isolated", "Removed", "pretokenizers[0].behavior"},
      {R"("invert":false)", R"("invert":true)", "pretokenizers[0].invert"},
      {R"("add_prefix_space":false)", R"("add_prefix_space":true)", "pretokenizers[1].add_prefix_space"},
      {R"("use_regex":false)", R"("use_regex":true)", "pretokenizers[1].use_regex"},
      {R"("type":"Sequence")", R"("type":"Whitespace")", "pre_tokenizer.type"},
      {R"("post_processor":{"type":"ByteLevel"})", R"("post_processor":{"type":"TemplateProcessing"})", "post_processor.type"},
      {R"("post_processor":{"type":"ByteLevel"})", R"("post_processor":null)", ""},
      {R"("decoder":{"type":"ByteLevel"})", R"("decoder":null)", "decoder"},
      {R"("type":"BPE")", R"("type":"Unigram")", "model.type: expected \"BPE\", got \"Unigram\""},
      {R"("dropout":null)", R"("dropout":0.1)", "model.dropout"},
      {R"("continuing_subword_prefix":"")", R"("continuing_subword_prefix":"##")", "model.continuing_subword_prefix"},
      {R"("end_of_word_suffix":"")", R"("end_of_word_suffix":"</w>")", "model.end_of_word_suffix"},
      {R"("byte_fallback":false)", R"("byte_fallback":true)", "model.byte_fallback"},
      {R"("ignore_merges":false)", R"("ignore_merges":true)", "model.ignore_merges"},
      {R"("lstrip":false)", R"("lstrip":true)", "added_tokens[0].lstrip"},
      {R"("rstrip":false)", R"("rstrip":true)", "added_tokens[0].rstrip"},
      {R"("normalized":false)", R"("normalized":true)", "added_tokens[0].normalized"},
      {R"("single_word":false)", R"("single_word":true)", "added_tokens[0].single_word"},
      {R"("special":true)", R"("special":1)", "added_tokens[0].special"},
      {R"("id":260)", R"("id":-1)", "added_tokens[0].id"},
      {R"("id":260)", R"("id":2000000000)", "added_tokens[0].id"},
      {R"("id":260)", R"("id":65)", "id 65"},
      {R"("content":"<end>")", R"("content":"the")", "257 as in the vocabulary"},
      {R"("content":"<end>")", R"("content":"")", "added_tokens[0].content"},
      {R"("th":256)", R"("th":256.5)", "model.vocab[\"th\"]"},
      {R"("th":256)", R"("th":255)", "model.vocab[\"th\"]"},
      {R"("th":256)", R"("t h":256)", "model.vocab[\"t h\"]"},
      {R"("th":256)", "\"th\":256,\"\u4f60\":259", "byte-level alphabet"},
      {R"("!":33,)", "", "byte 0x21 has no token"},
      {R"("t h")", R"("th")", "model.merges[0]"},
      {R"("t h")", R"("t q")", "merge 0"},
      {R"("t h")", R"("t zz")", "model.merges[0]"},
      {R"("t h")", R"(["t","h","e"])", "model.merges[0]"},
      {R"("t h")", R"(["t",1])", "model.merges[0]"},
      {R"("vocab":{)", R"("vocab":[],"x":{)", "model.vocab"},
      {R"("merges":[)", R"("merges":3,"x":[)", "model.merges"},
      {R"("model":{)", R"("x":{)", "model"},
      {R"({"version")", R"([{"version")", "line 1"},
  };
  for (const auto& c : changes) {
    std::string text = good;
    const size_t at = text.find(c.from);
    REQUIRE_MESSAGE(at != text.npos, c.from);
    const std::string e = error(text.replace(at, std::string_view(c.from).size(), c.to));
    CHECK_MESSAGE((*c.named ? e.find(c.named) != e.npos && e.find(dir.path) == 0 : e.empty()), c.to, ": ", e);
    CHECK(e.find('\n') == e.npos);
  }
  CHECK(error("[]").find("expected an object") != std::string::npos);
  for (size_t n = 0; n < good.size(); n += 37) CHECK_FALSE(error(good.substr(0, n)).empty());
  CHECK(error_of([&] { read_tokenizer(dir / "none"); }).find("no such file") != std::string::npos);
}

TEST_CASE("tokenizer.json: of the stories model") {
  const Tokenizer t(pack(read_tokenizer(QN_STORIES)));
  CHECK(t.size() == 1174);
  CHECK(t.find_added("<|im_end|>") >= 1165);
  const std::string text = read_text(QN_STORIES "/heldout.txt", 1 << 20);
  CHECK(t.decode(t.encode(text, true)) == nfc(text));
}
