// core/qn: what is written comes back, and nothing that was not written so is believed.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <thread>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/core/qn.h"
#include "tests/temp_dir.h"

using namespace qn;

namespace {

std::vector<uint8_t> random_bytes(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> v(n);
  for (uint8_t& b : v) b = static_cast<uint8_t>(rng());
  return v;
}

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

std::string open_error(const std::string& path) {
  return error_of([&] { QnFile::open(path); });
}

// ---- the format, stated a second time -----------------------------------------------------------------------------------

struct RawTensor {
  std::string name;
  uint8_t dtype, kind;
  uint16_t group;
  std::vector<uint64_t> shape;
  uint64_t offset, bytes;
  std::vector<uint32_t> crc;
  uint8_t ndim = 255;       // 255: shape.size()
  uint8_t pad = 0;
  uint32_t ncrc = UINT32_MAX;  // UINT32_MAX: crc.size()
};

struct Raw {
  std::vector<std::vector<uint8_t>> meta;  // encoded entries
  std::vector<RawTensor> tensors;
  std::vector<uint8_t> data;               // from offset 4096; a multiple of 64 bytes
  std::vector<uint8_t> tail;               // after the last entry
  uint32_t metas = UINT32_MAX, count = UINT32_MAX;
  uint32_t version = 1, header_bytes = 4096;
  uint64_t file_bytes = 0, dir_offset = 0, dir_bytes = 0;  // 0: the true one
  uint8_t header_pad = 0;

  template <class T>
  static void put(std::vector<uint8_t>& v, T x) {
    for (size_t i = 0; i < sizeof x; i++) v.push_back(static_cast<uint8_t>(static_cast<uint64_t>(x) >> (8 * i)));
  }
  static void put_string(std::vector<uint8_t>& v, const std::string& s) {
    put(v, static_cast<uint32_t>(s.size()));
    v.insert(v.end(), s.begin(), s.end());
  }
  static std::vector<uint8_t> entry(const std::string& key, uint8_t type, std::initializer_list<uint64_t> words,
                                    const std::string& text = "") {
    std::vector<uint8_t> v;
    put_string(v, key);
    v.push_back(type);
    if (type == 2) put_string(v, text);
    if (type == 3) put(v, static_cast<uint32_t>(words.size()));
    for (const uint64_t w : words) put(v, w);
    return v;
  }
  std::vector<uint8_t> build() const {
    std::vector<uint8_t> dir;
    put(dir, metas == UINT32_MAX ? static_cast<uint32_t>(meta.size()) : metas);
    put(dir, count == UINT32_MAX ? static_cast<uint32_t>(tensors.size()) : count);
    for (const auto& m : meta) dir.insert(dir.end(), m.begin(), m.end());
    for (const RawTensor& t : tensors) {
      put_string(dir, t.name);
      dir.push_back(t.dtype);
      dir.push_back(t.kind);
      put(dir, t.group);
      dir.push_back(t.ndim == 255 ? static_cast<uint8_t>(t.shape.size()) : t.ndim);
      for (int i = 0; i < 3; i++) dir.push_back(i == 1 ? t.pad : uint8_t{0});
      for (const uint64_t d : t.shape) put(dir, d);
      put(dir, t.offset);
      put(dir, t.bytes);
      put(dir, t.ncrc == UINT32_MAX ? static_cast<uint32_t>(t.crc.size()) : t.ncrc);
      for (const uint32_t c : t.crc) put(dir, c);
    }
    dir.insert(dir.end(), tail.begin(), tail.end());
    std::vector<uint8_t> file;
    for (const char c : {'Q', 'N', 'M', 'O', 'D', 'E', 'L', '\x1a'}) file.push_back(static_cast<uint8_t>(c));
    put(file, version);
    put(file, header_bytes);
    put(file, file_bytes ? file_bytes : 4096 + data.size() + dir.size());
    put(file, dir_offset ? dir_offset : 4096 + data.size());
    put(file, dir_bytes ? dir_bytes : dir.size());
    put(file, crc32c(dir));
    file.resize(4096);
    file[4000] = header_pad;
    std::vector<uint8_t> crc;
    put(crc, crc32c(file));
    std::copy(crc.begin(), crc.end(), file.begin() + 44);
    file.insert(file.end(), data.begin(), data.end());
    file.insert(file.end(), dir.begin(), dir.end());
    return file;
  }
};

// One of each: 4 keys; F32 (3, 5), INT4 (16, 64) g64, experts BF16 (2, 8, 4).
Raw small() {
  Raw r;
  r.meta = {Raw::entry("a.count", 0, {static_cast<uint64_t>(-5)}), Raw::entry("b.real", 1, {0x3ff8000000000000}),
            Raw::entry("c.text", 2, {}, "wort \xc3\xa9"), Raw::entry("d.list", 3, {1, 2, static_cast<uint64_t>(-3)})};
  r.data = random_bytes(4 * 4096, 1);
  std::fill(r.data.begin() + 60, r.data.begin() + 4096, uint8_t{0});
  std::fill(r.data.begin() + 4096 + 544, r.data.begin() + 8192, uint8_t{0});
  for (int e = 0; e < 2; e++) std::fill(r.data.begin() + 8192 + 4096 * e + 192, r.data.begin() + 8192 + 4096 * (e + 1), uint8_t{0});
  const auto crc = [&](size_t at, size_t n) { return crc32c(std::span(r.data).subspan(at, n)); };
  r.tensors = {{"first", 0, 0, 0, {3, 5}, 4096, 60, {crc(0, 60)}},
               {"second", 5, 0, 64, {16, 64}, 8192, 544, {crc(4096, 544)}},
               {"many", 1, 1, 0, {2, 8, 4}, 12288, 8192, {crc(8192, 4096), crc(12288, 4096)}}};
  return r;
}

void write_small(const std::string& path, const Raw& r) {
  QnWriter w(path);
  w.set("d.list", std::vector<int64_t>{1, 2, -3});
  w.set("c.text", std::string("wort \xc3\xa9"));
  w.set("b.real", 7.0);
  const size_t first = w.declare({.name = "first", .dtype = DType::F32, .shape = {3, 5}});
  const size_t second = w.declare({.name = "second", .dtype = DType::INT4, .group = 64, .shape = {16, 64}});
  const size_t many = w.declare({.name = "many", .dtype = DType::BF16, .experts = true, .shape = {2, 8, 4}});
  w.layout();
  const auto data = std::span(r.data);
  w.write_expert(many, 1, data.subspan(12288, 4096));  // with its padding
  w.write(second, data.subspan(4096, 100));
  w.write(first, data.first(60));
  w.write(second, data.subspan(4196, 444));
  w.write_expert(many, 0, data.subspan(8192, 192));    // without
  w.set("a.count", int64_t{-5});
  w.set("b.real", 1.5);
  CHECK(w.total_bytes() == r.build().size());
  w.finish();
}

}  // namespace

TEST_CASE("qn: the writer's bytes are the documented ones") {
  TempDir dir;
  write_small(dir / "m.qn", small());
  CHECK(file_bytes(dir / "m.qn") == small().build());
}

TEST_CASE("qn: the reader returns what the bytes say") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  const Raw r = small();
  put_file(path, r.build());
  const QnFile f = QnFile::open(path);
  CHECK(f.size() == r.build().size());
  CHECK(f.path() == path);
  CHECK(f.integer("a.count", -5, -5) == -5);
  CHECK(f.real("b.real", 1, 2) == 1.5);
  CHECK(f.text("c.text") == "wort \xc3\xa9");
  CHECK(f.integers("d.list", 3, -3, 2) == std::vector<int64_t>{1, 2, -3});
  CHECK(f.has("a.count"));
  CHECK(!f.has("a"));
  CHECK(f.meta().size() == 4);
  REQUIRE(f.tensors().size() == 3);
  CHECK(f.tensors()[2].name == "many");
  CHECK(f.find("none") == nullptr);
  const QnTensor* second = f.find("second");
  REQUIRE(second);
  CHECK(second->group == 64);
  CHECK(std::equal(f.data(*second).begin(), f.data(*second).end(), r.data.begin() + 4096, r.data.begin() + 4096 + 544));

  const DType f32[] = {DType::F32}, quant[] = {DType::BF16, DType::INT4};
  const Tensor a = f.dense("first", f32, {3, 5});
  CHECK(a.data == f.mapping().bytes().data() + 4096);
  CHECK(a.ndim == 2);
  CHECK(a.row_stride == 5);
  CHECK(a.cols() == 5);
  const Tensor b = f.dense("second", quant, {16, 64});
  CHECK(b.dtype == DType::INT4);
  CHECK(b.group == 64);
  const Experts x = f.experts("many", 2, 8, 4);
  CHECK(x.count == 2);
  CHECK(x.data == f.mapping().bytes().data() + 12288);
  CHECK(x.down(1).bytes() == x.data + 4096 + 128);
  int calls = 0;
  uint64_t last = 0;
  f.verify(2, [&](uint64_t done, uint64_t total) {
    calls++;
    last = done;
    CHECK(total == 60 + 544 + 8192);
  });
  CHECK(calls > 0);
  CHECK(last == 60 + 544 + 8192);

  check_error(error_of([&] { f.dense("first", f32, {5, 3}); }), {path.c_str(), "tensor first: expected f32 (5, 3), got f32 (3, 5)"});
  check_error(error_of([&] { f.dense("second", f32, {16, 64}); }), {"tensor second: expected f32 (16, 64), got int4 g64 (16, 64)"});
  check_error(error_of([&] { f.dense("first", quant, {3, 5}); }), {"expected bf16 or int4 (3, 5), got f32 (3, 5)"});
  check_error(error_of([&] { f.dense("first", f32, {15}); }), {"expected f32 (15), got"});
  check_error(error_of([&] { f.dense("many", quant, {2, 8, 4}); }), {"got experts bf16 (2, 8, 4)"});
  check_error(error_of([&] { f.dense("gone", f32, {1}); }), {path.c_str(), "gone is missing", "f32 (1)"});
  check_error(error_of([&] { f.experts("gone", 2, 8, 4); }), {"gone is missing", "(2, 8, 4)"});
  check_error(error_of([&] { f.experts("many", 2, 4, 8); }), {"expected experts (2, 4, 8), got experts bf16 (2, 8, 4)"});
  check_error(error_of([&] { f.experts("first", 2, 4, 8); }), {"got dense f32 (3, 5)"});
  check_error(error_of([&] { f.integer("a.count", 0, 9); }), {path.c_str(), "key a.count: expected an integer from 0 to 9, got -5"});
  check_error(error_of([&] { f.integer("c.text", 0, 9); }), {"expected an integer from 0 to 9, got text"});
  check_error(error_of([&] { f.integer("zzz", 0, 9); }), {"key zzz is missing"});
  check_error(error_of([&] { f.real("b.real", 2, 3); }), {"b.real", "1.5"});
  check_error(error_of([&] { f.real("a.count", -9, 3); }), {"got an integer"});
  check_error(error_of([&] { f.text("d.list"); }), {"expected text, got a list of integers"});
  check_error(error_of([&] { f.integers("d.list", 2, -9, 9); }), {"d.list", "at most 2", "got 3"});
  check_error(error_of([&] { f.integers("d.list", 3, 0, 9); }), {"got -3"});
}

TEST_CASE("qn: every dtype, sections, several threads") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  struct One {
    QnTensor t;
    bool section;
    std::vector<uint8_t> bytes;
  };
  std::vector<One> all;
  const auto dense = [&](DType t, std::vector<int64_t> shape, uint16_t group) {
    all.push_back({{.name = "t" + std::to_string(all.size()), .dtype = t, .group = group, .shape = shape}, false, {}});
  };
  dense(DType::U8, {12345}, 0);
  dense(DType::F32, {1}, 0);
  dense(DType::BF16, {7, 4}, 0);
  dense(DType::I32, {2, 3, 4, 5}, 0);
  dense(DType::INT8, {33, 96}, 32);
  dense(DType::INT8, {16, 256}, 128);
  dense(DType::INT4, {40, 128}, 64);
  for (const DType t : {DType::INT4, DType::INT8, DType::BF16, DType::F32}) {
    dense(t, {3, 64, 32}, is_t16(t) ? 32 : 0);
    all.back().t.experts = all.back().section = true;
  }
  dense(DType::F32, {9}, 0);
  {
    QnWriter w(path);
    for (One& o : all) w.declare(o.t, o.section);
    w.layout();
    uint32_t seed = 10;
    for (size_t i = 0; i < all.size(); i++) all[i].bytes = random_bytes(w.tensor(i).bytes, seed++);
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 3; t++)
      threads.emplace_back([&, t] {
        for (size_t i = t; i < all.size(); i += 3) {
          const auto bytes = std::span<const uint8_t>(all[i].bytes);
          if (!all[i].t.experts) {
            w.write(i, bytes.first(bytes.size() / 3));
            w.write(i, bytes.subspan(bytes.size() / 3));
          } else {
            const size_t stride = bytes.size() / 3;
            for (const size_t e : {2, 0, 1}) w.write_expert(i, static_cast<int64_t>(e), bytes.subspan(e * stride, stride));
          }
        }
      });
    for (auto& t : threads) t.join();
    w.finish();
  }
  const QnFile f = QnFile::open(path);
  f.verify(3);
  REQUIRE(f.tensors().size() == all.size());
  CHECK(f.tensors()[0].offset == 4096);
  for (size_t i = 0; i < all.size(); i++) {
    const QnTensor& t = f.tensors()[i];
    CAPTURE(i);
    CHECK(t.name == all[i].t.name);
    CHECK(t.dtype == all[i].t.dtype);
    CHECK(t.shape == all[i].t.shape);
    CHECK(t.group == all[i].t.group);
    CHECK(t.experts == all[i].t.experts);
    CHECK(t.offset % (all[i].section ? 2 << 20 : 4096) == 0);
    const auto bytes = f.data(t);
    CHECK(std::equal(bytes.begin(), bytes.end(), all[i].bytes.begin(), all[i].bytes.end()));
    if (t.experts) continue;
    const DType any[] = {t.dtype};
    const Tensor v = t.shape.size() == 1   ? f.dense(t.name, any, {t.shape[0]})
                     : t.shape.size() == 2 ? f.dense(t.name, any, {t.shape[0], t.shape[1]})
                                           : f.dense(t.name, any, {t.shape[0], t.shape[1], t.shape[2], t.shape[3]});
    CHECK(v.ndim == t.shape.size());
    CHECK(v.row_stride == (v.ndim == 1 ? 1 : v.ndim == 4 ? 60 : t.shape[1]));
  }
  CHECK(f.tensors()[4].bytes == 3 * (4 * 16 * 2 + 4 * 512));  // INT8 (33, 96) g32: K padded to 128
}

// ---- damage -------------------------------------------------------------------------------------------------------------

TEST_CASE("qn: held in memory, the same bytes; a file that was cut is an error, and the mapping stays") {
  TempDir dir;
  const std::string path = dir / "m.qn", copy = dir / "copy.qn";
  {
    QnWriter w(path);
    w.declare({.name = "a", .dtype = DType::U8, .shape = {(9 << 20) + 5}});
    w.layout();
    w.write(0, random_bytes(w.tensor(0).bytes, 3));
    w.finish();
  }
  const QnFile mapped = QnFile::open(path);
  for (const int threads : {1, 3}) {
    QnFile held = QnFile::open(path);
    uint64_t last = 0;
    held.hold(threads, true, [&](uint64_t done, uint64_t total) {
      CHECK((done >= last && done <= total && total == held.size()));
      last = done;
    });
    CHECK(last == mapped.size());
    CHECK(held.size() == mapped.size());
    CHECK(std::ranges::equal(held.data(held.tensors()[0]), mapped.data(mapped.tensors()[0])));
    held.verify(2);
  }
  std::filesystem::copy_file(path, copy);
  QnFile cut = QnFile::open(copy);
  std::filesystem::resize_file(copy, cut.size() / 2);
  CHECK_THROWS_WITH_AS(cut.hold(2, false), doctest::Contains("became shorter"), Error);
}

TEST_CASE("qn: every flipped bit of header and directory is refused") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  const auto good = small().build();
  put_file(path, good);
  REQUIRE(open_error(path).empty());
  std::fstream io(path, std::ios::binary | std::ios::in | std::ios::out);
  const auto set = [&](size_t at, uint8_t b) {
    io.seekp(static_cast<std::streamoff>(at));
    io.put(static_cast<char>(b));
    io.flush();
  };
  int accepted = 0;
  size_t bits = 0;
  for (size_t at = 0; at < good.size(); at = at == 4095 ? 4096 + small().data.size() : at + 1) {
    for (int bit = 0; bit < 8; bit++, bits++) {
      set(at, static_cast<uint8_t>(good[at] ^ 1 << bit));
      const std::string e = open_error(path);
      accepted += e.empty() || e.find(path) == std::string::npos;
    }
    set(at, good[at]);
  }
  CHECK(accepted == 0);
  CHECK(bits > 8 * 4096 + 8 * 200);
  CHECK(open_error(path).empty());
}

TEST_CASE("qn: truncation at every length is refused, and so is what comes after the end") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  auto bytes = small().build();
  put_file(path, bytes);
  int accepted = 0, named = 0;
  for (size_t n = bytes.size(); n-- > 0;) {
    std::filesystem::resize_file(path, n);
    const std::string e = open_error(path);
    accepted += e.empty();
    named += e.find("truncated") != std::string::npos;
  }
  CHECK(accepted == 0);
  CHECK(named == static_cast<int>(bytes.size()) - 8);  // with less than the magic it is no model file at all
  std::filesystem::resize_file(path, 0);
  put_file(path, bytes);
  std::filesystem::resize_file(path, bytes.size() - 1);
  const std::string said = format("truncated: header says %zu bytes, file has %zu", bytes.size(), bytes.size() - 1);
  check_error(open_error(path), {path.c_str(), said.c_str()});
  bytes.push_back(0);
  put_file(path, bytes);
  check_error(open_error(path), {"too long"});
}

TEST_CASE("qn: verify names the damaged tensor and expert, the first in the file") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  const auto good = small().build();
  const auto damaged = [&](std::initializer_list<size_t> at) {
    auto b = good;
    for (const size_t i : at) b[i] ^= 4;
    put_file(path, b);
    return error_of([&] { QnFile::open(path).verify(2); });
  };
  CHECK(damaged({}) == "");
  check_error(damaged({4096}), {path.c_str(), "tensor first is damaged"});
  check_error(damaged({4155}), {"tensor first is"});
  check_error(damaged({8192 + 543}), {"tensor second is"});
  check_error(damaged({12288 + 191}), {"tensor many, expert 0, is"});
  check_error(damaged({16384}), {"tensor many, expert 1, is"});
  check_error(damaged({16384 + 4095}), {"tensor many, expert 1, is"});  // padding of a record counts
  for (int i = 0; i < 20; i++) check_error(damaged({16384, 12288, 8200}), {"tensor second is"});
  CHECK(damaged({5000}) == "");  // between tensors nothing is stored

  damaged({4096, 12288});  // of the first tensor, and of the first expert: only what is picked is looked at, and counted
  const auto picked = [&](std::initializer_list<const char*> names) {
    uint64_t all = 0;
    const QnFile file = QnFile::open(path);
    const std::string error = error_of([&] {
      file.verify(2, [&](uint64_t, uint64_t total) { all = total; },
                  [&](const QnTensor& t) { return std::ranges::any_of(names, [&](const char* name) { return t.name == name; }); });
    });
    if (error.empty()) CHECK(all == (names.size() ? file.find("second")->bytes : 0));
    return error;
  };
  CHECK(picked({}) == "");
  CHECK(picked({"second"}) == "");
  check_error(picked({"second", "many"}), {"tensor many, expert 0, is"});
  check_error(picked({"first", "second", "many"}), {"tensor first is"});

  const std::string said = damaged({8200});
  damaged({16384, 8200});
  const QnFile f = QnFile::open(path);
  const auto one = [&](const char* name, size_t record) { return error_of([&] { f.check(*f.find(name), record); }); };
  CHECK(one("first", 0) == "");
  CHECK(one("second", 0) == said);  // the words of verify()
  CHECK(one("many", 0) == "");
  check_error(one("many", 1), {"tensor many, expert 1, is damaged"});
  CHECK_THROWS_AS(f.check(*f.find("first"), 1), Bug);
}

TEST_CASE("qn: hostile numbers with good checksums, one by one") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  const auto refused = [&](auto change, std::initializer_list<const char*> parts) {
    Raw r = small();
    change(r);
    put_file(path, r.build());
    const std::string e = open_error(path);
    CAPTURE(*parts.begin());
    CHECK(e.find(path) == 0);
    check_error(e, parts);
  };
  const uint64_t huge = UINT64_MAX, half = uint64_t{1} << 63;
  // header
  refused([](Raw& r) { r.version = 2; }, {"format version 2, this program reads version 1", "newer"});
  refused([](Raw& r) { r.version = 0; }, {"format version 0"});
  refused([](Raw& r) { r.header_bytes = 8192; }, {"expected 4096"});
  refused([](Raw& r) { r.header_pad = 1; }, {"padding is not zero"});
  refused([](Raw& r) { r.file_bytes = 1 << 30; }, {"truncated: header says 1073741824 bytes"});
  refused([&](Raw& r) { r.file_bytes = huge; }, {"truncated"});
  for (const uint64_t v : {uint64_t{64}, uint64_t{4096}, uint64_t{20479}, uint64_t{20544}, half, huge, huge - 63})
    refused([&](Raw& r) { r.dir_offset = v; }, {"header: directory"});
  for (const uint64_t v : {uint64_t{1}, uint64_t{7}, uint64_t{100}, half, huge, huge - 20479})
    refused([&](Raw& r) { r.dir_bytes = v; }, {"header: directory"});
  refused([](Raw& r) { r.data.resize(r.data.size() + 32); }, {"header: directory"});  // not at a multiple of 64
  refused([](Raw& r) { r.tail.resize((64 << 20) + 1); }, {"header: directory of 67"});
  // counts
  for (const uint32_t v : {5u, 9999u}) refused([&](Raw& r) { r.metas = v; }, {"directory"});
  refused([](Raw& r) { r.metas = 3; }, {"unknown kind"});  // a key read as a tensor
  refused([](Raw& r) { r.metas = 1u << 31; }, {"at most 10000 keys"});
  for (const uint32_t v : {4u, 99999u}) refused([&](Raw& r) { r.count = v; }, {"ends inside"});
  refused([](Raw& r) { r.count = 2; }, {"left over"});
  refused([](Raw& r) { r.count = UINT32_MAX - 1; }, {"at most 100000 tensors"});
  refused([](Raw& r) { r.tail = {0}; }, {"1 bytes left over"});
  // keys
  const auto meta = [](std::vector<uint8_t> m) { return [m](Raw& r) { r.meta[3] = m; r.tensors.clear(); }; };
  refused(meta({255, 255, 255, 255, 'a'}), {"name of a key", "at most 256"});
  refused(meta({1, 0, 0, 0, 'z', 9, 0}), {"key z: unknown type 9"});
  refused(meta({1, 0, 0, 0, 'z', 2, 255, 255, 255, 127}), {"z: expected at most 1048576 bytes"});
  refused(meta({1, 0, 0, 0, 'z', 2, 255, 255, 0, 0}), {"ends inside"});
  refused(meta({1, 0, 0, 0, 'z', 3, 255, 255, 255, 255, 1}), {"ends inside", "34359738360"});
  refused(meta({1, 0, 0, 0, 'z', 0, 1, 2, 3}), {"ends inside"});
  refused(meta({1, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8}), {"not UTF-8"});
  refused(meta(Raw::entry("a.count", 0, {1})), {"key a.count comes twice"});
  for (const char* s : {"\xff", "\xc3", "\xc0\xaf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf0\x80\x80\x80",
                        "\xe2\x82", "a\x80"})
    refused(meta(Raw::entry("z", 2, {}, s)), {"z: not UTF-8"});
  // tensors
  const auto t0 = [](auto change) { return [change](Raw& r) { change(r.tensors[0]); }; };
  const auto t1 = [](auto change) { return [change](Raw& r) { change(r.tensors[1]); }; };
  const auto t2 = [](auto change) { return [change](Raw& r) { change(r.tensors[2]); }; };
  using T = RawTensor;
  refused(t0([](T& t) { t.name = ""; }), {"without a name"});
  refused(t0([](T& t) { t.name = std::string(257, 'n'); }), {"name of a tensor"});
  refused(t0([](T& t) { t.name = "second"; }), {"tensor second comes twice"});
  refused(t0([](T& t) { t.name = std::string("a\0b", 3); }), {"NUL"});
  refused(t0([](T& t) { t.dtype = 6; }), {"tensor first: unknown dtype 6"});
  refused(t0([](T& t) { t.dtype = 255; }), {"unknown dtype"});
  refused(t0([](T& t) { t.dtype = 1; }), {"takes 30 bytes, got 60"});
  refused(t0([](T& t) { t.kind = 2; }), {"unknown kind"});
  refused(t0([](T& t) { t.kind = 1; }), {"expected 3 dims"});
  refused(t0([](T& t) { t.group = 32; }), {"no groups"});
  refused(t0([](T& t) { t.ndim = 0; }), {"1 to 4 dims"});
  refused(t0([](T& t) { t.ndim = 5; }), {"1 to 4 dims"});
  refused(t0([](T& t) { t.ndim = 254; }), {"1 to 4 dims"});
  refused(t0([](T& t) { t.pad = 1; }), {"padding is not zero"});
  for (const uint64_t d : {uint64_t{0}, huge, half, (uint64_t{1} << 31) + 1})
    for (int i = 0; i < 2; i++) refused(t0([=](T& t) { t.shape[i] = d; }), {"tensor first: dim"});
  refused(t0([](T& t) { t.shape = {uint64_t{1} << 31, uint64_t{1} << 31}; t.bytes = 0; }), {"too large"});  // 2^64 bytes
  refused(t0([](T& t) { t.shape = std::vector<uint64_t>(4, uint64_t{1} << 31); t.bytes = 0; }), {"too large"});
  refused(t0([](T& t) { t.shape = {5, 5}; }), {"takes 100 bytes, got 60"});
  for (const uint64_t v : {uint64_t{0}, uint64_t{59}, uint64_t{61}, half, huge})
    refused(t0([=](T& t) { t.bytes = v; }), {"takes 60 bytes"});
  for (const uint64_t v : {uint64_t{0}, uint64_t{4097}, uint64_t{4128}, uint64_t{20480}, half, huge, huge - 4095, huge - 59})
    refused(t0([=](T& t) { t.offset = v; }), {"tensor first: 60 bytes at offset", "between 4096 and 20480"});
  refused(t0([](T& t) { t.offset = 8192; }), {"overlap"});
  refused(t0([](T& t) { t.offset = 16384; }), {"tensors many and first overlap"});
  refused(t0([](T& t) { t.ncrc = 0; }), {"expected 1 checksums, got 0"});
  refused(t0([](T& t) { t.ncrc = UINT32_MAX - 1; }), {"expected 1 checksums"});
  refused(t0([](T& t) { t.crc = {1, 2}; }), {"expected 1 checksums, got 2"});
  for (const uint16_t g : {uint16_t{0}, uint16_t{16}, uint16_t{48}, uint16_t{256}, uint16_t{65535}})
    refused(t1([=](T& t) { t.group = g; }), {"tensor second", "group of 32, 64 or 128"});
  refused(t1([](T& t) { t.group = 128; }), {"does not divide"});
  refused(t1([](T& t) { t.group = 32; }), {"takes 576 bytes, got 544"});
  refused(t1([](T& t) { t.dtype = 4; }), {"takes 1056 bytes, got 544"});
  refused(t1([](T& t) { t.shape = {16, 8, 8}; }), {"expected 2 dims"});
  refused(t1([](T& t) { t.shape = {1024}; }), {"expected 2 dims"});
  refused(t1([](T& t) { t.shape = {uint64_t{1} << 31, uint64_t{1} << 31}; }), {"too large"});
  refused(t1([](T& t) { t.shape = {17, 64}; }), {"takes 1088 bytes"});
  refused(t2([](T& t) { t.dtype = 3; }), {"experts are"});
  refused(t2([](T& t) { t.kind = 0; }), {"takes 128 bytes"});
  refused(t2([](T& t) { t.shape = {2, 32}; }), {"expected 3 dims"});
  refused(t2([](T& t) { t.shape = {3, 8, 4}; }), {"takes 12288 bytes"});
  refused(t2([](T& t) { t.shape = {65537, 8, 4}; }), {"out of range"});
  refused(t2([](T& t) { t.shape = {2, (1 << 20) + 1, 4}; }), {"out of range"});
  refused(t2([](T& t) { t.shape = {2, 8, (1 << 20) + 1}; }), {"out of range"});
  refused(t2([](T& t) { t.shape = {65536, 1 << 20, 1 << 20}; }), {"too large"});
  refused(t2([](T& t) { t.offset = 16384; }), {"tensor many: 8192 bytes at offset"});  // runs into the directory
  refused(t2([](T& t) { t.crc.pop_back(); }), {"expected 2 checksums, got 1"});
  // and what is merely unusual is taken
  Raw r = small();
  std::swap(r.tensors[0], r.tensors[2]);
  r.meta[3] = Raw::entry("", 3, {});
  put_file(path, r.build());
  CHECK(open_error(path) == "");
}

TEST_CASE("qn: not a number is never in range") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  QnWriter w(path);
  w.set("x", std::numeric_limits<double>::quiet_NaN());
  w.layout();
  w.finish();
  const QnFile f = QnFile::open(path);
  CHECK(error_of([&] { f.real("x", -INFINITY, INFINITY); }) != "");
}

TEST_CASE("qn: files that are something else") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  put_file(path, {});
  check_error(open_error(path), {"not a .qn model file"});
  put_file(path, random_bytes(10000, 3));
  check_error(open_error(path), {"not a .qn model file"});
  CHECK(open_error(dir.path) != "");
  CHECK(open_error(dir / "none") != "");
}

// ---- the writer's contracts ---------------------------------------------------------------------------------------------

TEST_CASE("QnWriter: nothing half-written gets the name") {
  TempDir dir;
  const std::string path = dir / "m.qn";
  const auto bytes = random_bytes(60, 4);
  const QnTensor one{.name = "one", .dtype = DType::F32, .shape = {3, 5}};
  const QnTensor many{.name = "many", .dtype = DType::BF16, .experts = true, .shape = {3, 8, 4}};
  {
    QnWriter w(path);
    w.declare(one);
    const size_t x = w.declare(many, true);
    w.layout();
    w.write(0, std::span(bytes).first(59));
    check_error(error_of([&] { w.finish(); }), {path.c_str(), "tensor one: 59 of 60 bytes"});
    w.write(0, std::span(bytes).last(1));
    const auto record = random_bytes(192, 5);
    w.write_expert(x, 0, record);
    w.write_expert(x, 2, record);
    check_error(error_of([&] { w.finish(); }), {"tensor many: expert 1 was not written"});
  }
  CHECK(std::filesystem::is_empty(dir.path));
}

TEST_CASE("QnWriter: broken contracts") {
  TempDir dir;
  QnWriter w(dir / "m.qn");
  const auto bytes = random_bytes(5000, 6);
  CHECK_THROWS_AS(w.total_bytes(), Bug);
  w.declare({.name = "one", .dtype = DType::F32, .shape = {3, 5}});
  w.declare({.name = "many", .dtype = DType::BF16, .experts = true, .shape = {3, 8, 4}});
  CHECK_THROWS_AS(w.declare({.name = "one", .dtype = DType::F32, .shape = {3, 5}}), Error);
  CHECK_THROWS_AS(w.declare({.name = "", .dtype = DType::F32, .shape = {3, 5}}), Error);
  CHECK_THROWS_AS(w.declare({.name = "g", .dtype = DType::INT4, .group = 64, .shape = {16, 96}}), Error);
  CHECK_THROWS_AS(w.declare({.name = "z", .dtype = DType::F32, .shape = {0}}), Error);
  CHECK_THROWS_AS(w.set("k", std::string("\xff")), Error);
  CHECK_THROWS_AS(w.set(std::string(257, 'k'), int64_t{1}), Error);
  CHECK_THROWS_AS(w.write(0, bytes), Bug);
  w.layout();
  CHECK_THROWS_AS(w.layout(), Bug);
  CHECK_THROWS_AS(w.declare({.name = "late", .dtype = DType::F32, .shape = {3, 5}}), Bug);
  CHECK_THROWS_AS(w.write(0, std::span(bytes).first(61)), Bug);
  CHECK_THROWS_AS(w.write(1, std::span(bytes).first(60)), Bug);
  CHECK_THROWS_AS(w.write(2, std::span(bytes).first(60)), Bug);
  CHECK_THROWS_AS(w.write_expert(0, 0, std::span(bytes).first(192)), Bug);
  CHECK_THROWS_AS(w.write_expert(1, 3, std::span(bytes).first(192)), Bug);
  CHECK_THROWS_AS(w.write_expert(1, -1, std::span(bytes).first(192)), Bug);
  CHECK_THROWS_AS(w.write_expert(1, 0, std::span(bytes).first(193)), Bug);
  w.write_expert(1, 0, std::span(bytes).first(192));
  CHECK_THROWS_AS(w.write_expert(1, 0, std::span(bytes).first(192)), Bug);
}
