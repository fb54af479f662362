// A product of few tokens: y = W act(x), where x = some mixture of norms and gates of the activations that lie in memory, which
// every block computes for itself. Description and device code shared by matvec.cu (tensor cores) and matvec_exact.cu (fp32).
#pragma once
#include "cuda/common.cuh"
#include "ggml-lite/core/tensor.h"

namespace qn::cuda {

enum class Mix {
  Plain,      // a
  Norm,       // norm(a) * w
  GatedNorm,  // norm(a per head) * w * silu(b)
  Gate,       // a * sigmoid(b)
  Concat,     // norm(a) * w | norm(b) * w2
  Gated,      // a / rms of heads of 128, whose squares b has in parts (kernels.h), or a alone
};

struct Input {
  Mix mix = Mix::Plain;
  int tokens = 0, k = 0;
  const float *a = nullptr, *b = nullptr;   // (T, K), of Concat (T, K/2); rows lda and ldb apart
  int64_t lda = 0, ldb = 0;
  const float *w = nullptr, *w2 = nullptr;  // (span)
  float eps = 0;
  int span = 0, spans = 0;                  // a token has `spans` norms, each over `span` values
  int pieces = 0;                           // of a span: 128 values, the last one maybe fewer
  bool quick = false;                       // quick_shape()
};

enum class Store { Set, Add, SwiGLU };  // SwiGLU: y (T, N/2) = silu(gate rows) * up rows

// Rows that see unrounded activations: y (T, N) = W x or its sigmoid
struct ExactRows {
  Tensor w;  // BF16 or F32; may be empty
  float* y = nullptr;
  int64_t ldy = 0;
  bool squash = false;
};

struct Product {
  Input in;
  Act act = Act::F32;
  Tensor w;                 // any format; may be empty
  Store store = Store::Set;
  float* y = nullptr;
  int64_t ldy = 0;
  ExactRows exact[2];
  float* normed = nullptr;  // optional out (T, K): x
};

void matvec_exact(const Context&, const char* what, const Product&);
size_t matvec_exact_scratch(const OpLimits&);

// ---- the mixture: one warp per token and group of 128 values, four per lane -------------------------------------------

constexpr int kMatvecWarps = 8, kMatvecThreads = 32 * kMatvecWarps;  // that mix; a block may have more
__device__ __forceinline__ void sync_matvec() { asm volatile("bar.sync 1, %0;" ::"n"(kMatvecThreads) : "memory"); }  // these

// The same in all lanes, which the compiler would not know of threadIdx.x / 32
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Norm weights may be fetched before wait_for_previous(); nearly always they are in no cache yet.
__device__ __forceinline__ void prefetch_norms(const Input& in) {
  if (in.spans == 0) return;
  for (int i = static_cast<int>(threadIdx.x) * 32; i < in.span; i += kMatvecThreads * 32) {
    prefetch_l2(in.w + i);
    if (in.w2) prefetch_l2(in.w2 + i);
  }
}

struct Quad {  // v: values; s: what they are multiplied with: norm weights (Norm, Concat) or what gates them (GatedNorm, Gate)
  float4 v, s;
};
__device__ __forceinline__ Quad load_quad(const Input& in, int t, int k) {
  Quad q{};
  if (t >= in.tokens || k >= in.k) return q;
  const bool second = in.mix == Mix::Concat && k >= in.span;
  const int at = second ? k - in.span : k;
  q.v = load4((second ? in.b + t * in.ldb : in.a + t * in.lda) + at);
  if (in.mix == Mix::GatedNorm || in.mix == Mix::Gate) q.s = load4(in.b + t * in.ldb + k);
  if (in.mix == Mix::Norm || in.mix == Mix::Concat) q.s = load4((second ? in.w2 : in.w) + at);
  return q;
}
// inverse: 1 / rms, w: norm weight of GatedNorm
__device__ __forceinline__ float mixed(Mix mix, float v, float s, float inverse, float w) {
  if (mix == Mix::GatedNorm || mix == Mix::Gate) {
    const float gate = sigmoid(s);
    return mix == Mix::Gate ? v * gate : v * inverse * w * (s * gate);
  }
  return mix == Mix::Plain ? v : v * inverse * s;
}

constexpr int kBatch = 4;  // quads a lane loads at once, to wait for memory once

// inverse[t * spans + i] = 1 / rms of span i of token t. The block's first quads are at hand.
__device__ __forceinline__ void inverse_rms(const Input& in, const Quad (&q)[kBatch], float* squares, float* inverse) {
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % 32, warps = kMatvecWarps;
  const int norms = in.tokens * in.spans, parts = norms * in.pieces;
  const bool at_hand = in.spans == 1 || in.span % 128 == 0;  // pieces are groups
  int t = 0, span = 0, piece = warp - warps;
  for (int first = warp; first < parts; first += warps * kBatch) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      for (piece += warps; piece >= in.pieces; piece -= in.pieces)
        if (++span == in.spans) span = 0, t++;
      const int at = piece * 128 + 4 * lane;
      const float* x = in.mix == Mix::Concat && span == 1 ? in.b + t * in.ldb : in.a + t * in.lda + span * in.span;
      if (at_hand && first == warp) v[i] = q[i].v;
      else v[i] = t < in.tokens && at < in.span ? load4(x + at) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const float s = warp_sum(v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w);
      if (lane == 0 && first + i * warps < parts) squares[first + i * warps] = s;
    }
  }
  sync_matvec();
  if (in.pieces == 1) {  // a norm per thread, else one per warp
    for (int i = static_cast<int>(threadIdx.x); i < norms; i += kMatvecThreads)
      inverse[i] = 1.f / sqrtf(squares[i] / static_cast<float>(in.span) + in.eps);
  } else {
    for (int i = warp; i < norms; i += warps) {
      float s = 0;
      for (int p = lane; p < in.pieces; p += 32) s += squares[i * in.pieces + p];
      s = warp_sum(s);
      if (lane == 0) inverse[i] = 1.f / sqrtf(s / static_cast<float>(in.span) + in.eps);
    }
  }
  sync_matvec();
}

// Calls sink(t, k, x) for all x, by whole warps: lane l has x[k .. k+3] of token t, k = 128 * group + 4 * l, zero where k >= K.
// squares: room for tokens * spans * pieces, inverse: for tokens * spans. Every sum is in an order that T has no part in.
template <class Sink>
__device__ __forceinline__ void for_each_quad(const Input& in, float* squares, float* inverse, Sink sink) {
  const int warp = warp_index(), lane = static_cast<int>(threadIdx.x) % 32, warps = kMatvecWarps;
  const int groups = (in.k + 127) / 128;
  auto next = [&](int& t, int& group) {  // warps take groups in turn, on from token to token
    for (group += warps; group >= groups; group -= groups) t++;
  };
  // Heads of 128 meet the same norm weights in every group
  const int head_at = in.mix == Mix::GatedNorm ? 4 * lane % in.span : 0;
  const float4 head = in.mix == Mix::GatedNorm ? load4(in.w + head_at) : float4{};
  int t = 0, group = warp - warps;
  next(t, group);
  bool begin = true;
  do {
    Quad q[kBatch];
    int ahead_t = t, ahead_group = group;
#pragma unroll
    for (int i = 0; i < kBatch; i++) q[i] = load_quad(in, ahead_t, ahead_group * 128 + 4 * lane), next(ahead_t, ahead_group);
    if (begin && in.spans > 0) inverse_rms(in, q, squares, inverse);
    begin = false;
#pragma unroll 1  // the code would be large
    for (int i = 0; i < kBatch && t < in.tokens; i++) {
      const int k = group * 128 + 4 * lane;
      float4 x{};
      if (k < in.k) {
        const int span = in.spans > 1 ? k / in.span : 0, at = k - span * in.span;
        const float r = in.spans > 0 ? inverse[t * in.spans + span] : 1.f;
        const float4 w = in.mix == Mix::GatedNorm && at != head_at ? load4(in.w + at) : head;
        x.x = mixed(in.mix, q[0].v.x, q[0].s.x, r, w.x), x.y = mixed(in.mix, q[0].v.y, q[0].s.y, r, w.y);
        x.z = mixed(in.mix, q[0].v.z, q[0].s.z, r, w.z), x.w = mixed(in.mix, q[0].v.w, q[0].s.w, r, w.w);
      }
      sink(t, k, x);
      next(t, group);
#pragma unroll
      for (int j = 1; j < kBatch; j++) q[j - 1] = q[j];
    }
  } while (t < in.tokens);
}

// The usual shapes, by 256 threads: K a multiple of 128 up to 4096, a norm over all of K or one of heads that delta_net has prepared. Thread i holds values
// 1024 c + 4 i .. + 3, so that a warp has whole groups of 128, and everything is asked for at once. Straight code: a kernel that is over
// in microseconds also waits for its instructions.
inline bool quick_shape(const Input& in) {
  return in.k % 128 == 0 && in.k <= 4096 &&
         (in.mix == Mix::Plain || in.mix == Mix::Gate || in.mix == Mix::Gated || (in.mix == Mix::Norm && in.span == in.k));
}

// Norm weights of the thread's values; they may be loaded before wait_for_previous().
__device__ __forceinline__ void load_norms(const Input& in, float4 (&norm)[4]) {
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32;
#pragma unroll
  for (int c = 0; c < 4; c++) norm[c] = in.mix == Mix::Norm && 1024 * c + 128 * warp < in.k ? load4(in.w + 1024 * c + 4 * tid) : float4{1, 1, 1, 1};
}

// One way to round for all that follow
__device__ __forceinline__ float square(float4 v) { return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w))); }
__device__ __forceinline__ float4 scaled(float4 v, float r, float4 norm) {
  return {v.x * (r * norm.x), v.y * (r * norm.y), v.z * (r * norm.z), v.w * (r * norm.w)};
}
// squares (8): of the warps, behind a barrier
__device__ __forceinline__ float inverse_of(const Input& in, const float* squares) {
  float all = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) all += squares[i];
  return rsqrtf(all / static_cast<float>(in.k) + in.eps);
}

constexpr int kNarrow = 2048, kNarrowTokens = 4;

// Several tokens of K up to kNarrow, one norm over all of it or none: four of them are asked for at once. squares: room for 64.
template <class Sink>
__device__ __forceinline__ void narrow_quads(const Input& in, const float4 (&norm)[4], float* squares, Sink sink) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
#pragma unroll 1
  for (int first = 0, half = 0; first < in.tokens; first += kNarrowTokens, half ^= 1) {  // the other half of squares may still be read
    float4 v[kNarrowTokens][2];
    float r[kNarrowTokens] = {1, 1, 1, 1};
#pragma unroll
    for (int i = 0; i < kNarrowTokens; i++)
#pragma unroll
      for (int c = 0; c < 2; c++)
        v[i][c] = first + i < in.tokens && 1024 * c + 128 * warp < in.k ? load4(in.a + (first + i) * in.lda + 1024 * c + 4 * tid) : float4{};
    if (in.mix == Mix::Norm) {
      float* mine = squares + half * (8 * kNarrowTokens);
#pragma unroll
      for (int i = 0; i < kNarrowTokens; i++) {
        const float q = warp_sum(square(v[i][0]) + square(v[i][1]));
        if (lane == 0) mine[8 * i + warp] = q;
      }
      sync_matvec();
#pragma unroll
      for (int i = 0; i < kNarrowTokens; i++) r[i] = inverse_of(in, mine + 8 * i);
    }
#pragma unroll 1  // the code would be large
    for (int i = 0; i < kNarrowTokens && first + i < in.tokens; i++) {
#pragma unroll
      for (int c = 0; c < 2; c++)
        if (1024 * c + 128 * warp < in.k) sink(first + i, 1024 * c + 4 * tid, in.mix == Mix::Norm ? scaled(v[0][c], r[0], norm[c]) : v[0][c]);
#pragma unroll
      for (int j = 1; j < kNarrowTokens; j++) v[j - 1][0] = v[j][0], v[j - 1][1] = v[j][1], r[j - 1] = r[j];
    }
  }
}

// Of Mix::Gated, so many tokens at a time
template <bool One, int kAtOnce, class Sink>
__device__ __forceinline__ void gated_quads(const Input& in, Sink sink) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, tokens = One ? 1 : in.tokens;
#pragma unroll 1
  for (int first = 0; first < tokens; first += kAtOnce) {
    float4 v[kAtOnce][4];
    float r[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const bool there = first + i < tokens && 1024 * c + 128 * warp < in.k;
        r[i][c] = there && in.b ? in.b[(first + i) * in.ldb + (8 * c + warp) * Gated::kParts + lane % Gated::kParts] : 0.f;
        v[i][c] = there ? load4(in.a + (first + i) * in.lda + 1024 * c + 4 * tid) : float4{};
      }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
#pragma unroll
        for (int l = 1; l < Gated::kParts; l *= 2) r[i][c] += __shfl_xor_sync(0xffffffffu, r[i][c], l);
        r[i][c] = in.b ? rsqrtf(r[i][c] * (1.f / 128) + in.eps) : 1.f;
      }
#pragma unroll 1  // the code would be large
    for (int i = 0; i < kAtOnce && first + i < tokens; i++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        if (1024 * c + 128 * warp < in.k) sink(first + i, 1024 * c + 4 * tid, float4{v[0][c].x * r[0][c], v[0][c].y * r[0][c], v[0][c].z * r[0][c], v[0][c].w * r[0][c]});
#pragma unroll
        for (int j = 1; j < kAtOnce; j++) v[j - 1][c] = v[j][c], r[j - 1][c] = r[j][c];
      }
    }
  }
}

// As for_each_quad. One: of one token, which then is no loop. AtOnce: of several whose values are many, how many are asked for at once.
template <bool One, int AtOnce, class Sink>
__device__ __forceinline__ void quick_quads(const Input& in, const float4 (&norm)[4], float* squares, Sink sink) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, tokens = One ? 1 : in.tokens;
  const bool gates = in.mix == Mix::Gate;
  if (in.mix == Mix::Gated) return gated_quads<One, AtOnce>(in, sink);
  if (!One && in.k <= kNarrow && !gates) return narrow_quads(in, norm, squares, sink);
#pragma unroll 1
  for (int t = 0; t < tokens; t++) {
    const float *a = in.a + t * in.lda + 4 * tid, *b = in.b + t * in.ldb + 4 * tid;
    float4 v[4], s[4];
    float r = 1;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const bool in_k = 1024 * c + 128 * warp < in.k;
      v[c] = in_k ? load4(a + 1024 * c) : float4{};
      s[c] = in_k && gates ? load4(b + 1024 * c) : float4{};
    }
    if (in.mix == Mix::Norm) {
      const float q = warp_sum(square(v[0]) + square(v[1]) + square(v[2]) + square(v[3]));
      float* mine = squares + t % 2 * 8;  // the other half may still be read
      if (lane == 0) mine[warp] = q;
      sync_matvec();
      r = inverse_of(in, mine);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      if (1024 * c + 128 * warp >= in.k) break;
      float4 x = v[c];
      if (gates) x.x *= sigmoid(s[c].x), x.y *= sigmoid(s[c].y), x.z *= sigmoid(s[c].z), x.w *= sigmoid(s[c].w);
      else if (in.mix == Mix::Norm) x = scaled(x, r, norm[c]);
      sink(t, 1024 * c + 4 * tid, x);
    }
  }
}

// INT8 rounding of the 128 values that a warp holds, as core/codec.cpp defines it: x becomes codes, the scale is returned.
__device__ __forceinline__ float int8_codes(float4& x) {
  float largest = warp_max(fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
  if (__any_sync(0xffffffffu, isnan(x.x) || isnan(x.y) || isnan(x.z) || isnan(x.w))) largest = NAN;
  const float scale = largest / 127.f;
  const bool plain = scale > 0 && scale < INFINITY;
  auto code = [&](float v) { return plain ? fminf(fmaxf(rintf(v / scale), -127.f), 127.f) : 0.f; };
  x = {code(x.x), code(x.y), code(x.z), code(x.w)};
  return scale;
}

}  // namespace qn::cuda
