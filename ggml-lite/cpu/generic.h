// Kernels written once for all instruction sets, on top of a small vocabulary of lanes that each dot_*.cpp defines before it
// includes this file. Everything is in anonymous namespaces, here and there, so that each file keeps its own copy:
//
//   F                          L floats, 32 % L == 0
//   zero() all(x) load(p) store(p, v)      load of const uint16_t* widens bf16, of const int8_t* integers
//   all_half(p)                one fp16 in every lane
//   fma(a, b, c) = a * b + c   add sub mul divide larger(a, b) absolute(v)
//   sum(v) largest(v)          over the lanes, in one fixed order
//   sums(F (&v)[N], out)       of N vectors at once, N = 1 or what attend asks for
//   exponent(v)                e^v, within 2 ulp
//   to_bf16(p, v) to_int8(p, v)     rounded to nearest even
//   sum32(const int8_t*)       of 32 codes
//   halves(p, out)             16 fp16 -> 16 floats
//   codes4(p, out) codes8(p, out)   16 weight codes of one row less their zero -> F[16 / L]; p: the piece of 8 bytes in a tile
//   kRows, kTokens, kChains    register blocking of row-major products; 32 % (kChains * L) == 0
#include <cstring>

#include "ggml-lite/core/blocks.h"
#include "ggml-lite/cpu/kernels.h"

namespace qn::cpu {
namespace {

constexpr int kPer16 = 16 / L > 0 ? 16 / L : 1;

// ---- products, row-major weights

// The sum of one row and token runs in kChains accumulators, whatever R and T are. With few tokens the weights stream from memory,
// which is fastest row by row in order of addresses, for the hardware prefetcher follows one stream best; with more tokens, R rows
// share the loads of activations.
template <class W, int R, int T>
void rows_f32(const W* w, int64_t stride, int64_t k, const float* const* x, float* y) {
  F acc[T][R][kChains];
  QN_UNROLL
  for (auto& t : acc)
    QN_UNROLL
    for (auto& row : t)
      QN_UNROLL
      for (F& v : row) v = zero();
  for (int64_t i = 0; i < k; i += kChains * L)
    QN_UNROLL
    for (int c = 0; c < kChains; c++) {
      F a[R];
      QN_UNROLL
      for (int r = 0; r < R; r++) a[r] = load(w + r * stride + i + c * L);
      QN_UNROLL
      for (int t = 0; t < T; t++) {
        const F b = load(x[t] + i + c * L);
        QN_UNROLL
        for (int r = 0; r < R; r++) acc[t][r][c] = fma(a[r], b, acc[t][r][c]);
      }
    }
  QN_UNROLL
  for (int t = 0; t < T; t++)
    QN_UNROLL
    for (int r = 0; r < R; r++) {
      F s = acc[t][r][0];
      QN_UNROLL
      for (int c = 1; c < kChains; c++) s = add(s, acc[t][r][c]);
      y[16 * t + r] = sum(s);
    }
}

template <class W, int T>
void rows_of_tokens(const Product& p, const W* w, int rows, const float* const* x, int tokens, float* y) {
  if constexpr (T > 1)
    if (tokens < T) return rows_of_tokens<W, T - 1>(p, w, rows, x, tokens, y);
  int r = 0;
  for (; r + kRows <= rows; r += kRows) rows_f32<W, kRows, T>(w + r * p.row_stride, p.row_stride, p.k, x, y + r);
  for (; r < rows; r++) rows_f32<W, 1, T>(w + r * p.row_stride, p.row_stride, p.k, x, y + r);
}

// Few tokens: row by row. More: tokens outside, for kTokens rows of them stay in the first level of cache.
template <class W>
void product_rows_f32(const Product& p, const uint8_t* bytes, const uint8_t*, int rows, const uint8_t* const* x, int tokens, float* y) {
  const W* w = reinterpret_cast<const W*>(bytes);
  const float* const* xf = reinterpret_cast<const float* const*>(x);
  if (tokens < kTokens) {
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < tokens; t++) rows_f32<W, 1, 1>(w + r * p.row_stride, p.row_stride, p.k, xf + t, y + 16 * t + r);
    return;
  }
  for (int t = 0; t < tokens; t += kTokens) rows_of_tokens<W, kTokens>(p, w, rows, xf + t, tokens - t < kTokens ? tokens - t : kTokens, y + 16 * t);
}

// ---- products, T16 panels

// A panel's scales are unpacked so many groups at a time, so that its bytes are read almost in the order of addresses: with the
// scales as a second stream among the tiles the hardware prefetcher halves its speed (measured: 15 GB/s a core instead of 32).
constexpr int64_t kGroupsAhead = 32;

// With activations in fp32: codes become floats in registers, a group's sum is scaled once.

template <int Bits, int T>
void panel_f32(const Product& p, const uint8_t* panel, const float* const* x, float* y) {
  F total[16][T];
  QN_UNROLL
  for (auto& row : total)
    QN_UNROLL
    for (F& v : row) v = zero();
  const uint8_t* tiles = panel + p.tiles_at;
  float scales[kGroupsAhead][16];
  for (int64_t k = 0, group = 0; k < p.kp; k += p.group, group++) {
    if (group % kGroupsAhead == 0)
      for (int64_t g = 0; g < kGroupsAhead && (group + g) * p.group < p.kp; g++) halves(panel + (group + g) * 32, scales[g]);
    const float* scale = scales[group % kGroupsAhead];
    for (int r = 0; r < 16; r++) {
      F acc[T];
      QN_UNROLL
      for (F& v : acc) v = zero();
      for (int64_t i = k; i < k + p.group; i += 16) {
        const int per = Bits == 4 ? 64 : 32;  // k of a tile; 16 k are one piece of INT4 and two of INT8
        const uint8_t* piece = tiles + i / per * kTileBytes + (r & 7) * 64 + (r >> 3) * 8 + i % per * (Bits == 4 ? 1 : 2);
        F c[kPer16];
        if constexpr (Bits == 4) codes4(piece, c);
        else codes8(piece, c);
        QN_UNROLL
        for (int v = 0; v < kPer16; v++)
          QN_UNROLL
          for (int t = 0; t < T; t++) acc[t] = fma(c[v], load(x[t] + i + v * L), acc[t]);
      }
      QN_UNROLL
      for (int t = 0; t < T; t++) total[r][t] = fma(acc[t], all(scale[r]), total[r][t]);
    }
  }
  for (int r = 0; r < 16; r++)
    QN_UNROLL
    for (int t = 0; t < T; t++) y[16 * t + r] = sum(total[r][t]);
}

template <int Bits>
void product_panel_f32(const Product& p, const uint8_t* panel, const uint8_t*, int, const uint8_t* const* x, int tokens, float* y) {
  const float* const* xf = reinterpret_cast<const float* const*>(x);
  int t = 0;
  for (; t + 4 <= tokens; t += 4) panel_f32<Bits, 4>(p, panel, xf + t, y + 16 * t);
  for (; t < tokens; t++) panel_f32<Bits, 1>(p, panel, xf + t, y + 16 * t);
}

// ---- activations

// int8 codes of n <= 128 values (a multiple of 32) and their scale; as quantize_act of core/codec.h.
float quantize(const float* x, int64_t n, int8_t* codes) {
  F most = zero(), poison = zero();  // 0 * x is NaN for what is not finite: then the scale is, too
  for (int64_t i = 0; i < n; i += L) {
    const F v = load(x + i);
    most = larger(most, absolute(v));
    poison = fma(v, zero(), poison);
  }
  const float scale = largest(most) / 127.0f + sum(poison);
  if (!(scale > 0)) {
    std::memset(codes, 0, static_cast<size_t>(n));
    return scale;
  }
  const F s = all(scale);
  for (int64_t i = 0; i < n; i += L) to_int8(codes + i, divide(load(x + i), s));
  return scale;
}

void prepare(const Product& p, Act act, const float* x, uint8_t* out) {
  float* values = reinterpret_cast<float*>(out);
  uint16_t* halfs = reinterpret_cast<uint16_t*>(out);
  float* scales = reinterpret_cast<float*>(out + p.scales_at);
  int32_t* sums = reinterpret_cast<int32_t*>(out + p.sums_at);
  const int32_t excess = p.dtype == DType::INT4 ? 8 : 128;
  for (int64_t k = 0; k < p.kp; k += kActGroup) {
    const int64_t n = p.k - k < kActGroup ? p.k - k : kActGroup, np = p.kp - k < kActGroup ? p.kp - k : kActGroup;
    alignas(64) int8_t codes[kActGroup] = {};
    const float scale = act == Act::INT8 ? quantize(x + k, n, codes) : 0;
    switch (p.form) {
      case Form::F32:
        for (int64_t i = 0; i < n; i += L) {
          if (act == Act::F32) {
            store(values + k + i, load(x + k + i));
          } else if (act == Act::BF16) {
            uint16_t h[L];
            to_bf16(h, load(x + k + i));
            store(values + k + i, load(h));
          } else {
            for (int j = 0; j < L; j++) values[k + i + j] = static_cast<float>(codes[i + j]) * scale;
          }
        }
        std::memset(values + k + n, 0, static_cast<size_t>(np - n) * 4);
        break;
      case Form::BF16:
        for (int64_t i = 0; i < n; i += L) to_bf16(halfs + k + i, load(x + k + i));
        std::memset(halfs + k + n, 0, static_cast<size_t>(np - n) * 2);
        break;
      case Form::Codes:
        for (int64_t i = 0; i < np; i += L) {
          float v[L];
          for (int j = 0; j < L; j++) v[j] = codes[i + j];
          to_bf16(halfs + k + i, load(v));
        }
        scales[k / kActGroup] = scale;
        break;
      case Form::Bytes:
        std::memcpy(out + k, codes, static_cast<size_t>(np));
        for (int64_t i = 0; i < np; i += p.group) {
          int32_t s = 0;
          for (int64_t j = i; j < i + p.group; j += 32) s += sum32(codes + j);
          scales[(k + i) / p.group] = scale;
          sums[(k + i) / p.group] = excess * s;
        }
        break;
    }
  }
}

// ---- elementwise; what is left of n beyond whole vectors goes through a padded copy

template <class Body>
void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, static_cast<int>(L));
  if (i < n) body(i, static_cast<int>(n - i));
}
F load_some(const float* p, int n) {
  if (n == L) return load(p);
  float v[L] = {};
  std::memcpy(v, p, static_cast<size_t>(n) * 4);
  return load(v);
}
void store_some(float* p, F v, int n) {
  if (n == L) return store(p, v);
  float t[L];
  store(t, v);
  std::memcpy(p, t, static_cast<size_t>(n) * 4);
}

F sigmoid(F x) { return divide(all(1.0f), add(all(1.0f), exponent(sub(zero(), x)))); }

float sum_squares(const float* x, int64_t n) {
  F s[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    QN_UNROLL
    for (int j = 0; j < 4; j++) {
      const F v = load(x + i + j * L);
      s[j] = fma(v, v, s[j]);
    }
  each(n - i, [&](int64_t at, int some) {
    const F v = load_some(x + i + at, some);
    s[0] = fma(v, v, s[0]);
  });
  return sum(add(add(s[0], s[1]), add(s[2], s[3])));
}
void scale(const float* x, const float* w, float r, int64_t n, float* y) {
  each(n, [&](int64_t i, int some) {
    const F v = mul(load_some(x + i, some), all(r));
    store_some(y + i, w ? mul(v, load_some(w + i, some)) : v, some);
  });
}
void silu_mul(const float* gate, const float* x, int64_t n, float* y) {
  each(n, [&](int64_t i, int some) {
    const F g = load_some(gate + i, some);
    store_some(y + i, mul(mul(g, sigmoid(g)), load_some(x + i, some)), some);
  });
}
void sigmoid_mul(const float* gate, const float* x, int64_t n, float* y) {
  each(n, [&](int64_t i, int some) { store_some(y + i, mul(sigmoid(load_some(gate + i, some)), load_some(x + i, some)), some); });
}
void conv_silu(const float* const x[4], const float* taps, int64_t n, float* y) {
  each(n, [&](int64_t i, int some) {
    F s = zero();
    QN_UNROLL
    for (int j = 0; j < 4; j++) s = fma(load_some(taps + j * n + i, some), load_some(x[j] + i, some), s);
    store_some(y + i, mul(s, sigmoid(s)), some);
  });
}

// ---- gated delta rule, one pass over the old state for both of its products:
//   m = alpha S^T k   u = beta (v - m)   o = alpha S^T q + (k . q) u   S <- alpha S + k u^T
// Columns of S are independent; N vectors of them are held in registers while the rows stream by. The pass that writes S takes the
// products of the token after with it, so that a token costs one pass; each value is what two passes give.
template <int N>
void delta_columns(float* s, int64_t stride, int64_t dk, int64_t column, const DeltaStep* steps, int tokens, const float* kq) {
  F m[N], r[N];
  QN_UNROLL
  for (int j = 0; j < N; j++) m[j] = r[j] = zero();
  for (int64_t i = 0; i < dk; i++) {
    const F ki = all(steps[0].k[i]), qi = all(steps[0].q[i]);
    QN_UNROLL
    for (int j = 0; j < N; j++) {
      const F x = load(s + i * stride + j * L);
      m[j] = fma(x, ki, m[j]);
      r[j] = fma(x, qi, r[j]);
    }
  }
  for (int t = 0; t < tokens; t++) {
    const DeltaStep& now = steps[t];
    const F a = all(now.alpha);
    F u[N];
    QN_UNROLL
    for (int j = 0; j < N; j++) {
      u[j] = mul(all(now.beta), sub(load(now.v + column + j * L), mul(a, m[j])));
      store(now.o + column + j * L, fma(all(kq[t]), u[j], mul(a, r[j])));
      if (now.u) store(now.u + column + j * L, u[j]);
      m[j] = r[j] = zero();
    }
    if (t + 1 == tokens) {
      for (int64_t i = 0; i < dk; i++) {
        const F ki = all(now.k[i]);
        QN_UNROLL
        for (int j = 0; j < N; j++) store(s + i * stride + j * L, fma(ki, u[j], mul(a, load(s + i * stride + j * L))));
      }
      return;
    }
    const float *k = now.k, *next_k = steps[t + 1].k, *next_q = steps[t + 1].q;
    for (int64_t i = 0; i < dk; i++) {
      const F ki = all(k[i]), kn = all(next_k[i]), qn = all(next_q[i]);
      QN_UNROLL
      for (int j = 0; j < N; j++) {
        const F x = fma(ki, u[j], mul(a, load(s + i * stride + j * L)));
        store(s + i * stride + j * L, x);
        m[j] = fma(x, kn, m[j]);
        r[j] = fma(x, qn, r[j]);
      }
    }
  }
}
void delta_replay(float* s, int64_t stride, int64_t dk, int64_t cols, const float* k, const float* u, float alpha) {
  for (int64_t i = 0; i < dk; i++)
    for (int64_t c = 0; c < cols; c += L) store(s + i * stride + c, fma(all(k[i]), load(u + c), mul(all(alpha), load(s + i * stride + c))));
}
void delta_steps(float* s, int64_t stride, int64_t dk, int64_t cols, const DeltaStep* steps, int tokens) {
  float kq[kDeltaBlock];
  for (int t = 0; t < tokens; t++) {
    F v = zero();
    for (int64_t i = 0; i < dk; i += L) v = fma(load(steps[t].k + i), load(steps[t].q + i), v);
    kq[t] = sum(v);
  }
  int64_t c = 0;
  auto columns = [&]<int N>() {
    for (; c + N * L <= cols; c += N * L) delta_columns<N>(s + c, stride, dk, c, steps, tokens, kq);
  };
  // One token: rows of 512 bytes, as the memory likes them. More: a block that stays in the first level of cache, 32 KB of 128 rows.
  if (L == 16 && tokens == 1) columns.template operator()<8>();
  if (L == 16) columns.template operator()<4>();
  if (L == 16) columns.template operator()<2>();
  columns.template operator()<L == 8 ? 4 : L == 1 ? 8 : 2>();
}

// ---- attention

// L values from dim i of key j. A code times its scale is exact in fp32.
template <class C>
F cached(const Attend& a, const C* rows, const uint16_t* scales, int j, int i) {
  const C* row = rows + static_cast<int64_t>(j) * a.width + i;
  if constexpr (sizeof(C) == 1) return mul(load(row), all_half(scales + j * a.groups + i / kKvGroup));
  else return load(row);
}

// Dot products of H heads with keys; N keys at a time, so that a load of q serves N products. The order of a sum depends on H,
// never on N.
template <int H, int N, class C>
void scores_of(const Attend& a, const C* k, int head, int key) {
  const float* q = a.q + head * a.width;
  F acc[N][H];
  QN_UNROLL
  for (auto& row : acc)
    QN_UNROLL
    for (F& v : row) v = zero();
  for (int i = 0; i < a.width; i += L) {
    F x[N];
    QN_UNROLL
    for (int n = 0; n < N; n++) x[n] = cached(a, k, a.k_scales, key + n, i);
    QN_UNROLL
    for (int h = 0; h < H; h++) {
      const F y = load(q + h * a.width + i);
      QN_UNROLL
      for (int n = 0; n < N; n++) acc[n][h] = fma(x[n], y, acc[n][h]);
    }
  }
  QN_UNROLL
  for (int n = 0; n < N; n++) {
    float s[H];
    sums(acc[n], s);
    QN_UNROLL
    for (int h = 0; h < H; h++) a.scores[(head + h) * kKeys + key + n] = s[h];
  }
}

// Meanwhile v comes to the cache: weigh() passes over it in columns, which no prefetcher foresees.
template <int H, class C>
void scores(const Attend& a, const C* k, int head) {
  const int64_t row = 2 * a.width * static_cast<int64_t>(sizeof(C));  // bytes of two keys
  int key = 0;
  for (; key + 2 <= a.keys; key += 2) {
    if (head == 0)
      for (int64_t i = 0; i < row; i += 64) __builtin_prefetch(static_cast<const char*>(a.v) + key / 2 * row + i, 0, 2);
    scores_of<H, 2>(a, k, head, key);
  }
  if (key < a.keys) scores_of<H, 1>(a, k, head, key);
}

// weighted sums of v (keys, width), two vectors of columns at a time
template <int H, class C>
void weigh(const Attend& a, const C* v, int head) {
  constexpr int N = 2;
  for (int i = 0; i < a.width; i += N * L) {
    F acc[H][N];
    QN_UNROLL
    for (auto& row : acc)
      QN_UNROLL
      for (F& x : row) x = zero();
    for (int j = 0; j < a.keys; j++) {
      F x[N];
      QN_UNROLL
      for (int n = 0; n < N; n++) x[n] = cached(a, v, a.v_scales, j, i + n * L);
      QN_UNROLL
      for (int h = 0; h < H; h++) {
        const F s = all(a.scores[(head + h) * kKeys + j]);
        QN_UNROLL
        for (int n = 0; n < N; n++) acc[h][n] = fma(s, x[n], acc[h][n]);
      }
    }
    QN_UNROLL
    for (int h = 0; h < H; h++)
      QN_UNROLL
      for (int n = 0; n < N; n++) store(a.part + (head + h) * (a.width + kPartExtra) + i + n * L, acc[h][n]);
  }
}

// e^v of what a score is below the largest; less than 1e-30 is nothing. Not for the result: sums of smaller ones alone are denormal numbers, which
// some CPUs are slow at (attention to scores hundreds apart took a Xeon 30 times as long).
F share_of(F below) { return sub(larger(all(1e-30f), exponent(below)), all(1e-30f)); }

// scores -> exponentials of what they are below the largest
void soften(const Attend& a, int head) {
  float* s = a.scores + head * kKeys;
  F most = all(s[0]);
  const int whole = a.keys / L * L;
  for (int j = 0; j < whole; j += L) most = larger(most, load(s + j));
  float top = largest(most);
  for (int j = whole; j < a.keys; j++) top = s[j] > top ? s[j] : top;
  F sums = zero();
  each(a.keys, [&](int64_t j, int some) {
    store_some(s + j, share_of(sub(load_some(s + j, some), all(top))), some);
    sums = add(sums, load_some(s + j, some));
  });
  float* part = a.part + head * (a.width + kPartExtra) + a.width;
  part[0] = top;
  part[1] = sum(sums);
}

template <class C>
void attend_as(const Attend& a) {
  const C *k = static_cast<const C*>(a.k), *v = static_cast<const C*>(a.v);
  constexpr int kMany = L == 16 ? 8 : 4;  // heads at once: 2 * kMany accumulators in all registers but a few
  int h = 0;
  for (; h + kMany <= a.heads; h += kMany) scores<kMany>(a, k, h);
  for (; h < a.heads; h++) scores<1>(a, k, h);
  for (h = 0; h < a.heads; h++) soften(a, h);
  h = 0;
  for (; h + kMany <= a.heads; h += kMany) weigh<kMany>(a, v, h);
  for (; h < a.heads; h++) weigh<1>(a, v, h);
}
void attend(const Attend& a) {
  if (a.cache == DType::I8) attend_as<int8_t>(a);
  else if (a.cache == DType::BF16) attend_as<uint16_t>(a);
  else attend_as<float>(a);
}

float share_of_one(float below) {
  float e[L];
  store(e, share_of(all(below)));
  return e[0];
}

void merge(float* into, const float* part, int width) {
  float &top = into[width], &total = into[width + 1];
  const float higher = top > part[width] ? top : part[width];
  const float a = share_of_one(top - higher), b = share_of_one(part[width] - higher);
  top = higher;
  total = total * a + part[width + 1] * b;
  for (int i = 0; i < width; i += L) store(into + i, fma(load(into + i), all(a), mul(load(part + i), all(b))));
}

constexpr Kernels generic_kernels(const char* name) {
  Kernels k = {};
  k.name = name;
  ProductFn* f = k.product[static_cast<int>(Form::F32)];
  f[static_cast<int>(DType::F32)] = product_rows_f32<float>;
  f[static_cast<int>(DType::BF16)] = product_rows_f32<uint16_t>;
  f[static_cast<int>(DType::INT8)] = product_panel_f32<8>;
  f[static_cast<int>(DType::INT4)] = product_panel_f32<4>;
  k.prepare = prepare;
  k.sum_squares = sum_squares, k.scale = scale, k.silu_mul = silu_mul, k.sigmoid_mul = sigmoid_mul, k.conv_silu = conv_silu;
  k.delta_steps = delta_steps, k.delta_replay = delta_replay;
  k.attend = attend, k.merge = merge;
  return k;
}

}  // namespace
}  // namespace qn::cpu
