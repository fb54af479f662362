// JSON (RFC 8259): a strict reader that keeps the order of keys and the text of numbers, and writers.
// Bounded: nesting at most 256, so that hostile files cannot overflow the stack, and 4 Mi values, since a value takes 40 bytes
// where "0," takes two. Duplicate keys: the last value wins, at the place of the first (as Python).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace qn {

class Json {
 public:
  enum class Kind : uint8_t { Null, Bool, Number, String, Array, Object };
  using Items = std::vector<Json>;
  using Members = std::vector<std::pair<std::string, Json>>;

  // Throws Error "<where>: line 3: expected ':' after \"name\", got '}'". Invalid UTF-8 is refused; lone surrogate escapes
  // become U+FFFD.
  static Json parse(std::string_view text, std::string_view where);

  Json() = default;
  static Json boolean(bool b);
  static Json number(int64_t v);
  static Json number(double v);  // null when v is not finite: JSON has no word for it
  static Json string(std::string s);
  static Json array();
  static Json object();

  Kind kind() const { return static_cast<Kind>(value_.index()); }
  bool is_null() const { return kind() == Kind::Null; }
  bool is_bool() const { return kind() == Kind::Bool; }
  bool is_number() const { return kind() == Kind::Number; }
  bool is_integer() const;  // a number whose text has no '.', 'e' or 'E' and fits int64
  bool is_string() const { return kind() == Kind::String; }
  bool is_array() const { return kind() == Kind::Array; }
  bool is_object() const { return kind() == Kind::Object; }

  // Values; `what` names the thing in the Error thrown when the kind is another: as_int("config.json: hidden_size").
  bool as_bool(std::string_view what) const;
  int64_t as_int(std::string_view what) const;  // accepts 3 and 3.0
  double as_double(std::string_view what) const;
  const std::string& as_string(std::string_view what) const;

  const Items& items() const;                    // Array; empty otherwise
  const Members& members() const;                // Object; empty otherwise
  const Json* find(std::string_view key) const;  // Object member or nullptr; a null value is found. Looks at each member.
  const std::string& number_text() const;        // Number: as read; empty otherwise

  Json& push(Json v);                  // Array; returns *this
  Json& set(std::string key, Json v);  // Object: replaces or appends; returns *this

  // Compact: {"a":1}. Integers as read, other numbers as the fewest digits that read back equal, written as Python's repr
  // does (1.0, 1e-05).
  std::string dump() const;
  // Python's json.dumps(ensure_ascii=False): {"a": 1}.
  std::string dump_python() const;

 private:
  struct Number {
    std::string text;
  };
  std::variant<std::monostate, bool, Number, std::string, Items, Members> value_;  // in the order of Kind
  void write(std::string& out, bool python) const;
  friend struct JsonReader;
};

// "..." with escapes as Python writes them: \" \\ \b \f \n \r \t, other control characters as \u00xx.
// What is not UTF-8 becomes U+FFFD.
std::string json_quote(std::string_view s);

}  // namespace qn
