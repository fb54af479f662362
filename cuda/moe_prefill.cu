// Experts of many tokens: the T*K pairs (token, choice) sorted by expert, one grouped matrix product (gemm.cu) over the list, and
// the results of a token added up in the order of its choices.
//
//   rows  t*K + j                 ids     which expert a row wants
//   order (T*K)                   the rows, expert by expert, rising inside one: a counting sort in three kernels
//   items (T*K/64 + min(E, T*K))  tiles of one expert and at most 64 places of `order`; count 0 behind the last
//
// The sort: chunks of 1024 rows are counted by expert; one block turns the counts into where the rows of (chunk, expert) begin;
// each chunk then puts its rows there, in order. Atomics are of integers, and only counts come from them: the same bits every time.
#include <algorithm>

#include "cuda/common.cuh"

namespace qn::cuda {
namespace {

constexpr int kChunk = 1024;                          // rows a block counts and places
constexpr int64_t kSliceBytes = int64_t{3} << 29;     // results of the down projections that lie in memory at a time: 1.5 GiB

// counts (chunks, E)
__global__ void count_experts_k(const int32_t* ids, int64_t n, int experts, int32_t* counts) {
  let_next_start();
  wait_for_previous();
  extern __shared__ int32_t count[];  // (E)
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += static_cast<int>(blockDim.x)) count[e] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk, end = min(begin + kChunk, n);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += static_cast<int>(blockDim.x))
    counts[static_cast<int64_t>(blockIdx.x) * experts + e] = count[e];
}

// counts -> where in `order` the rows of (chunk, expert) begin; items. One block of 1024 threads, an expert each at a time.
__global__ void __launch_bounds__(1024) scan_experts_k(int32_t* counts, int chunks, int experts, GemmItem* items, int max_items) {
  let_next_start();
  wait_for_previous();
  __shared__ uint64_t warp_sums[32];
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  uint64_t before = 0;  // rows (low half) and items (high half) of the experts of earlier rounds
  for (int first = 0; first < experts; first += 1024) {
    const int e = first + tid;
    int32_t count = 0;
    if (e < experts)
#pragma unroll 8
      for (int c = 0; c < chunks; c++) count += counts[static_cast<int64_t>(c) * experts + e];
    const int tiles = (count + kTileTokens - 1) / kTileTokens;
    const uint64_t own = static_cast<uint64_t>(tiles) << 32 | static_cast<uint32_t>(count);
    uint64_t sum = own;  // of this lane and the lanes before it
    for (int i = 1; i < 32; i *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, sum, i);
      if (lane >= i) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    uint64_t all = 0;
    for (int i = 0; i < 32; i++) {
      if (i == warp) sum += all;
      all += warp_sums[i];
    }
    __syncthreads();  // warp_sums are written again
    const uint64_t start = before + sum - own;
    before += all;
    if (e < experts) {
      const int begin = static_cast<int>(start & 0xffffffffu), item = static_cast<int>(start >> 32);
      for (int i = 0; i < tiles; i++) items[item + i] = {e, begin + i * kTileTokens, min(kTileTokens, count - i * kTileTokens), 0};
      int32_t at = begin;
      for (int c = 0; c < chunks; c += 8) {  // eight loads in flight: the compiler cannot know that no store meets them
        int32_t here[8];
#pragma unroll
        for (int i = 0; i < 8; i++) here[i] = c + i < chunks ? counts[static_cast<int64_t>(c + i) * experts + e] : 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          if (c + i < chunks) counts[static_cast<int64_t>(c + i) * experts + e] = at;
          at += here[i];
        }
      }
    }
  }
  for (int i = static_cast<int>(before >> 32) + tid; i < max_items; i += 1024) items[i] = {0, 0, 0, 0};
}

// A warp per chunk, 32 rows at a time: lanes that want the same expert take consecutive places.
__global__ void place_rows_k(const int32_t* ids, int64_t n, int experts, const int32_t* counts, int32_t* order) {
  let_next_start();
  wait_for_previous();
  extern __shared__ int32_t next[];  // (E)
  const int lane = static_cast<int>(threadIdx.x);
  for (int e = lane; e < experts; e += 32) next[e] = counts[static_cast<int64_t>(blockIdx.x) * experts + e];
  __syncwarp();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kChunk, end = min(begin + kChunk, n);
  for (int64_t base = begin; base < end; base += 32) {
    const int64_t i = base + lane;
    const int id = i < end ? ids[i] : -1;
    const uint32_t same = __match_any_sync(0xffffffffu, id);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int at = id >= 0 ? next[id] + rank : 0;
    __syncwarp();
    if (id >= 0) {
      order[at] = static_cast<int32_t>(i);
      if (rank == 0) next[id] = at + __popc(same);
    }
    __syncwarp();
  }
}

// 8 values a thread
__global__ void round_to_bf16_k(const float* x, int64_t pieces, uint16_t* y) {
  let_next_start();
  wait_for_previous();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= pieces) return;
  const float4 a = reinterpret_cast<const float4*>(x)[2 * i], b = reinterpret_cast<const float4*>(x)[2 * i + 1];
  reinterpret_cast<uint4*>(y)[i] = make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w), pack_bf16(b.x, b.y), pack_bf16(b.z, b.w));
}

// h (T, D) += sum_j weights[t][j] * y[t*K + j] + shared_scale[t] * shared[t]; 4 values a thread, a row of blocks per token
__global__ void moe_combine_k(const float4* y, const float* weights, const float4* shared, const float* shared_scale, int chosen, int d4, float4* h) {
  let_next_start();
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= d4) return;
  const int64_t t = blockIdx.y;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  auto add = [&](float w, const float4& v) {
    sum.x += w * v.x, sum.y += w * v.y, sum.z += w * v.z, sum.w += w * v.w;
  };
  y += t * chosen * d4 + i;
  weights += t * chosen;
#pragma unroll 5
  for (int j = 0; j < chosen; j++) add(weights[j], y[static_cast<int64_t>(j) * d4]);
  add(shared_scale[t], shared[t * d4 + i]);
  float4& out = h[t * d4 + i];
  out = make_float4(out.x + sum.x, out.y + sum.y, out.z + sum.z, out.w + sum.w);
}

void round_to_bf16(const Context& c, const char* what, const float* x, int64_t n, uint16_t* y) {
  launch(c, what, round_to_bf16_k, dim3(static_cast<unsigned>((n / 8 + 255) / 256)), dim3(256), 0, x, n / 8, y);
}

// What one sorted list needs, cut from scratch memory.
struct Sorted {
  int32_t *counts, *order;
  GemmItem* items;
  int64_t chunks, max_items;
  Sorted(Scratch& s, int64_t rows, int64_t experts)
      : chunks((rows + kChunk - 1) / kChunk), max_items(rows / kTileTokens + std::min(experts, rows)) {
    counts = s.take<int32_t>(chunks * experts);
    order = s.take<int32_t>(rows);
    items = s.take<GemmItem>(max_items);
  }
};

GroupedGemm sort_by_expert(const Context& c, const char* what, const Sorted& s, const int32_t* ids, int64_t tokens, int64_t chosen,
                           const Experts& experts) {
  const int64_t rows = tokens * chosen;
  const int e = experts.count;
  const size_t shared = static_cast<size_t>(e) * 4;
  const auto chunks = static_cast<unsigned>((rows + kChunk - 1) / kChunk);
  launch(c, what, count_experts_k, dim3(chunks), dim3(256), shared, ids, rows, e, s.counts);
  launch(c, what, scan_experts_k, dim3(1), dim3(1024), 0, s.counts, chunks, e, s.items, s.max_items);
  launch(c, what, place_rows_k, dim3(chunks), dim3(32), shared, ids, rows, e, s.counts, s.order);
  return {experts, s.order, s.items, s.max_items, chosen};
}

int64_t slice_tokens(int64_t tokens, int64_t chosen, int64_t d) {
  return std::clamp<int64_t>(kSliceBytes / (chosen * d * 4), 1, tokens);
}

}  // namespace

void moe_prefill_gate_up(const Context& c, const MoeGateUpArgs& a) {
  const int64_t t = a.x.rows(), d = a.x.cols(), chosen = a.ids.cols();
  moe_route(c, a);
  Scratch s(c);
  uint16_t* x = s.take<uint16_t>(t * d);
  const Sorted sorted(s, t * chosen, a.experts.count);
  round_to_bf16(c, "moe_gate_up: rounding", a.x.f32(), t * d, x);
  gemm_gate_up(c, sort_by_expert(c, "moe_gate_up: sort", sorted, a.ids.i32(), t, chosen, a.experts), x, a.inner.f32());
}

void moe_prefill_down(const Context& c, const MoeDownArgs& a) {
  const int64_t t = a.h.rows(), d = a.h.cols(), chosen = a.ids.cols(), f = a.inner.cols(), slice = slice_tokens(t, chosen, d);
  Scratch s(c);
  float* shared = s.take<float>(t * d);
  uint16_t* inner = s.take<uint16_t>(slice * chosen * f);
  float* y = s.take<float>(slice * chosen * d);
  const Sorted sorted(s, slice * chosen, a.experts.count);
  matmul(c, s, "moe_down: shared", a.shared.f32(), a.shared.cols(), t, a.shared_act, a.shared_down, shared, d, false);
  for (int64_t begin = 0; begin < t; begin += slice) {
    const int64_t n = std::min(slice, t - begin);
    round_to_bf16(c, "moe_down: rounding", a.inner.f32() + begin * chosen * f, n * chosen * f, inner);
    gemm_down(c, sort_by_expert(c, "moe_down: sort", sorted, a.ids.i32() + begin * chosen, n, chosen, a.experts), inner, y);
    const int d4 = static_cast<int>(d / 4);
    launch(c, "moe_down: combine", moe_combine_k, dim3(static_cast<unsigned>((d4 + 127) / 128), static_cast<unsigned>(n)), dim3(128), 0,
           reinterpret_cast<const float4*>(y), a.weights.f32() + begin * chosen, reinterpret_cast<const float4*>(shared + begin * d),
           a.shared_scale.f32() + begin, chosen, d4, reinterpret_cast<float4*>(a.h.f32() + begin * d));
  }
}

size_t moe_prefill_scratch(const OpLimits& l) {
  const int64_t rows = static_cast<int64_t>(l.tokens) * l.chosen, d = l.model_width;
  if (rows == 0) return 0;
  Scratch up;
  up.take<uint16_t>(l.tokens * d);
  Sorted(up, rows, l.experts);
  const int64_t slice = slice_tokens(l.tokens, l.chosen, d) * l.chosen;
  Scratch down;
  down.take<float>(l.tokens * d);
  down.take<uint16_t>(slice * l.expert_width);
  down.take<float>(slice * d);
  Sorted(down, slice, l.experts);
  return std::max(up.used(), down.used() + matmul_scratch(l));
}

}  // namespace qn::cuda
