// The safetensors reader: real files read right, and nothing hostile gets past it.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/safetensors.h"
#include "tests/temp_dir.h"

using namespace qn;

namespace {

std::vector<uint8_t> made(const std::string& header, size_t data_bytes, uint64_t claimed = UINT64_MAX) {
  const uint64_t n = claimed == UINT64_MAX ? header.size() : claimed;
  std::vector<uint8_t> b(8);
  for (int i = 0; i < 8; i++) b[i] = static_cast<uint8_t>(n >> 8 * i);
  b.insert(b.end(), header.begin(), header.end());
  for (size_t i = 0; i < data_bytes; i++) b.push_back(static_cast<uint8_t>(i));
  return b;
}

// The message of the Error that opening throws; "" when it opens.
std::string refusal(const std::string& path, bool folder = false) {
  try {
    folder ? SafeTensors::open_folder(path) : SafeTensors::open_file(path);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

bool mentions(const std::string& message, const std::string& word) {
  INFO("message: " << message);
  const bool found = message.find(word) != std::string::npos && message.find('\n') == std::string::npos;
  CHECK(found);
  return found;
}

void put_text(const std::string& path, const std::string& text) { put_file(path, {text.begin(), text.end()}); }

}  // namespace

TEST_CASE("safetensors: tiny and its expected values") {
  const std::string folder = QN_TEST_DATA "/tiny";
  const SafeTensors s = SafeTensors::open_folder(folder);
  CHECK(s.files().size() == 1);
  const SafeTensor* t = s.find("model.embed_tokens.weight");
  REQUIRE(t);
  CHECK(t->dtype == "BF16");
  REQUIRE(t->shape.size() == 2);
  CHECK(t->bytes == static_cast<uint64_t>(t->shape[0] * t->shape[1] * 2));
  CHECK(s.find("no.such.tensor") == nullptr);
  CHECK_THROWS_AS(s.read_f32("no.such.tensor"), Error);

  const std::vector<float> f = s.read_f32("model.embed_tokens.weight");
  REQUIRE(f.size() == t->bytes / 2);
  uint8_t raw[6];
  s.read(*t, 10, raw);
  for (int i = 0; i < 3; i++) {
    const uint32_t bits = static_cast<uint32_t>(raw[2 * i] | raw[2 * i + 1] << 8) << 16;
    CHECK(std::memcmp(&bits, &f[static_cast<size_t>(5 + i)], 4) == 0);
  }
  CHECK_THROWS_AS(s.read(*t, t->bytes - 1, raw), Bug);
  CHECK_THROWS_AS(s.read(*t, t->bytes + 1, {}), Bug);

  const SafeTensors e = SafeTensors::open_file(folder + "/expected-1.safetensors");
  const std::vector<int32_t> tokens = e.read_i32("tokens");
  REQUIRE(!tokens.empty());
  const SafeTensor* logits = e.find("logits");
  REQUIRE(logits);
  CHECK(logits->shape == std::vector<int64_t>{static_cast<int64_t>(tokens.size()), s.find("lm_head.weight")->shape[0]});
  CHECK(e.read_f32("logits").size() * 4 == logits->bytes);
  CHECK_THROWS_AS(e.read_i32("logits"), Error);
  CHECK_THROWS_AS(e.read_f32("tokens"), Error);

  const SafeTensors fp8 = SafeTensors::open_folder(QN_TEST_DATA "/tiny-fp8");
  const auto is_fp8 = [](const auto& item) { return item.second.dtype == "F8_E4M3"; };
  CHECK(std::count_if(fp8.tensors().begin(), fp8.tensors().end(), is_fp8) > 0);
}

TEST_CASE("safetensors: shards of stories") {
  const SafeTensors s = SafeTensors::open_folder(QN_STORIES);
  CHECK(s.files().size() == 3);
  uint64_t total = 0;
  for (const auto& [name, t] : s.tensors()) total += t.bytes;
  CHECK(total == 29364320);  // total_size of its index
  CHECK(s.find("mtp.fc.weight")->file == 2);
}

TEST_CASE("safetensors: every dtype and the conversions") {
  TempDir dir;
  const std::string p = dir / "a.safetensors";
  put_file(p, made(R"({"__metadata__":{"format":"pt"},"h":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]},
      "e":{"dtype":"F32","shape":[0,5],"data_offsets":[8,8]},"i":{"dtype":"I64","shape":[],"data_offsets":[8,16]}}   )",
                   16));
  std::vector<uint8_t> b = file_bytes(p);
  const uint16_t half[4] = {0x3c00, 0xc100, 0x0001, 0x7bff};
  std::memcpy(b.data() + b.size() - 16, half, 8);
  const int64_t wide = -7;
  std::memcpy(b.data() + b.size() - 8, &wide, 8);
  put_file(p, b);
  const SafeTensors s = SafeTensors::open_file(p);
  CHECK(s.tensors().size() == 3);
  CHECK(s.read_f32("h") == std::vector<float>{1, -2.5f, 5.9604644775390625e-08f, 65504});
  CHECK(s.read_f32("e").empty());
  CHECK(s.read_i32("i") == std::vector<int32_t>{-7});
  const int64_t too_wide = int64_t{1} << 31;
  std::memcpy(b.data() + b.size() - 8, &too_wide, 8);
  put_file(p, b);
  CHECK_THROWS_AS(SafeTensors::open_file(p).read_i32("i"), Error);

  const std::pair<const char*, int> sizes[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
                                               {"U16", 2},  {"I16", 2}, {"F16", 2}, {"BF16", 2},    {"U32", 4},
                                               {"I32", 4},  {"F32", 4}, {"U64", 8}, {"I64", 8},     {"F64", 8}};
  for (const auto& [dtype, bytes] : sizes)
    for (int n = 3 * bytes - 1; n <= 3 * bytes + 1; n++) {
      put_file(p, made(format(R"({"a":{"dtype":"%s","shape":[3],"data_offsets":[0,%d]}})", dtype, n), static_cast<size_t>(n)));
      CAPTURE(dtype);
      CHECK(refusal(p).empty() == (n == 3 * bytes));
    }
}

TEST_CASE("safetensors: bad files are refused with one line that says why") {
  TempDir dir;
  const std::string p = dir / "bad.safetensors";
  const auto check = [&](const std::vector<uint8_t>& bytes, const char* word) {
    put_file(p, bytes);
    const std::string m = refusal(p);
    mentions(m, word);
    mentions(m, "bad.safetensors");
  };
  const auto tensor = [](const std::string& body) { return R"({"a":{)" + body + "}}"; };
  check({}, "safetensors");
  check({1, 2, 3, 4, 5, 6, 7}, "safetensors");
  check(made("{}", 0, 3), "header");
  check(made("{}", 0, 100'000'001), "header");
  check(made("{}", 0, UINT64_MAX - 1), "header");
  check(made("", 0), "");
  check(made("[]", 0), "object");
  check(made("{", 0), "");
  check(made("{}", 4), "belong to none");
  check(made(R"({"a":3})", 0), "object");
  check(made(tensor(R"("shape":[1],"data_offsets":[0,4])"), 4), "dtype");
  check(made(tensor(R"("dtype":"F32","data_offsets":[0,4])"), 4), "shape");
  check(made(tensor(R"("dtype":"F32","shape":[1])"), 4), "data_offsets");
  check(made(tensor(R"("dtype":"F33","shape":[1],"data_offsets":[0,4])"), 4), "F33");
  check(made(tensor(R"("dtype":7,"shape":[1],"data_offsets":[0,4])"), 4), "dtype");
  check(made(tensor(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"), 4), "shape");
  check(made(tensor(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"), 4), "shape");
  check(made(tensor(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"), 4), "negative");
  check(made(tensor(R"("dtype":"F32","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,4])"), 4), "shape");
  // 2^62 * 4 wraps to 0, 2^32 * 2^32 as well
  check(made(tensor(R"("dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0])"), 0), "too large");
  check(made(tensor(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0), "too large");
  check(made(tensor(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4])"), 4), "shape");
  check(made(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0])"), 4), "data_offsets");
  check(made(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4.5])"), 4), "data_offsets");
  check(made(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"), 4), "data_offsets");
  check(made(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[-4,0])"), 4), "data_offsets");
  check(made(tensor(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])"), 7), "truncated");
  check(made(tensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])"), 8), "4 bytes");
  const std::string two = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":)";
  check(made(two + "[2,6]}}", 8), "overlap");
  check(made(two + "[0,4]}}", 8), "overlap");
  check(made(two + "[8,12]}}", 12), "no tensor");
  put_file(p, made(two + "[4,8]}}", 8));
  CHECK(refusal(p).empty());
  std::string many = "{\"a\":[0";  // 4 M values: tens of bytes each once parsed
  for (int i = 0; i < 4'000'000; i++) many += ",0";
  check(made(many + "]}", 0), "values");
  CHECK_THROWS_AS(SafeTensors::open_file(dir / "absent.safetensors"), Error);
}

TEST_CASE("safetensors: a folder of shards") {
  TempDir dir;
  const std::string index = dir / "model.safetensors.index.json";
  put_file(dir / "one.safetensors", made(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4));
  CHECK(SafeTensors::open_folder(dir.path).tensors().size() == 1);  // the only one in it
  put_file(dir / "two.safetensors", made(R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4));
  mentions(refusal(dir.path, true), "index");
  mentions(refusal(dir / "nowhere", true), "not a folder");

  const auto map = [&](const std::string& entries) { put_text(index, R"({"metadata":{},"weight_map":{)" + entries + "}}"); };
  map(R"("a":"one.safetensors","b":"two.safetensors")");
  const SafeTensors s = SafeTensors::open_folder(dir.path + "/");
  CHECK(s.tensors().size() == 2);
  CHECK(s.files().size() == 2);
  CHECK(s.find("a")->file != s.find("b")->file);
  CHECK(s.read_f32("a").size() == 1);

  map(R"("a":"one.safetensors")");
  CHECK(SafeTensors::open_folder(dir.path).tensors().size() == 1);  // two.safetensors is none of its shards
  map(R"("a":"two.safetensors","b":"two.safetensors")");
  mentions(refusal(dir.path, true), "not in two");
  map(R"("a":"one.safetensors","b":"one.safetensors","c":"two.safetensors")");
  mentions(refusal(dir.path, true), "tensor b");
  map(R"("b":"one.safetensors","a":"two.safetensors")");
  mentions(refusal(dir.path, true), "should be in");
  map(R"("a":"one.safetensors","z":"two.safetensors")");
  mentions(refusal(dir.path, true), "tensor z");
  map(R"("a":"one.safetensors","b":"three.safetensors")");
  mentions(refusal(dir.path, true), "missing");
  for (const char* name : {"../one.safetensors", "/etc/passwd", "..", "", "x/one.safetensors", ".hidden", "a b"}) {
    map(format(R"("a":"%s")", name));
    mentions(refusal(dir.path, true), "plain file name");
  }
  map(R"("a":["one.safetensors"])");
  CHECK(!refusal(dir.path, true).empty());
  map("");
  mentions(refusal(dir.path, true), "weight_map");
  put_text(index, "[]");
  CHECK(!refusal(dir.path, true).empty());
  put_file(dir / "dup.safetensors",
           made(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"c":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}})", 4));
  map(R"("a":"one.safetensors","c":"dup.safetensors")");
  mentions(refusal(dir.path, true), "also in another");
}

// Anything may become of a damaged file but a crash: it opens, or one Error.
TEST_CASE("safetensors: mutants") {
  TempDir dir;
  const std::string p = dir / "m.safetensors";
  std::string header = R"({"__metadata__":{"k":"v"})";
  for (int i = 0; i < 6; i++)
    header += format(R"(,"t%d":{"dtype":"BF16","shape":[2,%d],"data_offsets":[%d,%d]})", i, i, 2 * i * (i - 1), 2 * i * (i + 1));
  const std::vector<uint8_t> good = made(header + "}", 60);
  put_file(p, good);
  REQUIRE(refusal(p) == "");
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < 500; i++) {
    std::vector<uint8_t> b = good;
    const size_t edits = 1 + random() % 3;
    for (size_t e = 0; e < edits; e++) {
      const size_t at = random() % (header.size() + 9);
      if (random() % 3 == 0)
        b[at] = "0123456789{}[],:\"-e."[random() % 20];
      else
        b[at] ^= static_cast<uint8_t>(1u << random() % 8);
    }
    if (random() % 4 == 0) b.resize(random() % b.size());
    put_file(p, b);
    try {
      const SafeTensors s = SafeTensors::open_file(p);
      for (const auto& [name, t] : s.tensors()) {
        std::vector<uint8_t> data(t.bytes);
        s.read(t, 0, data);
      }
    } catch (const Error& e) {
      refused++;
      CHECK(std::string(e.what()).find('\n') == std::string::npos);
    }
  }
  CHECK(refused > 300);
}
