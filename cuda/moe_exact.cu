// Experts with fp32 products, for what moe.cu and moe_prefill.cu leave out: F32 weights, activations that are not rounded, odd
// combinations with the shared expert. Any number of tokens. Not for speed.
//
// A warp computes 4 rows (of gate and of up, or of down) for one row of activations. Of each 128 k a lane has four: those of x,
// rounded as asked for, and those of every weight row, decoded to fp32; a T16 half cell has four neighbours in one 4-byte word.
#include "cuda/matvec.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kRows = 4;

struct Weights {
  const uint8_t* data;
  DType dtype;
  int32_t k, group;
  int64_t stride;  // bytes of a row; of a T16 panel,
  int32_t tiles;   // whose tiles begin there
};

// Weights k..k+3 of a row, k a multiple of 4
template <DType W>
__device__ __forceinline__ float4 decode4(const Weights& w, const uint8_t* data, int64_t row, int k) {
  if constexpr (W == DType::F32) {
    return load4(reinterpret_cast<const float*>(data + row * w.stride) + k);
  } else if constexpr (W == DType::BF16) {
    const uint2 v = *reinterpret_cast<const uint2*>(data + row * w.stride + 2 * k);
    return {bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y)};
  } else {
    const uint8_t* panel = data + row / kPanelRows * w.stride;
    const int r = static_cast<int>(row % kPanelRows), at = k % tile_k(W);
    const uint8_t* tile = panel + w.tiles + k / tile_k(W) * kTileBytes;
    uint32_t v = *reinterpret_cast<const uint32_t*>(tile + (W == DType::INT4 ? int4_byte(r, at) : int8_byte(r, at)));
    if (W == DType::INT4) v = v >> int4_shift(at) & 0x0f0f0f0fu;
    const float scale = half_bits_to_float(reinterpret_cast<const uint16_t*>(panel)[k / w.group * kPanelRows + r]);
    auto value = [&](int shift) { return static_cast<float>(static_cast<int>(v >> shift & 255) - code_zero(W)) * scale; };
    return {value(0), value(8), value(16), value(24)};
  }
}

// x[k..k+3] for k = k0 + 4 * lane, rounded; zero from n on
__device__ __forceinline__ float4 rounded4(const float* x, int k, int n, Act act) {
  float4 v = k < n ? load4(x + k) : float4{};
  if (act == Act::INT8) {
    const float scale = int8_codes(v);
    return {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
  }
  if (act == Act::BF16) return {round_bf16(v.x), round_bf16(v.y), round_bf16(v.z), round_bf16(v.w)};
  return v;
}

// sum[i] += this lane's part of row(i) . x
template <DType W, int N, class RowOf>
__device__ __forceinline__ void dot_rows_of(const Weights& w, const uint8_t* data, RowOf row, const float* x, Act act, float (&sum)[N]) {
#pragma unroll 1
  for (int k0 = 0; k0 < w.k; k0 += kActGroup) {
    const int k = k0 + 4 * (static_cast<int>(threadIdx.x) & 31);
    const float4 v = rounded4(x, k, w.k, act);
    if (k >= w.k) continue;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float4 c = decode4<W>(w, data, row(i), k);
      sum[i] = fmaf(c.w, v.w, fmaf(c.z, v.z, fmaf(c.y, v.y, fmaf(c.x, v.x, sum[i]))));
    }
  }
}
template <int N, class RowOf>
__device__ __forceinline__ void dot_rows(const Weights& w, const uint8_t* data, RowOf row, const float* x, Act act, float (&sum)[N]) {
  if (w.dtype == DType::F32) dot_rows_of<DType::F32>(w, data, row, x, act, sum);
  else if (w.dtype == DType::BF16) dot_rows_of<DType::BF16>(w, data, row, x, act, sum);
  else if (w.dtype == DType::INT8) dot_rows_of<DType::INT8>(w, data, row, x, act, sum);
  else dot_rows_of<DType::INT4>(w, data, row, x, act, sum);
}

struct ExactGateUp {
  const float* x;      // (T, D)
  const int32_t* ids;  // (T, K)
  Weights w;           // gate_up (2F, D) of expert 0
  int64_t expert;      // bytes from expert to expert
  const uint8_t* const* at;  // (E) or null: where the experts are instead; null there: computed elsewhere
  int64_t pairs;       // T * K
  int32_t chosen, f;
  Act act;
  float* inner;        // (T*K, F)
};

__global__ void __launch_bounds__(32 * kWarps) moe_exact_gate_up_k(const ExactGateUp a) {
  let_next_start();
  wait_for_previous();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, pair = unit / (a.f / kRows);
  if (pair >= a.pairs) return;
  const int first = static_cast<int>(unit % (a.f / kRows)) * kRows;
  const uint8_t* data = a.at ? a.at[a.ids[pair]] : a.w.data + a.ids[pair] * a.expert;
  if (!data) return;
  const bool t16 = is_t16(a.w.dtype);
  auto row = [&](int i) -> int64_t {  // rows of gate, then the matching ones of up
    const int64_t r = first + i % kRows + (i < kRows ? 0 : a.f);
    return t16 ? interleave_row(r, a.f) : r;
  };
  float sum[2 * kRows] = {};
  dot_rows(a.w, data, row, a.x + pair / a.chosen * a.w.k, a.act, sum);
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const float gate = warp_sum(sum[i]), up = warp_sum(sum[kRows + i]);
    if ((threadIdx.x & 31) == static_cast<unsigned>(i)) a.inner[pair * a.f + first + i] = silu(gate) * up;
  }
}

struct ExactDown {
  const int32_t* ids;              // (T, K)
  const float *weights, *inner;    // (T, K), (T*K, F)
  Weights w;                       // down (D, F) of expert 0
  int64_t expert;                  // bytes from expert to expert
  const uint8_t* const* at;        // (E) or null: as above,
  int64_t down_offset;             // and where in the record `down` is
  const float *shared, *scale;     // (T, FS), (T)
  Weights shared_w;                // (D, FS)
  int32_t chosen, tokens, d;
  Act act, shared_act;
  float* h;                        // (T, D)
};

__global__ void __launch_bounds__(32 * kWarps) moe_exact_down_k(const ExactDown a) {
  let_next_start();
  wait_for_previous();
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, t = unit / (a.d / kRows);
  if (t >= a.tokens) return;
  const int first = static_cast<int>(unit % (a.d / kRows)) * kRows;
  auto row = [&](int i) -> int64_t { return first + i; };
  float total[kRows] = {};  // this lane's part
  for (int j = 0; j <= a.chosen; j++) {
    float sum[kRows] = {}, weight;
    if (j < a.chosen) {
      const int64_t pair = t * a.chosen + j;
      const int e = a.ids[pair];
      const uint8_t* data = a.w.data + e * a.expert;
      if (a.at && !a.at[e]) continue;
      if (a.at) data = a.at[e] + a.down_offset;
      dot_rows(a.w, data, row, a.inner + pair * a.w.k, a.act, sum);
      weight = a.weights[pair];
    } else {
      dot_rows(a.shared_w, a.shared_w.data, row, a.shared + t * a.shared_w.k, a.shared_act, sum);
      weight = a.scale[t];
    }
#pragma unroll
    for (int i = 0; i < kRows; i++) total[i] += weight * sum[i];
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const float sum = warp_sum(total[i]);
    if ((threadIdx.x & 31) == static_cast<unsigned>(i)) a.h[t * a.d + first + i] += sum;
  }
}

Weights make_weights(const Tensor& w) {
  const int64_t k = w.cols();
  if (!is_t16(w.dtype)) return {w.bytes(), w.dtype, static_cast<int32_t>(k), 0, k * item_bytes(w.dtype), 0};
  return {w.bytes(), w.dtype, static_cast<int32_t>(k), w.group, t16_panel_bytes(w.dtype, k, w.group), static_cast<int32_t>(t16_scale_bytes(k, w.group))};
}
dim3 grid(int64_t warps) { return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)); }

}  // namespace

void moe_exact_gate_up(const Context& c, const MoeGateUpArgs& args) {
  moe_route(c, args);
  ExactGateUp a{};
  a.x = args.x.f32(), a.ids = args.ids.i32(), a.inner = args.inner.f32(), a.act = args.act;
  a.w = make_weights(args.experts.gate_up(0)), a.expert = args.experts.layout().stride;
  a.at = args.experts.home ? args.experts.home->at : nullptr;
  a.chosen = static_cast<int32_t>(args.ids.cols()), a.pairs = args.ids.rows() * args.ids.cols(), a.f = static_cast<int32_t>(args.inner.cols());
  launch(c, "moe_gate_up", moe_exact_gate_up_k, grid(a.pairs * (a.f / kRows)), dim3(32 * kWarps), 0, a);
}

void moe_exact_down(const Context& c, const MoeDownArgs& args) {
  ExactDown a{};
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32(), a.act = args.act;
  a.w = make_weights(args.experts.down(0)), a.expert = args.experts.layout().stride;
  a.at = args.experts.home ? args.experts.home->at : nullptr, a.down_offset = args.experts.layout().down_offset;
  a.shared = args.shared.f32(), a.scale = args.shared_scale.f32(), a.shared_w = make_weights(args.shared_down), a.shared_act = args.shared_act;
  a.chosen = static_cast<int32_t>(args.ids.cols()), a.tokens = static_cast<int32_t>(args.h.rows()), a.d = static_cast<int32_t>(args.h.cols());
  a.h = args.h.f32();
  launch(c, "moe_down", moe_exact_down_k, grid(int64_t{a.tokens} * (a.d / kRows)), dim3(32 * kWarps), 0, a);
}

}  // namespace qn::cuda
