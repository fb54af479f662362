// base/hash, base/file, and the number conversions of core/blocks.h.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/core/blocks.h"
#include "tests/temp_dir.h"

using namespace qn;

namespace {

std::span<const uint8_t> as_bytes(std::string_view s) { return {reinterpret_cast<const uint8_t*>(s.data()), s.size()}; }

std::vector<uint8_t> random_bytes(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> v(n);
  for (uint8_t& b : v) b = static_cast<uint8_t>(rng());
  return v;
}

uint32_t crc_bit_by_bit(std::span<const uint8_t> bytes) {
  uint32_t c = 0xFFFFFFFF;
  for (const uint8_t b : bytes) {
    c ^= b;
    for (int i = 0; i < 8; i++) c = c & 1 ? (c >> 1) ^ 0x82F63B78 : c >> 1;
  }
  return c ^ 0xFFFFFFFF;
}

size_t files_in(const std::string& folder) {
  size_t n = 0;
  for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(folder)) n++;
  return n;
}

// The message of the Error that f throws; "" when it throws none.
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

void check_error(const std::string& got, std::initializer_list<const char*> parts) {
  CAPTURE(got);
  for (const char* p : parts) CHECK(got.find(p) != std::string::npos);
}

}  // namespace

TEST_CASE("crc32c: published vectors") {
  std::vector<uint8_t> b(32);
  for (const auto crc : {crc32c, crc32c_portable}) {
    CHECK(crc(as_bytes("123456789"), 0) == 0xE3069283);
    CHECK(crc({}, 0) == 0);
    std::fill(b.begin(), b.end(), 0);  // these four: RFC 3720 B.4
    CHECK(crc(b, 0) == 0x8A9136AA);
    std::fill(b.begin(), b.end(), 255);
    CHECK(crc(b, 0) == 0x62A8AB43);
    for (int i = 0; i < 32; i++) b[i] = static_cast<uint8_t>(i);
    CHECK(crc(b, 0) == 0x46DD794E);
    for (int i = 0; i < 32; i++) b[i] = static_cast<uint8_t>(31 - i);
    CHECK(crc(b, 0) == 0x113FDB5C);
  }
}

TEST_CASE("crc32c: every path equals the polynomial, and parts join") {
  const auto data = random_bytes(70000, 1);
  std::mt19937 rng(2);
  std::vector<size_t> sizes;
  for (size_t i = 0; i < 70; i++) sizes.push_back(i);
  for (const size_t s : {4095u, 4096u, 12287u, 12288u, 12289u, 24575u, 24576u, 36871u, 69990u}) sizes.push_back(s);
  for (const size_t size : sizes) {
    const auto part = std::span(data).subspan(rng() % 9, size);
    const uint32_t want = crc_bit_by_bit(part);
    CHECK(crc32c(part) == want);
    CHECK(crc32c_portable(part) == want);
    const size_t cut = size ? rng() % size : 0;
    CHECK(crc32c(part.subspan(cut), crc32c(part.first(cut))) == want);
    CHECK(crc32c(part.subspan(cut), crc32c_portable(part.first(cut))) == want);
  }
}

TEST_CASE("fnv1a64: published vectors") {
  CHECK(fnv1a64("") == 0xcbf29ce484222325ull);
  CHECK(fnv1a64("a") == 0xaf63dc4c8601ec8cull);
  CHECK(fnv1a64("foobar") == 0x85944171f73967e8ull);
  CHECK(fnv1a64("bar", fnv1a64("foo")) == fnv1a64("foobar"));
  CHECK(fnv1a64("\xff") != fnv1a64("\x7f"));
}

// ---- fp16 and bf16: every number there is, and every place where rounding can turn ------------------------------------

namespace {

// The value of a small float with `mant` mantissa bits and exponent bias `bias`, from its definition.
double value_of(uint32_t bits, int mant, int bias) {
  const double m = bits & ((1u << mant) - 1);
  const int e = static_cast<int>(bits >> mant);
  return e == 0 ? std::ldexp(m, 1 - bias - mant) : std::ldexp(m + std::ldexp(1, mant), e - bias - mant);
}

// For every pair of neighbours a < b: a itself, the middle (goes to the even one), and the floats on both sides of it.
void check_rounding(uint16_t (*round)(float), int mant, int bias, uint32_t infinity) {
  int wrong = 0;
  for (uint32_t h = 0; h < infinity; h++) {
    const double a = value_of(h, mant, bias), b = value_of(h + 1, mant, bias);  // infinity counts as the next power of two
    const float low = static_cast<float>(a), middle = static_cast<float>((a + b) / 2);
    wrong += low != a || middle != (a + b) / 2;  // or else this test would not test what it says
    for (const uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      wrong += round(s * low) != (sign | h);
      wrong += round(s * middle) != (sign | (h + (h & 1)));
      wrong += round(s * std::nextafter(middle, 0.0f)) != (sign | h);
      wrong += round(s * std::nextafter(middle, INFINITY)) != (sign | (h + 1));
    }
  }
  CHECK(wrong == 0);
  CHECK(round(INFINITY) == infinity);
  CHECK(round(-INFINITY) == (infinity | 0x8000));
  CHECK(round(3.39e38f) == (mant == 10 ? infinity : 0x7f7f));
}

}  // namespace

TEST_CASE("fp16 -> fp32: all 65536") {
  int wrong = 0;
  for (uint32_t h = 0; h < 65536; h++) {
    const float f = half_to_float(static_cast<uint16_t>(h));
    const uint32_t m = h & 0x7fff;
    if (m > 0x7c00) {
      wrong += !std::isnan(f);
      continue;
    }
    const double v = m == 0x7c00 ? INFINITY : value_of(m, 10, 15);
    wrong += f != (h & 0x8000 ? -v : v) || std::signbit(f) != (h >= 0x8000);
  }
  CHECK(wrong == 0);
}

TEST_CASE("fp32 -> fp16: nearest even at every boundary") {
  check_rounding(float_to_half, 10, 15, 0x7c00);
  int wrong = 0;
  for (uint32_t u = 0x7f800001; u < 0x80000000; u += 4097)
    for (const uint32_t sign : {0u, 0x80000000u}) wrong += (float_to_half(bits_to_float(u | sign)) & 0x7fff) <= 0x7c00;
  CHECK(wrong == 0);
}

TEST_CASE("bf16: exact one way, nearest even the other") {
  int wrong = 0;
  for (uint32_t h = 0; h < 65536; h++) wrong += float_to_bits(bf16_to_float(static_cast<uint16_t>(h))) != h << 16;
  CHECK(wrong == 0);
  check_rounding(float_to_bf16, 7, 127, 0x7f80);
  for (uint32_t u = 0x7f800001; u < 0x80000000; u += 4097)  // NaN stays NaN, also when its mark is in the bits cut off
    for (const uint32_t sign : {0u, 0x80000000u}) wrong += (float_to_bf16(bits_to_float(u | sign)) & 0x7fff) <= 0x7f80;
  CHECK(wrong == 0);
  CHECK(round_bf16(1.00390625f) == 1.0f);       // 1 + 2^-8: a tie, down to even
  CHECK(round_bf16(1.01171875f) == 1.015625f);  // 1 + 3 * 2^-8: a tie, up to even
}

// ---- files ------------------------------------------------------------------------------------------------------------

TEST_CASE("OutFile and File: round trip, holes are zero, any order") {
  TempDir dir;
  const std::string path = dir / "a";
  const auto data = random_bytes(100000, 3);
  {
    OutFile out(path);
    out.write(200000, data);
    out.write(10, std::span(data).first(5));
    CHECK(!file_exists(path));
    out.commit();
  }
  CHECK(files_in(dir.path) == 1);
  const File f = File::open_read(path);
  CHECK(f.path() == path);
  REQUIRE(f.size() == 300000);
  std::vector<uint8_t> back(100000);
  f.read(200000, back);
  CHECK(back == data);
  f.drop_cache(0, f.size());
  const Mapping m = f.map();
  REQUIRE(m.bytes().size() == 300000);
  m.will_need(0, UINT64_MAX);
  m.will_need(299999, 10);
  m.will_need(300000, 1);
  CHECK(std::memcmp(m.bytes().data() + 10, data.data(), 5) == 0);
  CHECK(std::all_of(m.bytes().begin() + 15, m.bytes().begin() + 200000, [](uint8_t b) { return b == 0; }));
  check_error(error_of([&] { f.read(200001, back); }), {path.c_str(), "200001", "ends at 300000"});
  check_error(error_of([&] { f.read(UINT64_MAX, back); }), {"ends at 300000"});
  f.read(300000, {});
}

TEST_CASE("OutFile: without commit the old file stays and nothing is left over") {
  TempDir dir;
  const std::string path = dir / "model";
  put_file(path, {1, 2, 3});
  {
    OutFile out(path);
    out.write(0, random_bytes(5000, 4));
    CHECK(files_in(dir.path) == 2);
  }
  CHECK(files_in(dir.path) == 1);
  CHECK(file_bytes(path) == std::vector<uint8_t>{1, 2, 3});
  {
    OutFile one(path), other(path);  // two at once do not meet in one temporary file
    OutFile moved(std::move(one));
    moved.write(0, as_bytes("new"));
    other.write(0, as_bytes("x"));
    moved.commit();
    CHECK_THROWS_AS(moved.commit(), Bug);
    CHECK_THROWS_AS(moved.write(0, as_bytes("late")), Bug);
  }
  CHECK(files_in(dir.path) == 1);
  CHECK(read_text(path, 100) == "new");
}

TEST_CASE("OutFile: what a signal handler would do") {
  TempDir dir;
  const std::string kept = dir / "kept";
  OutFile done(kept);
  done.write(0, as_bytes("k"));
  done.commit();
  std::vector<OutFile> open;
  for (int i = 0; i < 20; i++) open.emplace_back(dir / ("f" + std::to_string(i)));
  CHECK(files_in(dir.path) == 21);
  remove_unfinished_files();
  CHECK(files_in(dir.path) == 1);
  CHECK(file_exists(kept));
  CHECK(error_of([&] { open[0].commit(); }) != "");  // its file is gone
  open.clear();
  for (int i = 0; i < 100; i++) OutFile again(dir / "again");  // places in the list are given back
  CHECK(files_in(dir.path) == 1);

  // A leftover with our number is somebody else's: neither used nor removed. A name may hold any byte.
  const std::string odd = dir / "a\tb", leftover = odd + ".tmp-" + std::to_string(::getpid());
  put_file(leftover, {7});
  {
    OutFile out(odd);
    CHECK(file_exists(leftover + "-1"));
    remove_unfinished_files();
    CHECK(!file_exists(leftover + "-1"));
    CHECK(file_bytes(leftover) == std::vector<uint8_t>{7});
  }
  std::vector<OutFile> full;
  const std::string message = error_of([&] {
    for (int i = 0; i < 1000; i++) full.emplace_back(dir / ("g" + std::to_string(i)));
  });
  check_error(message, {"too many files"});
  CHECK(files_in(dir.path) == 2 + full.size());  // the one too many is gone
}

TEST_CASE("OutFile: several threads, a link, and places where no file can be") {
  TempDir dir;
  const std::string path = dir / "t";
  const auto data = random_bytes(1 << 20, 5);
  {
    OutFile out(path);
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; t++)
      threads.emplace_back([&, t] {
        for (size_t i = t; i < 256; i += 4) out.write(i * 4096, std::span(data).subspan(i * 4096, 4096));
      });
    for (auto& t : threads) t.join();
    out.commit();
  }
  CHECK(file_bytes(path) == data);

  std::filesystem::create_symlink(path, dir / "link");
  {
    OutFile out(dir / "link");
    out.write(0, as_bytes("through"));
    out.commit();
  }
  CHECK(std::filesystem::is_symlink(dir / "link"));
  CHECK(read_text(path, 100) == "through");

  check_error(error_of([&] { OutFile out(dir.path); }), {dir.path.c_str(), "folder"});
  check_error(error_of([&] { OutFile out(dir / "no/such/file"); }), {"no folder", "no/such"});
  check_error(error_of([&] { OutFile out("/dev/null"); }), {"/dev/null", "not a regular file"});
  CHECK(error_of([&] { OutFile out(""); }) != "");
}

TEST_CASE("File: what cannot be read is refused by name") {
  TempDir dir;
  check_error(error_of([&] { File::open_read(dir / "none"); }), {"none", "No such file"});
  check_error(error_of([&] { File::open_read(dir.path); }), {dir.path.c_str(), "folder"});
  check_error(error_of([&] { File::open_read("/dev/zero"); }), {"/dev/zero", "not a regular file"});
  REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
  check_error(error_of([&] { File::open_read(dir / "pipe"); }), {"pipe", "not a regular file"});  // and does not wait
  put_file(dir / "empty", {});
  CHECK(File::open_read(dir / "empty").map().bytes().empty());
}

TEST_CASE("read_text and the questions about paths") {
  TempDir dir;
  const std::string path = dir / "text";
  put_file(path, std::vector<uint8_t>(70000, 'x'));
  CHECK(read_text(path, 70000) == std::string(70000, 'x'));
  check_error(error_of([&] { read_text(path, 69999); }), {path.c_str(), "69999"});
  put_file(path, {});
  CHECK(read_text(path, 0).empty());
  CHECK(error_of([&] { read_text(dir.path, 100); }) != "");
  CHECK(error_of([&] { read_text(dir / "none", 100); }) != "");
  REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
  std::thread writer([&] { put_file(dir / "pipe", {'h', 'i'}); });
  CHECK(read_text(dir / "pipe", 2) == "hi");  // waits for it
  writer.join();
  put_file(dir / "small", {'a', 'b', 'c'});
  CHECK(read_small_file(dir / "small", 3) == "abc");
  check_error(error_of([&] { read_small_file(dir / "small", 2); }), {"small", "at most 2"});
  check_error(error_of([&] { read_small_file(dir / "pipe", 100); }), {"pipe", "not a regular file"});  // does not wait
  check_error(error_of([&] { read_small_file("/dev/zero", 100); }), {"/dev/zero", "not a regular file"});
  CHECK(file_exists(path));
  CHECK(!file_exists(dir / "none"));
  CHECK(is_directory(dir.path));
  CHECK(!is_directory(path));
  CHECK(free_disk(dir / "not-yet") > 0);
  CHECK(error_of([&] { free_disk(dir / "no/such"); }) != "");
}

TEST_CASE("Arena and memory figures") {
  Arena a(40 << 20);
  REQUIRE(a.size() == 40 << 20);
  CHECK(reinterpret_cast<uintptr_t>(a.data()) % (2 << 20) == 0);
  CHECK(a.data()[0] == 0);
  CHECK(a.data()[a.size() - 1] == 0);
  std::memset(a.data(), 1, a.size());
  CHECK(peak_rss() >= 40u << 20);
  const uint8_t* at = a.data();
  Arena b(std::move(a));
  CHECK(a.data() == nullptr);
  CHECK(b.data() == at);
  Arena small(1000);
  small.data()[999] = 1;
  small = std::move(b);
  CHECK(small.data() == at);
  CHECK(Arena(0).data() == nullptr);
  CHECK(error_of([] { Arena(size_t{1} << 60); }) != "");
  CHECK(error_of([] { Arena(SIZE_MAX); }) != "");
  const uint64_t ram = available_ram();
  CHECK(ram > 64u << 20);
  CHECK(ram < uint64_t{1} << 50);
}
