// The T16 weight layout: the only definition, for the converter, the CPU and CUDA.
//
// A matrix W (N rows, K columns) of INT4 or INT8 is stored as ceil(N/16) panels of 16 rows. K is padded to Kp, the next
// multiple of 64, and N to the next multiple of 16, with codes and scales that mean zero.
//
//   panel:  [ fp16 scales: (Kp/group) x 16, scale of group g and row r at index 16*g + r ][ tiles in k order, 512 B each ]
//
// INT4 tile: 16 rows x 64 k. Codes are excess-8: weight = (code - 8) * scale, code 0..15.
// INT8 tile: 16 rows x 32 k. Codes are excess-128: weight = (code - 128) * scale; writers use 1..255, readers take 0 as -128.
//
//   a tile is 8 lines of 64 B; line g (0..7) holds rows g and g+8:
//
//   byte   0        8       16       24       32       40       48       56      63
//          [row g  ][row g+8][row g  ][row g+8][row g  ][row g+8][row g  ][row g+8]
//          '--- cell t=0 ---''--- cell t=1 ---''--- cell t=2 ---''--- cell t=3 ---'
//
//   INT4: byte b (0..7) of a half cell: low nibble = k 16t + b, high nibble = k 16t + 8 + b
//   INT8: byte b of a half cell: k 8t + b
//
// Why so: lane 4g+t of a warp loads its 16 bytes at 16*lane (512 contiguous bytes a warp), and the same 16 bytes are the A
// fragments of mma.m16n8k16 (four k-steps of INT4) and of mma.m16n8k32.s8; an AVX-512 register is one line, whose nibbles
// are u8 operands of vpdpbusd; AVX2 takes half a line. No repacking anywhere. tests/test_codec.cpp proves each consumer.
//
// Gate and up projections of SwiGLU that are computed together, (2F, D), are interleaved by 8: panel p holds gate rows
// 8p..8p+7 as its rows 0..7 and up rows 8p..8p+7 as its rows 8..15, so that one lane ends with both factors of a product.
#pragma once
#include <cstdint>

#include "ggml-lite/core/types.h"

#if defined(__CUDACC__)
#define QN_HD __host__ __device__
#else
#define QN_HD
#endif

namespace qn {

inline constexpr int kPanelRows = 16;
inline constexpr int kTileBytes = 512;
inline constexpr int kPadK = 64;
inline constexpr int64_t kPage = 4096;

QN_HD constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

QN_HD constexpr int tile_k(DType t) { return t == DType::INT4 ? 64 : 32; }
QN_HD constexpr int code_zero(DType t) { return t == DType::INT4 ? 8 : 128; }

QN_HD constexpr int64_t t16_scale_bytes(int64_t k, int group) { return round_up(k, kPadK) / group * kPanelRows * 2; }
QN_HD constexpr int64_t t16_panel_bytes(DType t, int64_t k, int group) {
  return t16_scale_bytes(k, group) + round_up(k, kPadK) / tile_k(t) * kTileBytes;
}
QN_HD constexpr int64_t t16_panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }
QN_HD constexpr int64_t t16_bytes(DType t, int64_t n, int64_t k, int group) {
  return t16_panels(n) * t16_panel_bytes(t, k, group);
}

// Byte offset inside a tile of row r (0..15), column k (0..63 for INT4, 0..31 for INT8).
QN_HD constexpr int int4_byte(int r, int k) { return (r & 7) * 64 + (k >> 4) * 16 + (r >> 3) * 8 + (k & 7); }
QN_HD constexpr int int4_shift(int k) { return (k & 8) ? 4 : 0; }
QN_HD constexpr int int8_byte(int r, int k) { return (r & 7) * 64 + (k >> 3) * 16 + (r >> 3) * 8 + (k & 7); }

// Where gate/up row r of (2F, D) lies among the rows of the panels, and back.
QN_HD constexpr int64_t interleave_row(int64_t r, int64_t f) {  // r < f: gate row r; else up row r - f
  const int64_t i = r < f ? r : r - f;
  return i / 8 * 16 + i % 8 + (r < f ? 0 : 8);
}

// Bytes of a whole weight matrix as stored.
QN_HD constexpr int64_t weight_bytes(DType t, int64_t n, int64_t k, int group) {
  return is_t16(t) ? t16_bytes(t, n, k, group) : n * k * item_bytes(t);
}

// One routed expert: gate_up (2F, D) then down (D, F), one contiguous record padded to whole pages.
// T16: gate_up panels interleaved as above, then down panels. Row-major: gate rows, up rows, down rows.
struct ExpertLayout {
  int64_t down_offset;  // bytes from the start of the record
  int64_t bytes;        // used
  int64_t stride;       // distance of records: bytes rounded up to kPage
};
QN_HD constexpr ExpertLayout expert_layout(DType t, int64_t d, int64_t f, int group) {
  const int64_t gate_up = weight_bytes(t, 2 * f, d, group), down = weight_bytes(t, d, f, group);
  return {gate_up, gate_up + down, round_up(gate_up + down, kPage)};
}

static_assert(t16_panel_bytes(DType::INT4, 2048, 128) == 16896 && t16_panel_bytes(DType::INT4, 512, 128) == 4224);
static_assert(expert_layout(DType::INT4, 2048, 512, 128).stride == 396 * kPage);  // exactly: no padding at the real shape
static_assert(expert_layout(DType::INT4, 2048, 512, 64).stride == 408 * kPage);
static_assert(expert_layout(DType::INT4, 2048, 512, 32).stride == 432 * kPage);

// fp16 <-> fp32 of the scales and bf16 <-> fp32, bit-exact, round to nearest even.
QN_HD inline float bits_to_float(uint32_t u) {
  union {
    uint32_t u;
    float f;
  } x;
  x.u = u;
  return x.f;
}
QN_HD inline uint32_t float_to_bits(float f) {
  union {
    float f;
    uint32_t u;
  } x;
  x.f = f;
  return x.u;
}
QN_HD inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
QN_HD inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
QN_HD inline float round_bf16(float f) { return bf16_to_float(float_to_bf16(f)); }
QN_HD inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
  if (e == 31) return bits_to_float(sign | 0x7f800000u | (m << 13));
  if (e == 0) {  // subnormal: m * 2^-24, exact in fp32
    const float v = static_cast<float>(m) * 5.9604644775390625e-08f;
    return bits_to_float(sign | float_to_bits(v));
  }
  return bits_to_float(sign | ((e + 112) << 23) | (m << 13));
}
QN_HD inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more: infinity
  if (a < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 puts the wanted bits at the bottom, rounded to even
    const float r = bits_to_float(a) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(r) - 0x3f000000u));
  }
  const uint32_t r = a - 0x38000000u + 0xfff + ((a >> 13) & 1);
  return static_cast<uint16_t>(sign | (r >> 13));
}

// The INT8 KV cache. A key (after RoPE) or value of DH dims is DH signed codes and a scale for every started 128 dims:
// x[i] = code[i] * scale[i / 128], which fp32 holds exactly. Codes lie apart from scales, so that a row of codes begins where 16-byte
// loads want it; of one layer, head g, position p, S = ceil(DH / 128):
//
//   K codes (HK, C, DH) int8     byte (g*C + p)*DH + i        ... [ p: code 0 | code 1 | ... | code DH-1 ][ p + 1: ... ] ...
//   K scales (HK, C, S) fp16     byte ((g*C + p)*S + i/128)*2 ... [ p: of dims 0..127 | of 128..255 ][ p + 1: ... ] ...
//   V likewise                                                DH 256: 256 + 4 bytes a row
//
//   scale = max|x| / 127 rounded to fp16; one step up where that would put the largest beyond code 127 (only scales below 2^-14 are
//           that coarse), so that no value is more than half a scale away. 0 for zeros alone.
//   code  = the integer next to x / scale, ties to even, with the scale as it was rounded.
//
// NaN, an infinity, or a value beyond 127 * 65504 makes the scale of its 128 values NaN and their codes 0: whatever meets them is NaN.
inline constexpr int kKvGroup = 128;
QN_HD constexpr int64_t kv_groups(int64_t width) { return (width + kKvGroup - 1) / kKvGroup; }
QN_HD constexpr int64_t kv_row_bytes(DType t, int64_t width) { return width * item_bytes(t) + (t == DType::I8 ? kv_groups(width) * 2 : 0); }
static_assert(kv_row_bytes(DType::BF16, 256) == 512 && kv_row_bytes(DType::I8, 256) == 260 && kv_row_bytes(DType::I8, 160) == 164);

// Magnitudes as integers order like floats, infinity and then NaN above all: a maximum of these bits loses none of them.
QN_HD inline uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffffu; }
QN_HD inline uint16_t kv_scale(uint32_t largest) {
  if (largest == 0) return 0;
  const float most = bits_to_float(largest);
  uint16_t s = float_to_half(most / 127.f);
  if (127.5f * half_to_float(s) <= most) s++;  // the product is exact
  return s < 0x7c00 ? s : uint16_t{0x7e00};
}
QN_HD inline int8_t kv_code(float x, float scale) {
  if (!(scale > 0)) return 0;
  // 1.5 * 2^23: the sum is rounded to an integer, which its low bits are
  return static_cast<int8_t>(static_cast<int32_t>(float_to_bits(x / scale + 12582912.f) - 0x4b400000u));
}

}  // namespace qn
