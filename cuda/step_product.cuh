// Products of the kernel of cuda/step.cuh.
#pragma once
#include "cuda/step_feed.cuh"

namespace qn::cuda {

// ---- products -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float square(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }

// A warp's part of 16 rows and all tokens: (T, 16)
template <int MaxT>
__device__ __forceinline__ void store_total(const float (&total)[2][4], float* to, int tokens, int lane) {
  const int t = lane % 4;
  to += 2 * t * kPanelRows + lane / 4;
  if (2 * t < tokens) to[0] = total[0][0] + total[1][0], to[8] = total[0][2] + total[1][2];
  if (MaxT > 1 && 2 * t + 1 < tokens) to[16] = total[0][1] + total[1][1], to[24] = total[0][3] + total[1][3];
}

// Four values of x from column k on, rounded: in natural order, and as INT4 experts want them
__device__ __forceinline__ void store_natural(uint16_t* row, int k, float4 x) {
  *reinterpret_cast<uint2*>(row + k) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
}
__device__ __forceinline__ void store_int4(uint16_t* row, int k, float4 x) {  // k and k + 2 are neighbours there, k + 1 and k + 3 four places on
  uint32_t* p = reinterpret_cast<uint32_t*>(row + (k & ~15) + int4_position(k & 15));
  p[0] = pack_bf16(x.x, x.z), p[2] = pack_bf16(x.y, x.w);
}

// Work memory of a product: kept x | x | exact x | results of the warps, twice
struct ProductRoom {
  uint16_t *kept, *x;
  float *exact, *partial;
};
__host__ __device__ constexpr int kept_bytes(int tokens, int k) { return static_cast<int>(round_up(tokens * kept_pitch(k) * 2, 16)); }
__host__ __device__ constexpr int product_bytes(int tokens, int k, bool keep, bool exact) {
  return (keep ? kept_bytes(tokens, k) : 0) + tokens * natural_pitch(k) * 2 + (exact ? tokens * k * 4 : 0) + 2 * kStepWarps * tokens * kPanelRows * 4;
}

// x into shared memory. K a multiple of 128; of Norm at most 2048, else 4096. Warp w has groups w, w + 8, ... of each token.
template <int MaxT>
__device__ __forceinline__ void prepare_x(const ProductPhase& p, int tokens, bool exact, const ProductRoom& room, Control& c) {
  const Input& in = p.in;
  const int tid = thread_anew(), warp = tid >> 5, lane = tid & 31, k_all = in.k, at = warp * 128 + 4 * lane;
  constexpr int kStride = kStepWarps * 128;
  if (in.mix == Mix::Norm) {
    float4 w[kWarpGroups], v[MaxT][kWarpGroups];
#pragma unroll
    for (int h = 0; h < kWarpGroups; h++) w[h] = at + h * kStride < k_all ? load4(in.w + at + h * kStride) : float4{};
    wait_for_all();
#pragma unroll
    for (int t = 0; t < MaxT; t++)
#pragma unroll
      for (int h = 0; h < kWarpGroups; h++)
        if (t < tokens) v[t][h] = at + h * kStride < k_all ? load4(in.a + t * in.lda + at + h * kStride) : float4{};
#pragma unroll
    for (int t = 0; t < MaxT; t++)
      if (t < tokens) {
        const float s = warp_sum(square(v[t][0]) + square(v[t][1]));
        if (lane == 0) c.squares[t * kStepWarps + warp] = s;
      }
    workers_sync();
    const bool report = p.normed && blockIdx.x == gridDim.x - 1;
#pragma unroll
    for (int t = 0; t < MaxT; t++)
      if (t < tokens) {
        const float4* q = reinterpret_cast<const float4*>(c.squares + t * kStepWarps);
        const float4 q0 = q[0], q1 = q[1];
        const float all = ((q0.x + q0.y) + (q0.z + q0.w)) + ((q1.x + q1.y) + (q1.z + q1.w));
        const float r = rsqrtf(all / static_cast<float>(k_all) + in.eps);
#pragma unroll
        for (int h = 0; h < kWarpGroups; h++) {
          const int k = at + h * kStride;
          if (k >= k_all) break;
          const float4 x = {v[t][h].x * r * w[h].x, v[t][h].y * r * w[h].y, v[t][h].z * r * w[h].z, v[t][h].w * r * w[h].w};
          store_natural(room.x + t * natural_pitch(k_all), k, x);
          if (p.keep) store_int4(room.kept + t * kept_pitch(k_all), k, x);
          if (exact) *reinterpret_cast<float4*>(room.exact + t * k_all + k) = x;
          if (report) *reinterpret_cast<float4*>(p.normed + static_cast<int64_t>(t) * k_all + k) = x;
        }
      }
    return;
  }
  const bool gates = in.mix != Mix::Plain, norms = in.mix == Mix::GatedNorm;
  const float4 head = norms ? load4(in.w + 4 * lane) : float4{1, 1, 1, 1};
  wait_for_all();
#pragma unroll 1
  for (int t = 0; t < tokens; t++) {
    float4 v[4], z[4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
      const bool mine = at + h * kStride < k_all;
      v[h] = mine ? load4(in.a + t * in.lda + at + h * kStride) : float4{};
      z[h] = mine && gates ? load4(in.b + t * in.ldb + at + h * kStride) : float4{};
    }
#pragma unroll
    for (int h = 0; h < 4; h++) {
      if (at + h * kStride >= k_all) break;
      float4 x = v[h];
      const float4 s = z[h];
      if (gates) {
        const float r = norms ? rsqrtf(warp_sum(square(x)) * (1.f / 128) + in.eps) : 1.f;
        const float4 y = norms ? s : float4{1, 1, 1, 1};
        x.x *= r * head.x * (y.x * sigmoid(s.x)), x.y *= r * head.y * (y.y * sigmoid(s.y));
        x.z *= r * head.z * (y.z * sigmoid(s.z)), x.w *= r * head.w * (y.w * sigmoid(s.w));
      }
      store_natural(room.x + t * natural_pitch(k_all), at + h * kStride, x);
    }
  }
}

template <DType W, int MaxT>
__device__ __forceinline__ void product(const Phase& phase, const Stream& s, Control& c, uint8_t* ring, uint8_t* work, const StepArgs& args) {
  const ProductPhase& p = phase.product;
  const int tokens = phase.tokens;
  const int tid = thread_anew(), warp = tid >> 5, lane = tid & 31, g = lane / 4, t = lane % 4, k_all = s.k, grid = static_cast<int>(gridDim.x);
  const bool exact = s.exact_rows[0] > 0;
  ProductRoom room;
  room.kept = reinterpret_cast<uint16_t*>(work);
  room.x = room.kept + (p.keep ? kept_bytes(tokens, k_all) / 2 : 0);
  room.exact = reinterpret_cast<float*>(room.x + tokens * natural_pitch(k_all));
  room.partial = room.exact + (exact ? tokens * k_all : 0);
  prepare_x<MaxT>(p, tokens, exact, room, c);
  Feed<W> feed(c, ring, args, phase.stream);
  workers_sync();

  const uint16_t* x = room.x + g * natural_pitch(k_all) + 8 * t;
  const bool swiglu = p.store == Store::SwiGLU, add = p.store == Store::Add;
  const int size = tokens * kPanelRows, shift = swiglu ? 3 : 4, group_shift = s.shift, panels = s.panels, rows = s.rows, tasks = s.tasks;
  const int begin = slice<W>(k_all, warp), end = slice<W>(k_all, warp + 1);
  const int row = tid & ((1 << shift) - 1), out = tid >> shift;  // of the thread: row and token
  float* const y = p.y + out * p.ldy + row;
  float* partial = room.partial;
  int half = kStepWarps * size;
#pragma unroll 1
  for (int task = static_cast<int>(blockIdx.x); task < tasks; task += grid) {
    const bool dense = task < panels;  // else a row for each warp, all tokens
    const int n = task << shift;
    const bool mine = dense && out < tokens && (swiglu || n + row < rows);
    const float old = mine && add ? y[n] : 0.f;
    if (!dense) {
      int which;
      const int r = exact_row(s, task, warp, which);
      if (r < 0) continue;
      const uint8_t* unit = feed.front() + lane * 16;
      float sum[MaxT] = {};
#pragma unroll 2
      for (int k = lane * 8; k < k_all; k += 256, unit += 512) {
        const uint4 v = *reinterpret_cast<const uint4*>(unit);
        const float4 lo = {bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y)}, hi = {bf16_lo(v.z), bf16_hi(v.z), bf16_lo(v.w), bf16_hi(v.w)};
#pragma unroll
        for (int j = 0; j < MaxT; j++) {
          if (j >= tokens) break;
          const float4 a = load4(room.exact + j * k_all + k), b = load4(room.exact + j * k_all + k + 4);
          sum[j] += lo.x * a.x + lo.y * a.y + lo.z * a.z + lo.w * a.w;
          sum[j] += hi.x * b.x + hi.y * b.y + hi.z * b.z + hi.w * b.w;
        }
      }
      feed.pop();
#pragma unroll
      for (int i = 0; i < MaxT; i++) {
        if (i >= tokens) break;
        const float v = warp_sum(sum[i]);
        if (lane == 0) p.exact_y[which][i * p.exact_ldy[which] + r] = p.squash[which] ? sigmoid(v) : v;
      }
      continue;
    }
    float total[2][4] = {};
#pragma unroll 1
    for (int u = begin; u < end; u++) {
      multiply_unit<W>(total, feed.front(), x + u * step_unit_k(W), g < tokens, group_shift, lane);
      feed.pop();
    }
    store_total<MaxT>(total, partial + warp * size, tokens, lane);
    workers_sync();
    if (mine) {
      const float* from = partial + out * kPanelRows + row;
      float sum = 0, up = 0;
#pragma unroll
      for (int i = 0; i < kStepWarps; i++) {
        sum += from[i * size];
        if (swiglu) up += from[i * size + 8];
      }
      if (swiglu) sum = silu(sum) * up;
      y[n] = old + sum;
    }
    partial += half;
    half = -half;
  }
  feed.save();
}

}  // namespace qn::cuda
