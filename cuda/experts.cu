// Experts of which only some are in memory of the device (core/experts.h): places, fetching, the host's part.
//
//   place  one block: every token's choice by a warp, then the list of distinct experts, hits, misses. The host's request goes out first, for
//          the host is what the others will wait for; then victims are looked for.
//   fetch  host memory -> slots, over the bus; a few dozen blocks keep it busy
//   likely the router of the next layer on what there is of its input: advice to the host
//   join   waits for the host's answer and adds it
//
// Ordering. The box is written by all threads of `place`: each fences (membar.sys), the block meets, one thread stores `request` with release at
// system scope. The host's thread sees the number with acquire, computes, writes `out` and stores `done` with release; `join` polls with acquire
// and then reads `out` past the caches. The next request comes from the next layer's `place`, which runs after `join`: the host's reads of the
// box are over by then, since it has answered.
#include "cuda/choice.cuh"
#include "cuda/decode.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kFetchThreads = 512, kFetchBlocks = 48;

struct Place {
  const float *x, *logits;  // (T, D), (T, E)
  int tokens, experts, chosen, d;
  bool renormalise;
  int64_t stride;           // bytes of a record
  ExpertHome home;
  int32_t* ids;             // (T, K)
  float* weights;           // (T, K)
  ExpertBox box;
  int32_t* fetch;           // count, then (expert, slot) of each
};

__device__ __forceinline__ void store_release_system(uint32_t* p, uint32_t v) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// The slot of least last_use among those unused since `before`; -1: none. By the whole block; the same in every thread.
__device__ __forceinline__ int oldest_slot(const ExpertHome& home, int64_t before, int64_t* scratch) {
  const int tid = static_cast<int>(threadIdx.x);
  constexpr int64_t kNone = INT64_MAX;
  int64_t best = kNone;  // last_use; no two alike
  int slot = -1;
  for (int s = tid; s < home.count; s += kThreads)
    if (const int64_t used = home.last_use[s]; used <= before && used < best) best = used, slot = s;
  int64_t least = best;
#pragma unroll
  for (int i = 16; i; i /= 2) least = min(least, __shfl_xor_sync(kAll, least, i));
  if (lane_id() == 0) scratch[warp_id()] = least;
  __syncthreads();
  least = scratch[0];
  for (int i = 1; i < kThreads / 32; i++) least = min(least, scratch[i]);
  if (best == least && slot >= 0) scratch[kThreads / 32] = slot;
  __syncthreads();
  const int found = least == kNone ? -1 : static_cast<int>(scratch[kThreads / 32]);
  __syncthreads();  // scratch is written again
  return found;
}

__global__ void __launch_bounds__(kThreads) place_experts_k(const Place a) {
  extern __shared__ int32_t memory[];
  __shared__ __align__(16) Candidate list[kPlacedTokens][32];
  __shared__ __align__(16) float room[kPlacedTokens][kQuickExperts];
  __shared__ int64_t scratch[kThreads / 32 + 1];
  __shared__ int hit_count, miss_count, pair_count;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id(), n = a.tokens * a.chosen;
  int32_t* ids = memory;      // (n)
  int32_t* missing = ids + n; // (n) distinct ones
  const ExpertHome& home = a.home;
  let_next_start();
  wait_for_previous();
  for (int t = warp; t < a.tokens; t += kThreads / 32) {
    const float* logits = a.logits + static_cast<int64_t>(t) * a.experts;
    top(Logits{logits}, a.experts, a.chosen, ids + t * a.chosen, list[t], room[t]);
    store_choice(logits, a.experts, a.chosen, a.renormalise, ids + t * a.chosen, a.ids + t * a.chosen, a.weights + t * a.chosen);
  }
  if (tid == 0) pair_count = 0;
  __syncthreads();
  const int64_t before = *home.clock;
  if (warp == 0) {
    int hits = 0, misses = 0;
    for (int base = 0; base < n; base += 32) {
      const int i = base + lane;
      bool first = i < n;
      if (a.tokens > 1)
        for (int j = 0; first && j < i; j++) first = ids[j] != ids[i];
      const int e = first ? ids[i] : 0, slot = first ? home.slot_of[e] : -1;
      const unsigned below = (1u << lane) - 1, firsts = __ballot_sync(kAll, first), hit = __ballot_sync(kAll, slot >= 0);
      if (slot >= 0) home.last_use[slot] = before + 1 + hits + __popc(hit & below);
      else if (first) missing[misses + __popc(firsts & ~hit & below)] = e;
      hits += __popc(hit), misses += __popc(firsts & ~hit);
    }
    if (lane == 0) hit_count = hits, miss_count = misses;
  }
  __syncthreads();
  const int misses = miss_count;
  const int fetched = min(fetched_misses(misses, home.host ? home.fetch_percent : 0), home.count - hit_count);
  if (misses > fetched) {  // what the host is asked for
    for (int i = tid; i < n; i += kThreads)
      for (int j = fetched; j < misses; j++)
        if (missing[j] == ids[i]) {
          const int at = atomicAdd(&pair_count, 1);
          a.box.token[at] = i / a.chosen, a.box.expert[at] = ids[i], a.box.weight[at] = a.weights[i];
        }
    for (int i = 4 * tid; i < a.tokens * a.d; i += 4 * kThreads) *reinterpret_cast<float4*>(a.box.x + i) = *reinterpret_cast<const float4*>(a.x + i);
    __threadfence_system();
    __syncthreads();
    if (tid == 0) {
      *a.box.layer = home.layer, *a.box.tokens = a.tokens, *a.box.pairs = pair_count;
      const uint32_t number = a.box.pending[1] + 1;
      a.box.pending[0] = a.box.pending[1] = number;
      store_release_system(a.box.request, number);
    }
  } else if (tid == 0) {
    a.box.pending[0] = 0;
  }
  for (int i = 0; i < fetched; i++) {
    const int slot = oldest_slot(home, before, scratch);
    if (tid == 0) {
      const int e = missing[i], old = home.expert_in[slot];
      if (old >= 0) home.slot_of[old] = -1, home.at[old] = nullptr;
      home.expert_in[slot] = e, home.slot_of[e] = slot, home.at[e] = home.slots + slot * a.stride;
      home.last_use[slot] = before + 1 + hit_count + i;
      a.fetch[1 + 2 * i] = e, a.fetch[2 + 2 * i] = slot;
    }
    __syncthreads();
  }
  if (tid == 0) *home.clock = before + hit_count + fetched, a.fetch[0] = fetched;
}

// 64 bytes of a record per thread and round
__global__ void __launch_bounds__(kFetchThreads) fetch_experts_k(const int32_t* fetch, const uint8_t* host, uint8_t* slots, int64_t stride) {
  wait_for_previous();
  let_next_start();  // not before: likely_experts_k reads what the kernels before have left
  const int count = fetch[0];
  const int64_t pieces = stride / 16, step = static_cast<int64_t>(gridDim.x) * kFetchThreads;
  for (int i = 0; i < count; i++) {
    const uint4* from = reinterpret_cast<const uint4*>(host + fetch[1 + 2 * i] * stride);
    uint4* to = reinterpret_cast<uint4*>(slots + fetch[2 + 2 * i] * stride);
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kFetchThreads + threadIdx.x; at < pieces; at += 4 * step) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (at + j * step < pieces) v[j] = __ldcv(from + at + j * step);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (at + j * step < pieces) to[at + j * step] = v[j];
    }
  }
}

struct Likely {
  const float *h, *norm;  // (T, D) rows ldh apart, (D)
  int64_t ldh;
  Stored router;          // (E, D)
  int tokens, experts, chosen, d;
  bool beside;            // fetch_experts_k is the kernel before
  float* logits;          // (T, E)
  ExpertHome home;        // of the next layer's experts
  ExpertBox box;
};

// A warp has an expert; the logits lack a factor that all of a token have in common, the norm's, which changes no order. The block that is
// last chooses, and tells first what the device will leave to the host.
//
// Beside a fetch it does not wait for that, but runs while the bus is busy: fetch_experts_k lets it start behind its own wait, when the
// kernels before have ended, and their writes are in the L2 cache, from where h is loaded. (Were something of that old, the advice would be worse.)
__global__ void __launch_bounds__(256) likely_experts_k(const Likely a) {
  extern __shared__ int32_t memory[];
  __shared__ __align__(16) Candidate list[kPlacedTokens][32];
  __shared__ __align__(16) float room[kPlacedTokens][kQuickExperts];
  __shared__ bool last;
  const int lane = lane_id(), warp = warp_id(), expert = static_cast<int>(blockIdx.x) * 8 + warp, n = a.tokens * a.chosen;
  if (!a.beside) wait_for_previous();
  let_next_start();
  if (expert < a.experts) {
    float sum[kPlacedTokens] = {};
    for (int k = 8 * lane; k < a.d; k += 256) {
      float w[8];
      decode8(a.router, expert, k, w);
#pragma unroll
      for (int i = 0; i < 8; i++) w[i] *= a.norm[k + i];
#pragma unroll
      for (int t = 0; t < kPlacedTokens; t++) {
        if (t >= a.tokens) break;
#pragma unroll
        for (int i = 0; i < 8; i++) sum[t] = fmaf(w[i], load_past_l1(a.h + t * a.ldh + k + i), sum[t]);
      }
    }
#pragma unroll
    for (int t = 0; t < kPlacedTokens; t++) {
      if (t >= a.tokens) break;
      const float s = warp_sum(sum[t]);
      if (lane == 0) a.logits[t * a.experts + expert] = s;
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.box.pending + 3, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) {
    int32_t *ids = memory, *missing = memory + n;
    for (int t = warp; t < a.tokens; t += 8) top(EarlyLogits{a.logits + t * a.experts}, a.experts, a.chosen, ids + t * a.chosen, list[t], room[t]);
    __syncthreads();
    if (warp == 0) {
      int misses = 0;
      for (int base = 0; base < n; base += 32) {
        const int i = base + lane;
        bool miss = i < n;
        for (int j = 0; miss && j < i; j++) miss = ids[j] != ids[i];
        miss = miss && load_past_l1(a.home.slot_of + ids[i]) < 0;
        const unsigned all = __ballot_sync(kAll, miss);
        if (miss) missing[misses + __popc(all & ((1u << lane) - 1))] = ids[i];
        misses += __popc(all);
      }
      __syncwarp();
      const int fetched = fetched_misses(misses, a.home.host ? a.home.fetch_percent : 0);
      for (int i = lane; i < misses; i += 32) a.box.likely_expert[i] = missing[(i + fetched) % misses];
      if (lane == 0) *a.box.likely_layer = a.home.layer, *a.box.likely_count = misses;
      __threadfence_system();
      __syncwarp();
      if (lane == 0) {
        const uint32_t number = load_past_l1(a.box.pending + 2) + 1;
        a.box.pending[2] = number, a.box.pending[3] = 0;
        store_release_system(a.box.likely, number);
      }
    }
  }
  if (a.beside) wait_for_previous();  // who comes behind relies on the fetch
}

__global__ void __launch_bounds__(256) join_experts_k(const ExpertBox box, int n4, float4* h) {
  let_next_start();
  wait_for_previous();
  const uint32_t number = box.pending[0];
  if (number == 0) return;
  if (threadIdx.x == 0)
    while (static_cast<int32_t>(load_acquire_system(box.done) - number) < 0) __nanosleep(100);
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n4) return;
  const float4 v = __ldcv(reinterpret_cast<const float4*>(box.out) + i), old = h[i];
  h[i] = make_float4(old.x + v.x, old.y + v.y, old.z + v.z, old.w + v.w);
}

}  // namespace

void place_experts(const Context& c, const PlaceExpertsArgs& args) {
  Place a{};
  a.x = args.x.f32(), a.logits = args.logits.f32();
  a.tokens = static_cast<int>(args.x.rows()), a.experts = args.experts.count, a.chosen = static_cast<int>(args.ids.cols()), a.d = static_cast<int>(args.x.cols());
  a.renormalise = args.renormalise, a.stride = args.experts.layout().stride, a.home = *args.experts.home;
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.box = args.box;
  Scratch s(c);
  a.fetch = s.take<int32_t>(1 + 2 * kPlacedTokens * a.chosen);
  launch(c, "place_experts", place_experts_k, dim3(1), dim3(kThreads), static_cast<size_t>(2 * a.tokens * a.chosen) * 4, a);
  const bool fetches = a.home.host && a.home.fetch_percent > 0;
  if (fetches)
    launch(c, "place_experts: fetch", fetch_experts_k, dim3(kFetchBlocks), dim3(kFetchThreads), 0, a.fetch, a.home.host, a.home.slots, a.stride);
  if (!args.next_router) return;
  Likely l{};
  l.h = args.h.f32(), l.norm = args.next_norm.f32(), l.ldh = args.h.row_stride, l.router = stored(args.next_router);
  l.tokens = a.tokens, l.experts = args.next.count, l.chosen = a.chosen, l.d = a.d;
  l.beside = fetches && c.overlap, l.home = *args.next.home, l.box = a.box;
  l.logits = s.take<float>(kPlacedTokens * int64_t{l.experts});
  launch(c, "place_experts: likely", likely_experts_k, dim3(static_cast<unsigned>((l.experts + 7) / 8)), dim3(256), static_cast<size_t>(2 * l.tokens * l.chosen) * 4, l);
}

void join_experts(const Context& c, const JoinExpertsArgs& a) {
  const int n4 = static_cast<int>(a.h.rows() * a.h.cols() / 4);
  launch(c, "join_experts", join_experts_k, dim3(static_cast<unsigned>((n4 + 255) / 256)), dim3(256), 0, a.box, n4, reinterpret_cast<float4*>(a.h.f32()));
}

size_t place_experts_scratch(const OpLimits& l) {
  Scratch s;
  s.take<int32_t>(1 + 2 * kPlacedTokens * l.chosen);
  s.take<float>(kPlacedTokens * int64_t{l.experts});
  return s.used();
}

}  // namespace qn::cuda
