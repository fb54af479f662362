// What differs from one instruction set to the next: a table of functions, filled by dot_scalar.cpp, dot_avx2.cpp,
// dot_avx512.cpp, dot_avx512bf16.cpp and dot_amx.cpp, which are compiled with flags of their own. Nothing in this header has code: an inline
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
//   Bytes  int8[Kp], float[G], int32[G]      int8 codes, and per group of the *weights* the scale of the activations and
//                                  code_zero * (sum of the codes), which undoes the excess of weight codes
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
  int64_t unpacked = 0, packed = 0;               // bytes of an unpacked panel, of kPacked packed rows; see Many
};

inline constexpr int kBlock = 64;      // tokens of one call of a product
inline constexpr int kKeys = 256;      // keys of one call of attend: the blocks are fixed, so their sums do not depend on T

// y[16*t + r] = row r of w times x[t], for r < rows <= 16 and t < tokens <= kBlock. T16: w is a panel. Row-major: its first row.
// The sum of one (row, token) has one order, whatever rows and tokens are.
// `next`: the weights that will be read after these, or null; a stream that jumps is one that the hardware does not foresee.
using ProductFn = void (*)(const Product&, const uint8_t* w, const uint8_t* next, int rows, const uint8_t* const* x, int tokens, float* y);

// T16 panels that meet many tokens. AVX-512 unpacks a panel once, so that neither nibbles nor the folding of lines is paid for every token:
//
//   unpacked panel:  [ fp32 scales: G x 16, in the order of the lanes ][ codes, one byte each: Kp/4 lines of 16 rows x 4 k ]
//
// A line is one register whose lane holds 4 k of one row, the operand of vpdpbusd beside 4 activations in every lane.
// Lane 4i + j holds row i + 8 (j % 2) + 4 (j / 2): the order that a T16 tile gives up with fewest moves.
//
// AMX takes panels as they are, and rows of activations that were packed, kPacked at a time; where there are fewer, zeros (so a level has one of
// `unpack` and `pack`):
//
//   packed rows:     [ fp32 scales: G x 16 rows ][ codes: Kp/4 lines of 16 rows x 4 k ]      16 lines are one tile
struct Many {
  int least = 0;  // tokens from which on this is faster than `product`; 0: this level has none
  void (*unpack)(const Product&, const uint8_t* panel, uint8_t* unpacked) = nullptr;  // null: `multiply` takes panels as they are
  void (*pack)(const Product&, const uint8_t* const* x, int rows, uint8_t* packed) = nullptr;  // null: `multiply` takes rows as they are
  // y[16 * (kBlock * i + t) + r]: panel i < panels <= kPanels at w + i * stride, as it is or unpacked, times row x[t], or row t of `packed`. Both
  // are aligned to 64 bytes, and y may be written up to the next multiple of kPacked tokens. The same bits as the product, as long as sums are
  // normal numbers. Meanwhile `next`, the next_bytes of weights that come after these, is asked for.
  void (*multiply)(const Product&, const uint8_t* w, int64_t stride, int panels, const uint8_t* const* x, const uint8_t* packed, int tokens,
                   const uint8_t* next, int64_t next_bytes, float* y) = nullptr;
};
inline constexpr int kPacked = 16;
inline constexpr int kPanels = 2;

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

// One token of the gated delta rule: q, k (dk), v, o (columns of the state)
struct DeltaStep {
  const float *q, *k, *v;
  float alpha, beta;
  float *o, *u;  // u: null, or what is added to S, divided by k
};
inline constexpr int kDeltaBlock = 16;

struct Kernels {
  const char* name;
  // [form][dtype]; null where this level has none, and then the activations are prepared as F32
  ProductFn product[4][6];
  Many many[6];  // [dtype], activations as Form::Bytes
  void (*prepare)(const Product&, Act, const float* x, uint8_t* out);
  float (*sum_squares)(const float* x, int64_t n);
  void (*scale)(const float* x, const float* w, float r, int64_t n, float* y);             // x * r * w; w may be null
  void (*silu_mul)(const float* gate, const float* x, int64_t n, float* y);                // silu(gate) * x
  void (*sigmoid_mul)(const float* gate, const float* x, int64_t n, float* y);             // sigmoid(gate) * x
  void (*conv_silu)(const float* const x[4], const float* taps, int64_t n, float* y);      // taps (4, n)
  // 1 <= tokens <= kDeltaBlock tokens of the gated delta rule for `cols` columns (a multiple of 32) of a state (dk, stride)
  void (*delta_steps)(float* s, int64_t stride, int64_t dk, int64_t cols, const DeltaStep* steps, int tokens);
  void (*delta_replay)(float* s, int64_t stride, int64_t dk, int64_t cols, const float* k, const float* u, float alpha);  // S <- alpha S + k u', the same bits
  void (*attend)(const Attend&);
  void (*merge)(float* into, const float* part, int width);  // one head of two results of attend, in order
  uint64_t (*read)(const uint8_t* p, int64_t bytes);                    // touches every line once; bytes: a multiple of 256
  // What products of int8 codes are made of, in registers alone: `rounds` times some of them. Returns multiplications and additions; may be null.
  double (*work)(int64_t rounds);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();    // null when not compiled for this architecture
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();  // as avx512_kernels(), but for Form::BF16 and Form::Codes
const Kernels* amx_kernels();         // as avx512bf16_kernels(), but for T16 panels that meet many tokens

}  // namespace qn::cpu
