#include "ggml-lite/base/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "ggml-lite/base/check.h"

namespace qn {

constexpr int kMaxDepth = 256;
constexpr size_t kMaxValues = size_t(4) << 20;

// ---- characters -----------------------------------------------------------------------------------------------------

// Length of the well-formed UTF-8 character at s (no overlong forms, no surrogates, at most U+10FFFF); 0 when there is none.
static size_t utf8_length(const char* at, const char* end) {
  const auto* s = reinterpret_cast<const unsigned char*>(at);
  const unsigned char a = *s;
  if (a < 0x80) return 1;
  const size_t n = a >= 0xf0 ? 4 : a >= 0xe0 ? 3 : 2;
  if (a < 0xc2 || a > 0xf4 || size_t(end - at) < n) return 0;
  for (size_t i = 1; i < n; ++i)
    if ((s[i] & 0xc0) != 0x80) return 0;
  if ((a == 0xe0 && s[1] < 0xa0) || (a == 0xed && s[1] > 0x9f) || (a == 0xf0 && s[1] < 0x90) || (a == 0xf4 &&
      s[1] > 0x8f)) return 0;
  return n;
}

static void append_utf8(std::string& out, uint32_t c) {
  if (c < 0x80) {
    out += char(c);
  } else if (c < 0x800) {
    out += {char(0xc0 | c >> 6), char(0x80 | (c & 63))};
  } else if (c < 0x10000) {
    out += {char(0xe0 | c >> 12), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
  } else {
    out += {char(0xf0 | c >> 18), char(0x80 | (c >> 12 & 63)), char(0x80 | (c >> 6 & 63)), char(0x80 | (c & 63))};
  }
}

static void append_quoted(std::string& out, std::string_view text) {
  static constexpr char kNames[] = "btn\0fr", kHex[] = "0123456789abcdef";  // kNames: of 8 to 13
  out += '"';
  for (const char *s = text.data(), *end = s + text.size(); s < end;) {
    const auto c = static_cast<unsigned char>(*s);
    const size_t n = utf8_length(s, end);
    if (n == 0) out += "\xef\xbf\xbd";
    else if (c == '"' || c == '\\') out += {'\\', *s};
    else if (c >= 0x20) out.append(s, n);
    else if (c >= 8 && c <= 13 && c != 11) out += {'\\', kNames[c - 8]};
    else out += {'\\', 'u', '0', '0', kHex[c >> 4], kHex[c & 15]};
    s += n ? n : 1;
  }
  out += '"';
}

std::string json_quote(std::string_view s) {
  std::string out;
  append_quoted(out, s);
  return out;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

static bool integer_text(std::string_view text) { return text.find_first_of(".eE") == text.npos; }

// Whether the number written in `text` (JSON grammar, not zero) is large or small. Only asked about numbers that are out of
// double's range, so far from 1.
static bool is_large(std::string_view text) {
  const size_t e = std::min(text.find_first_of("eE"), text.size());
  int64_t exponent = 0;
  if (e < text.size()) {
    const bool minus = text[e + 1] == '-';
    for (char c : text.substr(e + 1))
      if (c >= '0' && c <= '9') exponent = std::min<int64_t>(exponent * 10 + (c - '0'), int64_t(1) << 50);
    if (minus) exponent = -exponent;
  }
  const size_t point = std::min(text.find('.'), e), first = text.find_first_of("123456789");
  return int64_t(point) - int64_t(first) + exponent >= 0;  // about the power of ten of the first digit
}

static double to_double(std::string_view text) {
  double v = 0;
  const auto r = std::from_chars(text.data(), text.data() + text.size(), v);
  if (r.ec == std::errc::result_out_of_range) {
    v = is_large(text) ? HUGE_VAL : 0;
    if (text[0] == '-') v = -v;
  }
  return v;
}

// The fewest digits that read back equal, laid out as Python's repr: plain for 1e-4 <= |v| < 1e16, else 1.5e-07.
static std::string float_text(double v) {
  char buffer[40];
  const char* end = std::to_chars(buffer, buffer + sizeof buffer, v, std::chars_format::scientific).ptr;  // -d.ddde-07
  const char* e = std::find<const char*>(buffer, end, 'e');
  int exponent = 0;
  std::from_chars(e + (e[1] == '+' ? 2 : 1), end, exponent);
  if (exponent < -4 || exponent >= 16) return std::string(buffer, size_t(end - buffer));
  std::string out, digits;
  for (const char* p = buffer; p < e; ++p)
    if (*p == '-') out = "-";
    else if (*p != '.') digits += *p;
  if (exponent < 0) return out + "0." + std::string(-exponent - 1, '0') + digits;
  if (int(digits.size()) < exponent + 2) digits.resize(exponent + 2, '0');
  return out + digits.insert(exponent + 1, 1, '.');
}

// ---- reader ---------------------------------------------------------------------------------------------------------

struct JsonReader {
  std::string_view text, where;
  const char* p;
  const char* end;
  int depth = 0;
  size_t values = 0;

  [[noreturn]] void error(const std::string& expected) const {
    std::string got = "the end";
    if (p < end) got = *p > 0x20 && *p < 0x7f ? format("'%c'", *p) : format("byte 0x%02x", static_cast<unsigned char>(*p));
    refuse(format("expected %s, got %s", expected.c_str(), got.c_str()));
  }
  [[noreturn]] void refuse(const std::string& message) const {
    const long line = 1 + std::count(text.data(), p, '\n');
    fail("%.*s: line %ld: %s", int(where.size()), where.data(), line, message.c_str());
  }
  void space() {
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) ++p;
  }
  bool take(char c) {
    if (p == end || *p != c) return false;
    ++p;
    return true;
  }
  void word(std::string_view w) {
    if (std::string_view(p, end - p).substr(0, w.size()) != w) error("a value");
    p += w.size();
  }

  Json value() {
    if (++values > kMaxValues) refuse(format("more than %zu values", kMaxValues));
    Json v;
    switch (p < end ? *p : 0) {
      case '{': object(v.value_.emplace<Json::Members>()); break;
      case '[': array(v.value_.emplace<Json::Items>()); break;
      case '"': string(v.value_.emplace<std::string>()); break;
      case 't': word("true"), v.value_ = true; break;
      case 'f': word("false"), v.value_ = false; break;
      case 'n': word("null"); break;
      default: number(v.value_.emplace<Json::Number>().text);
    }
    return v;
  }

  void digits() {
    if (p == end || *p < '0' || *p > '9') error("a digit");
    while (p < end && *p >= '0' && *p <= '9') ++p;
  }
  void number(std::string& out) {
    const char* start = p;
    if (p == end || (*p != '-' && (*p < '0' || *p > '9'))) error("a value");
    take('-');
    if (!take('0')) digits();
    if (take('.')) digits();
    if (take('e') || take('E')) {
      if (!take('+')) take('-');
      digits();
    }
    out.assign(start, p);
  }

  uint32_t hex4() {
    uint32_t v = 0;
    for (int i = 0; i < 4; ++i, ++p) {
      const int c = p < end ? (*p | 0x20) : 0;
      const bool digit = p < end && *p >= '0' && *p <= '9';
      if (!digit && (c < 'a' || c > 'f')) error("four hexadecimal digits after \\u");
      v = v * 16 + uint32_t(digit ? *p - '0' : c - 'a' + 10);
    }
    return v;
  }
  void escape(std::string& out) {
    static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    if (take('u')) {
      uint32_t c = hex4();
      if (c >= 0xd800 && c < 0xdc00 && end - p >= 6 && p[0] == '\\' && p[1] == 'u') {
        const char* back = p;
        p += 2;
        const uint32_t low = hex4();
        if (low >= 0xdc00 && low < 0xe000) c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        else p = back;
      }
      return append_utf8(out, c >= 0xd800 && c < 0xe000 ? 0xfffd : c);
    }
    const size_t i = p < end ? kFrom.find(*p) : kFrom.npos;
    if (i == kFrom.npos) error("an escape after \\");
    out += kTo[i];
    ++p;
  }
  void string(std::string& out) {
    if (!take('"')) error("a string");
    for (;;) {
      const char* start = p;
      while (p < end) {
        const auto c = static_cast<unsigned char>(*p);
        if (c == '"' || c == '\\' || c < 0x20) break;
        const size_t n = c < 0x80 ? 1 : utf8_length(p, end);
        if (n == 0) error("UTF-8 in a string");
        p += n;
      }
      out.append(start, p);
      if (take('"')) return;
      if (!take('\\')) error("'\"' at the end of a string (control characters must be escaped)");
      escape(out);
    }
  }

  void open() {
    ++p;
    if (++depth > kMaxDepth) refuse(format("nested deeper than %d", kMaxDepth));
    space();
  }
  void array(Json::Items& out) {
    open();
    if (!take(']')) {
      for (;;) {
        out.push_back(value());
        space();
        if (take(']')) break;
        if (!take(',')) error("',' or ']' in an array");
        space();
      }
    }
    --depth;
  }
  void object(Json::Members& out) {
    open();
    if (!take('}')) {
      for (;;) {
        auto& [key, v] = out.emplace_back();
        string(key);
        space();
        if (!take(':')) error("':' after " + json_quote(key.substr(0, 40)));
        space();
        v = value();
        space();
        if (take('}')) break;
        if (!take(',')) error("',' or '}' in an object");
        space();
      }
    }
    --depth;
    remove_duplicates(out);
  }

  // Sorts by the first eight bytes of the key, which settles nearly every comparison without touching the keys.
  static void remove_duplicates(Json::Members& m) {
    struct Row {
      uint64_t prefix;
      size_t index;
    };
    if (m.size() < 2) return;
    std::vector<Row> rows(m.size());
    for (size_t i = 0; i < m.size(); ++i) {
      unsigned char b[8] = {};
      std::memcpy(b, m[i].first.data(), std::min<size_t>(8, m[i].first.size()));
      uint64_t prefix = 0;
      for (unsigned char c : b) prefix = prefix << 8 | c;
      rows[i] = {prefix, i};
    }
    std::sort(rows.begin(), rows.end(), [&](const Row& a, const Row& b) {
      if (a.prefix != b.prefix) return a.prefix < b.prefix;
      const int order = m[a.index].first.compare(m[b.index].first);
      return order != 0 ? order < 0 : a.index < b.index;
    });
    std::vector<size_t> gone;
    for (size_t i = 0, j; i < rows.size(); i = j) {
      for (j = i + 1; j < rows.size() && rows[j].prefix == rows[i].prefix && m[rows[j].index].first == m[rows[i].index].first;
          ++j)
        gone.push_back(rows[j].index);
      if (j > i + 1) m[rows[i].index].second = std::move(m[rows[j - 1].index].second);
    }
    if (gone.empty()) return;
    std::sort(gone.begin(), gone.end());
    size_t to = gone[0], next = 0;
    for (size_t from = to; from < m.size(); ++from)
      if (next < gone.size() && gone[next] == from) ++next;
      else m[to++] = std::move(m[from]);
    m.resize(to);
  }
};

Json Json::parse(std::string_view text, std::string_view where) {
  JsonReader r{text, where, text.data(), text.data() + text.size()};
  r.space();
  Json v = r.value();
  r.space();
  if (r.p != r.end) r.error("nothing after the value");
  return v;
}

// ---- values ---------------------------------------------------------------------------------------------------------

Json Json::boolean(bool b) {
  Json j;
  j.value_ = b;
  return j;
}
Json Json::number(int64_t v) {
  Json j;
  j.value_ = Number{std::to_string(v)};
  return j;
}
Json Json::number(double v) {
  Json j;
  if (std::isfinite(v)) j.value_ = Number{float_text(v)};
  return j;
}
Json Json::string(std::string s) {
  Json j;
  j.value_ = std::move(s);
  return j;
}
Json Json::array() {
  Json j;
  j.value_.emplace<Items>();
  return j;
}
Json Json::object() {
  Json j;
  j.value_.emplace<Members>();
  return j;
}

// The value of a variant when it holds a T, else an empty T that lives for ever.
template <class T, class V>
static const T& held(const V& v) {
  static const T none{};
  const T* p = std::get_if<T>(&v);
  return p ? *p : none;
}
const Json::Items& Json::items() const { return held<Items>(value_); }
const Json::Members& Json::members() const { return held<Members>(value_); }
const std::string& Json::number_text() const { return held<Number>(value_).text; }

static bool to_int64(const std::string& text, int64_t& v) {
  const auto r = std::from_chars(text.data(), text.data() + text.size(), v);
  return r.ec == std::errc() && r.ptr == text.data() + text.size();
}

bool Json::is_integer() const {
  int64_t v;
  return is_number() && to_int64(number_text(), v);
}

[[noreturn]] static void wrong_kind(const Json& j, std::string_view what, const char* expected) {
  const bool scalar = !j.is_array() && !j.is_object();
  std::string got = scalar ? j.dump() : j.is_array() ? "an array" : "an object";
  if (got.size() > 60) got = got.substr(0, 60) + "...";
  fail("%.*s: expected %s, got %s", int(what.size()), what.data(), expected, got.c_str());
}

bool Json::as_bool(std::string_view what) const {
  if (!is_bool()) wrong_kind(*this, what, "true or false");
  return std::get<bool>(value_);
}

int64_t Json::as_int(std::string_view what) const {
  int64_t v = 0;
  if (is_number() && to_int64(number_text(), v)) return v;
  const double d = is_number() && !integer_text(number_text()) ? to_double(number_text()) : NAN;
  if (!(std::abs(d) < 0x1p63) || d != std::floor(d)) wrong_kind(*this, what, "an integer of 64 bits");
  return int64_t(d);
}

double Json::as_double(std::string_view what) const {
  const double d = is_number() ? to_double(number_text()) : NAN;
  if (!std::isfinite(d)) wrong_kind(*this, what, "a number in the range of a double");
  return d;
}

const std::string& Json::as_string(std::string_view what) const {
  if (!is_string()) wrong_kind(*this, what, "a string");
  return std::get<std::string>(value_);
}

const Json* Json::find(std::string_view key) const {
  for (const auto& [k, v] : members())
    if (k == key) return &v;
  return nullptr;
}

Json& Json::push(Json v) {
  QN_CHECK(is_array(), "push to a Json that is no array");
  std::get<Items>(value_).push_back(std::move(v));
  return *this;
}

Json& Json::set(std::string key, Json v) {
  QN_CHECK(is_object(), "set in a Json that is no object");
  auto& m = std::get<Members>(value_);
  for (auto& [k, old] : m)
    if (k == key) {
      old = std::move(v);
      return *this;
    }
  m.emplace_back(std::move(key), std::move(v));
  return *this;
}

// ---- writer ---------------------------------------------------------------------------------------------------------

void Json::write(std::string& out, bool python) const {
  const char* comma = python ? ", " : ",";
  switch (kind()) {
    case Kind::Null: out += "null"; break;
    case Kind::Bool: out += std::get<bool>(value_) ? "true" : "false"; break;
    case Kind::String: append_quoted(out, std::get<std::string>(value_)); break;
    case Kind::Number: {
      const std::string& text = number_text();
      const double d = integer_text(text) ? NAN : to_double(text);
      if (std::isfinite(d)) out += float_text(d);
      else out += python && text == "-0" ? "0" : text;  // Python has no integer -0
      break;
    }
    case Kind::Array: {
      const char* between = "";
      out += '[';
      for (const Json& v : items()) {
        out += between;
        v.write(out, python);
        between = comma;
      }
      out += ']';
      break;
    }
    case Kind::Object: {
      const char* between = "";
      out += '{';
      for (const auto& [k, v] : members()) {
        out += between;
        append_quoted(out, k);
        out += python ? ": " : ":";
        v.write(out, python);
        between = comma;
      }
      out += '}';
      break;
    }
  }
}

std::string Json::dump() const {
  std::string out;
  write(out, false);
  return out;
}

std::string Json::dump_python() const {
  std::string out;
  write(out, true);
  return out;
}

}  // namespace qn
