// AVX-512 (F, BW, VL, DQ, VNNI): lanes of sixteen floats, vpdpbusd on lines of T16 tiles.
// Compiled with flags of its own: nothing but static functions and what this file alone instantiates.
#include "ggml-lite/cpu/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#if defined(__GNUC__) && !defined(__clang__)  // g++ 12 takes the deliberately undefined operands of its own header for ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace qn::cpu {
namespace {

using F = __m512;
constexpr int L = 16, kRows = 4, kTokens = 3, kChains = 2;  // 24 accumulators in 32 registers

F zero() { return _mm512_setzero_ps(); }
F all(float x) { return _mm512_set1_ps(x); }
F load(const float* p) { return _mm512_loadu_ps(p); }
F load(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
F load(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
F all_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(*p))); }
void store(float* p, F v) { _mm512_storeu_ps(p, v); }
F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
F add(F a, F b) { return _mm512_add_ps(a, b); }
F sub(F a, F b) { return _mm512_sub_ps(a, b); }
F mul(F a, F b) { return _mm512_mul_ps(a, b); }
F divide(F a, F b) { return _mm512_div_ps(a, b); }
F larger(F a, F b) { return _mm512_max_ps(a, b); }
F absolute(F v) { return _mm512_abs_ps(v); }
float sum(F v) { return _mm512_reduce_add_ps(v); }
float largest(F v) { return _mm512_reduce_max_ps(v); }
void sums(const F (&v)[1], float* out) { out[0] = sum(v[0]); }
// Eight vectors: each round adds halves of two vectors into one, [lanes of a | lanes of b], until 8 pairs are left.
void sums(const F (&v)[8], float* out) {
  F a[4], b[2];
  QN_UNROLL
  for (int i = 0; i < 4; i++)
    a[i] = add(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));  // 0 0 1 1
  for (int i = 0; i < 2; i++)
    b[i] = add(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));  // 0 1 2 3
  F c = add(_mm512_shuffle_ps(b[0], b[1], 0x44), _mm512_shuffle_ps(b[0], b[1], 0xee));  // 0 0 4 4 | 1 1 5 5 | 2 2 6 6 | 3 3 7 7
  c = add(c, _mm512_shuffle_ps(c, c, 0xb1));
  const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, c)));
}

// e^v = 2^n e^r, |r| <= ln2 / 2; ln2 in two parts so that r keeps its low bits; then a polynomial of degree 6 in r (minimax).
// Arguments beyond the range of floats are clamped; max and min are written so that a NaN passes.
F exponent(F v) {
  v = _mm512_min_ps(all(88.3762589f), _mm512_max_ps(all(-87.3365479f), v));
  const F n = _mm512_roundscale_ps(mul(v, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), v));
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  return _mm512_scalef_ps(add(fma(p, mul(r, r), r), all(1.0f)), n);
}

void to_bf16(uint16_t* p, F v) {
  const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16), odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __m512i h = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(h));
}
void to_int8(int8_t* p, F v) {
  v = larger(all(-127.0f), _mm512_min_ps(all(127.0f), v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
int32_t sum32(const int8_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i s = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), x);
  return _mm512_reduce_add_epi32(_mm512_zextsi256_si512(s));
}
void halves(const uint8_t* p, float* out) {
  store(out, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
F bytes_less(__m128i bytes, int zero_code) {
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(zero_code)));
}
__m128i piece(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
void codes4(const uint8_t* p, F* out) {
  const __m128i b = piece(p), low = _mm_set1_epi8(15);
  out[0] = bytes_less(_mm_unpacklo_epi64(_mm_and_si128(b, low), _mm_and_si128(_mm_srli_epi16(b, 4), low)), 8);
}
void codes8(const uint8_t* p, F* out) { out[0] = bytes_less(_mm_unpacklo_epi64(piece(p), piece(p + 16)), 128); }

}  // namespace
}  // namespace qn::cpu

#include "ggml-lite/cpu/ahead.h"
#include "ggml-lite/cpu/generic.h"

namespace qn::cpu {
namespace {

__m512i load_line(const void* p) { return _mm512_loadu_si512(p); }

// ---- T16 panels times int8 activations (Form::Bytes)
//
// One register is one line of a tile, its bytes the unsigned operand of vpdpbusd (after masking nibbles), the activations the
// signed one, each piece of 8 twice, for row g and for row g + 8; the excess of the codes is undone by the prepared sums. Integer sums are exact, so only the scaling, one fma
// per group, has an order. After a step of a group (or of a tile with two groups of 32) the 16 lanes of a line are per 128 bits
// [g, g, g+8, g+8]; three rounds of shuffle-and-add fold 8 lines into one register of 16 row sums, in the order
// 0 8 1 9 | 2 10 3 11 | 4 12 5 13 | 6 14 7 15.

// lines a and b -> per 128 bits [a, a+8, b, b+8]
__m512i fold_pairs(__m512i a, __m512i b) {
  const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
  return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
}
__m512i even_cells(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
__m512i odd_cells(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }
// -> [a cells 0+1, a cells 2+3, b cells 0+1, b cells 2+3]
__m512i fold_cells(__m512i a, __m512i b) { return _mm512_add_epi32(even_cells(a, b), odd_cells(a, b)); }

// fp16 scales of n groups -> fp32 in the order of the folded rows
void unpack_scales(const uint8_t* halfs, int64_t n, F* w) {
  const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
  for (int64_t g = 0; g < n; g++)
    w[g] = _mm512_cvtph_ps(_mm256_permutexvar_epi16(order, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halfs + 32 * g))));
}

// total += (sum - excess) * scale of the weights * scale of the activations, for group g
template <int T>
void scale_group(const Product& p, F w, int64_t g, const uint8_t* const* x, const __m512i* sums, F* total) {
  QN_UNROLL
  for (int t = 0; t < T; t++) {
    const __m512i v = _mm512_sub_epi32(sums[t], _mm512_set1_epi32(reinterpret_cast<const int32_t*>(x[t] + p.sums_at)[g]));
    const float scale = reinterpret_cast<const float*>(x[t] + p.scales_at)[g];
    total[t] = fma(_mm512_cvtepi32_ps(v), mul(w, all(scale)), total[t]);
  }
}

template <int Bits, int Tiles, bool Halves, int T>
void panel_bytes(const Product& p, const uint8_t* panel, const uint8_t* next, const uint8_t* const* x, float* y) {
  constexpr int kLines = T <= 2 ? 8 : 4;        // lines in flight: whole tiles in order of addresses where registers allow
  // Asked for in L2, which has room for more lines on their way than L1 has for loads (measured, 16 cores of a Xeon: gate_up of one token 109 to
  // 121 GB/s instead of 94 to 99). INT8 in two passes, of four tiles at most, hides its order from the hardware. Beyond the end it is `next` that
  // is asked for, if that is known: ranges of an expert may be so short that a fourth of what was asked for would be another thread's. Else it is
  // what lies there, which the thread's next range may well be (a hint that reads nothing, also behind the last weights).
  constexpr int kAsk = kLines == 8 ? 4096 : Bits == 8 ? 8192 : 0;
  const __m512i low = _mm512_set1_epi8(15);
  F total[T];
  QN_UNROLL
  for (F& v : total) v = zero();
  const uint8_t* tile = panel + p.tiles_at;
  const int64_t steps = p.kp / (Bits == 4 ? 64 : 32) / Tiles;
  const uint8_t* const end = tile + steps * Tiles * kTileBytes;
  if (kAsk && next)
    for (int64_t i = 0; i < p.tiles_at; i += 64) __builtin_prefetch(next + i, 0, 2);
  constexpr int kGroups = Halves ? 2 : 1;  // of a step
  F scales[kGroupsAhead];
  for (int64_t step = 0; step < steps; step++, tile += Tiles * kTileBytes) {
    const int64_t group = step * kGroups, ahead = group % kGroupsAhead;
    if (ahead == 0) {
      const int64_t left = steps * kGroups - group;
      unpack_scales(panel + 32 * group, left < kGroupsAhead ? left : kGroupsAhead, scales);
    }
    const uint8_t* ask = tile + kAsk;
    if (ask >= end && next) ask = next + p.tiles_at + (ask - end);
    __m512i quad[2][T];
    QN_UNROLL
    for (int q = 0; q < 8; q += kLines) {
      __m512i s[kLines][T];
      QN_UNROLL
      for (auto& line : s)
        QN_UNROLL
        for (__m512i& v : line) v = _mm512_setzero_si512();
      QN_UNROLL
      for (int i = 0; i < Tiles; i++) {
        __m512i twice[Bits == 4 ? 2 : 1][T];
        QN_UNROLL
        for (int t = 0; t < T; t++) {
          const uint8_t* xt = x[t] + (step * Tiles + i) * (Bits == 4 ? 64 : 32);
          if constexpr (Bits == 4) {  // k 0..7, 16..23, ... meet the low nibbles
            twice[0][t] = _mm512_unpacklo_epi64(load_line(xt), load_line(xt));
            twice[1][t] = _mm512_unpackhi_epi64(load_line(xt), load_line(xt));
          } else {
            const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(xt));
            twice[0][t] = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), _mm512_castsi256_si512(codes));
          }
        }
        QN_UNROLL
        for (int l = 0; l < kLines; l++) {
          const uint8_t* at = tile + i * kTileBytes + (q + l) * 64;
          if (kAsk) __builtin_prefetch(ask + (at - tile), 0, 2);
          const __m512i w = load_line(at);
          if constexpr (Bits == 4) {
            const __m512i lo = _mm512_and_si512(w, low), hi = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
            QN_UNROLL
            for (int t = 0; t < T; t++) {
              s[l][t] = _mm512_dpbusd_epi32(s[l][t], lo, twice[0][t]);
              s[l][t] = _mm512_dpbusd_epi32(s[l][t], hi, twice[1][t]);
            }
          } else {
            QN_UNROLL
            for (int t = 0; t < T; t++) s[l][t] = _mm512_dpbusd_epi32(s[l][t], w, twice[0][t]);
          }
        }
      }
      QN_UNROLL
      for (int l = 0; l < kLines; l += 4)
        QN_UNROLL
        for (int t = 0; t < T; t++)
          quad[(q + l) / 4][t] = fold_cells(fold_pairs(s[l][t], s[l + 1][t]), fold_pairs(s[l + 2][t], s[l + 3][t]));
    }
    __m512i first[T], second[T];
    QN_UNROLL
    for (int t = 0; t < T; t++) {
      first[t] = even_cells(quad[0][t], quad[1][t]);   // k of the first half of the tile
      second[t] = odd_cells(quad[0][t], quad[1][t]);
      if (!Halves) first[t] = _mm512_add_epi32(first[t], second[t]);
    }
    scale_group<T>(p, scales[ahead], group, x, first, total);
    if (Halves) scale_group<T>(p, scales[ahead + 1], group + 1, x, second, total);
  }
  const __m512i back = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  QN_UNROLL
  for (int t = 0; t < T; t++) store(y + 16 * t, _mm512_permutexvar_ps(back, total[t]));
}

template <int Bits, int Tiles, bool Halves>
void panel_tokens(const Product& p, const uint8_t* panel, const uint8_t* next, const uint8_t* const* x, int tokens, float* y) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) panel_bytes<Bits, Tiles, Halves, 4>(p, panel, next, x + t, y + 16 * t);
  switch (tokens - t) {
    case 3: return panel_bytes<Bits, Tiles, Halves, 3>(p, panel, next, x + t, y + 16 * t);
    case 2: return panel_bytes<Bits, Tiles, Halves, 2>(p, panel, next, x + t, y + 16 * t);
    case 1: return panel_bytes<Bits, Tiles, Halves, 1>(p, panel, next, x + t, y + 16 * t);
  }
}

template <int Bits>
void product_panel_bytes(const Product& p, const uint8_t* panel, const uint8_t* next, int, const uint8_t* const* x, int tokens, float* y) {
  constexpr int kPer32 = Bits == 4 ? 0 : 1;  // tiles in 32 k of INT8; of INT4 half a one
  if (p.group == 128) panel_tokens<Bits, kPer32 ? 4 : 2, false>(p, panel, next, x, tokens, y);
  else if (p.group == 64) panel_tokens<Bits, kPer32 ? 2 : 1, false>(p, panel, next, x, tokens, y);
  else panel_tokens<Bits, 1, kPer32 == 0>(p, panel, next, x, tokens, y);
}

// ---- the same for many tokens; see Many

__m512i cell(const uint8_t* p, const uint8_t* q, const uint8_t* r, const uint8_t* s) {
  auto load16 = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  // inserts from memory rather than a transposition of registers: they need no shuffle
  __m512i v = _mm512_castsi128_si512(load16(p));
  v = _mm512_inserti32x4(v, load16(q), 1);
  v = _mm512_inserti32x4(v, load16(r), 2);
  return _mm512_inserti32x4(v, load16(s), 3);
}

template <int Bits>
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

// Rows from the order of the lanes to their own
void order_rows(int panels, int tokens, float* y) {
  const __m512i back = _mm512_set_epi32(15, 11, 7, 3, 13, 9, 5, 1, 14, 10, 6, 2, 12, 8, 4, 0);
  for (int i = 0; i < panels; i++)
    for (int t = 0; t < tokens; t++) {
      float* at = y + 16 * (kBlock * i + t);
      _mm512_storeu_ps(at, _mm512_permutexvar_ps(back, _mm512_loadu_ps(at)));
    }
}

// vpdpbusd by name: from the intrinsic g++ 12 makes copies of the sum, and spills half of 24.
void add_products(__m512i& sum, __m512i codes, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x)); }

// Sums of a group in P x T registers; the totals of tokens live in y, which the first level of cache holds.
template <int P, int T>
void many_tokens(const Product& p, const uint8_t* w, const uint8_t* const* x, Ahead& ahead, float* y) {
  const int64_t groups = p.kp / p.group, part = (ahead.end - ahead.at) / groups + 64;
  const uint8_t* codes = w + groups * 64;
  const uint8_t* xt[T];
  QN_UNROLL
  for (int t = 0; t < T; t++) xt[t] = x[t];
  for (int64_t g = 0, k = 0; g < groups; g++) {
    __m512i s[P][T];
    QN_UNROLL
    for (int t = 0; t < T; t++) {
      const __m512i less = _mm512_set1_epi32(-reinterpret_cast<const int32_t*>(xt[t] + p.sums_at)[g]);
      QN_UNROLL
      for (int i = 0; i < P; i++) s[i][t] = less;
    }
    ahead.ask(part);
    for (const int64_t end = k + p.group; k < end; k += 4, codes += 64) {
      __m512i a[P];
      QN_UNROLL
      for (int i = 0; i < P; i++) a[i] = load_line(codes + i * p.unpacked);
      QN_UNROLL
      for (int t = 0; t < T; t++) {
        int32_t four;
        std::memcpy(&four, xt[t] + k, 4);
        const __m512i b = _mm512_set1_epi32(four);
        QN_UNROLL
        for (int i = 0; i < P; i++) add_products(s[i][t], a[i], b);
      }
    }
    QN_UNROLL
    for (int i = 0; i < P; i++) {
      const F scale = load(reinterpret_cast<const float*>(w + i * p.unpacked) + 16 * g);
      QN_UNROLL
      for (int t = 0; t < T; t++) {
        float* to = y + 16 * (kBlock * i + t);
        const F by = mul(scale, all(reinterpret_cast<const float*>(xt[t] + p.scales_at)[g]));
        store(to, fma(_mm512_cvtepi32_ps(s[i][t]), by, g ? load(to) : zero()));
      }
    }
  }
}

template <int P, int T>
void many_block(const Product& p, const uint8_t* w, const uint8_t* const* x, int tokens, Ahead& ahead, float* y) {
  if (tokens == T) return many_tokens<P, T>(p, w, x, ahead, y);
  if constexpr (T > 1) many_block<P, T - 1>(p, w, x, tokens, ahead, y);
}

void multiply_many(const Product& p, const uint8_t* w, int64_t, int panels, const uint8_t* const* x, const uint8_t*, int tokens,
                   const uint8_t* next, int64_t next_bytes, float* y) {
  constexpr int kAtOnce = 12;  // 24 sums in 32 registers
  const int blocks = (tokens + kAtOnce - 1) / kAtOnce;
  Ahead ahead{next, next + next_bytes};
  for (int b = 0; b < blocks; b++) {  // even blocks, for a last one of few tokens would cost as much as a whole one
    const int t = tokens * b / blocks, n = tokens * (b + 1) / blocks - t;
    if (panels == 2) many_block<2, kAtOnce>(p, w, x + t, n, ahead, y + 16 * t);
    else many_block<1, kAtOnce>(p, w, x + t, n, ahead, y + 16 * t);
  }
  order_rows(panels, tokens, y);
}

uint64_t read(const uint8_t* p, int64_t bytes) {
  __m512i s[4] = {};
  for (int64_t i = 0; i < bytes; i += 256)
    QN_UNROLL
    for (int j = 0; j < 4; j++) s[j] = _mm512_add_epi64(s[j], load_line(p + i + 64 * j));
  // Not _mm512_reduce_add_epi64: g++'s adds signed words, which may not wrap round.
  uint64_t w[8], total = 0;
  _mm512_storeu_si512(w, _mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3])));
  for (uint64_t v : w) total += v;
  return total;
}

double work(int64_t rounds) {
  constexpr int kChains = 12;  // instructions under way at once, and more
  __m512i s[kChains] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  for (__m512i& v : s) asm volatile("" : "+v"(v));  // equal sums would be one sum to the compiler
  for (int64_t i = 0; i < rounds; i++)
    QN_UNROLL
    for (int j = 0; j < kChains; j++) s[j] = _mm512_dpbusd_epi32(s[j], a, b);
  for (const __m512i& v : s) asm volatile("" ::"v"(v));
  return 2.0 * 64 * kChains * static_cast<double>(rounds);
}

}  // namespace

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = [] {
    Kernels k = generic_kernels("avx512");
    ProductFn* f = k.product[static_cast<int>(Form::Bytes)];
    f[static_cast<int>(DType::INT8)] = product_panel_bytes<8>;
    f[static_cast<int>(DType::INT4)] = product_panel_bytes<4>;
    k.many[static_cast<int>(DType::INT8)] = {8, unpack_panel<8>, nullptr, multiply_many};
    k.many[static_cast<int>(DType::INT4)] = {8, unpack_panel<4>, nullptr, multiply_many};
    k.read = read, k.work = work;
    return k;
  }();
  return &kernels;
}

}  // namespace qn::cpu

#else

namespace qn::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace qn::cpu

#endif
