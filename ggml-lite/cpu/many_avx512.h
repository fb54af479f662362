// What the kernels for many tokens (Many) of dot_avx512.cpp and dot_amx.cpp share. As generic.h, everything is in an anonymous namespace.
#include <immintrin.h>

#include "ggml-lite/core/blocks.h"
#include "ggml-lite/cpu/kernels.h"

namespace qn::cpu {
namespace {

__m512i cell(const uint8_t* p, const uint8_t* q, const uint8_t* r, const uint8_t* s) {
  auto load16 = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  // inserts from memory rather than a transposition of registers: they need no shuffle
  __m512i v = _mm512_castsi128_si512(load16(p));
  v = _mm512_inserti32x4(v, load16(q), 1);
  v = _mm512_inserti32x4(v, load16(r), 2);
  return _mm512_inserti32x4(v, load16(s), 3);
}

// Codes as they are, or less their zero: signed
template <int Bits, bool Signed>
void unpack_panel(const Product& p, const uint8_t* panel, uint8_t* out) {
  const int64_t groups = p.kp / p.group, tiles = p.kp / (Bits == 4 ? 64 : 32);
  const __m256i order = _mm256_set_epi16(15, 7, 11, 3, 14, 6, 10, 2, 13, 5, 9, 1, 12, 4, 8, 0);
  for (int64_t g = 0; g < groups; g++, out += 64) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * g));
    _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_permutexvar_epi16(order, h)));
  }
  const uint8_t* tile = panel + p.tiles_at;
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < tiles; i++, tile += kTileBytes)
    QN_UNROLL
    for (int t = 0; t < 4; t++) {
      const uint8_t* at = tile + 16 * t;
      // per 128 bits: row l k 0..3, 4..7, row l + 8 likewise
      const __m512 a = _mm512_castsi512_ps(cell(at, at + 64, at + 128, at + 192));
      const __m512 b = _mm512_castsi512_ps(cell(at + 256, at + 320, at + 384, at + 448));
      const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), odd = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
      auto put = [&out](__m512i codes) {
        if (Signed) codes = _mm512_sub_epi8(codes, _mm512_set1_epi8(static_cast<char>(Bits == 4 ? 8 : 128)));
        _mm512_storeu_si512(out, codes);
        out += 64;
      };
      if constexpr (Bits == 4) {
        put(_mm512_and_si512(even, low));
        put(_mm512_and_si512(odd, low));
        put(_mm512_and_si512(_mm512_srli_epi16(even, 4), low));
        put(_mm512_and_si512(_mm512_srli_epi16(odd, 4), low));
      } else {
        put(even);
        put(odd);
      }
    }
}

// What is asked for while a group is multiplied: an equal part of the next panels
struct Ahead {
  const uint8_t* at;
  const uint8_t* end;
  int64_t part;
  Ahead(const Product& p, const uint8_t* next, int64_t bytes) : at(next), end(next + bytes), part(bytes / (p.kp / p.group) + 64) {}
  void ask() {
    for (const uint8_t* to = at + part; at < to && at < end; at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// Rows from the order of the lanes to their own
void order_rows(int panels, int tokens, float* y) {
  const __m512i back = _mm512_set_epi32(15, 11, 7, 3, 13, 9, 5, 1, 14, 10, 6, 2, 12, 8, 4, 0);
  for (int i = 0; i < panels; i++)
    for (int t = 0; t < tokens; t++) {
      float* at = y + 16 * (kBlock * i + t);
      _mm512_storeu_ps(at, _mm512_permutexvar_ps(back, _mm512_loadu_ps(at)));
    }
}

}  // namespace
}  // namespace qn::cpu
