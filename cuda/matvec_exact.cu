// Products of at most 8 tokens with fp32 multiplications: F32 weights, or activations that are not rounded, or rows too long for
// shared memory. One kernel writes x, unrounded and rounded (as fp32 values, so that any format may meet any rounding), a second one
// computes rows, a warp each. Not for speed.
#include "cuda/decode.cuh"
#include "cuda/matvec.cuh"

#include <algorithm>

namespace qn::cuda {
namespace {

constexpr int kThreads = kMatvecThreads;

// Block t: x of token t. exact and rounded (T, K) may be null.
__global__ void __launch_bounds__(kThreads) matvec_input_k(Input in, Act act, float* exact, float* rounded) {
  extern __shared__ __align__(16) float sums[];  // of a quick norm 8, of others those of for_each_quad()
  let_next_start();
  float4 norm[kNormQuads];
  if (in.quick) load_norms(in, norm);
  else prefetch_norms(in);
  wait_for_previous();
  const int64_t token = blockIdx.x;
  in.a += token * in.lda, in.b += token * in.ldb, in.tokens = 1;
  const auto sink = [&](int, int k, float4 v) {
    if (exact && k < in.k) *reinterpret_cast<float4*>(exact + token * in.k + k) = v;
    if (!rounded) return;
    if (act == Act::INT8) {
      const float scale = int8_codes(v);
      v = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    } else if (act == Act::BF16) {
      v = {round_bf16(v.x), round_bf16(v.y), round_bf16(v.z), round_bf16(v.w)};
    }
    if (k < in.k) *reinterpret_cast<float4*>(rounded + token * in.k + k) = v;
  };
  if (in.quick) quick_quads<true>(in, norm, sums, sink);
  else for_each_quad(in, sums, sums + in.spans * in.pieces, sink);
}

struct Rows {
  Stored w;
  int rows, k, tokens;
  const float* x;     // (T, K)
  float* y;
  int64_t ldy;
  Store store;
  bool squash;
};

// Row times all tokens, summed over the warp
__device__ __forceinline__ void dot(const Rows& r, int64_t row, float (&sum)[kFewTokens]) {
#pragma unroll
  for (int t = 0; t < kFewTokens; t++) sum[t] = 0;
  for (int k = static_cast<int>(threadIdx.x) % 32 * 8; k < r.k; k += 256) {
    float w[8];
    decode8(r.w, row, k, w);
#pragma unroll
    for (int t = 0; t < kFewTokens; t++) {
      if (t >= r.tokens) break;
      const float* x = r.x + static_cast<int64_t>(t) * r.k + k;
#pragma unroll
      for (int i = 0; i < 8; i++) sum[t] = fmaf(w[i], x[i], sum[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kFewTokens; t++) sum[t] = warp_sum(sum[t]);
}

// A warp computes value n of every token; of SwiGLU from two rows
__global__ void __launch_bounds__(kThreads) matvec_rows_k(Rows r) {
  let_next_start();
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32, values = r.store == Store::SwiGLU ? r.rows / 2 : r.rows;
  if (n >= values) return;
  const bool interleaved = r.store == Store::SwiGLU && is_t16(r.w.dtype);
  float sum[kFewTokens], up[kFewTokens];
  dot(r, interleaved ? interleave_row(n, values) : n, sum);
  if (r.store == Store::SwiGLU) dot(r, interleaved ? interleave_row(values + n, values) : values + n, up);
#pragma unroll
  for (int t = 0; t < kFewTokens; t++) {
    if (t >= r.tokens || lane != 0) break;
    float* y = r.y + t * r.ldy + n;
    if (r.store == Store::SwiGLU) *y = silu(sum[t]) * up[t];
    else *y = (r.store == Store::Add ? *y : 0.f) + (r.squash ? sigmoid(sum[t]) : sum[t]);
  }
}

void launch_rows(const Context& c, const char* what, const Tensor& w, const float* x, int tokens, float* y, int64_t ldy, Store store, bool squash) {
  if (!w) return;
  Rows r;
  r.w = stored(w), r.rows = static_cast<int>(w.rows()), r.k = static_cast<int>(w.cols()), r.tokens = tokens;
  r.x = x, r.y = y, r.ldy = ldy, r.store = store, r.squash = squash;
  const int values = store == Store::SwiGLU ? r.rows / 2 : r.rows, warps = kThreads / 32;
  launch(c, what, matvec_rows_k, static_cast<unsigned>((values + warps - 1) / warps), kThreads, 0, r);
}

}  // namespace

void matvec_exact(const Context& c, const char* what, const Product& p) {
  Input in = p.in;
  // As matvec.cu chooses, in the same order of sums: norms that come here without a product and there with one have the same bits
  in.quick = p.act == Act::BF16 && quick_shape(in), in.inverse_k = 1.f / static_cast<float>(in.k);
  const bool round = p.w && p.act != Act::F32, exact_rows = p.exact[0].w || p.exact[1].w;
  Scratch s(c);
  float* exact = p.normed;
  if (!exact && (exact_rows || !round)) exact = s.take<float>(int64_t{in.tokens} * in.k);
  float* rounded = round ? s.take<float>(int64_t{in.tokens} * in.k) : nullptr;
  const size_t shared = std::max(static_cast<size_t>(in.spans) * (static_cast<size_t>(in.pieces) + 1), size_t{16}) * 4;
  launch(c, what, matvec_input_k, static_cast<unsigned>(in.tokens), kThreads, shared, in, p.act, exact, rounded);
  launch_rows(c, what, p.w, round ? rounded : exact, in.tokens, p.y, p.ldy, p.store, false);
  for (const ExactRows& e : p.exact) launch_rows(c, what, e.w, exact, in.tokens, e.y, e.ldy, Store::Set, e.squash);
}

size_t matvec_exact_scratch(const OpLimits& l) {
  Scratch s;
  const int64_t tokens = std::min(l.tokens, kFewTokens);
  s.take<float>(tokens * l.width), s.take<float>(tokens * l.width);
  return s.used();
}

}  // namespace qn::cuda
