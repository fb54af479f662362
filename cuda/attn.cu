// Causal attention of few tokens (decode, verification) over a long cache, and the exact kernel for everything unusual.
#include "cuda/attn_few.cuh"

#include <algorithm>

namespace qn::cuda {
namespace {

// Grid: HK x blocks per head
template <int Tiles>
__global__ __launch_bounds__(kFewThreads, 1) void attn_few_k(const Attn a, const Few f) {
  extern __shared__ __align__(128) uint8_t shared[];
  let_next_start();
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x) / a.kv_heads;
  attention_few<Tiles, false>(a, f, block % a.kv_heads, block / a.kv_heads, blocks, shared, [] { wait_for_previous(); }, [] { __syncthreads(); });
}

// Grid: H x tokens x 4
__global__ __launch_bounds__(256) void attn_combine_k(const Attn a, const Few f) {
  __shared__ CombineRoom room;
  let_next_start();
  wait_for_previous();
  combine_few(a, f, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z), room, [] { __syncthreads(); });
}

// ---- exact ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store_rounded(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Grid: T x HK, two warps: one for k, one for v.
template <class Stored>
__global__ __launch_bounds__(64) void attn_append_k(const Attn a) {
  extern __shared__ float row[];  // (DH)
  let_next_start();
  wait_for_previous();
  const int t = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x & 31);
  const int pos = a.start() + t;
  const int64_t at = static_cast<int64_t>(pos) * a.width;
  if (threadIdx.x < 32) {
    norm_rotate<0>(a, a.key(t, head), a.k_norm, pos, row);
    Stored* k = static_cast<Stored*>(a.k_cache) + head * a.k_stride + at;
    for (int i = lane; i < a.width; i += 32) store_rounded(k + i, row[i]);
  } else {
    const float* x = a.value(t, head);
    Stored* v = static_cast<Stored*>(a.v_cache) + head * a.v_stride + at;
    for (int i = lane; i < a.width; i += 32) store_rounded(v + i, x[i]);
  }
}

// Grid: H * T. Each of 8 warps takes every eighth group of 4 keys, a lane every 32nd dim; then the warps are merged in order.
template <class Stored, int Slices>  // DH <= 32 * Slices
__global__ __launch_bounds__(256, 1) void attn_exact_k(const Attn a) {
  extern __shared__ float row[];   // (DH), then o of the warps (8, DH)
  __shared__ float tops[8], sums[8];
  let_next_start();
  wait_for_previous();
  const int h = static_cast<int>(blockIdx.x) % a.heads, t = static_cast<int>(blockIdx.x) / a.heads, head = h / (a.heads / a.kv_heads);
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), slices = a.width / 32;
  const int pos = a.start() + t, keys = pos + 1;
  if (warp == 0) norm_rotate<0>(a, a.query(t, h), a.q_norm, pos, row);
  __syncthreads();
  const Stored* k = static_cast<const Stored*>(a.k_cache) + head * a.k_stride + lane;
  const Stored* v = static_cast<const Stored*>(a.v_cache) + head * a.v_stride + lane;
  float q[Slices], o[Slices] = {}, top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < Slices; i++) q[i] = i < slices ? row[32 * i + lane] : 0.f;
  for (int first = 4 * warp; first < keys; first += 32) {
    float s[4] = {};
    int64_t at[4];
#pragma unroll
    for (int u = 0; u < 4; u++) at[u] = static_cast<int64_t>(min(first + u, keys - 1)) * a.width;
#pragma unroll
    for (int i = 0; i < Slices; i++) {
      if (i >= slices) continue;
#pragma unroll
      for (int u = 0; u < 4; u++) s[u] += q[i] * to_float(k[at[u] + 32 * i]);
    }
    float higher = top;
#pragma unroll
    for (int u = 0; u < 4; u++) {
      s[u] = first + u < keys ? warp_sum(s[u]) * a.q_scale : -INFINITY;
      higher = fmaxf(higher, s[u]);
    }
    const float alpha = expf(top - higher);
    top = higher, sum *= alpha;
#pragma unroll
    for (int u = 0; u < 4; u++) sum += s[u] = expf(s[u] - top);
#pragma unroll
    for (int i = 0; i < Slices; i++) {
      if (i >= slices) continue;
      o[i] *= alpha;
#pragma unroll
      for (int u = 0; u < 4; u++) o[i] += s[u] * to_float(v[at[u] + 32 * i]);
    }
  }
  float* part = row + a.width;
#pragma unroll
  for (int i = 0; i < Slices; i++)
    if (i < slices) part[warp * a.width + 32 * i + lane] = o[i];
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  __syncthreads();
  float all = 0;
  top = tops[0];  // warp 0 has seen position 0
  for (int w = 1; w < 8; w++) top = fmaxf(top, tops[w]);
  for (int w = 0; w < 8; w++) all += sums[w] * expf(tops[w] - top);
  for (int i = static_cast<int>(threadIdx.x); i < a.width; i += 256) {
    float x = 0;
    for (int w = 0; w < 8; w++) x += part[w * a.width + i] * expf(tops[w] - top);
    a.o[(static_cast<int64_t>(t) * a.heads + h) * a.width + i] = x / all;
  }
}

template <class Stored>
void exact(const Context& ctx, const Attn& a) {
  const dim3 grid(static_cast<unsigned>(a.heads) * static_cast<unsigned>(a.tokens));
  const size_t bytes = static_cast<size_t>(9 * a.width) * sizeof(float);
  if (a.width <= 256) launch(ctx, "attention", attn_exact_k<Stored, 8>, grid, 256, bytes, a);
  else launch(ctx, "attention", attn_exact_k<Stored, 32>, grid, 256, bytes, a);
}

// How many A tiles a launch can take on this device, leaving room for two slots
int few_tiles(const Context& ctx) {
  int tiles = kTilesMax;
  while (tiles > 0 && few_bytes(2, tiles, std::min(tiles, kFewTokens)) > ctx.shared_max) tiles--;
  return tiles;
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------------------------------

void attention_append(const Context& ctx, const Attn& a, DType cache) {
  const dim3 grid(static_cast<unsigned>(a.tokens), static_cast<unsigned>(a.kv_heads));
  const size_t bytes = static_cast<size_t>(a.width) * sizeof(float);
  if (cache == DType::F32) launch(ctx, "attention", attn_append_k<float>, grid, 64, bytes, a);
  else launch(ctx, "attention", attn_append_k<__nv_bfloat16>, grid, 64, bytes, a);
}

void attention_exact(const Context& ctx, const Attn& a, DType cache) {
  attention_append(ctx, a, cache);
  if (cache == DType::F32) exact<float>(ctx, a);
  else exact<__nv_bfloat16>(ctx, a);
}

// Two kernels per launch: partial results, and their combination by as many blocks as it takes to read them in a microsecond (the
// last block to arrive would read half a megabyte alone). Tokens that do not fit at once follow in a second pair.
void attention_few(const Context& ctx, const AttentionArgs& args) {
  QN_CHECK(args.qgkv.rows() <= kFewTokens, "attention_few: %lld tokens", static_cast<long long>(args.qgkv.rows()));
  Attn a = make_attn(args);
  const int per_token = (a.heads / a.kv_heads + 7) / 8, at_once = few_tiles(ctx) / per_token;
  if (!attention_is_fast(args) || at_once == 0) return attention_exact(ctx, a, args.k_cache.dtype);
  a.q_scale *= kLog2e;
  Few f = make_few(ctx, a);
  const int blocks = std::min(std::max(ctx.sms / a.kv_heads, 1), f.chunks);
  for (f.first = 0; f.first < a.tokens; f.first += at_once) {
    f.tokens = std::min(at_once, a.tokens - f.first);
    const int tiles = f.tokens * per_token;
    f.slots = kKeySlotsMax;
    while (few_bytes(f.slots, tiles, f.tokens) > ctx.shared_max) f.slots--;
    const size_t bytes = few_bytes(f.slots, tiles, f.tokens);
    const dim3 grid(static_cast<unsigned>(blocks * a.kv_heads));
    if (tiles == 1) launch(ctx, "attention", attn_few_k<1>, grid, kFewThreads, bytes, a, f);
    else if (tiles <= 4) launch(ctx, "attention", attn_few_k<4>, grid, kFewThreads, bytes, a, f);
    else launch(ctx, "attention", attn_few_k<8>, grid, kFewThreads, bytes, a, f);
    launch(ctx, "attention", attn_combine_k, dim3(static_cast<unsigned>(a.heads), static_cast<unsigned>(f.tokens), 4), 256, 0, a, f);
  }
}

size_t attention_scratch(const OpLimits& limits) {
  const int64_t rows = static_cast<int64_t>(std::min(limits.tokens, kFewTokens)) * limits.heads;
  const int64_t chunks = limits.context > 0 ? chunk_of(static_cast<int>(std::min(limits.context, kMaxContext) - 1)) + 1 : 0;
  Scratch s;
  s.take<float>(chunks * rows * kWidth);
  s.take<float2>(chunks * rows);
  return s.used();
}

}  // namespace qn::cuda
