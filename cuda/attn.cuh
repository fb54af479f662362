// What the attention kernels share (attn.cu, attn_prefill.cu): their parameters, the norm and rotation of one head of one token,
// and tiles of keys in shared memory.
#pragma once
#include "cuda/unpack.cuh"

namespace qn::cuda {

struct Attn {
  const float* qgkv;              // (T, 2*H*DH + 2*HK*DH): query | gate | k | v, rows `ld` apart
  int64_t ld;
  const float *q_norm, *k_norm;   // (DH) w1
  const float* inv_freq;          // (half): radians per position
  void *k_cache, *v_cache;        // (HK, C, DH), heads `k_stride` and `v_stride` values apart
  int64_t k_stride, v_stride;
  uint16_t *k_scales, *v_scales;  // of codes: (HK, C, ceil(DH/128)) fp16, heads `k_scales_stride` and `v_scales_stride` apart
  int64_t k_scales_stride, v_scales_stride;
  float* o;                       // (T, H*DH)
  const StepParams* step;
  float eps, rope_scale, q_scale;  // q_scale: what scores are multiplied by
  int tokens, heads, kv_heads, width, half, context;

  // Position of token 0. The clamp keeps a broken contract inside the cache.
  __device__ int start() const { return min(step->pos, context - tokens); }
  __device__ const float* query(int t, int h) const { return qgkv + t * ld + static_cast<int64_t>(h) * width; }
  __device__ const float* key(int t, int g) const { return query(t, 2 * heads + g); }
  __device__ const float* value(int t, int g) const { return query(t, 2 * heads + kv_heads + g); }
};

inline Attn make_attn(const AttentionArgs& a) {
  QN_CHECK(a.qgkv.rows() <= a.k_cache.shape[1], "attention: %lld tokens, cache %lld", static_cast<long long>(a.qgkv.rows()),
           static_cast<long long>(a.k_cache.shape[1]));
  Attn p;
  p.qgkv = a.qgkv.f32(), p.ld = a.qgkv.row_stride, p.q_norm = a.q_norm.f32(), p.k_norm = a.k_norm.f32(), p.inv_freq = a.inv_freq.f32();
  p.k_cache = a.k_cache.data, p.v_cache = a.v_cache.data, p.k_stride = a.k_cache.row_stride, p.v_stride = a.v_cache.row_stride;
  p.k_scales = a.k_scales.bf16(), p.v_scales = a.v_scales.bf16();
  p.k_scales_stride = a.k_scales.row_stride, p.v_scales_stride = a.v_scales.row_stride;
  p.o = a.o.f32(), p.step = a.step, p.eps = a.eps, p.rope_scale = a.rope_scale;
  p.width = static_cast<int>(a.q_norm.rows()), p.half = static_cast<int>(a.inv_freq.rows());
  p.q_scale = 1.f / sqrtf(static_cast<float>(p.width));
  p.tokens = static_cast<int>(a.qgkv.rows()), p.heads = a.heads, p.kv_heads = a.kv_heads, p.context = static_cast<int>(a.k_cache.shape[1]);
  return p;
}

// The fast kernels: BF16 or INT8 cache, heads of 256, up to 16 query heads for a key head. They compute powers of two, so q_scale has
// log2(e) in it.
constexpr int kWidth = 256;
constexpr int kRowBytes = 2 * kWidth;  // of a row in BF16
constexpr int kGroupMax = 16;
constexpr float kLog2e = 1.4426950408889634f;
inline bool attention_is_fast(const AttentionArgs& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const auto pairs = [](const Tensor& scales) { return reinterpret_cast<uintptr_t>(scales.data) % 4 == 0 && scales.row_stride % 2 == 0; };
  const bool codes = a.k_cache.dtype == DType::I8 && pairs(a.k_scales) && pairs(a.v_scales);
  return (a.k_cache.dtype == DType::BF16 || codes) && a.q_norm.rows() == kWidth && a.heads / a.kv_heads <= kGroupMax && aligned(a.k_cache.data) &&
         aligned(a.v_cache.data) && aligned(a.o.data);
}

// ---- attn.cu: any format, width and number of tokens
void attention_append(const Context&, const Attn&, DType cache);  // norm and rotation of k; k and v to the cache
void attention_exact(const Context&, const Attn&, DType cache);   // attention_append(), then fp32 products, unhurried

// ---- attn_wgmma.cu: many tokens over a cache of BF16 or `codes` that holds them already, on sm_90a; p, and what codes stand for, rounded to
// BF16. False: not here, or not worth it.
bool attention_wgmma(const Context&, Attn, bool codes);
size_t attention_wgmma_scratch(const OpLimits&);

// ---- one head of one token, by one warp -------------------------------------------------------------------------------

// cos and sin of pos * freq, times scale. The product reaches 10^7 radians: it is reduced to a part of a turn in double.
__device__ __forceinline__ float2 rotation(int pos, float freq, float scale) {
  const double turns = __dmul_rn(__dmul_rn(pos, freq), 0.15915494309189534561);
  float s, c;
  sincospif(2.f * static_cast<float>(turns - rint(turns)), &s, &c);
  return make_float2(c * scale, s * scale);
}

// What a lane needs of a row of q or k: every 32nd value, norm weight, and of the first `half` the frequency. Loaded at once.
template <int Width>
struct HeadRow {
  static constexpr int kEach = Width / 32, kTurns = (kEach + 1) / 2;
  float v[kEach], w[kEach], freq[kTurns];
  __device__ __forceinline__ void load(const Attn& a, const float* x, const float* w1) {
    const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
    for (int i = 0; i < kEach; i++) v[i] = x[32 * i + lane], w[i] = w1[32 * i + lane];
#pragma unroll
    for (int i = 0; i < kTurns; i++) freq[i] = 32 * i + lane < a.half ? a.inv_freq[32 * i + lane] : 0.f;
  }
};

__device__ __forceinline__ void rotate(const Attn& a, float* row, int i, float2 turn) {
  const float lo = row[i], hi = row[i + a.half];
  row[i] = fmaf(-hi, turn.y, lo * turn.x);  // contracted by hand: all kernels get the same bits
  row[i + a.half] = fmaf(lo, turn.y, hi * turn.x);
}

// row (shared, DH, of this warp) = x / rms(x) * w1, then dims (i, i + half) rotated.
template <int Width>
__device__ __forceinline__ void norm_rotate(const Attn& a, const HeadRow<Width>& x, int pos, float* row) {
  using Row = HeadRow<Width>;
  const int lane = static_cast<int>(threadIdx.x & 31);
  float2 turn[Row::kTurns];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Row::kTurns; i++)
    if (32 * i + lane < a.half) turn[i] = rotation(pos, x.freq[i], a.rope_scale);
#pragma unroll
  for (int i = 0; i < Row::kEach; i++) sum = fmaf(x.v[i], x.v[i], sum);
  const float r = 1.f / sqrtf(warp_sum(sum) / static_cast<float>(Width) + a.eps);
#pragma unroll
  for (int i = 0; i < Row::kEach; i++) row[32 * i + lane] = x.v[i] * r * x.w[i];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Row::kTurns; i++)
    if (32 * i + lane < a.half) rotate(a, row, 32 * i + lane, turn[i]);
  __syncwarp();
}
// The same of any width
__device__ __forceinline__ void norm_rotate(const Attn& a, const float* x, const float* w1, int pos, float* row) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  float sum = 0;
  for (int i = lane; i < a.width; i += 32) sum = fmaf(x[i], x[i], sum);
  const float r = 1.f / sqrtf(warp_sum(sum) / static_cast<float>(a.width) + a.eps);
  for (int i = lane; i < a.width; i += 32) row[i] = x[i] * r * w1[i];
  __syncwarp();
  for (int i = lane; i < a.half; i += 32) rotate(a, row, i, rotation(pos, a.inv_freq[i], a.rope_scale));
  __syncwarp();
}

// A row of keys or values as codes (core/blocks.h) by one warp: `width` values -> codes (width) and scales (ceil(width/128)), all of them
// in shared or in global memory. Whoever calls it gets the same bits.
__device__ __forceinline__ void quantise_row(const float* x, int width, int8_t* codes, uint16_t* scales) {
  const int lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int g = 0; g * kKvGroup < width; g++) {
    const int at = g * kKvGroup + 4 * lane;  // widths are multiples of 32
    float v[4] = {};
    uint32_t largest = 0, packed = 0;
    if (at < width)
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = x[at + i], largest = max(largest, magnitude_bits(v[i]));
    const uint16_t bits = kv_scale(__reduce_max_sync(0xffffffffu, largest));
    const float scale = half_bits_to_float(bits);
#pragma unroll
    for (int i = 0; i < 4; i++) packed |= static_cast<uint32_t>(static_cast<uint8_t>(kv_code(v[i], scale))) << (8 * i);
    if (at < width) *reinterpret_cast<uint32_t*>(codes + at) = packed;
    if (lane == 0) scales[g] = bits;
  }
}

// ---- rows of 256 BF16 in shared memory --------------------------------------------------------------------------------

// Byte offset of the 16-byte chunk c (0..31) of a row. The exclusive or puts the same chunk of 8 successive rows into 8 different
// banks of 16 bytes, as ldmatrix wants them.
__device__ __forceinline__ int row_chunk(int row, int c) { return row * kRowBytes + ((c ^ (row & 7)) << 4); }

// at = row_chunk(row, c), c 0 or 1 -> row_chunk(row, c + 2 j). Four different exclusive ors for all j, the rest is a constant.
__device__ __forceinline__ int step_chunk(int at, int j) { return (at ^ (32 * j & 127)) + (32 * j & ~127); }

// threadIdx.x, read anew: what is made of it does not occupy registers across the loop over the tiles.
__device__ __forceinline__ int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// 16 bytes asynchronously, or zeros
__device__ __forceinline__ void copy_async16_if(bool real, void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(real ? 16 : 0)
               : "memory");
}

// Positions [first, first + Rows) of one head's keys or values, zeros from position `end` on (nothing there is read: it may lie
// behind the cache).
template <int Rows, int Threads>
__device__ __forceinline__ void load_rows(uint8_t* shared, const uint16_t* cache, int first, int end) {
  constexpr int kStep = Threads / 32;
  const int thread = thread_anew(), c = thread & 31, row = thread >> 5, rest = end - first - row;
  const uint16_t* from = cache + static_cast<int64_t>(first + row) * kWidth + c * 8;
#pragma unroll
  for (int i = 0; i < Rows / kStep; i++)
    copy_async16_if(i * kStep < rest, shared + row_chunk(row + i * kStep, c), from + i * kStep * kWidth);
}

// ---- rows of 256 codes ------------------------------------------------------------------------------------------------

constexpr int kScaleBytes = 4;  // of a row: fp16 of dims 0..127, fp16 of 128..255

// As row_chunk(), c 0..15
__device__ __forceinline__ int code_chunk(int row, int c) { return row * kWidth + ((c ^ (row & 7)) << 4); }

// The even bytes and the odd bytes of r, signed, as pairs of BF16. 0x4300 | (c & 127) is 128 + (c & 127); from it 128 is taken, or 256
// (0x4380) where the sign bit is set.
__device__ __forceinline__ void widen_codes(uint32_t r, uint32_t& even, uint32_t& odd) {
  const auto pair = [](uint32_t c) { return bf162_sub(bits_of<kAndOr>(c, 0x007f007fu, 0x43004300u), bits_of<kAndOr>(c, 0x00800080u, 0x43004300u)); };
  even = pair(r), odd = pair(r >> 8);
}

__device__ __forceinline__ float2 scale_pair(uint32_t halves) {
  return make_float2(half_bits_to_float(static_cast<uint16_t>(halves)), half_bits_to_float(static_cast<uint16_t>(halves >> 16)));
}

// 4 bytes asynchronously, or zeros
__device__ __forceinline__ void copy_async4_if(bool real, void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(real ? 4 : 0)
               : "memory");
}

// What load_rows() does for BF16: codes, and the scales (C, 2) of one plane by threads from .. from + Rows - 1. The scales' rows begin at
// multiples of 4 bytes only (an odd C is possible), hence copies of 4. Zeros from `end` on make zeros of what they scale.
template <int Rows, int Threads>
__device__ __forceinline__ void load_codes(uint8_t* shared, const int8_t* cache, int first, int end) {
  constexpr int kStep = Threads / 16;
  const int thread = thread_anew(), c = thread & 15, row = thread >> 4, rest = end - first - row;
  const int8_t* at = cache + static_cast<int64_t>(first + row) * kWidth + c * 16;
#pragma unroll
  for (int i = 0; i < Rows / kStep; i++)
    copy_async16_if(i * kStep < rest, shared + code_chunk(row + i * kStep, c), at + i * kStep * kWidth);
}
template <int Rows>
__device__ __forceinline__ void load_scales(uint8_t* shared, const uint16_t* scales, int first, int end, int from) {
  const int i = thread_anew() - from;
  if (i >= 0 && i < Rows) copy_async4_if(first + i < end, shared + i * kScaleBytes, scales + 2 * static_cast<int64_t>(first + i));
}

}  // namespace qn::cuda
