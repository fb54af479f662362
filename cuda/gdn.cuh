// What the kernels of the delta rule share (gdn.cu, gdn_chunk.cu): their parameters, the convolution, the gates.
#pragma once
#include "cuda/common.cuh"

namespace qn::cuda {

constexpr int kDim = 128;  // DK of the fast kernels

struct Delta {
  const float* qkv;  // (T, CH), rows qkv_stride apart
  int64_t qkv_stride;
  const float* ba;  // (T, 2*GV)
  const void* conv;  // (CH, 4)
  const float *neg_a, *dt_bias;  // (GV)
  float* ring;   // (slots, CH)
  float* state;  // (GV, DK, DV)
  float* log;    // (kDeltaLogRows, log_width) or null: see DeltaNetArgs
  float* work;   // like state: scratch of calls that leave it, when S is not in registers
  float* o;      // (T, GV*DV)
  const float *z, *out_norm;  // (T, GV*DV) rows z_stride apart, (DV); null: the output is not gated here
  int64_t z_stride;
  Gated gated;
  const StepParams* step;
  int tokens, slots, log_width, gk, gv, dk, dv;
  bool conv_bf16, ring_inside;  // ring_inside: the kernel for few tokens stores the new inputs
  __device__ int64_t channels() const { return 2 * gk * dk + gv * dv; }
  __device__ float* logged(int pos) const { return log + static_cast<int64_t>(pos & (kDeltaLogRows - 1)) * log_width; }
  __device__ int log_u(int head) const { return static_cast<int>(delta_log_u(gk, dk, dv, head)); }  // where u of a value head begins in it; behind, alpha
};

// ---- convolution and gates ----------------------------------------------------------------------------------------------

__device__ __forceinline__ float4 taps(const Delta& a, int64_t channel) {
  if (!a.conv_bf16) return static_cast<const float4*>(a.conv)[channel];
  const uint2 w = static_cast<const uint2*>(a.conv)[channel];
  return make_float4(bf16_lo(w.x), bf16_hi(w.x), bf16_lo(w.y), bf16_hi(w.y));
}

// Inputs of channels for tokens first - 3 ... first + Tokens - 1 of the call, as two steps so that work fits between: load() issues
// the loads, choose() completes x[c][i], the input for token first - 3 + i; behind the call's last token it is 0. first is 0 or at
// least 3. With four slots all are loaded and the position chooses afterwards, so that no load waits for it. Another block may then
// be overwriting the fourth, which nobody chooses.
template <int Count, int Tokens>
struct Inputs {
  float x[Count][3 + Tokens], before[Count][4];

  __device__ __forceinline__ void load(const Delta& a, const int64_t (&channel)[Count], int pos, int first) {
#pragma unroll
    for (int i = 0; i < Tokens; i++)
#pragma unroll
      for (int c = 0; c < Count; c++) x[c][3 + i] = first + i < a.tokens ? a.qkv[(first + i) * a.qkv_stride + channel[c]] : 0.f;
    if (first > 0) {
#pragma unroll
      for (int j = 0; j < 3; j++)
#pragma unroll
        for (int c = 0; c < Count; c++) before[c][j] = a.qkv[(first - 3 + j) * a.qkv_stride + channel[c]];
    } else if (a.slots == 4) {
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int c = 0; c < Count; c++) before[c][j] = a.ring[j * a.channels() + channel[c]];
    } else {
#pragma unroll
      for (int j = 0; j < 3; j++)
#pragma unroll
        for (int c = 0; c < Count; c++) before[c][j] = a.ring[((pos - 3 + j) & (a.slots - 1)) * a.channels() + channel[c]];
    }
  }
  __device__ __forceinline__ void choose(const Delta& a, int pos, int first) {
#pragma unroll
    for (int j = 0; j < 3; j++) {
      const int slot = first == 0 && a.slots == 4 ? (pos - 3 + j) & 3 : j;
      const bool sequence = first > 0 || pos - 3 + j >= 0;  // else before its start
#pragma unroll
      for (int c = 0; c < Count; c++) {
        const float* const b = before[c];
        x[c][j] = sequence ? (slot & 2 ? (slot & 1 ? b[3] : b[2]) : (slot & 1 ? b[1] : b[0])) : 0.f;
      }
    }
  }
};

__device__ __forceinline__ float convolved(const float4& w, float x0, float x1, float x2, float x3) {
  return silu(fmaf(w.w, x3, fmaf(w.z, x2, fmaf(w.y, x1, w.x * x0))));
}

// log alpha of a token
__device__ __forceinline__ float log_decay(float a, float neg_a, float dt_bias) {
  const float x = a + dt_bias;
  return neg_a * (x > 20.f ? x : log1pf(expf(x)));
}
// alpha, beta
__device__ __forceinline__ float2 gates(float b, float a, float neg_a, float dt_bias) {
  return make_float2(expf(log_decay(a, neg_a, dt_bias)), sigmoid(b));
}

__device__ __forceinline__ float inverse_norm(float squares) { return rsqrtf(squares + 1e-6f); }

__device__ __forceinline__ float dot4(const float4& a, const float4& b) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
}
__device__ __forceinline__ float4 scaled(const float4& a, float f) { return make_float4(a.x * f, a.y * f, a.z * f, a.w * f); }

// ---- gdn_chunk.cu: long calls, in chunks on tensor cores; not the ring. False: it does not take these shapes.
bool delta_net_chunks(const Context&, const Delta&);
size_t delta_net_chunks_scratch(const OpLimits&);

}  // namespace qn::cuda
