// Gated DeltaNet of few tokens, as a device function: gdn.cu has a kernel of it, step.cu a phase. What the formulas mean is said in gdn.cu.
#pragma once
#include "cuda/common.cuh"

namespace qn::cuda {

constexpr int kDeltaWarps = 4, kDeltaThreads = 32 * kDeltaWarps;
constexpr int kColumns = 8 * kDeltaWarps;  // of a block
constexpr int kDim = 128;             // DK of the fast kernels

struct Delta {
  const float* qkv;  // (T, CH), rows qkv_stride apart
  int64_t qkv_stride;
  const float* ba;  // (T, 2*GV)
  const void* conv;  // (CH, 4)
  const float *neg_a, *dt_bias;  // (GV)
  float* ring;   // (slots, CH)
  float* state;  // (GV, DK, DV)
  float* o;      // (T, GV*DV)
  const StepParams* step;
  int tokens, slots, gk, gv, dk, dv;
  bool conv_bf16, ring_inside;  // ring_inside: the kernel for few tokens stores the new inputs
  __device__ int64_t channels() const { return 2 * gk * dk + gv * dv; }
};

inline Delta make_delta(const DeltaNetArgs& args) {
  Delta a;
  a.qkv = args.qkv.f32(), a.qkv_stride = args.qkv.row_stride, a.ba = args.ba.f32();
  a.conv = args.conv.data, a.conv_bf16 = args.conv.dtype == DType::BF16;
  a.neg_a = args.neg_a.f32(), a.dt_bias = args.dt_bias.f32();
  a.ring = args.conv_ring.f32(), a.state = args.state.f32(), a.o = args.o.f32(), a.step = args.step;
  a.tokens = static_cast<int>(args.qkv.rows()), a.slots = static_cast<int>(args.conv_ring.rows());
  a.gk = args.key_heads, a.gv = args.value_heads;
  a.dk = static_cast<int>(args.state.shape[1]), a.dv = static_cast<int>(args.state.shape[2]);
  for (const void* p : {a.conv, static_cast<const void*>(a.state), static_cast<const void*>(a.o)})
    QN_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "delta_net: conv, state and o must be aligned to 16 bytes, got %p", p);
  a.ring_inside = false;
  return a;
}

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
    load_new(a, channel, first);
    load_before(a, channel, pos, first);
  }
  __device__ __forceinline__ void load_new(const Delta& a, const int64_t (&channel)[Count], int first) {
#pragma unroll
    for (int i = 0; i < Tokens; i++)
#pragma unroll
      for (int c = 0; c < Count; c++) x[c][3 + i] = first + i < a.tokens ? a.qkv[(first + i) * a.qkv_stride + channel[c]] : 0.f;
  }
  __device__ __forceinline__ void load_before(const Delta& a, const int64_t (&channel)[Count], int pos, int first) {
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

// alpha, beta
__device__ __forceinline__ float2 gates(float b, float a, float neg_a, float dt_bias) {
  const float x = a + dt_bias;
  return make_float2(expf(neg_a * (x > 20.f ? x : log1pf(expf(x)))), sigmoid(b));
}

__device__ __forceinline__ float inverse_norm(float squares) { return rsqrtf(squares + 1e-6f); }

// ---- few tokens ---------------------------------------------------------------------------------------------------------

// Brings state and ring to the L2 cache, before wait_for_previous(). That reads no value, and the L2 cache is where all
// multiprocessors meet: a line that an earlier kernel writes later is not stale there. Loading S into registers that early cannot
// be shown to be right. A kernel may start when all blocks of the one before have started, that one when all blocks of the one
// before it had, and so on; a block leaves only after its own wait. So all unfinished kernels are resident at once, and nothing
// but the room for their blocks bounds how many. The last call that wrote S is some 290 kernels back in a large model, but a few
// in a small one, and the very kernel before when a test calls this operation twice.
__device__ __forceinline__ void prefetch(const float* p) {  // the 32 bytes there
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// x[j] of 16 lanes -> lane l: the sum over them of x[l / 2 % 8]. Whatever j, its terms are added in the same order.
__device__ __forceinline__ float sum_of_8_over_16_lanes(float (&x)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & 2 * half;
#pragma unroll
    for (int j = 0; j < half; j++) {
      const float mine = upper ? x[j + half] : x[j], other = upper ? x[j] : x[j + half];
      x[j] = mine + __shfl_xor_sync(0xffffffffu, other, 2 * half);
    }
  }
  return x[0] + __shfl_xor_sync(0xffffffffu, x[0], 1);
}

// 32 columns of a head, by 128 threads. Rows > 0: DK / 16, S in registers, at most Tokens tokens. Rows 0: any DK, S in global memory,
// any number of tokens, Tokens at a time. ready() returns when qkv and ba are there; with Early the state is read before that (its
// writer must have ended long ago: Rows > 0). sync() is a barrier of the 128 threads. shared: few_shared() bytes.
template <int Rows, int Tokens, bool Early, class Ready, class Sync>
__device__ __forceinline__ void delta_few(const Delta& a, int block, int head, float4* shared, Ready ready, Sync sync) {
  const int tid = thread_anew(), lane = tid % 32, warp = tid / 32, low = lane % 16;
  const int dk = Rows ? 16 * Rows : a.dk, per_key = a.gv / a.gk;
  const int column = block * kColumns, key = head / per_key;
  float2* const kq = reinterpret_cast<float2*>(shared);                   // (Tokens, DK) of k, q: convolved, not yet normalised
  float4* const sums = reinterpret_cast<float4*>(kq + Tokens * dk);       // (Tokens, kDeltaWarps) of |k|^2, |q|^2, k.q
  float2* const gate = reinterpret_cast<float2*>(sums + Tokens * kDeltaWarps);  // (Tokens) of alpha, beta
  float* const v = reinterpret_cast<float*>(gate + Tokens);               // (Tokens, kDeltaThreads): each thread has its own

  const int my_column = warp * 8 + lane / 16 * 4 + lane / 2 % 4;  // whose sums end in this lane
  const int64_t q0 = static_cast<int64_t>(key) * dk, k0 = q0 + static_cast<int64_t>(a.gk) * dk;
  const int64_t v0 = 2ll * a.gk * dk + head * a.dv + column;
  float* const o = a.o + head * a.dv + column + my_column;
  float* const s_at = a.state + static_cast<int64_t>(head) * dk * a.dv + column + warp * 8 + lane / 16 * 4;
  auto s_row = [&](int i) { return reinterpret_cast<float4*>(s_at + static_cast<int64_t>(16 * i + low) * a.dv); };

  float4 w[3] = {};
  if constexpr (Rows > 0) {
    static_assert(16 * Rows == kDeltaThreads, "a thread convolves one q and one k");
    w[0] = taps(a, q0 + tid), w[1] = taps(a, k0 + tid), w[2] = taps(a, v0 + my_column);
    if constexpr (!Early) {
#pragma unroll
      for (int i = 0; i < kColumns; i += 8) prefetch(a.state + (static_cast<int64_t>(head) * dk + tid) * a.dv + column + i);
      if (a.slots == 4) {  // warp: slot
        prefetch(a.ring + warp * a.channels() + (lane < 16 ? q0 : k0) + 8 * low);
        if (lane < kColumns / 8) prefetch(a.ring + warp * a.channels() + v0 + 8 * lane);
      }
    }
  }
  const float neg_a = a.neg_a[head], dt_bias = a.dt_bias[head];
  if constexpr (!Early) ready();

  const int pos = a.step->pos;
  float4 s[Rows > 0 ? Rows : 1];
  Inputs<3, Tokens> in;
  if constexpr (Rows > 0) {
#pragma unroll
    for (int i = 0; i < Rows; i++) s[i] = *s_row(i);
    if constexpr (Early) {
      const int64_t channel[3] = {q0 + tid, k0 + tid, v0 + my_column};
      in.load_before(a, channel, pos, 0);
    }
  }
  if constexpr (Early) ready();
  for (int first = 0; first < (Rows > 0 ? 1 : a.tokens); first += Tokens) {
    const int my_token = first + kDeltaThreads - 1 - tid;  // the last threads have a token's gates
    const bool has_gate = my_token < min(first + Tokens, a.tokens);
    const float* const ba = a.ba + static_cast<int64_t>(has_gate ? my_token : first) * 2 * a.gv + head;
    const float b = ba[0], decay = ba[a.gv];
    float kk[Tokens] = {}, qq[Tokens] = {}, dots[Tokens] = {};
    for (int d = tid; d == tid || (Rows == 0 && d < dk); d += kDeltaThreads) {  // every thread has a column of v, some have no q and k
      const bool has_kq = Rows > 0 || d < dk;
      const int dim = has_kq ? d : 0;
      const int64_t channel[3] = {q0 + dim, k0 + dim, v0 + my_column};
      if constexpr (Rows == 0) w[0] = taps(a, channel[0]), w[1] = taps(a, channel[1]), w[2] = taps(a, channel[2]);
      in.load_new(a, channel, first);
      if constexpr (!Early) in.load_before(a, channel, pos, first);
      if (d == tid && has_gate) gate[kDeltaThreads - 1 - tid] = gates(b, decay, neg_a, dt_bias);
      in.choose(a, pos, first);
      const auto& x = in.x;
#pragma unroll
      for (int i = 0; i < Tokens; i++) {
        const float q = convolved(w[0], x[0][i], x[0][i + 1], x[0][i + 2], x[0][i + 3]);
        const float k = convolved(w[1], x[1][i], x[1][i + 1], x[1][i + 2], x[1][i + 3]);
        if (d == tid) v[i * kDeltaThreads + tid] = convolved(w[2], x[2][i], x[2][i + 1], x[2][i + 2], x[2][i + 3]);
        if (has_kq) {
          kq[i * dk + d] = make_float2(k, q);
          kk[i] = fmaf(k, k, kk[i]), qq[i] = fmaf(q, q, qq[i]), dots[i] = fmaf(k, q, dots[i]);
        }
        if (a.ring_inside && first + i < a.tokens) {
          float* const slot = a.ring + ((pos + first + i) & (a.slots - 1)) * a.channels();
          if (column == 0 && head % per_key == 0 && has_kq) slot[channel[0]] = x[0][i + 3], slot[channel[1]] = x[1][i + 3];
          if (d == tid && (lane & 9) == 0) slot[channel[2]] = x[2][i + 3];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tokens; i++) {
      const float4 sum = make_float4(warp_sum(kk[i]), warp_sum(qq[i]), warp_sum(dots[i]), 0.f);
      if (lane == 0) sums[i * kDeltaWarps + warp] = sum;
    }
    sync();

    for (int t = 0; t < min(Tokens, a.tokens - first); t++) {
      float4 sum = sums[t * kDeltaWarps];
#pragma unroll
      for (int i = 1; i < kDeltaWarps; i++) {
        const float4 more = sums[t * kDeltaWarps + i];
        sum.x += more.x, sum.y += more.y, sum.z += more.z;
      }
      const float k_scale = inverse_norm(sum.x), q_scale = inverse_norm(sum.y) * rsqrtf(static_cast<float>(dk));
      const float dot = sum.z * k_scale * q_scale, alpha = gate[t].x, beta = gate[t].y;
      const float2* const kq_t = kq + t * dk + low;
      float pr[8] = {};  // S'k of the four columns, S'q of them
#pragma unroll
      for (int i = 0; i < (Rows > 0 ? Rows : dk / 16); i++) {
        const float2 x = kq_t[16 * i];
        const float4 m = Rows > 0 ? s[Rows > 0 ? i : 0] : *s_row(i);
        pr[0] = fmaf(m.x, x.x, pr[0]), pr[1] = fmaf(m.y, x.x, pr[1]), pr[2] = fmaf(m.z, x.x, pr[2]), pr[3] = fmaf(m.w, x.x, pr[3]);
        pr[4] = fmaf(m.x, x.y, pr[4]), pr[5] = fmaf(m.y, x.y, pr[5]), pr[6] = fmaf(m.z, x.y, pr[6]), pr[7] = fmaf(m.w, x.y, pr[7]);
      }
      // lanes 0-7 of 16: p of my_column, 8-15: r of it
      const float mine = alpha * sum_of_8_over_16_lanes(pr, lane);
      float u = beta * fmaf(-k_scale, mine, v[t * kDeltaThreads + tid]);
      u = __shfl_sync(0xffffffffu, u, lane & ~8);
      if ((lane & 9) == 8) o[static_cast<int64_t>(first + t) * a.gv * a.dv] = fmaf(q_scale, mine, dot * u);
      const float ku = k_scale * u;
      const float u0 = __shfl_sync(0xffffffffu, ku, lane & 16), u1 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 2);
      const float u2 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 4), u3 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 6);
#pragma unroll
      for (int i = 0; i < (Rows > 0 ? Rows : dk / 16); i++) {
        const float k = kq_t[16 * i].x;
        float4& m = Rows > 0 ? s[Rows > 0 ? i : 0] : *s_row(i);
        m = make_float4(fmaf(k, u0, alpha * m.x), fmaf(k, u1, alpha * m.y), fmaf(k, u2, alpha * m.z), fmaf(k, u3, alpha * m.w));
      }
    }
    if constexpr (Rows == 0) sync();  // before the next tokens' q and k
  }
  if constexpr (Rows > 0) {
#pragma unroll
    for (int i = 0; i < Rows; i++) *s_row(i) = s[i];
  }
}

QN_HD constexpr size_t few_shared(int tokens, int dk) {
  return static_cast<size_t>(tokens) * (static_cast<size_t>(dk) * 8 + kDeltaWarps * 16 + 8 + kDeltaThreads * 4);
}

}  // namespace qn::cuda
