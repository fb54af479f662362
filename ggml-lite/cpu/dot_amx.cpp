// AMX (tiles of int8): T16 panels that meet many tokens. All else is AVX-512 with BF16.
// Compiled with flags of its own: nothing but static functions and what this file alone instantiates.
#include "ggml-lite/cpu/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // as in dot_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "ggml-lite/core/blocks.h"
#include "ggml-lite/cpu/ahead.h"

namespace qn::cpu {
namespace {
// Operand of ldtilecfg
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);
}  // namespace
}  // namespace qn::cpu

#if !defined(QN_TILES)  // tests have tiles in software
#define QN_TILES "ggml-lite/cpu/tiles.h"
#endif
#include QN_TILES

namespace qn::cpu {
namespace {

// Weights are the left operand: 16 rows x 64 k (or a group of 32), which two shuffles make of a line of T16. Packed activations are the right one.
// K is gone through in chunks of two groups: of two panels a chunk is unpacked, which with its part of the activations stays in the first level of
// cache, and meets all tokens (measured, 16 threads of 8 cores: unpacking whole panels of 2048 first takes 1.8 times as long for 16 tokens, 1.6 for 64).
constexpr int kTile = 16, kGroups = 2;
static_assert(kPacked == kTile && kPanels == 2);

// k of rows 0..15 from k on, signed, at 64 (k / 64 * 16 + row) + k % 64. INT4: in the upper half of their bytes, where the mask and the sign are one
// instruction: 16 times what they are, and so are the sums until they are complete, which changes no bit of normal numbers.
template <int Bits>
void unpack(const uint8_t* tile, int64_t length, uint8_t* to) {
  const __m512i sign = _mm512_set1_epi8(-128), upper = _mm512_set1_epi8(-16);
  const __m512i even = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_set_epi64(15, 13, 11, 9, 7, 5, 3, 1);
  for (int64_t k = 0; k < length; k += 64, tile += (Bits == 4 ? 1 : 2) * kTileBytes, to += 1024)
    QN_UNROLL
    for (int l = 0; l < 8; l++) {
      const __m512i line = _mm512_loadu_si512(tile + 64 * l);
      __m512i row, row8;
      if constexpr (Bits == 4) {
        constexpr int kAndXor = 0x6a;  // (a & b) ^ c
        const __m512i low = _mm512_ternarylogic_epi32(_mm512_slli_epi16(line, 4), upper, sign, kAndXor);
        const __m512i high = _mm512_ternarylogic_epi32(line, upper, sign, kAndXor);
        row = _mm512_unpacklo_epi64(low, high), row8 = _mm512_unpackhi_epi64(low, high);
      } else {
        const __m512i next = _mm512_loadu_si512(tile + kTileBytes + 64 * l);
        row = _mm512_xor_si512(sign, _mm512_permutex2var_epi64(line, even, next));
        row8 = _mm512_xor_si512(sign, _mm512_permutex2var_epi64(line, odd, next));
      }
      _mm512_store_si512(to + 64 * l, row);
      _mm512_store_si512(to + 64 * (l + 8), row8);
    }
}

// 16 x 16 values of 4 bytes: row i, value j <-> row j, value i
[[gnu::always_inline]] inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  QN_UNROLL
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  QN_UNROLL
  for (int i = 0; i < 16; i += 4)
    QN_UNROLL
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  QN_UNROLL
  for (int i = 0; i < 4; i++)
    QN_UNROLL
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  QN_UNROLL
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

void pack(const Product& p, const uint8_t* const* x, int rows, uint8_t* packed) {
  const int64_t groups = p.kp / p.group;
  for (int64_t g = 0; g < groups; g++, packed += 64)
    for (int t = 0; t < kTile; t++) {
      const float scale = t < rows ? reinterpret_cast<const float*>(x[t] + p.scales_at)[g] : 0;
      std::memcpy(packed + 4 * t, &scale, 4);
    }
  for (int64_t k = 0; k < p.kp; k += 64, packed += 1024) {
    __m512i of[kTile];
    for (int t = 0; t < kTile; t++) of[t] = t < rows ? _mm512_loadu_si512(x[t] + k) : _mm512_setzero_si512();
    transpose(of);
    for (int i = 0; i < kTile; i++) _mm512_store_si512(packed + 64 * i, of[i]);
  }
}

// What became of a chunk of two panels and 16 tokens, to be scaled
struct Sums {
  alignas(64) int32_t of[kGroups][2][16 * kTile];  // [group][panel][16 r + t]
  const float* scales;                             // [group][panel][r], two panels
  const float* of_tokens;                          // [group][t]
  int groups = 0;                                  // 0: nothing
  float* y;                                        // [kBlock panel + r][t]
};

template <int Panel, int From, int To>
[[gnu::always_inline]] inline void add_scaled(const Sums& s) {
  if (!s.groups) return;
  const __m512 x0 = _mm512_load_ps(s.of_tokens), x1 = _mm512_load_ps(s.of_tokens + 16 * (s.groups - 1));
  float* y = s.y + 16 * kBlock * Panel;
  QN_UNROLL
  for (int r = From; r < To; r++) {
    const auto scaled = [&](int g, __m512 x, __m512 to) {
      const __m512 by = _mm512_mul_ps(_mm512_set1_ps(s.scales[32 * g + 16 * Panel + r]), x);
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(s.of[g][Panel] + 16 * r)), by, to);
    };
    __m512 total = scaled(0, x0, _mm512_load_ps(y + 16 * r));
    if (s.groups > 1) total = scaled(1, x1, total);
    _mm512_store_ps(y + 16 * r, total);
  }
}

// Sums of Panels panels, a chunk of them unpacked, with 16 tokens. Meanwhile, piece by piece between the instructions for tiles, what is there
// before is scaled, and weights are asked for: by itself the processor looks not far enough ahead to do both at once.
//
//   tiles  0, 1: sums of the panels    4, 5, 6: two of weights, one of tokens    2, 3, 7: the same for the second half of a group of 128
template <int Group, int Panels>
void meet(const uint8_t (&codes)[2][16 * kGroups * Group], const uint8_t* x, Sums& sums, const Sums& before, Ahead& ahead, int64_t part) {
  auto group = [&]<int G>() {
    constexpr int kAt = G * Group / 64 * 1024 + G * Group % 64;
    constexpr bool kTwo = Group == 128, kBoth = Panels > 1;
    const auto earlier = [&]<int From, int To>() {
      if constexpr (G < Panels) add_scaled<G, From, To>(before);
      ahead.ask(part);
    };
    const uint8_t* xg = x + 16 * Group * G;
    clear<0>();
    if constexpr (kBoth) clear<1>();
    load_tile<4>(codes[0] + kAt, 64);
    earlier.template operator()<0, 3>();
    load_tile<6>(xg, 64);
    earlier.template operator()<3, 6>();
    multiply_tiles<0, 4, 6>();
    if constexpr (kBoth) load_tile<5>(codes[1] + kAt, 64);
    earlier.template operator()<6, 8>();
    if constexpr (kBoth) multiply_tiles<1, 5, 6>();
    if constexpr (kTwo) load_tile<2>(codes[0] + kAt + 1024, 64);
    earlier.template operator()<8, 11>();
    if constexpr (kTwo) load_tile<7>(xg + 1024, 64);
    earlier.template operator()<11, 14>();
    if constexpr (kTwo) multiply_tiles<0, 2, 7>();
    store_tile<0>(sums.of[G][0], 64);
    if constexpr (kTwo && kBoth) load_tile<3>(codes[1] + kAt + 1024, 64);
    earlier.template operator()<14, 16>();
    if constexpr (kTwo && kBoth) multiply_tiles<1, 3, 7>();
    if constexpr (kBoth) store_tile<1>(sums.of[G][1], 64);
  };
  group.template operator()<0>();
  if (sums.groups > 1) group.template operator()<1>();
  else if (Panels > 1) add_scaled<1, 0, 16>(before);
}

template <int Bits, int Group, int Panels>
void multiply_groups(const Product& p, const uint8_t* w, int64_t stride, const uint8_t* packed, int tokens, Ahead ahead, float* y) {
  constexpr int kStep = Group < 64 ? Group : 64, kChunk = kGroups * Group, kAsks = 6;  // kAsks: of a group
  alignas(64) uint8_t codes[2][16 * kChunk];
  alignas(64) float scales[2][kGroups * 2 * 16];  // of this chunk and the one before
  Sums sums[2];                                   // likewise of blocks of 16 tokens
  const int64_t groups = p.kp / Group, part = (ahead.end - ahead.at) / (kAsks * groups) + 64;
  const int blocks = (tokens + kTile - 1) / kTile;
  Shapes s;
  for (int i = 0; i < 8; i++) s.rows[i] = i < 6 ? kTile : kStep / 4, s.row_bytes[i] = i < 2 || i > 5 ? 64 : kStep;
  set_shapes(s);
  for (int i = 0; i < Panels; i++) std::memset(y + 16 * kBlock * i, 0, static_cast<size_t>(blocks) * 1024);
  int turn = 0;
  for (int64_t g = 0; g < groups; g += kGroups) {
    const int n = groups - g < kGroups ? 1 : kGroups;
    float* const of = scales[g / kGroups % 2];
    for (int i = 0; i < Panels; i++) {
      const uint8_t* panel = w + i * stride;
      for (int j = 0; j < n; j++)
        _mm512_store_ps(of + 32 * j + 16 * i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * (g + j)))));
      unpack<Bits>(panel + p.tiles_at + g * Group * (Bits == 4 ? 8 : 16), n * Group, codes[i]);
    }
    for (int b = 0; b < blocks; b++, turn ^= 1) {
      const uint8_t* x = packed + b * p.packed;
      Sums& now = sums[turn];
      now.scales = of, now.of_tokens = reinterpret_cast<const float*>(x) + 16 * g, now.groups = n, now.y = y + 256 * b;
      meet<Group, Panels>(codes, x + 64 * groups + 16 * g * Group, now, sums[turn ^ 1], ahead, b ? 0 : part);
    }
  }
  add_scaled<0, 0, 16>(sums[turn ^ 1]);
  if (Panels > 1) add_scaled<1, 0, 16>(sums[turn ^ 1]);
  release_tiles();  // for as long as tiles hold something, every switch of threads saves 8 KB
  for (int i = 0; i < Panels * blocks; i++) {
    float* at = y + 16 * kBlock * (i / blocks) + 256 * (i % blocks);
    __m512i of[16];
    for (int r = 0; r < 16; r++)
      of[r] = _mm512_castps_si512(_mm512_mul_ps(_mm512_set1_ps(Bits == 4 ? 1.0f / 16 : 1.0f), _mm512_load_ps(at + 16 * r)));
    transpose(of);
    for (int t = 0; t < 16; t++) _mm512_store_si512(at + 16 * t, of[t]);
  }
}

template <int Bits, int Group>
void multiply_panels(const Product& p, const uint8_t* w, int64_t stride, int panels, const uint8_t* packed, int tokens, Ahead ahead, float* y) {
  if (panels > 1) multiply_groups<Bits, Group, 2>(p, w, stride, packed, tokens, ahead, y);
  else multiply_groups<Bits, Group, 1>(p, w, stride, packed, tokens, ahead, y);
}
template <int Bits>
void multiply_many(const Product& p, const uint8_t* w, int64_t stride, int panels, const uint8_t* const*, const uint8_t* packed, int tokens,
                   const uint8_t* next, int64_t next_bytes, float* y) {
  const Ahead ahead{next, next + next_bytes};
  if (p.group == 128) multiply_panels<Bits, 128>(p, w, stride, panels, packed, tokens, ahead, y);
  else if (p.group == 64) multiply_panels<Bits, 64>(p, w, stride, panels, packed, tokens, ahead, y);
  else multiply_panels<Bits, 32>(p, w, stride, panels, packed, tokens, ahead, y);
}

double work(int64_t rounds) {
  Shapes s;
  for (int i = 0; i < 8; i++) s.rows[i] = kTile, s.row_bytes[i] = 64;
  set_shapes(s);
  clear<0>(), clear<1>(), clear<2>(), clear<3>(), clear<4>(), clear<5>(), clear<6>(), clear<7>();
  for (int64_t i = 0; i < rounds; i++) multiply_tiles<0, 4, 6>(), multiply_tiles<1, 4, 7>(), multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
  release_tiles();
  return 2.0 * 4 * kTile * kTile * 64 * static_cast<double>(rounds);
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512bf16_kernels();
    k.name = "amx", k.work = work;
    k.many[static_cast<int>(DType::INT8)] = {5, nullptr, pack, multiply_many<8>};
    k.many[static_cast<int>(DType::INT4)] = {5, nullptr, pack, multiply_many<4>};
    return k;
  }();
  return &kernels;
}

}  // namespace qn::cpu

#else

namespace qn::cpu {
const Kernels* amx_kernels() { return avx512bf16_kernels(); }
}  // namespace qn::cpu

#endif
