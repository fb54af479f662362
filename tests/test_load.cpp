// Loading a file into the memory of a GPU. Where there is none every case says SKIPPED.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "cuda/cuda.h"
#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"
#include "ggml-lite/core/device.h"
#include "tests/temp_dir.h"

namespace qn {
namespace {

using Bytes = std::vector<uint8_t>;

bool no_gpu() {
  if (!list_cuda_devices().empty()) return false;
  MESSAGE("SKIPPED: no GPU");
  return true;
}

// A file whose pieces have neighbours in every way: joined in file and memory, apart in one of them, smaller than a step of the
// checksum, larger than what one thread joins, of no bytes at all, and not in the order of the file.
class Sample {
 public:
  explicit Sample(Device& device) : device_(device) {
    std::mt19937_64 random(7);
    for (int i = 0; i < 90; i++) {
      const uint64_t n = i == 20   ? (21 << 20) + 3
                         : i == 50 ? 4 << 20
                         : i == 60 ? 0
                         : i % 3   ? random() % 40 * Device::kPlaceAlign
                         : i % 2   ? 1 + random() % 100
                                   : random() % (2 << 20);
      if (i % 4 == 0) bytes_.resize(bytes_.size() + random() % 5000);
      pieces_.push_back({bytes_.size(), n, nullptr, 0});
      bytes_.resize(bytes_.size() + n);
    }
    bytes_.resize(bytes_.size() + 100);
    for (uint8_t& b : bytes_) b = static_cast<uint8_t>(random());
    write();
    std::ranges::shuffle(std::span(pieces_).subspan(30), random);
    uint64_t reserve = 0;
    for (const LoadPiece& p : pieces_) reserve += (p.bytes + Device::kPlaceAlign - 1) / Device::kPlaceAlign * Device::kPlaceAlign;
    device_.reserve_weights(reserve);
    for (LoadPiece& p : pieces_) {
      p.to = const_cast<void*>(device_.place(bytes_.data() + p.offset, p.bytes));
      p.crc = crc32c(std::span(bytes_).subspan(p.offset, p.bytes));
    }
  }

  void write() const { put_file(path(), bytes_); }
  std::string path() const { return dir_ / "weights"; }
  void flip(uint64_t at) { bytes_[at] ^= 4; }
  const std::vector<LoadPiece>& pieces() const { return pieces_; }

  static constexpr size_t kUndamaged = SIZE_MAX;
  // Number of the piece that was reported as damaged
  size_t load(int threads, bool check = true) {
    size_t bad = kUndamaged;
    uint64_t last = 0, sum = 0;
    for (const LoadPiece& p : pieces_) sum += p.bytes;
    auto damaged = [&](size_t i) {
      bad = i;
      fail("damaged");
    };
    auto progress = [&](uint64_t done, uint64_t total) {
      CHECK((done >= last && done <= total));
      last = done;
    };
    const File file = File::open_read(path());
    try {
      const LoadReport r = device_.load(file, pieces_, threads, check, damaged, progress);
      CHECK(r.bytes == sum);
      CHECK(last == sum);
      CHECK((r.threads >= 1 && r.threads <= threads));
      CHECK((r.seconds > 0 && r.read > 0));
    } catch (const Error& e) {
      CHECK(std::string(e.what()) == "damaged");
    }
    return bad;
  }
  int different() {
    int n = 0;
    for (const LoadPiece& p : pieces_) {
      Bytes got(p.bytes);
      if (p.bytes) device_.download(got.data(), p.to, p.bytes);
      n += p.bytes && std::memcmp(got.data(), bytes_.data() + p.offset, p.bytes) != 0;
    }
    return n;
  }
  void wipe() {
    for (const LoadPiece& p : pieces_)
      if (p.bytes) device_.zero(p.to, p.bytes);
  }

 private:
  Device& device_;
  TempDir dir_;
  Bytes bytes_;
  std::vector<LoadPiece> pieces_;
};

}  // namespace

TEST_CASE("CUDA: pieces of a file arrive, whatever their sizes and the number of threads") {
  if (no_gpu()) return;
  const auto device = make_cuda_device(0);
  Sample s(*device);
  for (const int threads : {1, 3, 16, 200}) {
    CAPTURE(threads);
    s.wipe();
    CHECK(s.different() > 0);
    CHECK(s.load(threads) == Sample::kUndamaged);
    CHECK(s.different() == 0);
  }
}

TEST_CASE("CUDA: a flipped bit of a file is found while it is loaded, and the first damaged piece is named") {
  if (no_gpu()) return;
  const auto device = make_cuda_device(0);
  Sample s(*device);
  std::mt19937_64 random(8);
  for (int round = 0; round < 12; round++) {
    std::vector<uint64_t> flips;
    size_t lowest = SIZE_MAX;
    for (int i = 0; i <= round % 3; i++) {
      const size_t at = round == 0 ? 20 : random() % s.pieces().size();  // the large one, in its last byte
      const LoadPiece& p = s.pieces()[at];
      const uint64_t in = p.offset + (round == 0 ? p.bytes - 1 : p.bytes ? random() % p.bytes : 0);
      if (!p.bytes || std::ranges::count(flips, in)) continue;
      flips.push_back(in), lowest = std::min(lowest, at);
      s.flip(in);
    }
    s.write();
    CAPTURE(round);
    CHECK(s.load(1 + round) == lowest);
    if (round == 1) CHECK(s.load(2, false) == Sample::kUndamaged);  // not looked at
    for (const uint64_t at : flips) s.flip(at);
  }
  s.write();
  CHECK(s.load(4) == Sample::kUndamaged);
  CHECK(s.different() == 0);
}

TEST_CASE("CUDA: a file that ends too early is refused while it is loaded") {
  if (no_gpu()) return;
  const auto device = make_cuda_device(0);
  TempDir dir;
  put_file(dir / "short", Bytes(10000, 1));
  device->reserve_weights(1 << 20);
  const LoadPiece p{4096, 8192, const_cast<void*>(device->place(nullptr, 8192)), 0};
  CHECK_THROWS_WITH_AS(device->load(File::open_read(dir / "short"), {&p, 1}, 4, true, [](size_t) {}, {}), doctest::Contains("ends at 10000"), Error);
}

}  // namespace qn
