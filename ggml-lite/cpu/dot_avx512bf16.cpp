// AVX-512 with BF16: BF16 weights times BF16 activations or int8 codes. All else is as in dot_avx512.cpp.
// Compiled with flags of its own: nothing but static functions and what this file alone instantiates.
#include "ggml-lite/cpu/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#if defined(__GNUC__) && !defined(__clang__)  // g++ 12 takes the deliberately undefined operands of its own header for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace qn::cpu {
namespace {

// vdpbf16ps adds pairs of products to fp32 lanes; codes are integers up to 127 and so exact in BF16, and each group of 128 is
// scaled once.

template <bool Scaled, int R, int T>
void rows_bf16(const Product& p, const uint16_t* w, const uint8_t* const* x, float* y) {
  __m512 total[T][R], acc[T][R];
  QN_UNROLL
  for (int t = 0; t < T; t++)
    QN_UNROLL
    for (int r = 0; r < R; r++) total[t][r] = acc[t][r] = _mm512_setzero_ps();
  const int64_t step = Scaled ? kActGroup : p.k;
  for (int64_t k = 0; k < p.k; k += step) {
    const int64_t end = k + step < p.k ? k + step : p.k;
    for (int64_t i = k; i < end; i += 32) {
      __m512bh a[R];
      QN_UNROLL
      for (int r = 0; r < R; r++) {
        const uint16_t* at = w + r * p.row_stride + i;
        if (R > 1) __builtin_prefetch(at + R * p.row_stride, 0, 2);  // into L2: R streams are more than the hardware follows well
        a[r] = (__m512bh)_mm512_loadu_si512(at);
      }
      QN_UNROLL
      for (int t = 0; t < T; t++) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(x[t] + 2 * i);
        QN_UNROLL
        for (int r = 0; r < R; r++) acc[t][r] = _mm512_dpbf16_ps(acc[t][r], a[r], b);
      }
    }
    if (!Scaled) continue;
    QN_UNROLL
    for (int t = 0; t < T; t++) {
      const __m512 scale = _mm512_set1_ps(reinterpret_cast<const float*>(x[t] + p.scales_at)[k / kActGroup]);
      QN_UNROLL
      for (int r = 0; r < R; r++) {
        total[t][r] = _mm512_fmadd_ps(acc[t][r], scale, total[t][r]);
        acc[t][r] = _mm512_setzero_ps();
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) y[16 * t + r] = _mm512_reduce_add_ps(Scaled ? total[t][r] : acc[t][r]);
}

template <bool Scaled, int T>
void rows_of_tokens(const Product& p, const uint16_t* w, int rows, const uint8_t* const* x, float* y) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) rows_bf16<Scaled, 4, T>(p, w + r * p.row_stride, x, y + r);
  for (; r < rows; r++) rows_bf16<Scaled, 1, T>(p, w + r * p.row_stride, x, y + r);
}

// Few tokens: row by row, one stream from memory. More: tokens outside, 4 of them meet 4 rows at a time.
template <bool Scaled>
void product_rows_bf16(const Product& p, const uint8_t* bytes, const uint8_t*, int rows, const uint8_t* const* x, int tokens, float* y) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(bytes);
  if (tokens < 4) {
    for (int r = 0; r < rows; r++) {
      const uint16_t* at = w + r * p.row_stride;
      if (tokens == 3) rows_bf16<Scaled, 1, 3>(p, at, x, y + r);
      if (tokens == 2) rows_bf16<Scaled, 1, 2>(p, at, x, y + r);
      if (tokens == 1) rows_bf16<Scaled, 1, 1>(p, at, x, y + r);
    }
    return;
  }
  int t = 0;
  for (; t + 4 <= tokens; t += 4) rows_of_tokens<Scaled, 4>(p, w, rows, x + t, y + 16 * t);
  if (tokens - t == 3) rows_of_tokens<Scaled, 3>(p, w, rows, x + t, y + 16 * t);
  if (tokens - t == 2) rows_of_tokens<Scaled, 2>(p, w, rows, x + t, y + 16 * t);
  if (tokens - t == 1) rows_of_tokens<Scaled, 1>(p, w, rows, x + t, y + 16 * t);
}

}  // namespace

const Kernels* avx512bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_kernels();
    k.name = "avx512bf16";
    k.product[static_cast<int>(Form::BF16)][static_cast<int>(DType::BF16)] = product_rows_bf16<false>;
    k.product[static_cast<int>(Form::Codes)][static_cast<int>(DType::BF16)] = product_rows_bf16<true>;
    return k;
  }();
  return &kernels;
}

}  // namespace qn::cpu

#else

namespace qn::cpu {
const Kernels* avx512bf16_kernels() { return avx512_kernels(); }
}  // namespace qn::cpu

#endif
