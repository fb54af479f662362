// The delta rule of many tokens in chunks of 64 on tensor cores (model-spec 3.6). State, inverse, gates and all sums are fp32; operands
// of products are BF16. The inverse, and what is added to the state (keys and u), are in two parts, hi + lo: with keys that are nearly
// parallel a rounded key would move the state by 4 % of its norm. Nothing else gained from a second part (simulated, and measured by
// tests/test_delta.cpp): the rule corrects in the next tokens what a rounded S or W leaves wrong.
//
// In a chunk let G_i be the sum of log alpha up to token i, D_ij = e^(G_i - G_j) for j <= i.
//
//   A_ij = beta_i (k_i.k_j) D_ij below the diagonal        T = (1 + A)^-1, by forward substitution
//   W = T diag(beta e^G) K    U = T diag(beta) V           P_ij = (q_i.k_j) D_ij for j <= i
//
//   u = U - W S      o = e^G Q S + P u      S = e^G_63 S + K' diag(e^(G_63 - G)) u
//
// The first kernel computes the first two lines, a block for a chunk and key head; the second one takes S through the chunks, a block for
// 32 columns of a value head. Between them everything lies as the lanes of the second one want it: an A operand of 16 rows x 16 is
// 32 lanes x 16 bytes, so its lanes load straight into registers, a chunk ahead, and each value is loaded by one lane of a block.
//
//   per chunk       A operands, row tiles x k steps                per chunk     A operands, row tiles x k steps
//   and key head    q (64 x 128)   4 x 8   16 KB                   and value     w (64 x 128)   4 x 8   16 KB
//                   k' (128 x 64)  8 x 4   32 KB, hi, lo           head          p (64 x 64)    4 x 4    8 KB
//                                                                                u: sums of 16 x 8, 32 lanes x 16 bytes, 32 KB
//                                                                                e^G_i | e^(G_63 - G_i), 512 B
//
// Missing tokens of the last chunk have k = q = v = 0, beta = 0, alpha = 1 and change nothing. 1,024 tokens are prepared at a time: they
// leave 41 MB, most of which the second kernel still finds in the L2 cache.
#include <algorithm>

#include "cuda/gdn.cuh"

namespace qn::cuda {
namespace {

constexpr int kChunk = 64, kSegment = 1024, kThreads = 256, kColumns = 32;
constexpr int kFewest = 128;         // tokens of a call; with fewer the groups of gdn.cu, which round nothing, are about as fast
constexpr int kHeadsAtOnce = 2;      // value heads that a block prepares together
constexpr int kStride = kChunk + 4;  // floats from row to row of T
constexpr float kLeastLog = -100.f;  // log alpha; e^-100 is nothing, and sums of 64 keep their digits

// Everything of a segment; n: chunk of the segment
struct Chunks {
  uint4 *q, *k, *w, *p;
  float4* u;
  float* decay;
  int key_heads, value_heads;
  __device__ uint4* q_at(int64_t n, int key) const { return q + (n * key_heads + key) * (4 * 8 * 32); }
  __device__ uint4* k_at(int64_t n, int key) const { return k + (n * key_heads + key) * (2 * 8 * 4 * 32); }  // hi, lo
  __device__ uint4* w_at(int64_t n, int head) const { return w + (n * value_heads + head) * (4 * 8 * 32); }
  __device__ uint4* p_at(int64_t n, int head) const { return p + (n * value_heads + head) * (4 * 4 * 32); }
  __device__ float4* u_at(int64_t n, int head) const { return u + (n * value_heads + head) * (16 * 4 * 32); }  // (16 n tiles, 4 row tiles, 32)
  __device__ float* decay_at(int64_t n, int head) const { return decay + (n * value_heads + head) * (2 * kChunk); }
};

Chunks take_chunks(Scratch& s, int64_t tokens, int64_t key_heads, int64_t value_heads) {
  const int64_t n = (std::min<int64_t>(tokens, kSegment) + kChunk - 1) / kChunk, keys = n * key_heads, values = n * value_heads;
  Chunks c;
  c.q = s.take<uint4>(keys * (4 * 8 * 32)), c.k = s.take<uint4>(keys * (2 * 8 * 4 * 32));
  c.w = s.take<uint4>(values * (4 * 8 * 32)), c.p = s.take<uint4>(values * (4 * 4 * 32));
  c.u = s.take<float4>(values * (16 * 4 * 32)), c.decay = s.take<float>(values * (2 * kChunk));
  c.key_heads = static_cast<int>(key_heads), c.value_heads = static_cast<int>(value_heads);
  return c;
}

// ---- the first kernel ---------------------------------------------------------------------------------------------------

// Rows of 128 BF16 in shared memory: piece c (16 bytes) of a row at place c ^ (row & 7), so that 8 rows are 8 different banks of 16 bytes
__device__ __forceinline__ int row_at(int row, int c) { return row * (2 * kDim) + ((c ^ (row & 7)) << 4); }

struct PrepareShared {
  uint8_t q[kChunk * 2 * kDim], k[kChunk * 2 * kDim], v[kHeadsAtOnce][kChunk * 2 * kDim];  // v[0]: first what rounding leaves of k
  float t[kHeadsAtOnce][kChunk][kStride];  // A, then T diag(beta)
  float sum[kHeadsAtOnce][kChunk], grown[kHeadsAtOnce][kChunk], beta[kHeadsAtOnce][kChunk];  // G, e^G
};

// Four channels of one input row of the convolution, i counted from the call's first token
__device__ __forceinline__ float4 input(const Delta& a, int64_t channel, int pos, int i) {
  if (i >= a.tokens) return make_float4(0.f, 0.f, 0.f, 0.f);
  if (i >= 0) return *reinterpret_cast<const float4*>(a.qkv + i * a.qkv_stride + channel);
  if (pos + i < 0) return make_float4(0.f, 0.f, 0.f, 0.f);
  return *reinterpret_cast<const float4*>(a.ring + ((pos + i) & (a.slots - 1)) * a.channels() + channel);
}

// put(t, y): y of tokens first + t, t = 0..7, for channels channel .. + 3
template <class F>
__device__ __forceinline__ void convolve(const Delta& a, int64_t channel, int pos, int first, F put) {
  float4 w[4], x[11];
#pragma unroll
  for (int c = 0; c < 4; c++) w[c] = taps(a, channel + c);
#pragma unroll
  for (int t = 0; t < 11; t++) x[t] = input(a, channel, pos, first - 3 + t);
#pragma unroll
  for (int t = 0; t < 8; t++) {
    float4 y = make_float4(convolved(w[0], x[t].x, x[t + 1].x, x[t + 2].x, x[t + 3].x), convolved(w[1], x[t].y, x[t + 1].y, x[t + 2].y, x[t + 3].y),
                           convolved(w[2], x[t].z, x[t + 1].z, x[t + 2].z, x[t + 3].z), convolved(w[3], x[t].w, x[t + 1].w, x[t + 2].w, x[t + 3].w));
    if (first + t >= a.tokens) y = make_float4(0.f, 0.f, 0.f, 0.f);
    put(t, y);
  }
}
__device__ __forceinline__ void store_row(uint8_t* rows, int row, int lane, const float4& y) {
  *reinterpret_cast<uint2*>(rows + row_at(row, lane >> 1) + (lane & 1) * 8) = make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
}

__device__ __forceinline__ float rest_of_bf16(float x) { return x - __bfloat162float(__float2bfloat16_rn(x)); }

// Two sums of 16 x 8 side by side -> an A operand
__device__ __forceinline__ uint4 operand(const float (&left)[4], const float (&right)[4]) {
  return make_uint4(pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]), pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3]));
}

// d (rows 16 tile .. + 15 of T times `rows` (64, 128), columns 64 half .. + 63) with column j of T times `by`[j], or 1
template <bool Scaled>
__device__ __forceinline__ void times_inverse(const float (&t)[kChunk][kStride], const float* by, const uint8_t* rows, int tile, int half, float (&d)[8][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t2 = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < 8; n++) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
#pragma unroll
  for (int s = 0; s < 4; s++) {
    if (s > tile) continue;  // above the diagonal
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = 16 * s + t2 + 8 * (i / 2);
      float2 x = *reinterpret_cast<const float2*>(&t[16 * tile + g + 8 * (i % 2)][column]);
      if constexpr (Scaled) x.x *= by[column], x.y *= by[column + 1];
      split_bf16(x.x, x.y, hi[i], lo[i]);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, rows + row_at(16 * s + (lane & 15), 8 * half + 2 * n + (lane >> 4)));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        mma_16816(d[2 * n + i], hi, b[2 * i], b[2 * i + 1]);
        mma_16816(d[2 * n + i], lo, b[2 * i], b[2 * i + 1]);
      }
    }
  }
}

// Grid: chunks of the segment x GK. Tokens begin ... of the call.
__global__ void __launch_bounds__(kThreads, 2) delta_net_chunk_prepare_k(const Delta a, const Chunks c, int begin) {
  extern __shared__ __align__(128) uint8_t shared[];
  PrepareShared& s = *reinterpret_cast<PrepareShared*>(shared);
  let_next_start();
  wait_for_previous();
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, g = lane / 4, t2 = 2 * (lane % 4);
  const int chunk = static_cast<int>(blockIdx.x), key = static_cast<int>(blockIdx.y), first = begin + chunk * kChunk, per_key = a.gv / a.gk;
  const int pos = a.step->pos;

  convolve(a, key * kDim + 4 * lane, pos, first + 8 * warp, [&](int t, const float4& y) {
    store_row(s.q, 8 * warp + t, lane, scaled(y, inverse_norm(warp_sum(dot4(y, y))) * rsqrtf(static_cast<float>(kDim))));
  });
  convolve(a, (a.gk + key) * kDim + 4 * lane, pos, first + 8 * warp,
           [&](int t, const float4& y) {
             const float4 k = scaled(y, inverse_norm(warp_sum(dot4(y, y))));
             store_row(s.k, 8 * warp + t, lane, k);
             store_row(s.v[0], 8 * warp + t, lane, make_float4(rest_of_bf16(k.x), rest_of_bf16(k.y), rest_of_bf16(k.z), rest_of_bf16(k.w)));
           });
  __syncthreads();

  const int tile = warp % 4;
#pragma unroll
  for (int step = 0; step < 8; step++) {  // rows 16 warp .. of K', hi and lo: four 8 x 8 blocks, transposed
    uint32_t x[4];
    load_matrix_x4_transposed(x, (step < 4 ? s.k : s.v[0]) + row_at(16 * (step % 4) + (lane >> 4) * 8 + (lane & 7), 2 * warp + (lane >> 3 & 1)));
    c.k_at(chunk, key)[((step / 4 * 8 + warp) * 4 + step % 4) * 32 + lane] = make_uint4(x[0], x[1], x[2], x[3]);
  }

#pragma unroll 1
  for (int h0 = 0; h0 < per_key; h0 += kHeadsAtOnce) {
    const int heads = min(kHeadsAtOnce, per_key - h0), head0 = key * per_key + h0;
    __syncthreads();  // the heads before are done with
    for (int h = 0; h < heads; h++)
      convolve(a, 2ll * a.gk * kDim + (head0 + h) * kDim + 4 * lane, pos, first + 8 * warp, [&](int t, const float4& y) { store_row(s.v[h], 8 * warp + t, lane, y); });
    const int mine = tid / kChunk, i = tid % kChunk;  // a value head and a token for each thread
    const bool gated = mine < heads;
    float log = 0, beta = 0;
    if (gated && first + i < a.tokens) {
      const float* ba = a.ba + static_cast<int64_t>(first + i) * 2 * a.gv + head0 + mine;
      log = fmaxf(log_decay(ba[a.gv], a.neg_a[head0 + mine], a.dt_bias[head0 + mine]), kLeastLog), beta = sigmoid(ba[0]);
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, log, d);
      if (lane >= d) log += other;
    }
    if (gated) s.sum[mine][i] = log;
    __syncthreads();
    if (gated && i >= 32) log += s.sum[mine][31];
    __syncthreads();
    if (gated) s.sum[mine][i] = log, s.grown[mine][i] = __expf(log), s.beta[mine][i] = beta;
    __syncthreads();
    if (gated) {
      float* decay = c.decay_at(chunk, head0 + mine);
      decay[i] = s.grown[mine][i], decay[kChunk + i] = __expf(s.sum[mine][kChunk - 1] - log);
    }

    // Warps 0..3: k_i.k_j, warps 4..7: q_i.k_j, 16 rows each, columns up to the diagonal
    float dots[8][4] = {};
#pragma unroll
    for (int step = 0; step < 8; step++) {
      uint32_t x[4];
      load_matrix_x4(x, (warp < 4 ? s.k : s.q) + row_at(16 * tile + (lane & 15), 2 * step + (lane >> 4)));
      if (warp >= 4 && h0 == 0) c.q_at(chunk, key)[(tile * 8 + step) * 32 + lane] = make_uint4(x[0], x[1], x[2], x[3]);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        if (n > tile) continue;
        uint32_t b[4];
        load_matrix_x4(b, s.k + row_at(16 * n + (lane >> 4) * 8 + (lane & 7), 2 * step + (lane >> 3 & 1)));
        mma_16816(dots[2 * n], x, b[0], b[1]);
        mma_16816(dots[2 * n + 1], x, b[2], b[3]);
      }
    }
    for (int h = 0; h < heads; h++) {  // A, and P as the second kernel wants it
      float d[8][4];
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = 16 * tile + g + 8 * (e / 2), column = 8 * n + t2 + e % 2;
          const bool there = warp < 4 ? column < row : column <= row;
          d[n][e] = there ? dots[n][e] * __expf(s.sum[h][row] - s.sum[h][column]) : 0.f;
        }
      if (warp < 4) {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            const int row = 16 * tile + g + 4 * e;
            *reinterpret_cast<float2*>(&s.t[h][row][8 * n + t2]) = make_float2(s.beta[h][row] * d[n][e], s.beta[h][row] * d[n][e + 1]);
          }
      } else {
#pragma unroll
        for (int step = 0; step < 4; step++)
          if (step <= tile) c.p_at(chunk, head0 + h)[(tile * 4 + step) * 32 + lane] = operand(d[2 * step], d[2 * step + 1]);
      }
    }
    __syncthreads();
    float column[kChunk];  // of T
    if (gated) {
#pragma unroll
      for (int r = 0; r < kChunk; r++) {
        float part[4] = {r == i ? 1.f : 0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int l = 0; l < r; l += 4) {  // A is 0 from the diagonal on, but the column is not known there
          const float4 x = *reinterpret_cast<const float4*>(&s.t[mine][r][l]);
          part[0] = fmaf(-x.x, column[l], part[0]);
          if (l + 1 < r) part[1] = fmaf(-x.y, column[l + 1], part[1]);
          if (l + 2 < r) part[2] = fmaf(-x.z, column[l + 2], part[2]);
          if (l + 3 < r) part[3] = fmaf(-x.w, column[l + 3], part[3]);
        }
        column[r] = (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
    __syncthreads();
    if (gated) {
#pragma unroll
      for (int r = 0; r < kChunk; r++) s.t[mine][r][i] = column[r] * s.beta[mine][i];
    }
    __syncthreads();
    for (int h = 0; h < heads; h++) {
      const int half = warp / 4;
      float d[8][4];
      times_inverse<true>(s.t[h], s.grown[h], s.k, tile, half, d);
#pragma unroll
      for (int n = 0; n < 4; n++) c.w_at(chunk, head0 + h)[(tile * 8 + 4 * half + n) * 32 + lane] = operand(d[2 * n], d[2 * n + 1]);
      times_inverse<false>(s.t[h], nullptr, s.v[h], tile, half, d);
#pragma unroll
      for (int n = 0; n < 8; n++) c.u_at(chunk, head0 + h)[((8 * half + n) * 4 + tile) * 32 + lane] = make_float4(d[n][0], d[n][1], d[n][2], d[n][3]);
    }
  }
}

// ---- the second kernel --------------------------------------------------------------------------------------------------

// Rows of 32 BF16 in shared memory: 64 bytes; eight rows at the same c are 8 different banks of 16 bytes
__device__ __forceinline__ int part_at(int row, int c) { return row * (2 * kColumns) + ((c ^ (row >> 1 & 3)) << 4); }

// B operands of the four n tiles for rows 16 step .. + 15
__device__ __forceinline__ void column_operands(const uint8_t* rows, int step, uint32_t (&b)[2][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < 2; n++) load_matrix_x4_transposed(b[n], rows + part_at(16 * step + (lane & 15), 2 * n + (lane >> 4)));
}
__device__ __forceinline__ void multiply(float (&d)[4][4], const uint4& x, const uint32_t (&b)[2][4]) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int n = 0; n < 4; n++) mma_16816(d[n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
}

// What a lane needs of a chunk. Warps 0..3 make u of 16 tokens, warps 4..7 make o of 16 tokens; each updates 16 rows of S.
struct Lane {
  uint4 rows[8], keys[2][4], rest[4];  // w or q; k', hi and lo; sums of U or p
  float by[2], end;                    // of tokens g, g + 8: e^(G_63 - G) or e^G; e^G_63
  __device__ __forceinline__ void load(const Chunks& c, int64_t n, int key, int head, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, tile = warp % 4;
    const uint4* from = (warp < 4 ? c.w_at(n, head) : c.q_at(n, key)) + tile * 8 * 32 + lane;
#pragma unroll
    for (int i = 0; i < 8; i++) rows[i] = from[i * 32];
    from = c.k_at(n, key) + warp * 4 * 32 + lane;
#pragma unroll
    for (int i = 0; i < 8; i++) keys[i / 4][i % 4] = from[(i / 4 * 8 * 4 + i % 4) * 32];
    const uint4* sums = reinterpret_cast<const uint4*>(c.u_at(n, head)) + (column / 8 * 4 + tile) * 32 + lane;
    from = c.p_at(n, head) + tile * 4 * 32 + lane;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (warp < 4) rest[i] = sums[i * 4 * 32];
      else rest[i] = i <= tile ? from[i * 32] : make_uint4(0, 0, 0, 0);
    }
    const float* decay = c.decay_at(n, head);
#pragma unroll
    for (int i = 0; i < 2; i++) by[i] = decay[(warp < 4 ? kChunk : 0) + 16 * tile + lane / 4 + 8 * i];
    end = decay[kChunk - 1];
  }
};

// Grid: DV / 32 x GV. Takes S through the chunks of a segment, whose first token is `begin`.
__global__ void __launch_bounds__(kThreads, 1) delta_net_chunk_scan_k(const Delta a, const Chunks c, int begin, int chunks) {
  __shared__ __align__(128) uint8_t state[kDim * 2 * kColumns];
  __shared__ __align__(128) uint8_t u_now[2][kChunk * 2 * kColumns], u_end[2][kChunk * 2 * kColumns];  // u, diag(e^(G_63 - G)) u: hi, lo
  let_next_start();
  wait_for_previous();
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32, tile = warp % 4, g = lane / 4, t2 = 2 * (lane % 4);
  const int head = static_cast<int>(blockIdx.y), key = head / (a.gv / a.gk), column = static_cast<int>(blockIdx.x) * kColumns;
  Lane now;
  now.load(c, 0, key, head, column);

  float s[4][4];  // rows 16 warp + g, + 8; columns 8 n + 2t, + 1
  float* const s_at = a.state + (static_cast<int64_t>(head) * kDim + 16 * warp + g) * a.dv + column + t2;
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float2 x = *reinterpret_cast<const float2*>(s_at + static_cast<int64_t>(4 * e) * a.dv + 8 * n);
      s[n][e] = x.x, s[n][e + 1] = x.y;
    }
  const auto show_state = [&] {
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int e = 0; e < 4; e += 2)
        *reinterpret_cast<uint32_t*>(state + part_at(16 * warp + g + 4 * e, n) + 2 * t2) = pack_bf16(s[n][e], s[n][e + 1]);
  };
  show_state();
  __syncthreads();

#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    Lane next = now;
    if (chunk + 1 < chunks) next.load(c, chunk + 1, key, head, column);

    float d[4][4] = {};  // W S, or Q S
#pragma unroll
    for (int step = 0; step < 8; step++) {
      uint32_t b[2][4];
      column_operands(state, step, b);
      multiply(d, now.rows[step], b);
    }
    if (warp < 4) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float made[4] = {__uint_as_float(now.rest[n].x), __uint_as_float(now.rest[n].y), __uint_as_float(now.rest[n].z), __uint_as_float(now.rest[n].w)};
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const float u0 = made[e] - d[n][e], u1 = made[e + 1] - d[n][e + 1], by = now.by[e / 2];
          const int at = part_at(16 * tile + g + 4 * e, n) + 2 * t2;
          uint32_t hi, lo;
          split_bf16(u0, u1, hi, lo);
          *reinterpret_cast<uint32_t*>(u_now[0] + at) = hi, *reinterpret_cast<uint32_t*>(u_now[1] + at) = lo;
          split_bf16(u0 * by, u1 * by, hi, lo);
          *reinterpret_cast<uint32_t*>(u_end[0] + at) = hi, *reinterpret_cast<uint32_t*>(u_end[1] + at) = lo;
        }
      }
    }
    __syncthreads();  // u is there for all, and all are done with S as it was

#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= now.end;
#pragma unroll
    for (int step = 0; step < 4; step++) {
      uint32_t b[2][4];
      column_operands(u_end[0], step, b);
      multiply(s, now.keys[0][step], b);
      multiply(s, now.keys[1][step], b);
      column_operands(u_end[1], step, b);
      multiply(s, now.keys[0][step], b);
    }
    show_state();
    if (warp >= 4) {
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) d[n][e] *= now.by[e / 2];
#pragma unroll
      for (int step = 0; step < 4; step++) {
        if (step > tile) continue;
        uint32_t b[2][4];
        column_operands(u_now[0], step, b);
        multiply(d, now.rest[step], b);
        column_operands(u_now[1], step, b);
        multiply(d, now.rest[step], b);
      }
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int64_t token = begin + chunk * kChunk + 16 * tile + g + 4 * e;
        if (token >= a.tokens) continue;
        float* o = a.o + (token * a.gv + head) * a.dv + column + t2;
#pragma unroll
        for (int n = 0; n < 4; n++) *reinterpret_cast<float2*>(o + 8 * n) = make_float2(d[n][e], d[n][e + 1]);
      }
    }
    __syncthreads();  // S is there for all, and all are done with u
    now = next;
  }
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int e = 0; e < 4; e += 2) *reinterpret_cast<float2*>(s_at + static_cast<int64_t>(4 * e) * a.dv + 8 * n) = make_float2(s[n][e], s[n][e + 1]);
}

}  // namespace

bool delta_net_chunks(const Context& ctx, const Delta& a) {
  if (a.tokens < kFewest || a.dk != kDim || a.dv != kDim || reinterpret_cast<uintptr_t>(a.qkv) % 16 || reinterpret_cast<uintptr_t>(a.ring) % 16 || a.qkv_stride % 4 ||
      ctx.shared_max < sizeof(PrepareShared))
    return false;
  Scratch scratch(ctx);
  const Chunks c = take_chunks(scratch, a.tokens, a.gk, a.gv);
  for (int begin = 0; begin < a.tokens; begin += kSegment) {
    const int chunks = (std::min(a.tokens - begin, kSegment) + kChunk - 1) / kChunk;
    launch(ctx, "delta_net", delta_net_chunk_prepare_k, dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(a.gk)), dim3(kThreads), sizeof(PrepareShared), a,
           c, begin);
    launch(ctx, "delta_net", delta_net_chunk_scan_k, dim3(kDim / kColumns, static_cast<unsigned>(a.gv)), dim3(kThreads), 0, a, c, begin, chunks);
  }
  return true;
}

size_t delta_net_chunks_scratch(const OpLimits& l) {
  Scratch s;
  if (l.key_dim == kDim && l.value_dim == kDim && l.tokens >= kFewest) take_chunks(s, l.tokens, l.key_heads, l.value_heads);
  return s.used();
}

}  // namespace qn::cuda
