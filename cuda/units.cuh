// A unit: the piece of 16 rows of weights that a warp multiplies at once, and how: tensor cores with the weights as operand A and up to 8
// tokens as the columns of B. Used by products of few tokens wherever their weights come from shared memory.
#pragma once
#include "cuda/matvec.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {

constexpr int unit_loads(DType w) { return w == DType::INT4 ? 2 : 4; }
constexpr int unit_k(DType w) { return w == DType::BF16 ? 64 : 128; }
// Rows of x in shared memory: padded with zeros to whole groups of 128, and apart such that 16-byte loads of two tokens' fragments
// (4 times 16 bytes in a row of BF16 and INT8, with gaps of 16 bytes in INT4) share no bank.
constexpr int x_stride(DType w, int k) { return (k + 127) / 128 * 128 + (w == DType::INT4 ? 8 : 32); }

// total += sum * (scales of the two rows) * (scales of the two tokens)
template <Act A>
__device__ __forceinline__ void flush(float (&total)[4], float (&sum)[4], float lo, float hi, float2 x) {
  const float s[4] = {lo * sum[0], lo * sum[1], hi * sum[2], hi * sum[3]};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    total[i] += A == Act::INT8 ? s[i] * (i % 2 ? x.y : x.x) : s[i];
    sum[i] = 0;
  }
}

// total += one unit. x: what the lane reads of its token g from the first k of the unit on, valid where `live`; x_scale: of the
// unit's k for tokens 2t and 2t+1.
template <DType W, Act A>
__device__ __forceinline__ void multiply(float (&total)[4], const uint8_t* unit, const uint16_t* x, bool live, float2 x_scale, int shift) {
  const int lane = thread_anew() % 32, g = lane / 4, t = lane % 4;
  auto weights = [&](int i) { return *reinterpret_cast<const uint4*>(unit + i * 512 + lane * 16); };
  auto tokens = [&](int at) { return live ? *reinterpret_cast<const uint4*>(x + at) : uint4{}; };
  uint32_t a[4];
  if constexpr (W == DType::BF16) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 lo = weights(2 * i), hi = weights(2 * i + 1), b = tokens(i * 32);
      bf16_fragment<0>(lo, hi, a);
      mma_16816(A == Act::INT8 ? sum : total, a, b.x, b.y);
      bf16_fragment<1>(lo, hi, a);
      mma_16816(A == Act::INT8 ? sum : total, a, b.z, b.w);
    }
    if (A == Act::INT8) flush<A>(total, sum, 1.f, 1.f, x_scale);
  } else {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(unit + unit_loads(W) * 512);  // (128 / group, 16)
    float sum[4] = {};
    // After the first `end` values of the unit: is a group complete? Then its scales meet its sums.
    auto close_group = [&](int end) {
      if (end & ((1 << shift) - 1)) return;
      const uint16_t* s = scales + ((end >> shift) - 1) * kPanelRows + g;
      flush<A>(total, sum, half_bits_to_float(s[0]), half_bits_to_float(s[8]), x_scale);
    };
    if constexpr (W == DType::INT8) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 v = weights(i), b = tokens(i * 32);
        int8_fragment<0>(v, a);
        mma_16816(sum, a, b.x, b.y);
        int8_fragment<1>(v, a);
        mma_16816(sum, a, b.z, b.w);
        close_group((i + 1) * 32);
      }
    } else {
      // Groups of 32: lanes t = 0, 1 hold the first of a tile, t = 2, 3 the second, and the tile is multiplied twice
      const uint32_t first = shift == 5 && t >= 2 ? 0 : ~0u;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 v = weights(i), b = tokens(i * 64), c = tokens(i * 64 + 8);
        int4_fragment<0>(v, a);
        mma_16816(sum, a, b.x & first, b.y & first);
        int4_fragment<1>(v, a);
        mma_16816(sum, a, b.z & first, b.w & first);
        int4_fragment<2>(v, a);
        mma_16816(sum, a, c.x & first, c.y & first);
        int4_fragment<3>(v, a);
        mma_16816(sum, a, c.z & first, c.w & first);
        if (shift == 5) {
          close_group(i * 64 + 32);
          int4_fragment<0>(v, a);
          mma_16816(sum, a, b.x & ~first, b.y & ~first);
          int4_fragment<1>(v, a);
          mma_16816(sum, a, b.z & ~first, b.w & ~first);
          int4_fragment<2>(v, a);
          mma_16816(sum, a, c.x & ~first, c.y & ~first);
          int4_fragment<3>(v, a);
          mma_16816(sum, a, c.z & ~first, c.w & ~first);
        }
        close_group((i + 1) * 64);
      }
    }
  }
}

// sum[t] += one unit of an exact row times token t. x: (T, K) from the lane's first k of the unit on, `left` values of the row lie there.
__device__ __forceinline__ void multiply_exact(float (&sum)[kFewTokens], const uint8_t* unit, int loads, bool f32, const float* x, int tokens, int k_all,
                                               int left) {
  const int each = f32 ? 4 : 8;  // weights in 16 bytes
#pragma unroll 1
  for (int i = 0; i < loads && left > 0; i++, unit += 512, x += 32 * each, left -= 32 * each) {
    const uint4 v = *reinterpret_cast<const uint4*>(unit);
    const float4 lo = f32 ? float4{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)}
                          : float4{bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y)};
    const float4 hi = {bf16_lo(v.z), bf16_hi(v.z), bf16_lo(v.w), bf16_hi(v.w)};
#pragma unroll
    for (int t = 0; t < kFewTokens; t++) {
      if (t >= tokens) break;
      const float4 a = load4(x + t * k_all);
      sum[t] += lo.x * a.x + lo.y * a.y + lo.z * a.z + lo.w * a.w;
      if (f32) continue;
      const float4 b = load4(x + t * k_all + 4);
      sum[t] += hi.x * b.x + hi.y * b.y + hi.z * b.z + hi.w * b.w;
    }
  }
}

}  // namespace qn::cuda
