// The strict reader and the writers. The lists of what is JSON and what is not follow RFC 8259, case by case.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/json.h"

using namespace qn;

namespace {

Json parse(std::string_view s) { return Json::parse(s, "test"); }
std::string error_of(std::string_view s) {
  try {
    parse(s);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}
std::string repeat(std::string_view s, int n) {
  std::string out;
  while (n-- > 0) out += s;
  return out;
}

}  // namespace

TEST_CASE("json: accepted, and written again") {
  const char* same[] = {  // dump() gives these back
      "null", "true", "false", "0", "-0", "123", "-1", "12345678901234567890123", "1.5", "-0.0", "1e+16", "1e-05", "0.0001",
      "\"\"", "\"a\"", "[]", "[1]", "[[]]", "[null,1,\"1\",{}]", "{}", "{\"\":0}", "{\"a\":{\"b\":[]}}", "\"\x7f\"", "\"/\"",
      "\"\xc3\xa9\"", "\"\xe2\x82\xac\"", "\"\xf0\x9f\x98\x80\"", "\"\xf4\x8f\xbf\xbf\"", "\"\xef\xbf\xbf\"",
          "\"\xed\x9f\xbf\"", "\"\\\\\\\"\"",
      "\"\\b\\f\\n\\r\\t\"", "\"\\u0000\\u001f\\u000b\"", "\"\xe2\x80\xa8\"", "[true,false,null]", "{\"a\":1,\"b\":2}"};
  for (const char* s : same) CHECK(parse(s).dump() == s);
  const std::pair<const char*, const char*> other[] = {
      {" \t\r\n[ 1 , 2 ] \n", "[1,2]"}, {"{ \"a\" : 1 }", "{\"a\":1}"}, {"1E5", "100000.0"}, {"1e+2", "100.0"}, {"1.50", "1.5"},
      {"0e1", "0.0"}, {"0E-0", "0.0"}, {"-1.0e-7", "-1e-07"}, {"123456789.000", "123456789.0"}, {"\"\\/\"", "\"/\""},
      {"\"\\u0041\\u00e9\\u20AC\"", "\"A\xc3\xa9\xe2\x82\xac\""}, {"\"\\ud83d\\ude00\"", "\"\xf0\x9f\x98\x80\""},
      {"\"\\uD834\\uDD1E\"", "\"\xf0\x9d\x84\x9e\""}, {"\"\\uDBFF\\uDFFF\"", "\"\xf4\x8f\xbf\xbf\""},
      {"\"\\ud800\"", "\"\xef\xbf\xbd\""}, {"\"\\udc00x\"", "\"\xef\xbf\xbdx\""}, {"\"\\ud800\\n\"", "\"\xef\xbf\xbd\\n\""},
      {"\"\\ud800\\u0041\"", "\"\xef\xbf\xbd" "A\""}, {"\"\\ud800\\ud800\\udc00\"", "\"\xef\xbf\xbd\xf0\x90\x80\x80\""},
      {"\"\\ude00\\ud83d\"", "\"\xef\xbf\xbd\xef\xbf\xbd\""}, {"{\"a\":1,\"b\":2,\"a\":3}", "{\"a\":3,\"b\":2}"},
      {"{\"a\":1,\"b\":0,\"\\u0061\":[],\"c\":4,\"b\":5,\"a\":6}", "{\"a\":6,\"b\":5,\"c\":4}"},
      {"{\"longer than eight\":1,\"longer than nine\":2,\"longer than eight\":3}",
          "{\"longer than eight\":3,\"longer than nine\":2}"},
      {"{\"\":1,\"\\u0000\":2,\"\":3}", "{\"\":3,\"\\u0000\":2}"}};
  for (const auto& [s, expected] : other) CHECK(parse(s).dump() == expected);
}

TEST_CASE("json: refused") {
  const char* bad[] = {
      "", " ", "[", "]", "{", "}", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1,,2]", "[1]]", "[]x", "1 2", "[1}", "{]", "[:]",
          "{\"a\"}", "{\"a\":}",
      "{\"a\":1,}", "{,}", "{a:1}", "{'a':1}", "{1:1}", "{\"a\" 1}", "{\"a\":1 \"b\":2}", "{\"a\":1,,\"b\":2}", "{\"a\"::1}",
          "{\"a\":1", "{\"a",
      "{null:1}", "nul", "nulL", "True", "tru", "NaN", "Infinity", "-Infinity", "nan", "undefined", "truefalse", "01", "-01",
          "00", "-", "+1",
      ".5", "-.5", "1.", "1.e5", "1e", "1e+", "1E-", "1.2.3", "0x10", "1_000", "- 1", "1 .5", "--1", "1a", "\"", "\"a",
          "\"\\\"", "\"\\", "\"\\x\"",
      "\"\\'\"", "\"\\u\"", "\"\\u12\"", "\"\\u12g4\"", "\"\\U0041\"", "\"\\u 041\"", "\"\n\"", "\"\t\"", "\"\x1f\"", "'a'",
          "\"a\"b", "// c\n1",
      "/* c */1", "1//", "#1", "\v1", "\f1", "\xc2\xa0" "1", "\xef\xbb\xbf{}", "[1\x01]", "\"\\ud800\\u\"", "\"\\ud83d\\u12\"",
          "<a>", "*", "(1)",
      "[\"a\"", "[\"a\",\n4\n,1,", "{\"a\":\"b\"}/**/", "\x1b[0m",
      "\"\x80\"", "\"\xbf\"", "\"\xc0\x80\"", "\"\xc1\xbf\"", "\"\xc3\"", "\"\xc3(\"", "\"\xe0\x80\x80\"", "\"\xe0\x9f\xbf\"",
          "\"\xed\xa0\x80\"",
      "\"\xed\xbf\xbf\"", "\"\xe2\x82\"", "\"\xe2(\xa1\"", "\"\xf0\x80\x80\x80\"", "\"\xf0\x8f\xbf\xbf\"", "\"\xf4\x90\x80\x80\"",
      "\"\xf5\x80\x80\x80\"", "\"\xff\"", "\"\xfe\"", "\"\xf0\x9f\x98\"", "\"a\xc3", "{\"\xff\":1}", "\"\xf8\x88\x80\x80\x80\""};
  for (const char* s : bad) CHECK_MESSAGE(error_of(s).starts_with("test: line "), s);
  CHECK_THROWS_AS(parse(std::string_view("[1]\0", 4)), Error);
  CHECK_THROWS_AS(parse(std::string_view("\"a\0b\"", 5)), Error);
  CHECK_THROWS_AS(parse(std::string_view("\0", 1)), Error);
  // Every beginning of a text is refused (a text that ends in a bracket has no shorter form).
  const std::string whole = R"({"a": [1.5e-3, "\ud83d\ude00é", {"b": null, "c": [true, false]}], "d": -0})";
  CHECK(parse(whole).dump() == R"({"a":[0.0015,"😀é",{"b":null,"c":[true,false]}],"d":-0})");
  for (size_t n = 0; n < whole.size(); ++n) CHECK_THROWS_AS(parse(whole.substr(0, n)), Error);
}

TEST_CASE("json: errors say where and what") {
  CHECK(error_of("{\n\n\"name\" }") == "test: line 3: expected ':' after \"name\", got '}'");
  CHECK(error_of("[1,\n2") == "test: line 2: expected ',' or ']' in an array, got the end");
  CHECK(error_of("[\"a\nb\"]") == "test: line 1: expected '\"' at the end of a string (control characters must be escaped), "
        "got byte 0x0a");
  CHECK(error_of("\"\xff\"") == "test: line 1: expected UTF-8 in a string, got byte 0xff");
  CHECK(error_of("{} x") == "test: line 1: expected nothing after the value, got 'x'");
}

TEST_CASE("json: nesting and number of values are bounded") {
  CHECK(parse(repeat("[", 256) + repeat("]", 256)).is_array());
  CHECK(error_of(repeat("[", 257) + repeat("]", 257)) == "test: line 1: nested deeper than 256");
  CHECK(error_of(repeat("{\"a\":", 257)) == "test: line 1: nested deeper than 256");
  CHECK(error_of(repeat("[", 1000000)) == "test: line 1: nested deeper than 256");
  for (const char* item : {"[]", "{}", "{\"a\":[]}"})  // depth is left again
    CHECK(parse("[" + repeat(item + std::string(","), 1000) + item + "]").items().size() == 1001);
  CHECK(error_of("[" + repeat("0,", 4200000)) == "test: line 1: more than 4194304 values");
}

TEST_CASE("json: values") {
  const Json j = parse(R"({"i": 3, "f": 3.0, "g": 3.5, "b": true, "s": "x", "n": null, "a": [1, 2], 
                           "big": 9223372036854775807, "min": -9223372036854775808,
                           "over": 9223372036854775808, "e": 1e3, "huge": 1e400, "tiny": 1e-400, "o": {"k": 7}})");
  const auto at = [&](const char* key) -> const Json& { return *j.find(key); };
  CHECK(at("i").as_int("x") == 3);
  CHECK(at("f").as_int("x") == 3);
  CHECK(at("e").as_int("x") == 1000);
  CHECK(at("big").as_int("x") == INT64_MAX);
  CHECK(at("min").as_int("x") == INT64_MIN);
  CHECK(at("i").as_double("x") == 3.0);
  CHECK(at("g").as_double("x") == 3.5);
  CHECK(at("over").as_double("x") == 9223372036854775808.0);
  CHECK(at("tiny").as_double("x") == 0);
  CHECK(at("b").as_bool("x"));
  CHECK(at("s").as_string("x") == "x");
  CHECK(at("n").is_null());
  CHECK(at("a").items().size() == 2);
  CHECK(at("o").members().size() == 1);
  CHECK(at("over").number_text() == "9223372036854775808");
  CHECK(j.find("none") == nullptr);
  CHECK(at("a").find("k") == nullptr);
  CHECK(at("s").items().empty());
  CHECK(at("a").members().empty());
  CHECK(at("s").number_text().empty());
  CHECK(at("i").is_integer());
  for (const char* key : {"f", "over", "e", "s", "n", "a"}) CHECK(!at(key).is_integer());
  for (const char* key : {"g", "over", "huge", "s", "n", "a", "b"}) CHECK_THROWS_AS(at(key).as_int("x"), Error);
  for (const char* key : {"huge", "s", "n", "o", "b"}) CHECK_THROWS_AS(at(key).as_double("x"), Error);
  CHECK_THROWS_AS(at("i").as_bool("x"), Error);
  CHECK_THROWS_AS(at("n").as_string("x"), Error);
  CHECK_THROWS_WITH_AS(at("s").as_int("config.json: hidden_size"),
      "config.json: hidden_size: expected an integer of 64 bits, got \"x\"", Error);
  CHECK_THROWS_WITH_AS(at("a").as_string("name"), "name: expected a string, got an array", Error);
  const Json copy = j;  // deep
  CHECK(copy.dump() == j.dump());
}

TEST_CASE("json: building") {
  Json j = Json::object();
  j.set("a", Json::number(int64_t(-5))).set("b", Json::boolean(false)).set("a", Json::string("x\ny")).set("n", Json());
  Json list = Json::array();
  list.push(Json::number(0.1)).push(Json::number(2.0)).push(Json::number(NAN)).push(Json::number(-INFINITY));
  j.set("l", std::move(list));
  CHECK(j.dump() == R"({"a":"x\ny","b":false,"n":null,"l":[0.1,2.0,null,null]})");
  CHECK(parse(j.dump()).dump() == j.dump());
  CHECK_THROWS_AS(j.push(Json()), Bug);
  CHECK_THROWS_AS(Json().set("a", Json()), Bug);
  CHECK(Json::number(int64_t(3)).is_integer());
  CHECK(!Json::number(3.0).is_integer());
  CHECK(json_quote("a\"\\\n\x01\x7f/\xe2\x80\xa8") == "\"a\\\"\\\\\\n\\u0001\x7f/\xe2\x80\xa8\"");
  CHECK(json_quote("\xc3 \xe2\x82\xf0\x9f\x98\x80\xff") ==
      "\"\xef\xbf\xbd \xef\xbf\xbd\xef\xbf\xbd\xf0\x9f\x98\x80\xef\xbf\xbd\"");
}

TEST_CASE("json: as Python writes it") {  // expected: json.dumps(json.loads(s), ensure_ascii=False)
  CHECK(parse(R"({"a":[1,2,{"b":null}],"c":true,"d":[],"e":{},"f":"/é\u007f\u2028\u001F\b"})").dump_python() ==
        "{\"a\": [1, 2, {\"b\": null}], \"c\": true, \"d\": [], \"e\": {}, \"f\": \"/é\x7f\xe2\x80\xa8\\u001f\\b\"}");
  const std::pair<const char*, const char*> numbers[] = {
      {"1.0", "1.0"}, {"1e0", "1.0"}, {"-0", "0"}, {"-0.0", "-0.0"}, {"1e-5", "1e-05"}, {"0.00001", "1e-05"}, {"0.0001",
          "0.0001"},
      {"0.00012345", "0.00012345"}, {"1.5e-7", "1.5e-07"}, {"1e15", "1000000000000000.0"}, {"1e16", "1e+16"}, {"1.5e16",
          "1.5e+16"},
      {"9999999999999998.0", "9999999999999998.0"}, {"123456789.125", "123456789.125"}, {"1e22", "1e+22"}, {"1e100", "1e+100"},
      {"5e-324", "5e-324"}, {"2.2250738585072014e-308", "2.2250738585072014e-308"}, {"1.7976931348623157e308",
          "1.7976931348623157e+308"},
      {"0.1", "0.1"}, {"0.30000000000000004", "0.30000000000000004"}, {"0.1000000000000000055511151231257827", "0.1"}, {"3.14",
          "3.14"},
      {"12345678901234567890", "12345678901234567890"}, {"-7", "-7"}, {"100.0", "100.0"}, {"1e-400", "0.0"}, {"-1e-400", "-0.0"},
      {"0.0000000001e-390", "0.0"}, {"0e999999999999999999999", "0.0"}, {"1e23", "1e+23"}, {"9007199254740993.0",
          "9007199254740992.0"}};
  for (const auto& [s, expected] : numbers) CHECK(parse(s).dump_python() == expected);
  // Too large for a double: the text is kept, since Python's "Infinity" is no JSON.
  for (const char* s : {"1e400", "-1e400", "100e307", "0.0001e400", "1e999999999999999999999"}) CHECK(parse(s).dump_python() ==
      s);
}

TEST_CASE("json: doubles read back equal") {
  uint64_t state = 1;
  for (int i = 0; i < 20000; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    double v;
    static_assert(sizeof v == sizeof state);
    std::memcpy(&v, &state, sizeof v);
    if (!std::isfinite(v)) continue;
    const std::string s = Json::number(v).dump();
    if (parse(s).as_double("x") != v || parse(s).is_integer()) CHECK_MESSAGE(false, s);
  }
}

TEST_CASE("json: many keys are read in one pass") {
  std::string s = "{";
  for (int i = 0; i < 200000; ++i) s += "\"a common beginning " + std::to_string(i % 150000) + "\":" + std::to_string(i) + ",";
  s.back() = '}';
  const Json j = parse(s);
  REQUIRE(j.members().size() == 150000);
  CHECK(j.members()[49999].second.as_int("x") == 199999);  // the last value, at the first place
  CHECK(j.members()[149999].second.as_int("x") == 149999);
}
