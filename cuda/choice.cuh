// The choice of experts: the top K of E logits, by one warp.
#pragma once
#include "cuda/common.cuh"

namespace qn::cuda {

constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

// Unsigned integers in the order of the logits; -0 is 0, NaN comes last.
__device__ __forceinline__ uint32_t rank_key(float v) {
  v += 0.f;
  const uint32_t u = __float_as_uint(v);
  return v != v ? 0u : u & 0x80000000u ? ~u : u | 0x80000000u;
}

constexpr int kQuickExperts = 512;  // 16 keys per lane
struct Candidate {
  uint32_t key;
  int32_t expert;
};

struct Logits {
  const float* at;
  __device__ float operator()(int e) const { return at[e]; }
};
struct EarlyLogits {  // of a kernel that has not waited yet
  const float* at;
  __device__ float operator()(int e) const { return load_past_l1(at + e); }
};

// The top `chosen` of E logits, best first, equal ones in order of their index; by one warp. logit(e): that of expert e. ids (chosen)
// and list (32) are in shared memory; false: there were too many candidates, nothing is chosen.
// At least `chosen` lanes have a maximum that is not below the chosen-th largest of the 32 maxima, so the answer is among the keys
// from there on: hardly ever more than a dozen or two. Each finds its own place by counting those before it.
template <class Logit>
__device__ __forceinline__ bool quick_top(Logit logit, int experts, int chosen, int32_t* ids, Candidate* list) {
  const int lane = lane_id();
  float v[kQuickExperts / 32];
  uint32_t key[kQuickExperts / 32], best = 0;
#pragma unroll
  for (int i = 0; i < kQuickExperts / 32; i++) v[i] = logit(min(32 * i + lane, experts - 1));  // no branches: all at once
#pragma unroll
  for (int i = 0; i < kQuickExperts / 32; i++) key[i] = 32 * i + lane < experts ? rank_key(v[i]) : 0;
#pragma unroll
  for (int i = 0; i < kQuickExperts / 32; i++) best = max(best, key[i]);
  int above = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) above += __shfl_sync(kAll, best, i) > best;
  const uint32_t least = __reduce_min_sync(kAll, above < chosen ? best : ~0u);
  int n = 0;
#pragma unroll
  for (int i = 0; i < kQuickExperts / 32; i++) {
    const bool in = key[i] >= least && 32 * i + lane < experts;
    const unsigned all = __ballot_sync(kAll, in);
    if (all == 0) continue;
    const int at = n + __popc(all & ((1u << lane) - 1));
    if (in && at < 32) list[at] = {key[i], 32 * i + lane};
    n += __popc(all);
  }
  if (n > 32) return false;
  __syncwarp();
  const Candidate mine = lane < n ? list[lane] : Candidate{0, 0};
  int place = 0;
#pragma unroll 4
  for (int i = 0; i < n; i++) {  // the list is in order of the index
    const uint32_t other = __shfl_sync(kAll, mine.key, i);
    place += other > mine.key || (other == mine.key && i < lane);
  }
  if (lane < n && place < chosen) ids[place] = mine.expert;
  __syncwarp();
  return true;
}

// The same for any E and K: each round finds the largest (key, index) below that of the round before.
template <class Logit>
__device__ __noinline__ void any_top(Logit logit, int experts, int chosen, int32_t* ids) {
  uint64_t last = ~uint64_t{0};
  for (int j = 0; j < chosen; j++) {
    uint64_t best = 0;
    for (int e = lane_id(); e < experts; e += 32) {
      const uint64_t c = static_cast<uint64_t>(rank_key(logit(e))) << 32 | ~static_cast<uint32_t>(e);
      if (c < last && c > best) best = c;
    }
    const uint32_t high = static_cast<uint32_t>(best >> 32), top = __reduce_max_sync(kAll, high);
    const uint32_t low = __reduce_max_sync(kAll, high == top ? static_cast<uint32_t>(best) : 0u);
    last = static_cast<uint64_t>(top) << 32 | low;
    if (lane_id() == 0) ids[j] = static_cast<int32_t>(~low);
  }
  __syncwarp();
}

template <class Logit>
__device__ __forceinline__ void top(Logit logit, int experts, int chosen, int32_t* ids, Candidate* list) {
  if (experts <= kQuickExperts && chosen <= 32 && quick_top(logit, experts, chosen, ids, list)) return;
  any_top(logit, experts, chosen, ids);
}

// What a token chose, from shared memory to `ids_out` and `weights` (chosen); by one warp.
__device__ __noinline__ static void store_choice(const float* logits, int experts, int chosen, bool renormalise, const int32_t* ids, int32_t* ids_out,
                                          float* weights) {
  const float largest = logits[ids[0]];
  float sum = 0;
  for (int i = lane_id(); i < (renormalise ? chosen : experts); i += 32) sum += expf(logits[renormalise ? ids[i] : i] - largest);
  sum = warp_sum(sum);
  for (int j = lane_id(); j < chosen; j += 32) {
    ids_out[j] = ids[j];
    weights[j] = expf(logits[ids[j]] - largest) / sum;
  }
}

}  // namespace qn::cuda
