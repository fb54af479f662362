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

__device__ __forceinline__ float of_rank_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

constexpr int kQuickExperts = 512;  // 16 logits per lane
// A logit and its expert: the best are the largest, of equal logits those with the lower index
using Candidate = uint64_t;
__device__ __forceinline__ Candidate candidate(float logit, int expert) {
  return static_cast<uint64_t>(rank_key(logit)) << 32 | ~static_cast<uint32_t>(expert);
}
__device__ __forceinline__ int expert_of(Candidate c) { return static_cast<int>(~static_cast<uint32_t>(c)); }
// How many of the first n of a list in shared memory come before c; up to 3 behind these must be zero.
__device__ __forceinline__ int place_of(Candidate c, const Candidate* list, int n) {
  int place = 0;
#pragma unroll 1
  for (int i = 0; i < n; i += 4)
#pragma unroll
    for (int j = 0; j < 4; j++) place += list[i + j] > c;
  return place;
}

struct Logits {
  const float* at;
  __device__ float operator()(int e) const { return at[e]; }
  __device__ float4 four(int e) const { return *reinterpret_cast<const float4*>(at + e); }
};
struct EarlyLogits {  // of a kernel that has not waited yet
  const float* at;
  __device__ float operator()(int e) const { return load_past_l1(at + e); }
  __device__ float4 four(int e) const { return load_past_l1(reinterpret_cast<const float4*>(at + e)); }
};

// The top `chosen` of E logits, best first, equal ones in order of their index; by one warp. E is a multiple of 4. ids (chosen) and list (32) are
// in shared memory, list and room for the logits (kQuickExperts) at 16 bytes; false: nothing is chosen, there were too many candidates, or too few
// that are numbers.
// At least `chosen` lanes have a maximum that is not below the chosen-th largest of the 32 maxima, so the answer is among the logits
// from there on: hardly ever more than a dozen or two. Each finds its own place by counting those before it.
// Few instructions: the kernels that call it are over in microseconds, and fetch each of them anew.
template <class Logit>
__device__ __forceinline__ bool quick_top(Logit logit, int experts, int chosen, int32_t* ids, Candidate* list, float* room) {
  constexpr int kEach = kQuickExperts / 32;
  const int lane = lane_id();
  float v[kEach], best = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; i += 4) {  // lane l: 32 i + 4 l ..
    const float4 q = 32 * i + 4 * lane < experts ? logit.four(32 * i + 4 * lane) : float4{NAN, NAN, NAN, NAN};  // never among the answer
    *reinterpret_cast<float4*>(room + 32 * i + 4 * lane) = q;
    v[i] = q.x, v[i + 1] = q.y, v[i + 2] = q.z, v[i + 3] = q.w;
  }
#pragma unroll
  for (int i = 0; i < kEach; i++) best = fmaxf(best, v[i]);  // of a number and a NaN, the number
  float4* maxima = reinterpret_cast<float4*>(list);
  reinterpret_cast<float*>(list)[lane] = best;
  __syncwarp();
  unsigned above = 0;  // bits, which take two instructions each; sums take three
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const float4 m = maxima[i / 4];
    above |= (m.x > best ? 1u << i : 0) | (m.y > best ? 2u << i : 0) | (m.z > best ? 4u << i : 0) | (m.w > best ? 8u << i : 0);
  }
  const float least = of_rank_key(__reduce_min_sync(kAll, __popc(above) < chosen ? rank_key(best) : ~0u));
  unsigned mine = 0;
#pragma unroll
  for (int i = 0; i < kEach; i++) mine |= v[i] >= least ? 1u << i : 0;
  const int count = __popc(mine);
  int at = 0, n = 0;
#pragma unroll
  for (int bit = 0; 1 << bit <= kEach; bit++) {
    const unsigned all = __ballot_sync(kAll, count >> bit & 1);
    at += __popc(all & ((1u << lane) - 1)) << bit, n += __popc(all) << bit;
  }
  if (n < chosen || n > 32) return false;
  __syncwarp();  // the maxima, which lie there, have been read
  int32_t* experts_in = reinterpret_cast<int32_t*>(list);
#pragma unroll 1
  for (; mine; mine &= mine - 1) {
    const int i = __ffs(static_cast<int>(mine)) - 1;
    experts_in[at++] = 32 * (i & ~3) + 4 * lane + (i & 3);
  }
  __syncwarp();
  const int expert = lane < n ? experts_in[lane] : 0;
  const Candidate own = lane < n ? candidate(room[expert], expert) : 0;
  __syncwarp();
  list[lane] = own;
  __syncwarp();
  const int place = place_of(own, list, n);
  if (lane < n && place < chosen) ids[place] = expert;
  __syncwarp();
  return true;
}

// The same for any E and K: each round finds the largest (key, index) below that of the round before.
template <class Logit>
__device__ __noinline__ void any_top(Logit logit, int experts, int chosen, int32_t* ids) {
  uint64_t last = ~uint64_t{0};
#pragma unroll 1
  for (int j = 0; j < chosen; j++) {
    uint64_t best = 0;
#pragma unroll 4
    for (int e = lane_id(); e < experts; e += 32) {
      const Candidate c = candidate(logit(e), e);
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
__device__ __forceinline__ void top(Logit logit, int experts, int chosen, int32_t* ids, Candidate* list, float* room) {
  if (experts <= kQuickExperts && experts % 4 == 0 && chosen <= 32 && quick_top(logit, experts, chosen, ids, list, room)) return;
  any_top(logit, experts, chosen, ids);
}

// What a token chose, from shared memory to `ids_out` and `weights` (chosen); by one warp.
__device__ __noinline__ static void store_choice(const float* logits, int experts, int chosen, bool renormalise, const int32_t* ids, int32_t* ids_out,
                                          float* weights) {
  const float largest = logits[ids[0]];
  float sum = 0;
#pragma unroll 1
  for (int i = lane_id(); i < (renormalise ? chosen : experts); i += 32) sum += expf(logits[renormalise ? ids[i] : i] - largest);
  sum = warp_sum(sum);
#pragma unroll 1
  for (int j = lane_id(); j < chosen; j += 32) {
    ids_out[j] = ids[j];
    weights[j] = expf(logits[ids[j]] - largest) / sum;
  }
}

}  // namespace qn::cuda
