// AVX2 + FMA + F16C: lanes of eight floats, and integer products of T16 panels with int8 activations.
// Compiled with flags of its own: nothing but static functions and what this file alone instantiates.
#include "ggml-lite/cpu/kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace qn::cpu {
namespace {

using F = __m256;
constexpr int L = 8, kRows = 1, kTokens = 2, kChains = 4;  // 8 accumulators in 16 registers

F zero() { return _mm256_setzero_ps(); }
F all(float x) { return _mm256_set1_ps(x); }
F load(const float* p) { return _mm256_loadu_ps(p); }
F load(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
F load(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
F all_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(*p))); }
void store(float* p, F v) { _mm256_storeu_ps(p, v); }
F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
F add(F a, F b) { return _mm256_add_ps(a, b); }
F sub(F a, F b) { return _mm256_sub_ps(a, b); }
F mul(F a, F b) { return _mm256_mul_ps(a, b); }
F divide(F a, F b) { return _mm256_div_ps(a, b); }
F larger(F a, F b) { return _mm256_max_ps(a, b); }
F absolute(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
float largest(F v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
void sums(const F (&v)[1], float* out) { out[0] = sum(v[0]); }
void sums(const F (&v)[4], float* out) {
  const F t = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}

// e^v = 2^n e^r, |r| <= ln2 / 2; ln2 in two parts so that r keeps its low bits; then a polynomial of degree 6 in r (minimax).
// Arguments beyond the range of floats are clamped; max and min are written so that a NaN passes.
F exponent(F v) {
  v = _mm256_min_ps(all(88.3762589f), _mm256_max_ps(all(-87.3365479f), v));
  const F n = _mm256_round_ps(mul(v, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), v));
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), all(1.0f));
  const __m256i two = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(p, _mm256_castsi256_ps(two));
}

void to_bf16(uint16_t* p, F v) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i h = _mm256_blendv_epi8(rounded, quiet, nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
void to_int8(int8_t* p, F v) {
  v = larger(_mm256_set1_ps(-127.0f), _mm256_min_ps(_mm256_set1_ps(127.0f), v));
  const __m256i i = _mm256_cvtps_epi32(v);
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
__m256i ones8() { return _mm256_set1_epi8(1); }
__m256i ones16() { return _mm256_set1_epi16(1); }
__m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
int32_t sum32(const int8_t* p) {
  const __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(ones8(), load_bytes(p)), ones16());
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
void halves(const uint8_t* p, float* out) {
  const __m128i* h = reinterpret_cast<const __m128i*>(p);
  store(out, _mm256_cvtph_ps(_mm_loadu_si128(h)));
  store(out + 8, _mm256_cvtph_ps(_mm_loadu_si128(h + 1)));
}
F bytes_less(__m128i bytes, int zero_code) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(zero_code)));
}
void codes4(const uint8_t* p, F* out) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  out[0] = bytes_less(_mm_and_si128(b, low), 8);
  out[1] = bytes_less(_mm_and_si128(_mm_srli_epi16(b, 4), low), 8);
}
void codes8(const uint8_t* p, F* out) {
  out[0] = bytes_less(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), 128);
  out[1] = bytes_less(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16)), 128);
}

}  // namespace
}  // namespace qn::cpu

#include "ggml-lite/cpu/generic.h"

namespace qn::cpu {
namespace {

// ---- T16 panels times int8 activations (Form::Bytes)
//
// A unit is half a line: 32 bytes, two cells. vpmaddubsw multiplies unsigned with signed bytes and adds pairs to 16 bits with
// saturation, so its operands must be small:
//   INT4: codes 0..15 unsigned, activations signed; the 8 products that meet in 16 bits over a group of 128 stay below
//         8 * 2 * 15 * 127 = 30480. The excess of 8 is undone by the prepared sums.
//   INT8: |code - 128| unsigned, the activation with the sign of code - 128 signed: at most 2 * 128 * 127 = 32512, widened at
//         once. Not the other way round: -128 has no negative among signed bytes, while 128 is an unsigned one.
// Either way a line ends as 8 sums of 32 bits, per 128 bits [row g, row g, row g+8, row g+8].

// acc += the products of the unit at w with the activations of each token
template <int Bits, int T>
[[gnu::always_inline]] inline void add_unit(const uint8_t* w, int64_t unit, const uint8_t* const* x, __m256i* acc) {
  const __m256i v = load_bytes(w);
  if constexpr (Bits == 4) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i lo = _mm256_and_si256(v, low), hi = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    QN_UNROLL
    for (int t = 0; t < T; t++) {
      const __m256i xt = load_bytes(x[t] + unit * 32);  // pieces 0 and 2 meet the low nibbles, of row g and of row g + 8
      acc[t] = _mm256_add_epi16(acc[t], _mm256_maddubs_epi16(lo, _mm256_unpacklo_epi64(xt, xt)));
      acc[t] = _mm256_add_epi16(acc[t], _mm256_maddubs_epi16(hi, _mm256_unpackhi_epi64(xt, xt)));
    }
  } else {
    const __m256i centred = _mm256_xor_si256(v, _mm256_set1_epi8(static_cast<char>(0x80)));
    const __m256i size = _mm256_abs_epi8(centred);
    QN_UNROLL
    for (int t = 0; t < T; t++) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x[t] + unit * 16));
      const __m256i xt = _mm256_permute4x64_epi64(_mm256_castsi128_si256(codes), 0x50);  // piece 0 twice, piece 1 twice
      const __m256i m = _mm256_maddubs_epi16(size, _mm256_sign_epi8(xt, centred));
      acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(m, ones16()));
    }
  }
}

// Two sums of lines a, b, c, d -> [a, a+8, b, b+8 | c, c+8, d, d+8]
__m256i four_lines(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab = _mm256_hadd_epi32(a, b), cd = _mm256_hadd_epi32(c, d);
  return _mm256_add_epi32(_mm256_permute2x128_si256(ab, cd, 0x20), _mm256_permute2x128_si256(ab, cd, 0x31));
}

// fp16 scales of n groups -> fp32 of rows in the order of four_lines: 0 8 1 9 2 10 3 11 | 4 12 5 13 6 14 7 15
void unpack_scales(const uint8_t* halfs, int64_t n, F (*w)[2]) {
  for (int64_t g = 0; g < n; g++) {
    const __m128i* h = reinterpret_cast<const __m128i*>(halfs + 32 * g);
    const __m128i r0 = _mm_loadu_si128(h), r8 = _mm_loadu_si128(h + 1);
    w[g][0] = _mm256_cvtph_ps(_mm_unpacklo_epi16(r0, r8)), w[g][1] = _mm256_cvtph_ps(_mm_unpackhi_epi16(r0, r8));
  }
}

template <int Bits, int Group, int T>
void panel_bytes(const Product& p, const uint8_t* panel, const uint8_t* const* x, float* y) {
  constexpr int kUnits = Group / (Bits == 4 ? 32 : 16);  // a half line holds 32 (16) k of two rows
  constexpr int kHalves = kUnits == 1 ? 1 : 2;           // of a line that belong to the group
  constexpr int kLines = T == 1 ? 8 : 4;                 // whole tiles in order of addresses where registers allow
  F total[2][T], scales[kGroupsAhead][2];
  for (auto& half : total)
    for (F& v : half) v = zero();
  const int64_t groups = p.kp / Group;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t ahead = g % kGroupsAhead;
    if (ahead == 0) unpack_scales(panel + 32 * g, groups - g < kGroupsAhead ? groups - g : kGroupsAhead, scales);
    QN_UNROLL
    for (int q = 0; q < 8; q += kLines) {
      __m256i s[kLines][T];
      QN_UNROLL
      for (auto& line : s)
        QN_UNROLL
        for (__m256i& v : line) v = _mm256_setzero_si256();
      for (int64_t u = g * kUnits; u < (g + 1) * kUnits; u += kHalves) {
        const uint8_t* tile = panel + p.tiles_at + (u >> 1) * kTileBytes + (u & 1) * 32;
        QN_UNROLL
        for (int l = 0; l < kLines; l++)
          QN_UNROLL
          for (int h = 0; h < kHalves; h++) add_unit<Bits, T>(tile + (q + l) * 64 + h * 32, u + h, x, s[l]);
      }
      QN_UNROLL
      for (int l = 0; l < kLines; l += 4)
        QN_UNROLL
        for (int t = 0; t < T; t++) {
          auto widen = [&](int i) { return Bits == 4 ? _mm256_madd_epi16(s[l + i][t], ones16()) : s[l + i][t]; };
          __m256i v = four_lines(widen(0), widen(1), widen(2), widen(3));
          if (Bits == 4) v = _mm256_sub_epi32(v, _mm256_set1_epi32(reinterpret_cast<const int32_t*>(x[t] + p.sums_at)[g]));
          const float scale = reinterpret_cast<const float*>(x[t] + p.scales_at)[g];
          F& into = total[(q + l) / 4][t];
          into = fma(_mm256_cvtepi32_ps(v), mul(scales[ahead][(q + l) / 4], all(scale)), into);
        }
    }
  }
  for (int t = 0; t < T; t++) {
    float v[16];
    store(v, total[0][t]);
    store(v + 8, total[1][t]);
    for (int i = 0; i < 8; i++) {
      y[16 * t + i] = v[2 * i];
      y[16 * t + 8 + i] = v[2 * i + 1];
    }
  }
}

template <int Bits, int Group>
void panel_tokens(const Product& p, const uint8_t* panel, const uint8_t* const* x, int tokens, float* y) {
  int t = 0;
  for (; t + 2 <= tokens; t += 2) panel_bytes<Bits, Group, 2>(p, panel, x + t, y + 16 * t);
  if (t < tokens) panel_bytes<Bits, Group, 1>(p, panel, x + t, y + 16 * t);
}

template <int Bits>
void product_panel_bytes(const Product& p, const uint8_t* panel, const uint8_t*, int, const uint8_t* const* x, int tokens, float* y) {
  if (p.group == 128) panel_tokens<Bits, 128>(p, panel, x, tokens, y);
  else if (p.group == 64) panel_tokens<Bits, 64>(p, panel, x, tokens, y);
  else panel_tokens<Bits, 32>(p, panel, x, tokens, y);
}

uint64_t read(const uint8_t* p, int64_t bytes) {
  __m256i s[4] = {};
  for (int64_t i = 0; i < bytes; i += 128)
    QN_UNROLL
    for (int j = 0; j < 4; j++) s[j] = _mm256_add_epi64(s[j], load_bytes(p + i + 32 * j));
  const __m256i t = _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3]));
  alignas(32) uint64_t v[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(v), t);
  return v[0] + v[1] + v[2] + v[3];
}

double work(int64_t rounds) {
  constexpr int kChains = 8;
  const __m256i b = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
  __m256i s[kChains] = {}, a = _mm256_set1_epi8(3);
  for (int64_t i = 0; i < rounds; i++)
    QN_UNROLL
    for (int j = 0; j < kChains; j++) {
      asm volatile("" : "+x"(a));  // another operand each time, for all the compiler knows
      s[j] = _mm256_add_epi32(s[j], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  for (const __m256i& v : s) asm volatile("" ::"x"(v));
  return 2.0 * 32 * kChains * static_cast<double>(rounds);
}

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = [] {
    Kernels k = generic_kernels("avx2");
    ProductFn* f = k.product[static_cast<int>(Form::Bytes)];
    f[static_cast<int>(DType::INT8)] = product_panel_bytes<8>;
    f[static_cast<int>(DType::INT4)] = product_panel_bytes<4>;
    k.read = read, k.work = work;
    return k;
  }();
  return &kernels;
}

}  // namespace qn::cpu

#else

namespace qn::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace qn::cpu

#endif
