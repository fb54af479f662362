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
  float eps = 0, inverse_k = 1;             // 1 / K, of quick_shape()
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

// The usual shapes, by 256 threads: K a multiple of 128, up to 2048 with a norm over all of it or none, up to 4096 of what the operation before has
// gated. Thread i holds values 1024 c + 4 i .. + 3, so that a warp has whole groups of 128, and everything is asked for at once. Straight
// code, and little of it: a kernel that is over in microseconds also waits for its instructions.
inline bool quick_shape(const Input& in) {
  return in.k % 128 == 0 && (in.mix == Mix::Gated ? in.k <= 4096 : in.k <= 2048 && (in.mix == Mix::Plain || (in.mix == Mix::Norm && in.span == in.k)));
}
constexpr int kNormQuads = 2, kGatedQuads = 4, kNormsAtOnce = 4;

__device__ __forceinline__ bool has_quad(const Input& in, int c) { return 1024 * c + 128 * (static_cast<int>(threadIdx.x) / 32) < in.k; }
__device__ __forceinline__ float4 quad_of(const Input& in, int t, int c) {
  return t < in.tokens && has_quad(in, c) ? load4(in.a + t * in.lda + 1024 * c + 4 * static_cast<int>(threadIdx.x)) : float4{};
}
// Norm weights of the thread's values; they may be loaded before wait_for_previous().
__device__ __forceinline__ void load_norms(const Input& in, float4 (&norm)[kNormQuads]) {
#pragma unroll
  for (int c = 0; c < kNormQuads; c++)
    norm[c] = in.mix == Mix::Norm && has_quad(in, c) ? load4(in.w + 1024 * c + 4 * static_cast<int>(threadIdx.x)) : float4{1, 1, 1, 1};
}

// One way to round for all that follow
__device__ __forceinline__ float square(float4 v) { return fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, v.w * v.w))); }
__device__ __forceinline__ float4 scaled(float4 v, float r) { return {v.x * r, v.y * r, v.z * r, v.w * r}; }
__device__ __forceinline__ float4 scaled(float4 v, float r, float4 norm) {  // v, when there is no norm: both are 1 then
  return {v.x * (r * norm.x), v.y * (r * norm.y), v.z * (r * norm.z), v.w * (r * norm.w)};
}

// sink(first + i, k, value(i, c)) for all quads of AtOnce tokens
template <int AtOnce, int Quads, class Value, class Sink>
__device__ __forceinline__ void hand_over(const Input& in, int first, Value value, Sink sink) {
#pragma unroll
  for (int i = 0; i < AtOnce; i++)
    if (first + i < in.tokens)
#pragma unroll
      for (int c = 0; c < Quads; c++)
        if (has_quad(in, c)) sink(first + i, 1024 * c + 4 * static_cast<int>(threadIdx.x), value(i, c));
}

// squares: room for 8 values, of several tokens for 2 * 8 * kNormsAtOnce; at 16 bytes
template <bool One, class Sink>
__device__ __forceinline__ void norm_quads(const Input& in, const float4 (&norm)[kNormQuads], float* squares, Sink sink) {
  constexpr int kAtOnce = One ? 1 : kNormsAtOnce;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int first = 0; first < (One ? 1 : in.tokens); first += kAtOnce) {
    float4 v[kAtOnce][kNormQuads];
    float r[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int c = 0; c < kNormQuads; c++) v[i][c] = quad_of(in, first + i, c);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) r[i] = 1;
    if (in.mix == Mix::Norm) {
      float* mine = squares + first % (2 * kAtOnce) * 8;  // the other half may still be read
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const float q = warp_sum(square(v[i][0]) + square(v[i][1]));
        if (lane == 0) mine[8 * i + warp] = q;
      }
      sync_matvec();
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const float4 a = load4(mine + 8 * i), b = load4(mine + 8 * i + 4);
        r[i] = rsqrtf(fmaf(((((((a.x + a.y) + a.z) + a.w) + b.x) + b.y) + b.z) + b.w, in.inverse_k, in.eps));
      }
    }
    hand_over<kAtOnce, kNormQuads>(in, first, [&](int i, int c) { return scaled(v[i][c], r[i], norm[c]); }, sink);
  }
}

// 1 / rms of heads of 128 comes from the parts of their squares, if there are any; of several tokens each thread adds up one head's, at most
// 8 * 32, in the order of the butterfly of one token. inverse: room for T * K / 128.
template <bool One, class Sink>
__device__ __forceinline__ void gated_quads(const Input& in, float* inverse, Sink sink) {
  constexpr int kAtOnce = One ? 1 : 4;
  static_assert(Gated::kParts == 16 && kFewTokens * kGatedQuads * 1024 / 128 <= kMatvecThreads);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, heads = in.k / 128;
#pragma unroll 1
  for (int first = 0; first < (One ? 1 : in.tokens); first += kAtOnce) {
    float4 v[kAtOnce][kGatedQuads];
    float r[kGatedQuads] = {1, 1, 1, 1};
#pragma unroll
    for (int i = 0; i < kAtOnce; i++)
#pragma unroll
      for (int c = 0; c < kGatedQuads; c++) v[i][c] = quad_of(in, first + i, c);
    if (One && in.b) {
#pragma unroll
      for (int c = 0; c < kGatedQuads; c++) r[c] = has_quad(in, c) ? in.b[(8 * c + warp) * Gated::kParts + lane % Gated::kParts] : 0.f;
#pragma unroll
      for (int c = 0; c < kGatedQuads; c++) {
#pragma unroll
        for (int l = 1; l < Gated::kParts; l *= 2) r[c] += __shfl_xor_sync(0xffffffffu, r[c], l);
        r[c] = rsqrtf(r[c] * (1.f / 128) + in.eps);
      }
    } else if (!One && first == 0 && in.b) {
      if (tid < in.tokens * heads) {  // rows of b lie one behind the other
        float sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float4 p = load4(in.b + tid * Gated::kParts + 4 * i);
          sum[i] = (p.x + p.y) + (p.z + p.w);
        }
        inverse[tid] = rsqrtf(((sum[0] + sum[1]) + (sum[2] + sum[3])) * (1.f / 128) + in.eps);
      }
      sync_matvec();
    }
    hand_over<kAtOnce, kGatedQuads>(
        in, first, [&](int i, int c) { return scaled(v[i][c], One || !in.b ? r[c] : inverse[(first + i) * heads + 8 * c + warp]); }, sink);
  }
}

// As for_each_quad. One: of one token, which then is no loop. room: what norm_quads() and gated_quads() ask for.
template <bool One, class Sink>
__device__ __forceinline__ void quick_quads(const Input& in, const float4 (&norm)[kNormQuads], float* room, Sink sink) {
  if (in.mix == Mix::Gated) gated_quads<One>(in, room, sink);
  else norm_quads<One>(in, norm, room, sink);
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
