// AMX (tiles of int8): T16 panels that meet many tokens. All else is AVX-512 with BF16.
// Compiled with flags of its own: nothing but static functions and what this file alone instantiates.
#include "ggml-lite/cpu/kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)  // as in dot_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "ggml-lite/cpu/many_avx512.h"

namespace qn::cpu {
namespace {

// Instructions by name: the intrinsics of g++ 12 do not say that they read and write memory.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Shapes) == 64);
void set_shapes(const Shapes& s) { asm volatile("ldtilecfg %0" ::"m"(s) : "memory"); }
void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int Tile>
[[gnu::always_inline]] inline void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
[[gnu::always_inline]] inline void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
[[gnu::always_inline]] inline void store_tile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int C, int A, int B>
[[gnu::always_inline]] inline void multiply_tiles() {  // C += A B, signed bytes
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tiles 0..3: sums of 16 tokens x 16 rows, 2 * (block of tokens) + panel. 4, 5: tokens x 64 k (or a group of 32). 6, 7: panels.
constexpr int kTile = 16;

template <int P, int T>
void tokens_by_panels(const Product& p, const uint8_t* w, const uint8_t* x, int64_t stride, int tokens, Ahead& ahead, float* y) {
  alignas(64) int32_t sums[2][2][kTile * 16];
  const int64_t groups = p.kp / p.group;
  const int step = p.group < 64 ? p.group : 64;
  const uint8_t *codes = w + groups * 64, *second = x + kTile * stride;
  for (int64_t g = 0; g < groups; g++) {
    clear<0>();
    if (P > 1) clear<1>();
    if (T > 1) clear<2>();
    if (T > 1 && P > 1) clear<3>();
    ahead.ask();
    for (int64_t k = g * p.group; k < (g + 1) * p.group; k += step) {
      load_tile<6>(codes + 16 * k, 64);
      load_tile<4>(x + k, stride);
      multiply_tiles<0, 4, 6>();
      if (P > 1) load_tile<7>(codes + p.unpacked + 16 * k, 64), multiply_tiles<1, 4, 7>();
      if (T > 1) load_tile<5>(second + k, stride), multiply_tiles<2, 5, 6>();
      if (T > 1 && P > 1) multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(sums[0][0], 64);
    if (P > 1) store_tile<1>(sums[0][1], 64);
    if (T > 1) store_tile<2>(sums[1][0], 64);
    if (T > 1 && P > 1) store_tile<3>(sums[1][1], 64);
    for (int i = 0; i < P; i++) {
      const __m512 scale = _mm512_loadu_ps(reinterpret_cast<const float*>(w + i * p.unpacked) + 16 * g);
      for (int t = 0; t < tokens; t++) {
        float* to = y + 16 * (kBlock * i + t);
        const float of_token = reinterpret_cast<const float*>(x + t * stride + p.scales_at)[g];
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(&sums[t / kTile][i][t % kTile * 16]));
        const __m512 by = _mm512_mul_ps(scale, _mm512_set1_ps(of_token));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(sum, by, g ? _mm512_loadu_ps(to) : _mm512_setzero_ps()));
      }
    }
  }
}

void multiply_many(const Product& p, const uint8_t* w, int panels, const uint8_t* const* x, int tokens, const uint8_t* next, int64_t next_bytes,
                   float* y) {
  const int64_t stride = tokens > 1 ? x[1] - x[0] : 0;
  Ahead ahead(p, next, next_bytes);
  for (int t = 0, before = 0; t < tokens; t += 2 * kTile) {
    const int n = tokens - t < 2 * kTile ? tokens - t : 2 * kTile, first = n < kTile ? n : kTile;
    if (n != before) {
      Shapes s;
      const int step = p.group < 64 ? p.group : 64;
      auto shape = [&s](int tile, int rows, int bytes) { s.rows[tile] = static_cast<uint8_t>(rows), s.row_bytes[tile] = static_cast<uint16_t>(bytes); };
      for (int i = 0; i < 2; i++) shape(i, first, 64), shape(6 + i, step / 4, 64);
      shape(4, first, step);
      if (n > first) {
        for (int i = 0; i < 2; i++) shape(2 + i, n - first, 64);
        shape(5, n - first, step);
      }
      set_shapes(s);
      before = n;
    }
    if (panels == 2) (n > kTile ? tokens_by_panels<2, 2> : tokens_by_panels<2, 1>)(p, w, x[t], stride, n, ahead, y + 16 * t);
    else (n > kTile ? tokens_by_panels<1, 2> : tokens_by_panels<1, 1>)(p, w, x[t], stride, n, ahead, y + 16 * t);
  }
  release_tiles();  // for as long as tiles hold something, every switch of threads saves 8 KB
  order_rows(panels, tokens, y);
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
    k.many[static_cast<int>(DType::INT8)] = {8, unpack_panel<8, true>, multiply_many, true};
    k.many[static_cast<int>(DType::INT4)] = {8, unpack_panel<4, true>, multiply_many, true};
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
