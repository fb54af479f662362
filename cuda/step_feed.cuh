// The shared memory of the kernel of cuda/step.cuh, its barriers, and the ring of weights.
#pragma once
#include "cuda/choice.cuh"
#include "cuda/step.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {

// ---- shared memory ------------------------------------------------------------------------------------------------------

constexpr int kWindow = 16, kAhead = 8;  // streams: of the list, those in sight; how many of them from the phase's own on
constexpr int kRows = kFewTokens * kStepChosen;
constexpr int kNot = 255;
constexpr int kMaxima = kQuickExperts / 32;

// Where a warp is in the list of streams; the same in all its lanes.
struct alignas(16) Place {
  int held, slot;              // units asked for and not used up; where the next will go
  int stream, task, tasks;     // of the next copy
  int unit, end;
  int limit;                   // levels that may be used now
};

struct alignas(128) Control {
  Stream window[kWindow];                 // stream i of the list at i % kWindow
  Place place[kStepWarps];
  alignas(16) uint8_t phase[2][kPhaseBytes];
  alignas(16) float squares[kFewTokens * kStepWarps];
  alignas(16) uint32_t maxima[kFewTokens * kMaxima];
  Candidate list[kFewTokens][32];
  int32_t candidates[kFewTokens];
  int32_t distinct;                       // how many experts the last choice has
  float weights[kRows];                   // (T, K)
  int32_t ids[kRows];                     // (T, K)
  int32_t todo[kRows];                    // experts to compute, each once
  uint8_t slot[kRows][kFewTokens];        // which choice of token t the i-th of those is; kNot: none
  uint32_t used[kQuickExperts / 32];
};
constexpr int kControlBytes = sizeof(Control);

__host__ __device__ constexpr int kept_pitch(int k) { return k + 8; }  // values; of x for INT4 experts (cuda/unpack.cuh)
__host__ __device__ constexpr int natural_pitch(int k) { return k + 32; }

template <int Id, int Threads>
__device__ __forceinline__ void barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}
__device__ __forceinline__ void workers_sync() { barrier<1, kStepThreads>(); }
// A phase waits here, once and in every thread of the workers, until all blocks have ended the phases before it.
__device__ __forceinline__ void wait_for_all() { barrier<2, kStepThreads + 32>(); }
__device__ __forceinline__ void end_phase() { barrier<3, kStepThreads + 32>(); }

// ---- the ring -----------------------------------------------------------------------------------------------------------

constexpr int kLevelsMax = 5;
__device__ __forceinline__ void copy_async_wait_pending(int n) {
  if (n >= 4) copy_async_wait<4>();
  else if (n == 3) copy_async_wait<3>();
  else if (n == 2) copy_async_wait<2>();
  else if (n == 1) copy_async_wait<1>();
  else copy_async_wait<0>();
}

constexpr int step_unit_k(DType w) { return w == DType::BF16 ? 128 : 256; }
// First unit of warp i's slice of K
template <DType W>
__device__ __forceinline__ int slice(int k, int i) {
  return k / step_unit_k(W) * i / kStepWarps;
}
// The exact row that a warp has in a task behind the panels: which matrix and which row of it, or -1
__device__ __forceinline__ int exact_row(const Stream& s, int task, int warp, int& which) {
  const int row = (task - s.panels) * kStepWarps + warp;
  which = row < s.exact_rows[0] ? 0 : 1;
  const int r = which ? row - s.exact_rows[0] : row;
  return r < s.exact_rows[which] ? r : -1;
}

template <DType W>
class Feed : Place {
 public:
  // first: the phase's own stream
  __device__ __forceinline__ Feed(Control& c, uint8_t* ring, const StepArgs& args, int first)
      : c_(c), args_(args), allowed_(min(first + kAhead, args.stream_count)), lane_(thread_anew() & 31), warp_(thread_anew() >> 5) {
    static_cast<Place&>(*this) = c.place[warp_];
    slots_ = ring + warp_ * kUnitBytes;
    if (unit < end) point();
  }
  __device__ __forceinline__ void save() {
    if (lane_ == 0) c_.place[warp_] = *this;
    __syncwarp();
  }
  __device__ __forceinline__ void resume() { limit = args_.levels; }
  __device__ __forceinline__ void fill() {
#pragma unroll 1
    while (held < limit && next()) {
      copy();
      held++;
    }
  }
  // The oldest unit, once it has arrived. It must exist.
  __device__ __forceinline__ const uint8_t* front() {
    copy_async_wait_pending(held - 1);  // as many are younger
    __syncwarp();
    int at = slot - held;
    if (at < 0) at += args_.levels;
    return slots_ + at * kLevelBytes;
  }
  // It has been used by all lanes
  __device__ __forceinline__ void drop() {
    __syncwarp();
    held--;
  }
  __device__ __forceinline__ void pop() {
    drop();
    fill();
  }

 private:
  // Whether there is a next unit for this warp now
  __device__ __forceinline__ bool next() {
    if (unit < end) return true;
    const int grid = static_cast<int>(gridDim.x);
#pragma unroll 1
    do {
      task += grid;
      if (task >= tasks) {
        task -= grid;
        if (stream + 1 >= allowed_) return false;
        const Stream& s = c_.window[(stream + 1) % kWindow];
        if (s.pause) {
          if (held > 0) return false;
          slot = 0, limit = args_.low;
        }
        stream++, tasks = s.tasks, task = static_cast<int>(blockIdx.x) - grid;
        continue;
      }
      const Stream& s = c_.window[stream % kWindow];
      int which;
      if (task < s.panels) unit = slice<W>(s.k, warp_), end = slice<W>(s.k, warp_ + 1);
      else unit = 0, end = exact_row(s, task, warp_, which) >= 0;  // a row is a unit
    } while (unit >= end);
    point();
    return true;
  }
  // lo_, hi_: where the lane reads of the unit that is next: rows g and g + 8; tiles and scales; an exact row
  __device__ __forceinline__ void point() {
    const Stream& s = c_.window[stream % kWindow];
    exact_ = task >= s.panels;
    if (exact_) {
      int which;
      const int row = exact_row(s, task, warp_, which);
      lo_ = s.exact[which] + static_cast<int64_t>(row) * s.k * 2 + lane_ * 16;
      bytes_ = s.k * 2 - lane_ * 16;
    } else if (W == DType::BF16) {
      const int row = task * s.step + lane_ / 4, at = unit * 256 + lane_ % 4 * 16;
      lo_ = s.w + min(row, s.rows - 1) * s.stride + at, hi_ = s.w + min(row + s.pair, s.rows - 1) * s.stride + at;
    } else {
      const uint8_t* const panel = s.w + task * s.stride;
      bytes_ = (256 >> s.shift) * 32;  // of scales
      lo_ = panel + s.scale_bytes + unit * 4096 + lane_ * 16, hi_ = panel + unit * bytes_ + lane_ * 16;
    }
  }
  // Eight times 512 bytes. K is a multiple of a unit: only exact rows can be shorter.
  __device__ __forceinline__ void copy() {
    uint8_t* const to = slots_ + slot * kLevelBytes + lane_ * 16;
    if (exact_) {
#pragma unroll 1
      for (int i = 0; i < 8; i++) copy_weights_async16(to + i * 512, lo_ + i * 512, i * 512 < bytes_ ? 16 : 0);
    } else if (W == DType::BF16) {
#pragma unroll
      for (int i = 0; i < 4; i++) copy_weights_async16(to + i * 1024, lo_ + i * 64, 16), copy_weights_async16(to + i * 1024 + 512, hi_ + i * 64, 16);
      lo_ += 256, hi_ += 256;
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) copy_weights_async16(to + i * 512, lo_ + i * 512, 16);
      if (lane_ * 16 < bytes_) copy_weights_async16(to + 4096, hi_, 16);
      lo_ += 4096, hi_ += bytes_;
    }
    copy_async_commit();
    unit++;
    if (++slot == args_.levels) slot = 0;
  }

  Control& c_;
  uint8_t* slots_;
  const StepArgs& args_;
  const int allowed_;  // streams before that are in sight
  const int lane_, warp_;
  const uint8_t *lo_ = nullptr, *hi_ = nullptr;
  int bytes_ = 0;
  bool exact_ = false;
};

// Asks for what there is room for; resume: attention has ended, and all of the block know. A function that is called: it is wanted in
// many places, and the state of the ring needs no registers elsewhere.
template <DType W>
__device__ __noinline__ void top_up(Control& c, uint8_t* ring, const StepArgs& args, int first, bool resume) {
  Feed<W> feed(c, ring, args, first);
  if (resume) feed.resume();
  feed.fill();
  feed.save();
}

// total (two halves, to be added) += a unit times x, as operand D lies. x: of the lane's token from its first k on, valid where `live`.
template <DType W>
__device__ __forceinline__ void multiply_unit(float (&total)[2][4], const uint8_t* unit, const uint16_t* x, bool live, int shift, int lane) {
  uint32_t a[4];
  if constexpr (W == DType::BF16) {
    const uint4* const weights = reinterpret_cast<const uint4*>(unit) + lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 lo = weights[i * 64], hi = weights[i * 64 + 32], b = live ? *reinterpret_cast<const uint4*>(x + i * 32) : uint4{};
      bf16_fragment<0>(lo, hi, a), mma_16816(total[0], a, b.x, b.y);
      bf16_fragment<1>(lo, hi, a), mma_16816(total[1], a, b.z, b.w);
    }
  } else {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(unit + 4096) + lane / 4;
    float sum[2][4] = {};
#pragma unroll 4
    for (int i = 0; i < 8; i++) {
      const uint4 v = reinterpret_cast<const uint4*>(unit)[i * 32 + lane], b = live ? *reinterpret_cast<const uint4*>(x + i * 32) : uint4{};
      int8_fragment<0>(v, a), mma_16816(sum[0], a, b.x, b.y);
      int8_fragment<1>(v, a), mma_16816(sum[1], a, b.z, b.w);
      if ((i + 1) * 32 & ((1 << shift) - 1)) continue;
      const float l = half_bits_to_float(scales[0]), h = half_bits_to_float(scales[8]);
      scales += kPanelRows;
      total[0][0] += l * (sum[0][0] + sum[1][0]), total[0][1] += l * (sum[0][1] + sum[1][1]);
      total[0][2] += h * (sum[0][2] + sum[1][2]), total[0][3] += h * (sum[0][3] + sum[1][3]);
#pragma unroll
      for (int j = 0; j < 4; j++) sum[0][j] = sum[1][j] = 0;
    }
  }
}

}  // namespace qn::cuda
