// Gated DeltaNet: causal convolution of 4 taps, SiLU, L2 norm of q and k, gates, delta rule. fp32 throughout.
//
// Columns of a head's state S (DK, DV) never meet: with p = S'k and r = S'q of the state before the token, alpha its decay,
//
//   u = beta (v - alpha p)      o = alpha r + (k.q) u      S = alpha S + k u'
//
// so a block takes 32 columns of a head, a warp 8 of them over all DK rows, and S is read once, kept in registers and written once (by calls
// that log their tokens as it is before them, if it has changed since).
//
//   lane l of a warp:   columns 4 (l / 16) ... + 3,  rows 16 i + l % 16 (few tokens)  or  64 i + 4 (l % 16) ... + 3 (many)
//
// (Long calls go in chunks of 64 on tensor cores, gdn_chunk.cu, unless Act::F32 forbids their rounding.)
//
// Few tokens: one kernel, first over what counts of the log, then token by token. Each block convolves the q and k it needs (128
// channels each) again: that is cheaper than a kernel more. Many tokens: one kernel prepares q, k, v and small matrices for groups of
// eight tokens, a second one takes S through the groups: its two passes over S serve eight tokens, and only one sum over lanes does.
//
// The group form. In a group with decays alpha_i let D_ij = alpha_(j+1) ... alpha_i for j <= i and a_i = alpha_0 ... alpha_i. Then
//
//   u_i = beta_i (w_i - sum_(j<i) D_ij (k_i.k_j) u_j),   w_i = v_i - a_i S'k_i        hence u = T diag(beta) w,
//   o_i = a_i S'q_i + sum_(j<=i) D_ij (q_i.k_j) u_j        T = (1 + A)^-1,  A_ij = beta_i (k_i.k_j) D_ij below the diagonal
//   S   = a_7 S + sum_j D_7j k_j u_j'
//
// D is formed of products, not of differences of summed logarithms: those lose digits after a token that forgets nearly all.
// A group's missing tokens have k = q = v = 0, beta = 0, alpha = 1 and change nothing.
//
// A log holds k as the convolution leaves it and u over its length. Rows of it that blocks read and rows that they write are others.
//
// The ring of convolution inputs is read by several blocks, at positions pos-3 .. pos-1. With tokens + 3 slots or more the new
// inputs go elsewhere and the kernel itself stores them, one block per channel; otherwise a kernel behind it does.
#include <algorithm>

#include "cuda/gdn.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kColumns = 8 * kWarps;  // of a block
constexpr int kGroup = 8;             // tokens taken together when there are many
constexpr int kCoefficients = 2 * kGroup * kGroup + kGroup;
constexpr int kSegment = 1024;        // tokens prepared at once: bounds the scratch memory, which then stays in the L2 cache

// ---- few tokens ---------------------------------------------------------------------------------------------------------

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

// Four columns of a row of S over a token
__device__ __forceinline__ void advance(float4& s, float alpha, float k, const float4& u) {
  s = make_float4(fmaf(k, u.x, alpha * s.x), fmaf(k, u.y, alpha * s.y), fmaf(k, u.z, alpha * s.z), fmaf(k, u.w, alpha * s.w));
}
// ... over those of the log, `count` before pos
__device__ __forceinline__ void replay(const Delta& a, float4& s, int pos, int count, int head, int row, int column) {
  for (int p = pos - count; p < pos; p++) {
    const float *at = a.logged(p), *u = at + a.log_u(head);
    advance(s, u[a.dv], at[head / (a.gv / a.gk) * a.dk + row], *reinterpret_cast<const float4*>(u + column));
  }
}
// Grid: DK * DV / 1024 x GV
__global__ void __launch_bounds__(256) delta_replay_k(const Delta a, int pos, int count) {
  let_next_start();
  wait_for_previous();
  const int head = static_cast<int>(blockIdx.y), i = static_cast<int>(blockIdx.x * 256 + threadIdx.x) * 4;
  float4* const at = reinterpret_cast<float4*>(a.state + static_cast<int64_t>(head) * a.dk * a.dv + i);
  float4 s = *at;
  replay(a, s, pos, count, head, i / a.dv, i % a.dv);
  *at = s;
}

// State and ring are brought to the L2 cache before wait_for_previous(). That reads no value, and the L2 cache is where all
// multiprocessors meet: a line that an earlier kernel writes later is not stale there. Loading S into registers that early cannot
// be shown to be right. A kernel may start when all blocks of the one before have started, that one when all blocks of the one
// before it had, and so on; a block leaves only after its own wait. So all unfinished kernels are resident at once, and nothing
// but the room for their blocks bounds how many. The last call that wrote S is some 290 kernels back in a large model, but a few
// in a small one, and the very kernel before when a test calls this operation twice.
//
// Grid: DV / 32 x GV. Rows > 0: DK / 16, S in registers, at most Tokens tokens. Rows 0: any DK, S in global memory, any number of
// tokens, Tokens at a time.
template <int Rows, int Tokens>
__global__ void __launch_bounds__(kThreads, 1) delta_net_few_k(const Delta a) {
  extern __shared__ float4 shared[];
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, low = lane % 16;
  const int dk = Rows ? 16 * Rows : a.dk, per_key = a.gv / a.gk;
  const int head = static_cast<int>(blockIdx.y), column = static_cast<int>(blockIdx.x) * kColumns, key = head / per_key;
  float2* const kq = reinterpret_cast<float2*>(shared);                   // (Tokens, DK) of k, q: convolved, not yet normalised
  float4* const sums = reinterpret_cast<float4*>(kq + Tokens * dk);       // (Tokens, kWarps) of |k|^2, |q|^2, k.q
  float2* const gate = reinterpret_cast<float2*>(sums + Tokens * kWarps);  // (Tokens) of alpha, beta
  float* const v = reinterpret_cast<float*>(gate + (Tokens + 1) / 2 * 2);  // (Tokens, kThreads): each thread has its own
  float* const old_k = v + Tokens * kThreads;                             // (kDeltaLogTokens, DK) of the log, if Rows > 0
  float* const old_u = old_k + kDeltaLogTokens * dk;                      // (kDeltaLogTokens, kColumns + 4): u, alpha, three unused

  const int my_columns = warp * 8 + lane / 16 * 4, my_column = my_columns + lane / 2 % 4;  // the first of four; whose sums end in this lane
  const int64_t q0 = static_cast<int64_t>(key) * dk, k0 = q0 + static_cast<int64_t>(a.gk) * dk;
  const int64_t v0 = 2ll * a.gk * dk + head * a.dv + column;
  float* const o = a.o + head * a.dv + column + my_column;
  const int64_t my_s = static_cast<int64_t>(head) * dk * a.dv + column + my_columns;
  auto row_of = [&](float* s, int i) { return reinterpret_cast<float4*>(s + my_s + static_cast<int64_t>(16 * i + low) * a.dv); };
  const bool logs = Tokens > 1 && a.log && a.tokens > 1;
  float* const work = Rows == 0 && logs ? a.work : a.state;
  auto s_row = [&](int i) { return row_of(work, i); };
  const int log_u = a.log_u(head);

  const bool gates_o = Rows > 0 && a.gated.o;  // then DV is kDim
  const float* const z_at = gates_o ? a.z + head * a.dv + column + my_column : a.qkv;
  const float* const norm_at = gates_o ? a.out_norm + column + my_column : a.neg_a;
  float z[Tokens], norm = 0;
  float4 w[3] = {};
  if constexpr (Rows > 0) {
    static_assert(16 * Rows == kThreads, "a thread convolves one q and one k");
    w[0] = taps(a, q0 + tid), w[1] = taps(a, k0 + tid), w[2] = taps(a, v0 + my_column);
#pragma unroll
    for (int i = 0; i < kColumns; i += 8) prefetch_l2(a.state + (static_cast<int64_t>(head) * dk + tid) * a.dv + column + i);
    if (a.slots == 4) {  // warp: slot
      prefetch_l2(a.ring + warp * a.channels() + (lane < 16 ? q0 : k0) + 8 * low);
      if (lane < kColumns / 8) prefetch_l2(a.ring + warp * a.channels() + v0 + 8 * lane);
    }
  }
  const float neg_a = a.neg_a[head], dt_bias = a.dt_bias[head];
  let_next_start();  // S is on its way; what the next one reads has the time that this one computes
  if (tid < 4) prefetch_l2(tid == 0 ? a.qkv : tid == 1 ? a.ba : tid == 2 ? a.o : reinterpret_cast<const float*>(a.step));
  if (tid == 4) prefetch_l2(norm_at);
  if (Rows > 0 && a.slots > 4) {  // what step says may be what it said in the last pass; then the wrong rows are prefetched
    const int soon = load_past_l1(&a.step->pos), some = a.log ? min(load_past_l1(&a.step->from), kDeltaLogTokens) : 0;
    if (warp < 3 && lane < 9)
      prefetch_l2(a.ring + ((soon - 3 + warp) & (a.slots - 1)) * a.channels() + (lane < 4 ? q0 + 32 * lane : lane < 8 ? k0 + 32 * (lane - 4) : v0));
    for (int j = warp; j < some; j += kWarps)
      if (lane < dk / 32 + 3)  // k, then u, which lies across two lines, and alpha
        prefetch_l2(a.logged(soon - some + j) + (lane < dk / 32 ? q0 + 32 * lane : log_u + (lane % 4 == 0 ? column : lane % 4 == 1 ? column + 31 : a.dv)));
  }
  wait_for_previous();

  const int pos = a.step->pos, said = a.step->from, from = a.log ? said : 0;  // both at once, no branch between
  float4 s[Rows > 0 ? Rows : 1];  // a block's columns are its own: it reads them before it writes any, and no other block touches them
  if constexpr (Rows == 0) {
    for (int i = 0; (from > 0 || logs) && i < dk / 16; i++) {
      float4 m = *row_of(a.state, i);
      replay(a, m, pos, from, head, 16 * i + low, column + my_columns);
      *row_of(a.state, i) = *s_row(i) = m;
    }
  }
  for (int first = 0; first < (Rows > 0 ? 1 : a.tokens); first += Tokens) {
    const int my_token = first + kThreads - 1 - tid;  // the last threads have a token's gates
    const bool has_gate = my_token < min(first + Tokens, a.tokens);
    const float* const ba = a.ba + static_cast<int64_t>(has_gate ? my_token : first) * 2 * a.gv + head;
    const float b = ba[0], decay = ba[a.gv];
    float kk[Tokens] = {}, qq[Tokens] = {}, dots[Tokens] = {};
    for (int d = tid; d == tid || (Rows == 0 && d < dk); d += kThreads) {  // every thread has a column of v, some have no q and k
      const bool has_kq = Rows > 0 || d < dk;
      const int dim = has_kq ? d : 0;
      const int64_t channel[3] = {q0 + dim, k0 + dim, v0 + my_column};
      if constexpr (Rows == 0) w[0] = taps(a, channel[0]), w[1] = taps(a, channel[1]), w[2] = taps(a, channel[2]);
      Inputs<3, Tokens> in;
      in.load(a, channel, pos, first);
      if constexpr (Rows > 0) {  // no branch around these: loads behind it would have to wait
#pragma unroll
        for (int i = 0; i < Tokens; i++) z[i] = z_at[min(i, a.tokens - 1) * a.z_stride];
        norm = *norm_at;
      }
      if constexpr (Rows > 0) {  // loads are served in the order of asking, and these come from DRAM
#pragma unroll
        for (int i = 0; i < Rows; i++) s[i] = *s_row(i);
        for (int j = warp; j < from; j += kWarps) {
          const float* const row = a.logged(pos - from + j);
          copy_async16(old_k + j * dk + 4 * lane, row + q0 + 4 * lane);
          if (lane <= kColumns / 4) copy_async16(old_u + j * (kColumns + 4) + 4 * lane, row + log_u + (lane < kColumns / 4 ? column + 4 * lane : a.dv));
        }
        copy_async_commit();
      }
      if (d == tid && has_gate) gate[kThreads - 1 - tid] = gates(b, decay, neg_a, dt_bias);
      in.choose(a, pos, first);
      const auto& x = in.x;
#pragma unroll
      for (int i = 0; i < Tokens; i++) {
        const float q = convolved(w[0], x[0][i], x[0][i + 1], x[0][i + 2], x[0][i + 3]);
        const float k = convolved(w[1], x[1][i], x[1][i + 1], x[1][i + 2], x[1][i + 3]);
        if (d == tid) v[i * kThreads + tid] = convolved(w[2], x[2][i], x[2][i + 1], x[2][i + 2], x[2][i + 3]);
        if (has_kq) {
          kq[i * dk + d] = make_float2(k, q);
          kk[i] = fmaf(k, k, kk[i]), qq[i] = fmaf(q, q, qq[i]), dots[i] = fmaf(k, q, dots[i]);
        }
        if (a.ring_inside && first + i < a.tokens) {
          float* const slot = a.ring + ((pos + first + i) & (a.slots - 1)) * a.channels();
          if (column == 0 && head % per_key == 0 && has_kq) {
            slot[channel[0]] = x[0][i + 3], slot[channel[1]] = x[1][i + 3];
            if (logs) a.logged(pos + first + i)[channel[0]] = k;
          }
          if (d == tid && (lane & 9) == 0) slot[channel[2]] = x[2][i + 3];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tokens; i++) {
      const float4 sum = make_float4(warp_sum(kk[i]), warp_sum(qq[i]), warp_sum(dots[i]), 0.f);
      if (lane == 0) sums[i * kWarps + warp] = sum;
    }
    if constexpr (Rows > 0) copy_async_wait<0>();
    __syncthreads();
    if constexpr (Rows > 0) {
#pragma unroll 1
      for (int j = 0; j < from; j++) {
        const float4 u = *reinterpret_cast<const float4*>(old_u + j * (kColumns + 4) + my_columns);
        const float alpha = old_u[j * (kColumns + 4) + kColumns];
#pragma unroll
        for (int i = 0; i < Rows; i++) advance(s[i], alpha, old_k[j * dk + 16 * i + low], u);
      }
      if (logs && from > 0)
#pragma unroll
        for (int i = 0; i < Rows; i++) __stwb(s_row(i), s[i]);
    }

    for (int t = 0; t < min(Tokens, a.tokens - first); t++) {
      float4 sum = sums[t * kWarps];
#pragma unroll
      for (int i = 1; i < kWarps; i++) {
        const float4 more = sums[t * kWarps + i];
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
      float u = beta * fmaf(-k_scale, mine, v[t * kThreads + tid]);
      u = __shfl_sync(0xffffffffu, u, lane & ~8);
      const float out = fmaf(q_scale, mine, dot * u);  // in lanes with (lane & 9) == 8
      if ((lane & 9) == 8) o[static_cast<int64_t>(first + t) * a.gv * a.dv] = out;
      if (gates_o) {
        if ((lane & 9) == 8) a.gated.o[static_cast<int64_t>(t) * a.gv * a.dv + head * a.dv + column + my_column] = out * (norm * silu(z[0]));
#pragma unroll
        for (int i = 1; i < Tokens; i++) z[i - 1] = z[i];
        float square = __fmul_rn(out, out);  // not to be contracted: the same bits in every instance
        square += __shfl_xor_sync(0xffffffffu, square, 2);  // over the lanes with the same (lane & 9)
        square += __shfl_xor_sync(0xffffffffu, square, 4);
        square += __shfl_xor_sync(0xffffffffu, square, 16);
        if (lane == 8) a.gated.squares[(static_cast<int64_t>(t) * a.gv + head) * Gated::kParts + blockIdx.x * kWarps + warp] = square;
      }
      const float ku = k_scale * u;
      if (logs) {
        float* const row = a.logged(pos + first + t) + log_u;
        if ((lane & 9) == 0) row[column + my_column] = ku;
        if (column == 0 && tid == 1) row[a.dv] = alpha;
        if (first + t + 1 == a.tokens) break;
      }
      const float u0 = __shfl_sync(0xffffffffu, ku, lane & 16), u1 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 2);
      const float u2 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 4), u3 = __shfl_sync(0xffffffffu, ku, (lane & 16) + 6);
#pragma unroll
      for (int i = 0; i < (Rows > 0 ? Rows : dk / 16); i++) {
        advance(Rows > 0 ? s[Rows > 0 ? i : 0] : *s_row(i), alpha, kq_t[16 * i].x, make_float4(u0, u1, u2, u3));
      }
    }
    if constexpr (Rows == 0) __syncthreads();  // before the next tokens' q and k
  }
  if (Rows > 0 && !logs) {
#pragma unroll
    for (int i = 0; i < Rows; i++) __stwb(s_row(i), s[i]);  // as an assignment the compiler may cut it into four (4 us a layer)
  }
}

size_t few_shared(int tokens, int dk, bool log) {
  return static_cast<size_t>(tokens) * (static_cast<size_t>(dk) * 8 + kWarps * 16 + 8 + kThreads * 4) + 8 +
         (log ? kDeltaLogTokens * (static_cast<size_t>(dk) + kColumns + 4) * 4 : 0);
}

// ---- many tokens --------------------------------------------------------------------------------------------------------

// What the first kernel leaves for the second, for the tokens of a segment in whole groups.
struct Prepared {
  float* qk;  // (groups, GK, 2, kGroup, kDim): q, k; normalised, q scaled
  float* v;   // (groups * kGroup, GV*DV)
  float* c;   // (groups, GV, kCoefficients): D_7i T_ij beta_j | (N T)_ij beta_j with N_ij = D_ij (q_i.k_j) | a_i
};

Prepared take_prepared(Scratch& s, int64_t tokens, int64_t gk, int64_t gv, int64_t dv) {
  const int64_t groups = (min(tokens, static_cast<int64_t>(kSegment)) + kGroup - 1) / kGroup;
  Prepared p;
  p.qk = s.take<float>(groups * gk * 2 * kGroup * kDim);
  p.v = s.take<float>(groups * kGroup * gv * dv);
  p.c = s.take<float>(groups * gv * kCoefficients);
  return p;
}

// x[s] of the lanes for token s ^ (lane % 8) -> x[0]: the sum for token lane % 8 over all lanes l with equal l / Lanes.
// The lanes' different orders of tokens spare choosing what to keep and what to send.
template <int Width, int Lanes>
__device__ __forceinline__ void sum_tokens(float (&x)[kGroup][Width]) {
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2)
#pragma unroll
    for (int s = 0; s < half; s++)
#pragma unroll
      for (int c = 0; c < Width; c++) x[s][c] += __shfl_xor_sync(0xffffffffu, x[s + half][c], half);
#pragma unroll
  for (int step = kGroup; step < Lanes; step *= 2)
#pragma unroll
    for (int c = 0; c < Width; c++) x[0][c] += __shfl_xor_sync(0xffffffffu, x[0][c], step);
}


// Coefficients of a group for one value head, by eight lanes; lane j has column j of every matrix.
__device__ __forceinline__ void group_coefficients(float2 gate, const float (&kk)[kGroup][kGroup], const float (&qk)[kGroup][kGroup],
                                                   int j, float* out, bool store) {
  float below[kGroup], with[kGroup], decay = 1.f, a = 1.f, my_a = 1.f;  // columns of A and N; D_ij; a_i
#pragma unroll
  for (int i = 0; i < kGroup; i++) {
    const float alpha = __shfl_sync(0xffffffffu, gate.x, i, kGroup), beta = __shfl_sync(0xffffffffu, gate.y, i, kGroup);
    a *= alpha;
    if (i == j) my_a = a;
    if (i > j) decay *= alpha;
    below[i] = i > j ? beta * kk[i][j] * decay : 0.f;
    with[i] = i >= j ? qk[i][j] * decay : 0.f;
  }
  float t[kGroup];  // column j of T, by forward substitution
#pragma unroll
  for (int i = 0; i < kGroup; i++) {
    t[i] = i == j ? 1.f : 0.f;
#pragma unroll
    for (int l = 0; l < i; l++) t[i] = fmaf(-__shfl_sync(0xffffffffu, below[i], l, kGroup), t[l], t[i]);
  }
#pragma unroll
  for (int i = 0; i < kGroup; i++) {
    float n = 0;
#pragma unroll
    for (int l = 0; l <= i; l++) n = fmaf(__shfl_sync(0xffffffffu, with[i], l, kGroup), t[l], n);
    const float to_end = __shfl_sync(0xffffffffu, decay, i, kGroup);
    if (store) out[i * kGroup + j] = to_end * t[i] * gate.y, out[(kGroup + i) * kGroup + j] = n * gate.y;
  }
  if (store) out[2 * kGroup * kGroup + j] = my_a;
}

// Grid: groups of the segment x GK; 256 threads. Tokens begin ... of the call.
__global__ void __launch_bounds__(256, 3) delta_net_prepare_k(const Delta a, const Prepared p, int begin) {
  __shared__ float4 conv[2][kGroup][kDim / 4];              // q, k
  __shared__ float kk[kGroup][kGroup], qk[kGroup][kGroup];  // k_i.k_j, q_i.k_j
  let_next_start();
  wait_for_previous();
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t group = blockIdx.x, key = blockIdx.y;
  const int first = begin + static_cast<int>(group) * kGroup, n = min(kGroup, a.tokens - first), per_key = a.gv / a.gk;
  const int pos = a.step->pos;
  const int64_t values = static_cast<int64_t>(per_key) * a.dv, v0 = 2ll * a.gk * kDim + key * values;
  for (int64_t i = tid; i < 2 * kDim + values; i += 256) {
    const int kind = static_cast<int>(i) / kDim;  // 0: q, 1: k, from 2: v
    const int64_t channel[1] = {kind < 2 ? (kind * a.gk + key) * kDim + i % kDim : v0 + i - 2 * kDim};
    const float4 w = taps(a, channel[0]);
    Inputs<1, kGroup> in;
    in.load(a, channel, pos, first);
    in.choose(a, pos, first);
    const auto& x = in.x;
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      const float y = t < n ? convolved(w, x[0][t], x[0][t + 1], x[0][t + 2], x[0][t + 3]) : 0.f;
      if (kind < 2) reinterpret_cast<float*>(conv[kind][t])[i % kDim] = y;
      else p.v[(group * kGroup + t) * a.gv * a.dv + key * values + i - 2 * kDim] = y;
    }
  }
  __syncthreads();

  static_assert(256 / 32 == kGroup && kDim == 4 * 32, "a warp has a token, a lane four values");
  float4 q = conv[0][warp][lane], k = conv[1][warp][lane];
  q = scaled(q, inverse_norm(warp_sum(dot4(q, q))) * rsqrtf(static_cast<float>(kDim)));
  k = scaled(k, inverse_norm(warp_sum(dot4(k, k))));
  float4* const out = reinterpret_cast<float4*>(p.qk + ((group * a.gk + key) * 2 * kGroup + warp) * kDim);
  out[lane] = q, out[kGroup * kDim / 4 + lane] = k;
  conv[1][warp][lane] = k;
  __syncthreads();

  float dots[kGroup][2];
#pragma unroll
  for (int s = 0; s < kGroup; s++) {
    const float4 other = conv[1][s ^ (lane % kGroup)][lane];
    dots[s][0] = dot4(k, other), dots[s][1] = dot4(q, other);
  }
  sum_tokens<2, 32>(dots);
  if (lane < kGroup) kk[warp][lane] = dots[0][0], qk[warp][lane] = dots[0][1];
  __syncthreads();

  for (int h = 0; h < per_key; h += 256 / kGroup) {  // every thread of a warp takes part; heads too many compute the last again
    if (h + 4 * warp >= per_key) continue;
    const bool store = h + tid / kGroup < per_key;
    const int64_t head = key * per_key + min(h + tid / kGroup, per_key - 1);
    const int j = tid % kGroup;
    float2 gate = make_float2(1.f, 0.f);
    if (j < n) {
      const float* const ba = a.ba + static_cast<int64_t>(first + j) * 2 * a.gv + head;
      gate = gates(ba[0], ba[a.gv], a.neg_a[head], a.dt_bias[head]);
    }
    group_coefficients(gate, kk, qk, j, p.c + (group * a.gv + head) * kCoefficients, store);
  }
}

struct alignas(16) Stage {  // of a group, in one piece
  float qk[2][kGroup][kDim];
  float v[kGroup][kColumns];
  float c[kCoefficients];
};
constexpr int kStages = 3;

// What a thread of the scan copies of each group: four pieces of q and k, one of v or of the coefficients.
struct Copier {
  const float *qk, *rest;
  int64_t qk_step, rest_step;
  int to;          // of the rest, in a stage
  bool has_rest;

  __device__ Copier(const Delta& a, const Prepared& p, int64_t head, int64_t column, int tid) {
    const int part = tid % (kColumns / 4), t = tid / (kColumns / 4), i = tid - kGroup * kColumns / 4;
    qk = p.qk + head / (a.gv / a.gk) * 2 * kGroup * kDim + 4 * tid, qk_step = static_cast<int64_t>(a.gk) * 2 * kGroup * kDim;
    const int64_t width = static_cast<int64_t>(a.gv) * a.dv;
    if (i < 0) rest = p.v + t * width + head * a.dv + column + 4 * part, rest_step = kGroup * width;
    else rest = p.c + head * kCoefficients + 4 * i, rest_step = static_cast<int64_t>(a.gv) * kCoefficients;
    to = 2 * kGroup * kDim + 4 * tid, has_rest = i < kCoefficients / 4;
  }
  __device__ __forceinline__ void next_group(Stage& stage) {
    float* const at = &stage.qk[0][0][0];
    const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 2 * kGroup * kDim; i += 4 * kThreads) copy_async16(at + i + 4 * tid, qk + i);
    if (has_rest) copy_async16(at + to, rest);
    qk += qk_step, rest += rest_step;
  }
};
static_assert(kGroup * kColumns / 4 + kCoefficients / 4 <= kThreads && kCoefficients % 4 == 0);

__device__ __forceinline__ void add_scaled(float4& y, float f, const float4& x) {
  y.x = fmaf(f, x.x, y.x), y.y = fmaf(f, x.y, y.y), y.z = fmaf(f, x.z, y.z), y.w = fmaf(f, x.w, y.w);
}

// x[s][c]: this lane's part of column c of S'k (or S'q) for token s ^ (lane % 8); k: the values met, kept by who wants them
__device__ __forceinline__ void products(const float (&vectors)[kGroup][kDim], const float (&s)[8][4], int lane, float (&k)[kGroup][8],
                                         float (&x)[kGroup][4]) {
#pragma unroll
  for (int t = 0; t < kGroup; t++) {
    const float* const at = vectors[t ^ (lane % kGroup)] + 4 * (lane % 16);
    const float4 lo = *reinterpret_cast<const float4*>(at), hi = *reinterpret_cast<const float4*>(at + 64);
    k[t][0] = lo.x, k[t][1] = lo.y, k[t][2] = lo.z, k[t][3] = lo.w, k[t][4] = hi.x, k[t][5] = hi.y, k[t][6] = hi.z, k[t][7] = hi.w;
#pragma unroll
    for (int c = 0; c < 4; c++) {
      x[t][c] = s[0][c] * k[t][0];
#pragma unroll
      for (int i = 1; i < 8; i++) x[t][c] = fmaf(s[i][c], k[t][i], x[t][c]);
    }
  }
}

// Grid: DV / 32 x GV. Takes S through the groups of a segment, whose first token is `begin`.
__global__ void __launch_bounds__(kThreads) delta_net_scan_k(const Delta a, const Prepared p, int begin, int groups) {
  __shared__ Stage stages[kStages];
  __shared__ float4 w_of[kWarps][2][kGroup], u_of[kWarps][2][kGroup];  // four columns of w_i and of D_7i u_i; half of the warp, token
  let_next_start();
  wait_for_previous();
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int low = lane % 16, half = lane / 16, mine = lane % kGroup;  // mine: the token of the group whose sums end here
  const int64_t head = blockIdx.y, column = blockIdx.x * kColumns;
  const int columns = warp * 8 + half * 4;  // the first of this lane, in the block
  Copier copier(a, p, head, column, tid);
  copier.next_group(stages[0]);
  copy_async_commit();
  if (groups > 1) copier.next_group(stages[1]);
  copy_async_commit();

  float* const s_at = a.state + head * kDim * a.dv + column + columns;
  auto s_row = [&](int i) { return reinterpret_cast<float4*>(s_at + static_cast<int64_t>(i / 4 * 64 + 4 * low + i % 4) * a.dv); };
  float s[8][4];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float4 m = *s_row(i);
    s[i][0] = m.x, s[i][1] = m.y, s[i][2] = m.z, s[i][3] = m.w;
  }
  for (int g = 0; g < groups; g++) {
    copy_async_wait<1>();
    __syncthreads();  // group g is there for all, and group g - 1 no longer needed by any
    if (g + 2 < groups) copier.next_group(stages[(g + 2) % kStages]);
    copy_async_commit();
    const Stage& st = stages[g % kStages];

    float k[kGroup][8], q[kGroup][8], x[kGroup][4], r[kGroup][4];
    products(st.qk[1], s, lane, k, x);
    sum_tokens<4, 16>(x);
    products(st.qk[0], s, lane, q, r);
    const float a_mine = st.c[2 * kGroup * kGroup + mine];
    float4 w = *reinterpret_cast<const float4*>(&st.v[mine][columns]);
    add_scaled(w, -a_mine, make_float4(x[0][0], x[0][1], x[0][2], x[0][3]));
    if (low < kGroup) w_of[warp][half][mine] = w;
    __syncwarp();
    sum_tokens<4, 16>(r);

    // lanes 0-7 of 16: u of their token, 8-15: o of it
    const float* const row = st.c + (low < kGroup ? 0 : kGroup * kGroup) + mine * kGroup;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int j = 0; j < kGroup; j++) add_scaled(y, row[j], w_of[warp][half][j]);
    const int64_t token = begin + g * kGroup + mine;
    if (low < kGroup) {
      u_of[warp][half][mine] = y;
    } else if (token < a.tokens) {
      add_scaled(y, a_mine, make_float4(r[0][0], r[0][1], r[0][2], r[0][3]));
      *reinterpret_cast<float4*>(a.o + token * a.gv * a.dv + head * a.dv + column + columns) = y;
    }
    __syncwarp();
    const float decay = st.c[2 * kGroup * kGroup + kGroup - 1];
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int c = 0; c < 4; c++) s[i][c] *= decay;
#pragma unroll
    for (int t = 0; t < kGroup; t++) {
      const float4 u = u_of[warp][half][t ^ mine];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        s[i][0] = fmaf(k[t][i], u.x, s[i][0]), s[i][1] = fmaf(k[t][i], u.y, s[i][1]);
        s[i][2] = fmaf(k[t][i], u.z, s[i][2]), s[i][3] = fmaf(k[t][i], u.w, s[i][3]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) *s_row(i) = make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
}

// Grid: channels / 256 x min(T, slots)
__global__ void delta_net_ring_k(const Delta a) {
  let_next_start();
  wait_for_previous();
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int64_t t = max(0, a.tokens - a.slots) + static_cast<int>(blockIdx.y);
  if (c < a.channels()) a.ring[((a.step->pos + t) & (a.slots - 1)) * a.channels() + c] = a.qkv[t * a.qkv_stride + c];
}

}  // namespace

// ---- launchers ----------------------------------------------------------------------------------------------------------

Gated take_gated(const Context& c, int64_t tokens, int64_t value_heads, int64_t key_dim, int64_t value_dim) {
  Gated g;
  static_assert(kDim / kColumns * kWarps == Gated::kParts);
  if (key_dim != kDim || value_dim != kDim) return g;
  Scratch s(c);
  g.o = s.take<float>(tokens * value_heads * kDim), g.squares = s.take<float>(tokens * value_heads * Gated::kParts);
  return g;
}

void delta_net(const Context& c, const DeltaNetArgs& args) {
  Delta a;
  a.qkv = args.qkv.f32(), a.qkv_stride = args.qkv.row_stride, a.ba = args.ba.f32();
  a.conv = args.conv.data, a.conv_bf16 = args.conv.dtype == DType::BF16;
  a.neg_a = args.neg_a.f32(), a.dt_bias = args.dt_bias.f32();
  a.ring = args.conv_ring.f32(), a.state = args.state.f32(), a.log = args.log.f32(), a.o = args.o.f32(), a.step = args.step;
  a.tokens = static_cast<int>(args.qkv.rows()), a.slots = static_cast<int>(args.conv_ring.rows());
  a.log_width = static_cast<int>(args.log.cols());
  a.gk = args.key_heads, a.gv = args.value_heads;
  a.dk = static_cast<int>(args.state.shape[1]), a.dv = static_cast<int>(args.state.shape[2]);
  for (const void* p : {a.conv, static_cast<const void*>(a.state), static_cast<const void*>(a.log), static_cast<const void*>(a.o)})
    QN_CHECK(reinterpret_cast<uintptr_t>(p) % 16 == 0, "delta_net: conv, state, log and o must be aligned to 16 bytes, got %p", p);

  a.z = args.z.f32(), a.z_stride = args.z.row_stride, a.out_norm = args.out_norm.f32();
  if (args.z && a.tokens <= kFewTokens) a.gated = take_gated(c, a.tokens, a.gv, a.dk, a.dv);
  if (!a.gated.o) a.z_stride = 0;

  const auto columns = static_cast<unsigned>(a.dv / kColumns), heads = static_cast<unsigned>(a.gv), keys = static_cast<unsigned>(a.gk);
  const bool fast = a.dk == kDim, many = fast && a.tokens > kFewTokens;
  a.ring_inside = !many && a.slots >= a.tokens + 3;
  const bool in_chunks = many && args.act != Act::F32 && delta_net_chunks(c, a);
  if (many && !in_chunks) {
    Scratch scratch(c);
    const Prepared p = take_prepared(scratch, a.tokens, a.gk, a.gv, a.dv);
    for (int begin = 0; begin < a.tokens; begin += kSegment) {
      const int groups = (min(a.tokens - begin, kSegment) + kGroup - 1) / kGroup;
      launch(c, "delta_net", delta_net_prepare_k, dim3(static_cast<unsigned>(groups), keys), dim3(256), 0, a, p, begin);
      launch(c, "delta_net", delta_net_scan_k, dim3(columns, heads), dim3(kThreads), 0, a, p, begin, groups);
    }
  } else if (!many) {
    const int tokens = !fast || a.tokens > 4 ? kFewTokens : a.tokens > 2 ? 4 : a.tokens;  // of the instance
    const size_t bytes = few_shared(tokens, a.dk, a.log && fast);
    if (!fast && a.log && a.tokens > 1) a.work = Scratch(c).take<float>(static_cast<int64_t>(a.gv) * a.dk * a.dv);
    QN_CHECK(bytes <= c.shared_max, "delta_net: keys of width %d need %zu bytes of shared memory, not %zu", a.dk, bytes, c.shared_max);
    constexpr int kRows = kDim / 16;
    const auto kernel = !fast         ? delta_net_few_k<0, kFewTokens>
                        : tokens == 1 ? delta_net_few_k<kRows, 1>
                        : tokens == 2 ? delta_net_few_k<kRows, 2>
                        : tokens == 4 ? delta_net_few_k<kRows, 4>
                                      : delta_net_few_k<kRows, kFewTokens>;
    launch(c, "delta_net", kernel, dim3(columns, heads), dim3(kThreads), bytes, a);
  }
  if (!a.ring_inside) {
    const dim3 grid(static_cast<unsigned>((args.qkv.cols() + 255) / 256), static_cast<unsigned>(min(a.tokens, a.slots)));
    launch(c, "delta_net", delta_net_ring_k, grid, dim3(256), 0, a);
  }
}

void delta_replay(const Context& c, const DeltaReplayArgs& args) {
  Delta a{};
  a.state = args.state.f32(), a.log = args.log.f32(), a.log_width = static_cast<int>(args.log.cols());
  a.gk = args.key_heads, a.gv = static_cast<int>(args.state.rows());
  a.dk = static_cast<int>(args.state.shape[1]), a.dv = static_cast<int>(args.state.shape[2]);
  const dim3 grid(static_cast<unsigned>(a.dk * a.dv / 1024), static_cast<unsigned>(a.gv));
  launch(c, "delta_replay", delta_replay_k, grid, dim3(256), 0, a, args.pos, args.count);
}

size_t delta_net_scratch(const OpLimits& l) {
  Scratch s;
  if (l.key_dim == kDim && l.tokens > kFewTokens) take_prepared(s, l.tokens, l.key_heads, l.value_heads, l.value_dim);
  Scratch gated;
  gated.take<float>(kFewTokens * l.value_heads * l.value_dim), gated.take<float>(kFewTokens * l.value_heads * Gated::kParts);
  Scratch work;
  work.take<float>(l.value_heads * l.key_dim * l.value_dim);
  return std::max({s.used(), gated.used(), work.used(), delta_net_chunks_scratch(l)});
}

}  // namespace qn::cuda
