// What differs from one instruction set to the next: a table of functions, filled by dot_scalar.cpp, dot_avx2.cpp,
// dot_avx512.cpp and dot_avx512bf16.cpp, which are compiled with flags of their own. Nothing in this header has code: an inline
// function here would be emitted by each of those files, and the linker might keep the copy that needs AVX-512.
#pragma once
#include <cstdint>

#include "ggml-lite/core/types.h"

// Loops over arrays that must live in registers: g++ -O2 unrolls none of them by itself, and an array with a variable index lives
// in memory, at a third of the speed.
#if defined(__clang__)
#define QN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace qn::cpu {

// How the activations of one token lie when they meet weights. They are prepared once per operation and read many times.
//   F32    float[Kp]               rounded as Act says; meets every weight format
//   BF16   bf16[Kp]                meets BF16 weights in vdpbf16ps
//   Codes  bf16[Kp], float[G]      int8 codes, which BF16 holds exactly, and the scale of each group of 128: BF16 weights
//   Bytes  int8[2*Kp], float[G], int32[G]    int8 codes in the order of T16 tiles, and per group of the *weights* the scale of
//                                  the activations and code_zero * (sum of the codes), which undoes the excess of weight codes
//
// Order of Bytes: a line of a tile alternates 8 bytes of row g and 8 bytes of row g + 8 that meet the same activations, so
// every piece of 8 codes is stored twice. p0 = k 0..7, p1 = k 8..15, ...
//   INT8, per 32 k:  p0 p0 p1 p1 p2 p2 p3 p3
//   INT4, per 64 k:  p0 p0 p2 p2 p4 p4 p6 p6  (meets the low nibbles)  p1 p1 p3 p3 p5 p5 p7 p7  (the high ones)
enum class Form : uint8_t { F32, BF16, Codes, Bytes };

// One weight matrix and how its activations are prepared (make_matrix in cpu.cpp).
struct Product {
  DType dtype = DType::F32;
  Form form = Form::F32;
  int group = 0;           // of T16 weights
  int64_t k = 0, kp = 0;   // kp: K padded to 64; activations beyond K are zero
  int64_t row_stride = 0;  // row-major weights: values from row to row
  int64_t tiles_at = 0;    // T16: bytes of scales before the tiles of a panel
  int64_t scales_at = 0, sums_at = 0, bytes = 0;  // of a prepared row; bytes is a multiple of 64
};

inline constexpr int kBlock = 8;       // tokens of one call of a product
inline constexpr int kKeys = 256;      // keys of one call of attend: the blocks are fixed, so their sums do not depend on T

// y[16*t + r] = row r of w times x[t], for r < rows <= 16 and t < tokens <= kBlock. T16: w is a panel. Row-major: its first row.
// The sum of one (row, token) has one order, whatever rows and tokens are.
using ProductFn = void (*)(const Product&, const uint8_t* w, int rows, const uint8_t* const* x, int tokens, float* y);

// Softmax attention of the query heads that share one KV head over at most kKeys keys.
struct Attend {
  const float* q;         // (heads, width), already scaled
  const void *k, *v;      // (keys, width)
  DType cache;            // of k and v: F32, BF16 or I8
  const uint16_t *k_scales, *v_scales;  // I8: (keys, groups) fp16
  int heads, keys, width, groups;  // groups: scales of a row
  float* scores;          // scratch (heads, kKeys)
  float* part;            // out: per head, width + kPartExtra apart: weighted sum of v (width), largest score, sum of exponentials
};
inline constexpr int kPartExtra = 16;

struct Kernels {
  const char* name;
  // [form][dtype]; null where this level has none, and then the activations are prepared as F32
  ProductFn product[4][6];
  void (*prepare)(const Product&, Act, const float* x, uint8_t* out);
  float (*sum_squares)(const float* x, int64_t n);
  void (*scale)(const float* x, const float* w, float r, int64_t n, float* y);             // x * r * w; w may be null
  void (*silu_mul)(const float* gate, const float* x, int64_t n, float* y);                // silu(gate) * x
  void (*sigmoid_mul)(const float* gate, const float* x, int64_t n, float* y);             // sigmoid(gate) * x
  void (*conv_silu)(const float* const x[4], const float* taps, int64_t n, float* y);      // taps (4, n)
  // One token of the gated delta rule for `cols` columns (a multiple of 32) of a state (dk, stride).
  void (*delta_step)(float* s, int64_t stride, int64_t dk, int64_t cols, const float* q, const float* k, const float* v, float alpha,
                     float beta, float* o);
  void (*attend)(const Attend&);
  void (*merge)(float* into, const float* part, int width);  // one head of two results of attend, in order
  uint64_t (*read)(const uint8_t* p, int64_t bytes);                    // touches every line once; p, bytes multiples of 256
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null when not compiled for this architecture
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();  // as avx512_kernels(), but for Form::BF16 and Form::Codes

}  // namespace qn::cpu
