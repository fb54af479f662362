#include "convert/tokenizer_json.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <unordered_map>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/json.h"
#include "ggml-lite/text/unicode.h"

namespace qn {

static constexpr uint64_t kMaxBytes = 32 << 20;  // the file of the 80B models has 11 MB; base/json bounds what it takes parsed
static constexpr int64_t kMaxId = (1 << 20) - 1;
static constexpr const char* kPattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

namespace {

struct Reader {
  std::string path;

  [[noreturn]] void refuse(const std::string& where, const std::string& expected, const Json* got) const {
    std::string text = got ? got->dump() : "nothing";
    if (text.size() > 200) text = text.substr(0, utf8_complete(std::string_view(text).substr(0, 200))) + "...";
    fail("%s: %s: expected %s, got %s; only the tokenizer of Qwen2 and Qwen3 models can be converted", path.c_str(), where.c_str(),
         expected.c_str(), text.c_str());
  }

  // The member `key` of `parent` (a dotted name for messages: `where`) must be one of the given JSON texts; "" stands for a missing one.
  void expect(const Json& parent, const std::string& where, const char* key, std::initializer_list<const char*> allowed) const {
    const Json* v = parent.find(key);
    const std::string text = v ? v->dump() : "";
    if (std::find(allowed.begin(), allowed.end(), text) == allowed.end()) refuse(where + "." + key, *allowed.begin(), v);
  }
  const Json& object(const Json& parent, const std::string& where, const char* key) const {
    const Json* v = parent.find(key);
    if (!v || !v->is_object()) refuse(where + key, "an object", v);
    return *v;
  }
  const Json& array(const Json& parent, const std::string& where, const char* key) const {
    const Json* v = parent.find(key);
    if (!v || !v->is_array()) refuse(where + key, "an array", v);
    return *v;
  }
  int64_t id(const Json& v, const std::string& where) const {
    if (!v.is_integer()) refuse(where, "an id", &v);
    const int64_t id = v.as_int(where);
    if (id < 0 || id > kMaxId) refuse(where, format("an id from 0 to %lld", static_cast<long long>(kMaxId)), &v);
    return id;
  }

  void check_pipeline(const Json& root) const;
  void check_pre_tokenizer(const Json& root) const;
  void read_vocabulary(const Json& model, TokenizerData& data);
  void read_merges(const Json& model, TokenizerData& data) const;
  void read_added(const Json& root, TokenizerData& data) const;

  std::unordered_map<std::string_view, int32_t> ids;  // by printable text, which the parsed JSON owns
};

// GPT-2's printable alphabet: bytes that print in Latin-1 stand for themselves, the others for U+0100 and on, in order.
struct Alphabet {
  std::array<int, 0x180> byte;  // of a code point, -1: not a letter of the alphabet
  Alphabet() {
    byte.fill(-1);
    int next = 0x100;
    for (int b = 0; b < 256; b++) {
      const bool prints = (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
      byte[prints ? b : next++] = b;
    }
  }
  bool decode(std::string_view text, std::string& out) const {
    out.clear();
    for (size_t p = 0; p < text.size();) {
      int len;
      const char32_t c = utf8_decode(text, p, len);
      if (c >= byte.size() || byte[c] < 0) return false;
      out += static_cast<char>(byte[c]);
      p += len;
    }
    return true;
  }
};

void Reader::check_pre_tokenizer(const Json& root) const {
  const Json& sequence = object(root, "", "pre_tokenizer");
  expect(sequence, "pre_tokenizer", "type", {"\"Sequence\""});
  const auto& steps = array(sequence, "pre_tokenizer.", "pretokenizers").items();
  if (steps.size() != 2) refuse("pre_tokenizer.pretokenizers", "a Split and a ByteLevel", sequence.find("pretokenizers"));
  const std::string split = "pre_tokenizer.pretokenizers[0]", bytes = "pre_tokenizer.pretokenizers[1]";
  expect(steps[0], split, "type", {"\"Split\""});
  const std::string pattern = Json::object().set("Regex", Json::string(kPattern)).dump();
  expect(steps[0], split, "pattern", {pattern.c_str()});
  expect(steps[0], split, "behavior", {"\"Isolated\""});
  expect(steps[0], split, "invert", {"false", ""});
  expect(steps[1], bytes, "type", {"\"ByteLevel\""});
  expect(steps[1], bytes, "add_prefix_space", {"false"});
  expect(steps[1], bytes, "use_regex", {"false"});
}

void Reader::check_pipeline(const Json& root) const {
  if (!root.is_object()) refuse("the file", "an object", &root);
  const Json* normalizer = root.find("normalizer");
  if (normalizer && !normalizer->is_null()) expect(*normalizer, "normalizer", "type", {"\"NFC\""});
  check_pre_tokenizer(root);
  const Json* post = root.find("post_processor");
  if (post && !post->is_null()) expect(*post, "post_processor", "type", {"\"ByteLevel\""});  // changes offsets, not ids
  expect(object(root, "", "decoder"), "decoder", "type", {"\"ByteLevel\""});
  const Json& model = object(root, "", "model");
  expect(model, "model", "type", {"\"BPE\""});
  expect(model, "model", "dropout", {"null", "", "0.0", "0"});
  expect(model, "model", "continuing_subword_prefix", {"null", "\"\"", ""});
  expect(model, "model", "end_of_word_suffix", {"null", "\"\"", ""});
  expect(model, "model", "byte_fallback", {"false", ""});
  expect(model, "model", "ignore_merges", {"false", ""});
}

void Reader::read_vocabulary(const Json& model, TokenizerData& data) {
  static const Alphabet alphabet;
  const auto& entries = object(model, "model.", "vocab").members();
  ids.reserve(entries.size());
  std::string bytes;
  for (const auto& [text, value] : entries) {
    const std::string where = "model.vocab[" + json_quote(text) + "]";
    const int64_t i = id(value, where);
    if (text.empty()) refuse(where, "a token of at least one byte", &value);
    if (!alphabet.decode(text, bytes)) refuse(where, "letters of the byte-level alphabet", &value);
    if (static_cast<size_t>(i) >= data.tokens.size()) data.tokens.resize(i + 1);
    if (!data.tokens[i].empty()) refuse(where, "an id of its own", &value);
    data.tokens[i] = bytes;
    ids.emplace(text, static_cast<int32_t>(i));
  }
}

// "a b" in older files, ["a", "b"] in newer ones; a space within a token is no letter of the alphabet, so the first one divides.
void Reader::read_merges(const Json& model, TokenizerData& data) const {
  const auto& merges = array(model, "model.", "merges").items();
  data.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); i++) {
    const Json& m = merges[i];
    const auto refuse_merge = [&](const char* expected) { refuse(format("model.merges[%zu]", i), expected, &m); };
    std::string_view left, right;
    if (m.is_string()) {
      const std::string_view text = m.as_string("");
      const size_t space = text.find(' ');
      if (space == text.npos) refuse_merge("two tokens with a space between");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    } else {
      if (m.items().size() != 2 || !m.items()[0].is_string() || !m.items()[1].is_string()) refuse_merge("a pair of tokens");
      left = m.items()[0].as_string("");
      right = m.items()[1].as_string("");
    }
    const auto l = ids.find(left), r = ids.find(right);
    if (l == ids.end() || r == ids.end()) refuse_merge("tokens of the vocabulary");
    data.merges.emplace_back(l->second, r->second);
  }
}

void Reader::read_added(const Json& root, TokenizerData& data) const {
  const auto& added = array(root, "", "added_tokens").items();
  for (size_t i = 0; i < added.size(); i++) {
    const Json& a = added[i];
    const std::string where = format("added_tokens[%zu]", i);
    const Json *content = a.find("content"), *special = a.find("special"), *number = a.find("id");
    if (!content || !content->is_string() || content->as_string("").empty()) refuse(where + ".content", "a text", content);
    if (!special || !special->is_bool()) refuse(where + ".special", "true or false", special);
    if (!number) refuse(where + ".id", "an id", number);
    for (const char* key : {"single_word", "lstrip", "rstrip", "normalized"}) expect(a, where, key, {"false"});
    const auto same = ids.find(content->as_string(""));
    const int64_t n = id(*number, where + ".id");
    if (same != ids.end() && same->second != n) refuse(where + ".id", format("%d as in the vocabulary", same->second), number);
    data.added.push_back({static_cast<int32_t>(n), content->as_string(""), special->as_bool("")});
  }
}

}  // namespace

TokenizerData read_tokenizer(const std::string& folder) {
  Reader reader;
  reader.path = folder + "/tokenizer.json";
  if (!file_exists(reader.path))
    fail("%s: no such file; a tokenizer is read from tokenizer.json (vocab.json and merges.txt are not enough)", reader.path.c_str());
  const Json root = Json::parse(read_small_file(reader.path, kMaxBytes), reader.path);
  TokenizerData data;
  reader.check_pipeline(root);
  const Json* normalizer = root.find("normalizer");
  data.nfc = normalizer && !normalizer->is_null();
  const Json& model = *root.find("model");
  reader.read_vocabulary(model, data);
  reader.read_merges(model, data);
  reader.read_added(root, data);
  try {
    const Tokenizer loads(pack(data));
  } catch (const Error& e) {
    fail("%s: %s", reader.path.c_str(), e.what());
  }
  return data;
}

}  // namespace qn
