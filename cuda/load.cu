// File -> device memory. The format of the file is the format of the kernels, so loading is copying, and the checksums come along.
//
//   pieces --sort, join neighbours--> jobs --one thread each--> [ pread 512 KiB, crc32c of it, ... ] 4 MiB --cudaMemcpyAsync--> device
//
// A job is a run of bytes that is contiguous both in the file and on the device: small pieces (one expert is 1.6 MB) joined until
// they are worth a few copies, or a single large one. Each thread has a stream and three pinned buffers: while two are on their way
// it fills the third. Steps of 512 KiB let the checksum find its bytes in the L2 cache. One core reads a warm file at 8 to 10 GB/s
// and sums at 20 and more, so 8 to 10 of them fill a PCIe 5 link (54 GB/s). Pinning costs a quarter of a second per GB: 12 MiB per
// thread are little, and a thread that finds no work pins nothing.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/kernels.h"
#include "ggml-lite/base/hash.h"

namespace qn::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kBuffer = 4 << 20, kStep = 512 << 10;
constexpr int kBuffers = 3;
constexpr uint64_t kJob = 16 << 20;    // joined pieces end here
constexpr auto kReport = std::chrono::milliseconds(50);
constexpr size_t kNone = SIZE_MAX;

struct Job {
  size_t begin, end;  // of the sorted pieces
  uint64_t bytes;
  size_t lowest;      // of the numbers of its pieces
};

// Adds the time it lives to `sum`.
class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum) {}
  ~Stopwatch() { sum_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;

 private:
  double& sum_;
  const Clock::time_point start_ = Clock::now();
};

// The pinned buffers of a thread and the stream that empties them.
class Ring {
 public:
  Ring() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "load: cudaStreamCreate"); }
  ~Ring() {
    cudaStreamSynchronize(stream_);  // copies may still read the buffers
    for (Slot& s : slots_) {
      if (s.sent) cudaEventDestroy(s.sent);
      if (s.data) cudaFreeHost(s.data);
    }
    cudaStreamDestroy(stream_);
  }
  Ring(const Ring&) = delete;

  // The next buffer, once its last copy has ended.
  uint8_t* next() {
    Slot& s = slots_[at_ = (at_ + 1) % kBuffers];
    if (s.data) {
      check(cudaEventSynchronize(s.sent), "load: copy to the device");
      return s.data;
    }
    check(cudaEventCreateWithFlags(&s.sent, cudaEventDisableTiming | cudaEventBlockingSync), "load: cudaEventCreate");
    check(cudaHostAlloc(reinterpret_cast<void**>(&s.data), kBuffer, cudaHostAllocDefault), "load: 4 MiB of pinned memory (try fewer --threads)");
    return s.data;
  }
  void send(void* to, size_t n) {  // what lies in the buffer next() gave
    check(cudaMemcpyAsync(to, slots_[at_].data, n, cudaMemcpyHostToDevice, stream_), "load: copy to the device");
    check(cudaEventRecord(slots_[at_].sent, stream_), "load: cudaEventRecord");
  }
  void finish() { check(cudaStreamSynchronize(stream_), "load: copy to the device"); }

 private:
  struct Slot {
    uint8_t* data = nullptr;
    cudaEvent_t sent = nullptr;
  };
  cudaStream_t stream_ = nullptr;
  Slot slots_[kBuffers];
  int at_ = 0;
};

class Loader {
 public:
  Loader(const File& file, std::span<const LoadPiece> pieces, bool check) : file_(file), pieces_(pieces), check_(check) {
    for (size_t i = 0; i < pieces.size(); i++)
      if (pieces[i].bytes) order_.push_back(i);
    std::ranges::sort(order_, {}, [&](size_t i) { return pieces[i].offset; });
    for (size_t i = 0; i < order_.size(); i++) {
      const LoadPiece& p = piece(i);
      report_.bytes += p.bytes;
      if (i && joins(jobs_.back(), piece(i - 1), p)) {
        Job& j = jobs_.back();
        j.end = i + 1, j.bytes += p.bytes, j.lowest = std::min(j.lowest, order_[i]);
      } else {
        jobs_.push_back({i, i + 1, p.bytes, order_[i]});
      }
    }
    // The largest first: the longest tasks end while small ones keep the other threads busy. The rest in the order of the file.
    std::ranges::stable_sort(jobs_, std::ranges::greater(), [](const Job& j) { return j.bytes > kJob ? j.bytes : 0; });
    check_cuda(cudaGetDevice(&device_));
  }

  LoadReport run(int threads, const std::function<void(uint64_t, uint64_t)>& progress) {
    const auto start = Clock::now();
    report_.threads = static_cast<int>(std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), jobs_.size()));
    {
      std::vector<std::jthread> readers;
      readers.reserve(static_cast<size_t>(report_.threads));
      const StopOnExit stop{stop_};  // goes before the readers do: they are joined, whatever comes
      running_ = report_.threads;
      try {
        for (int i = 0; i < report_.threads; i++) readers.emplace_back([this] { reader(); });
      } catch (const std::system_error&) {
        fail("load: the system refused thread %zu of %d; try fewer --threads", readers.size() + 1, report_.threads);
      }
      std::unique_lock lock(mutex_);
      while (running_) {
        ended_.wait_for(lock, kReport);
        lock.unlock();
        if (progress) progress(done_, report_.bytes);
        lock.lock();
      }
    }
    if (error_) std::rethrow_exception(error_);
    report_.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    return report_;
  }
  size_t damaged() const { return damaged_; }  // number of the first damaged piece, kNone: none

 private:
  struct StopOnExit {
    std::atomic<bool>& stop;
    ~StopOnExit() { stop = true; }
  };

  static void check_cuda(cudaError_t e) { cuda::check(e, "load"); }
  const LoadPiece& piece(size_t i) const { return pieces_[order_[i]]; }
  static bool joins(const Job& j, const LoadPiece& last, const LoadPiece& p) {
    return last.offset + last.bytes == p.offset && static_cast<uint8_t*>(last.to) + last.bytes == p.to && j.bytes + p.bytes <= kJob;
  }

  void reader() {
    LoadReport mine;
    std::exception_ptr error;
    try {
      check_cuda(cudaSetDevice(device_));
      Ring ring;
      for (size_t i; !stop_ && (i = next_++) < jobs_.size();) copy(jobs_[i], ring, mine);
      const Stopwatch watch(mine.wait);
      ring.finish();
    } catch (...) {
      error = std::current_exception();
      stop_ = true;
    }
    const std::lock_guard lock(mutex_);
    report_.read += mine.read, report_.check += mine.check, report_.wait += mine.wait;
    if (error && !error_) error_ = error;
    if (--running_ == 0) ended_.notify_one();
  }

  void copy(const Job& j, Ring& ring, LoadReport& mine) {
    if (j.lowest > damaged_) return;  // only what lies before the first damaged piece is still of interest
    const LoadPiece& first = piece(j.begin);
    Sum sum{j.begin, piece(j.begin).bytes, 0};
    for (uint64_t at = 0; at < j.bytes && !stop_;) {
      const size_t n = static_cast<size_t>(std::min<uint64_t>(kBuffer, j.bytes - at));
      uint8_t* buffer;
      {
        const Stopwatch watch(mine.wait);
        buffer = ring.next();
      }
      for (size_t in = 0; in < n; in += kStep) {
        const std::span<uint8_t> step{buffer + in, std::min(kStep, n - in)};
        {
          const Stopwatch watch(mine.read);
          file_.read(first.offset + at + in, step);
        }
        const Stopwatch watch(mine.check);
        if (check_) add(sum, step);
      }
      ring.send(static_cast<uint8_t*>(first.to) + at, n);
      at += n, done_ += n;
    }
  }

  // The checksum of the piece whose bytes are coming.
  struct Sum {
    size_t piece;   // in the sorted order
    uint64_t left;  // bytes
    uint32_t crc;
  };
  void add(Sum& s, std::span<const uint8_t> bytes) {
    while (!bytes.empty()) {
      const size_t n = static_cast<size_t>(std::min<uint64_t>(s.left, bytes.size()));
      s.crc = crc32c(bytes.first(n), s.crc);
      bytes = bytes.subspan(n), s.left -= n;
      if (s.left) return;
      if (s.crc != piece(s.piece).crc) note_damage(order_[s.piece]);
      if (++s.piece < order_.size()) s.left = piece(s.piece).bytes, s.crc = 0;
    }
  }
  void note_damage(size_t i) {
    for (size_t lowest = damaged_; i < lowest && !damaged_.compare_exchange_weak(lowest, i);) {
    }
  }

  const File& file_;
  const std::span<const LoadPiece> pieces_;
  const bool check_;
  std::vector<size_t> order_;  // numbers of the pieces, by offset
  std::vector<Job> jobs_;
  int device_ = 0;

  std::atomic<size_t> next_ = 0, damaged_ = kNone;
  std::atomic<uint64_t> done_ = 0;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;  // of what follows
  std::condition_variable ended_;
  int running_ = 0;
  std::exception_ptr error_;
  LoadReport report_;
};

}  // namespace

LoadReport load(const File& file, std::span<const LoadPiece> pieces, int threads, bool check, const std::function<void(size_t)>& damaged,
                const std::function<void(uint64_t, uint64_t)>& progress) {
  Loader loader(file, pieces, check);
  const LoadReport report = loader.run(threads, progress);
  if (const size_t i = loader.damaged(); i != kNone) {
    damaged(i);
    QN_CHECK(false, "load: piece %zu is damaged, and damaged() returned", i);
  }
  return report;
}

}  // namespace qn::cuda
