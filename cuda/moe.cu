// Experts of few tokens (decode and verification): choice and gate_up in one kernel, down, the shared expert and the sum in another.
// Both are over in a few microseconds, so what counts is the time between knowing the ids and having asked for every byte.
//
// Tensor cores do the sums: operand A is a panel of 16 rows of weights, the columns of operand B are tokens (gate_up) or choices
// (down), so that an expert that several tokens chose is read once. A warp has one slab of a panel in shared memory: 8 copies of 16
// bytes per lane, all asked for at once. One token of the usual shape has kernels of its own, in which panels come in one piece.
//
//            slab: 16 rows x      of a panel         real shape: gate_up K = 2048      down K = 512
//   INT4     512 k (8 tiles)      + fp16 scales      4 slabs, a warp each              1
//   INT8     256 k (8 tiles)      + fp16 scales      8                                 2
//   BF16     128 k                                   16                                4
//
//   gate_up  a team of 4 warps takes a panel (8 gate and 8 up rows), slabs part, part + 4, ...; 10 experts x 64 panels are 5 teams
//            on each of 128 multiprocessors. Every block finds the top K itself.
//   down     a block takes a panel of the output: a warp per choice and slab, two more for the shared expert, whose weights are
//            known before the kernel ahead has ended. The results are added in the order choice 0, 1, ..., shared expert.
//
// A column's sums do not depend on what the other columns hold, nor the cut of K on T: rows are bit-equal to those of single calls.
#include <algorithm>

#include "cuda/choice.cuh"
#include "cuda/matvec.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {
namespace {

__device__ __forceinline__ void copy_async4(float* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}

// First i in [begin, end) with ids[i] == e, or -1; the same in every lane of the warp.
__device__ __forceinline__ int find(const int32_t* ids, int begin, int end, int e) {
#pragma unroll 1
  for (int i = begin; i < end; i += 32) {
    const unsigned found = __ballot_sync(kAll, i + lane_id() < end && ids[i + lane_id()] == e);
    if (found) return i + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

// ---- choice of many tokens ---------------------------------------------------------------------------------------------

constexpr int kRouteWarps = 4;

// logits (T, E), ids and weights (T, K): a warp per token
__global__ void __launch_bounds__(32 * kRouteWarps) moe_route_k(const float* logits, int tokens, int experts, int chosen, bool renormalise,
                                                               int32_t* ids, float* weights) {
  extern __shared__ int32_t chosen_ids[];  // (warps, K)
  __shared__ Candidate list[kRouteWarps][32];
  let_next_start();
  wait_for_previous();
  const int t = static_cast<int>(blockIdx.x) * kRouteWarps + warp_id();
  if (t >= tokens) return;
  int32_t* mine = chosen_ids + warp_id() * chosen;
  logits += static_cast<int64_t>(t) * experts;
  top(logits, experts, chosen, mine, list[warp_id()]);
  const int64_t out = static_cast<int64_t>(t) * chosen;
  store_choice(logits, experts, chosen, renormalise, mine, ids + out, weights + out);
}

// ---- slabs ------------------------------------------------------------------------------------------------------------

// A weight matrix of which panels are taken.
struct Matrix {
  const uint8_t* data;
  int32_t k;
  int32_t shift;        // T16: groups of 1 << shift
  int32_t slab_scales;  // T16: bytes of the scales of a slab
  int32_t panel_bytes;  // T16
  int32_t scale_bytes;  // T16: tiles begin there
  int32_t tiles;        // T16: of a panel
  int32_t step, pair;   // BF16: panel p begins at row p * step, its row 8 + g lies `pair` rows behind its row g
};

__device__ __forceinline__ uint4 load_shared(const uint16_t* p) { return *reinterpret_cast<const uint4*>(p); }

// Rounds the four values of each lane, 128 consecutive ones of a row, and stores them as the B fragments of W want them. The
// result is their scale.
template <DType W>
__device__ __forceinline__ float store_rounded(float4 v, bool int8, uint16_t* to) {
  const float scale = int8 ? int8_codes(v) : 1.f;
  const int k = 4 * lane_id();
  if constexpr (W == DType::INT4) {  // k and k + 2 are neighbours there, k + 1 and k + 3 four places on
    uint32_t* p = reinterpret_cast<uint32_t*>(to + (k & ~15) + int4_position(k & 15));
    p[0] = pack_bf16(v.x, v.z);
    p[2] = pack_bf16(v.y, v.w);
  } else {
    *reinterpret_cast<uint2*>(to + k) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
  }
  return scale;
}

// 16 rows x kWidth columns of a matrix, in shared memory of one warp; with copy() each lane copies its fragments itself. What lies beyond K is
// zero, and so must be x there. Plain: groups of 128 and activations without scales, the case that is made to be fast.
template <DType W, bool Plain>
struct Slab {
  static constexpr DType kType = W;
  static constexpr bool kPlain = Plain;
  static constexpr int kBlock = W == DType::INT4 ? 64 : 32;      // k of a block (cuda/unpack.cuh)
  static constexpr int kLoads = 8, kBlocks = W == DType::BF16 ? kLoads / 2 : kLoads;
  static constexpr int kWidth = kBlock * kBlocks;
  static constexpr int kChunks = kWidth / kActGroup;             // activation scales
  static constexpr int kCell = kBlock / 4;
  static constexpr int kPad = W == DType::INT4 ? 8 : 32;         // values behind a row of x: two tokens' 16-byte loads share no bank
  static constexpr int kScales = is_t16(W) ? kWidth / (Plain ? 128 : 32) * kPanelRows * 2 : 0;  // bytes, at most
  static constexpr int kScalesAt = kLoads * kTileBytes;          // behind tiles, or what lanes load of BF16 rows
  static constexpr int kBytes = kScalesAt + kScales;

  // Asks for slab s of panel p
  __device__ __forceinline__ static void copy(const Matrix& m, const uint8_t* data, int p, int s, uint8_t* to) {
    const int lane = lane_id();
    to += lane * 16;
    if constexpr (W == DType::BF16) {
      const int64_t row = static_cast<int64_t>(p) * m.step + lane / 4, bytes = static_cast<int64_t>(m.k) * 2;
      const uint8_t* lo = data + row * bytes + s * (2 * kWidth) + lane % 4 * 16;
      const uint8_t* hi = lo + m.pair * bytes;
#pragma unroll
      for (int i = 0; i < kBlocks; i++) {
        const bool in = s * kWidth + i * kBlock < m.k;
        copy_async16_or_zero(to + 2 * i * kTileBytes, lo + i * kBlock * 2, in);
        copy_async16_or_zero(to + (2 * i + 1) * kTileBytes, hi + i * kBlock * 2, in);
      }
    } else {
      const uint8_t* panel = data + static_cast<int64_t>(p) * m.panel_bytes;
      const uint8_t* tiles = panel + m.scale_bytes + s * (kBlocks * kTileBytes) + lane * 16;
      const int end = m.tiles - s * kBlocks;
#pragma unroll
      for (int i = 0; i < kBlocks; i++) copy_async16_or_zero(to + i * kTileBytes, tiles + i * kTileBytes, i < end);
      const int bytes = Plain ? kScales : m.slab_scales, at = s * bytes + lane * 16;
      if (lane * 16 < bytes) copy_async16_or_zero(to + kLoads * kTileBytes, panel + at, at < m.scale_bytes);
    }
    copy_async_commit();
  }
  // What has been asked for is there, for the whole warp
  __device__ __forceinline__ static void wait() {
    copy_async_wait<0>();
    __syncwarp();
  }

  // total += the slab times x, as operand D lies: rows g, g + 8, columns 2t, 2t + 1. row_scales: those of its groups, (groups, 16) fp16;
  // x: the values of column g in shared memory, from cell t on; s0, s1: the activation scales of columns 2t and 2t + 1.
  __device__ __forceinline__ static void multiply(const uint8_t* slab, const uint8_t* row_scales, const uint16_t* x, const float* s0, const float* s1,
                                                  int shift,
                                                  float (&total)[4]) {
    const uint4* tiles = reinterpret_cast<const uint4*>(slab) + lane_id();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(row_scales) + lane_id() / 4;
    auto scale = [&](int q) { return float2{half_bits_to_float(scales[kPanelRows * q]), half_bits_to_float(scales[kPanelRows * q + 8])}; };
    float sum[2][4] = {};  // two chains, so that an instruction need not wait for the one before
#pragma unroll 4
    for (int i = 0; i < kBlocks; i++) {
      const uint4 b = load_shared(x + i * kBlock);
      uint32_t a[4];
      if constexpr (W == DType::BF16) {
        const uint4 lo = tiles[2 * i * 32], hi = tiles[(2 * i + 1) * 32];
        bf16_fragment<0>(lo, hi, a), mma_16816(sum[0], a, b.x, b.y);
        bf16_fragment<1>(lo, hi, a), mma_16816(sum[1], a, b.z, b.w);
        if (i == kBlocks - 1) add(float2{1, 1}, s0[0], s1[0], sum, total);
      } else if constexpr (W == DType::INT8) {
        const uint4 v = tiles[i * 32];
        int8_fragment<0>(v, a), mma_16816(sum[0], a, b.x, b.y);
        int8_fragment<1>(v, a), mma_16816(sum[1], a, b.z, b.w);
        if (((i + 1) * kBlock & ((1 << shift) - 1)) == 0) add(scale(i * kBlock >> shift), s0[i / 4], s1[i / 4], sum, total);
      } else {
        const uint4 v = tiles[i * 32], c = load_shared(x + i * kBlock + 8);
        if constexpr (Plain) {
          multiply_tile(v, b, c, sum);
          if (i % 2 == 1) add(scale(i / 2), 1.f, 1.f, sum, total);
        } else if (shift == 5) {  // cells 0 and 1 belong to the first group of the tile, 2 and 3 to the second
          const bool second = lane_id() % 4 >= 2;
          multiply_tile(v, second ? uint4{} : b, second ? uint4{} : c, sum);
          add(scale(2 * i), s0[i / 2], s1[i / 2], sum, total);
          multiply_tile(v, second ? b : uint4{}, second ? c : uint4{}, sum);
          add(scale(2 * i + 1), s0[i / 2], s1[i / 2], sum, total);
        } else {
          multiply_tile(v, b, c, sum);
          if (((i + 1) * kBlock & ((1 << shift) - 1)) == 0) add(scale(i * kBlock >> shift), s0[i / 2], s1[i / 2], sum, total);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static void multiply_tile(const uint4& v, const uint4& b, const uint4& c, float (&sum)[2][4]) {
    uint32_t a[4];
    int4_fragment<0>(v, a), mma_16816(sum[0], a, b.x, b.y);
    int4_fragment<1>(v, a), mma_16816(sum[1], a, b.z, b.w);
    int4_fragment<2>(v, a), mma_16816(sum[0], a, c.x, c.y);
    int4_fragment<3>(v, a), mma_16816(sum[1], a, c.z, c.w);
  }
  // The end of a group: rows times their scale, columns times theirs. All kernels round alike.
  __device__ __forceinline__ static void add(float2 row, float s0, float s1, float (&sum)[2][4], float (&total)[4]) {
    total[0] = fmaf(row.x * s0, sum[0][0] + sum[1][0], total[0]);
    total[1] = fmaf(row.x * s1, sum[0][1] + sum[1][1], total[1]);
    total[2] = fmaf(row.y * s0, sum[0][2] + sum[1][2], total[2]);
    total[3] = fmaf(row.y * s1, sum[0][3] + sum[1][3], total[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[0][i] = sum[1][i] = 0;
  }
};

// ---- gate and up ------------------------------------------------------------------------------------------------------

constexpr int kQuickWarps = kQuickExperts / 32;
constexpr int kTeam = 4;      // warps that share a panel
constexpr int kMaxTeams = 8;  // in a block
// For several tokens fewer warps are faster: they leave registers for blocks of the next kernel to begin early (of 5 to 8 teams and
// 8 to 16 warps of down, measured on H100 at the 80B model's shapes: a pass of 2 to 4 tokens 1.5 to 2.5 % faster, of 8 tokens 1.5 %).
constexpr int kSeveralTeams = 5;

// Shared memory of a block; offsets in bytes
struct GateUpLayout {
  int chunks, pitch;               // of a row of x: groups of 128, values
  int slabs, part, x, list, scales, ids, distinct, used;
  int64_t bytes;
};
template <class S>
GateUpLayout gate_up_layout(int tokens, int k, int experts, int chosen, int teams) {
  GateUpLayout l{};
  const int width = static_cast<int>(round_up(k, S::kWidth));
  l.chunks = width / kActGroup, l.pitch = width + S::kPad;
  l.slabs = 0;                                                    // (teams, kTeam) Slab
  // (teams, 2, kTeam, 32) float4: results of the warps, two rounds; of one token (teams, 2, kTeam, 8) float2
  l.part = teams * kTeam * S::kBytes;
  l.x = l.part + teams * 2 * kTeam * 32 * 16;                     // (T, pitch) bf16 or codes
  l.list = l.x + tokens * l.pitch * 2;                            // (T, 32) Candidate
  l.scales = l.list + tokens * 32 * static_cast<int>(sizeof(Candidate));  // (T, chunks)
  l.ids = l.scales + tokens * l.chunks * 4;                       // (T, K)
  l.distinct = l.ids + tokens * chosen * 4;                       // (T * K) experts to compute
  l.used = l.distinct + tokens * chosen * 4;                      // (E) bits
  l.bytes = l.used + (experts + 31) / 32 * 4;
  return l;
}

struct GateUp {
  const float *x, *logits;         // (T, D), (T, E)
  Matrix w;                        // gate_up (2F, D) of expert 0
  int64_t stride;                  // bytes from expert to expert
  const uint8_t* const* where;     // (E) or null: where the experts are instead; null there: computed elsewhere
  int tokens, experts, chosen, f;
  bool renormalise, int8;
  int32_t* ids;                    // (T, K)
  float *weights, *inner;          // (T, K), (T*K, F)
  int panels, slabs;               // of an expert, of a panel
  GateUpLayout at;
};

// Rounds x (T, K) into shared memory: warps first, first + 1, ... of the block
template <class S>
__device__ __forceinline__ void round_tokens(const GateUp& a, uint8_t* shared, int first) {
  constexpr int kBatch = 4;  // loads of a lane at once
  const int chunks = a.tokens * a.at.chunks, step = static_cast<int>(blockDim.x) / 32 - first;
  for (int begin = warp_id() - first; begin < chunks; begin += kBatch * step) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int c = begin + i * step, t = c / a.at.chunks, k = c % a.at.chunks * kActGroup + 4 * lane_id();
      v[i] = c < chunks && k < a.w.k ? load4(a.x + static_cast<int64_t>(t) * a.w.k + k) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int c = begin + i * step, t = c / a.at.chunks;
      if (c >= chunks) break;
      uint16_t* to = reinterpret_cast<uint16_t*>(shared + a.at.x) + t * a.at.pitch + c % a.at.chunks * kActGroup;
      const float scale = store_rounded<S::kType>(v[i], !S::kPlain && a.int8, to);
      if (!S::kPlain && lane_id() == 0) reinterpret_cast<float*>(shared + a.at.scales)[c] = scale;
    }
  }
}

// The experts whose bit is set, ascending; returns how many. By all threads; the list may be read after the next barrier.
__device__ __forceinline__ int list_experts(const uint32_t* used, int experts, int32_t* list) {
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += static_cast<int>(blockDim.x)) {
    if (!(used[e / 32] >> (e % 32) & 1)) continue;
    int at = __popc(used[e / 32] & ((1u << (e % 32)) - 1));
#pragma unroll 4
    for (int i = 0; i < e / 32; i++) at += __popc(used[i]);
    list[at] = e;
  }
  int n = 0;
#pragma unroll 4
  for (int i = 0; i < (experts + 31) / 32; i++) n += __popc(used[i]);
  return n;
}

// Adds up the four parts of a panel and stores silu(gate) * up for the tokens that chose the expert; by one warp.
__device__ __forceinline__ void finish_panel(const GateUp& a, const float4* part, const int32_t* ids, int e, int panel) {
  const int lane = lane_id();
  float4 s = part[lane];
#pragma unroll
  for (int i = 1; i < kTeam; i++) {
    const float4 p = part[i * 32 + lane];
    s.x += p.x, s.y += p.y, s.z += p.z, s.w += p.w;
  }
  const float even = silu(s.x) * s.z, odd = silu(s.y) * s.w;  // rows g: gate, g + 8: up
#pragma unroll 1
  for (int t = 0; t < a.tokens; t++) {
    const int j = find(ids + t * a.chosen, 0, a.chosen, e);
    if (j >= 0 && lane % 4 == t / 2) a.inner[static_cast<int64_t>(t * a.chosen + j) * a.f + panel * 8 + lane / 4] = t % 2 ? odd : even;
  }
}

template <DType W, bool Plain>
__global__ void __launch_bounds__(kMaxTeams * kTeam * 32, 1) moe_gate_up_few_k(const GateUp a) {
  using S = Slab<W, Plain>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int lane = lane_id(), warp = warp_id(), warps = static_cast<int>(blockDim.x) / 32, team = warp / kTeam, part = warp % kTeam;
  int32_t* ids = reinterpret_cast<int32_t*>(shared + a.at.ids);
  uint32_t* used = reinterpret_cast<uint32_t*>(shared + a.at.used);
  const int stride = static_cast<int>(gridDim.x) * (warps / kTeam);
  int unit = static_cast<int>(blockIdx.x) * (warps / kTeam) + team;  // (expert, panel)
  const bool lists = a.tokens > 1 || a.where;  // each expert once, and only those that are here
  if (lists) {
    for (int i = static_cast<int>(threadIdx.x); i < (a.experts + 31) / 32; i += static_cast<int>(blockDim.x)) used[i] = 0;
    __syncthreads();
  }
  wait_for_previous();

#pragma unroll 1
  for (int t = warp; t < a.tokens; t += warps) {
    top(a.logits + static_cast<int64_t>(t) * a.experts, a.experts, a.chosen, ids + t * a.chosen, reinterpret_cast<Candidate*>(shared + a.at.list) + t * 32);
    if (lists)
      for (int j = lane; j < a.chosen; j += 32)
        if (const int e = ids[t * a.chosen + j]; !a.where || a.where[e]) atomicOr(&used[e / 32], 1u << (e % 32));
  }
  const int rounding = warps > a.tokens ? a.tokens : 0;  // the first warp that has time for x
  if (warp >= rounding) round_tokens<S>(a, shared, rounding);
  __syncthreads();
  const int32_t* todo = ids;
  int units = a.chosen * a.panels;
  if (lists) {
    todo = reinterpret_cast<int32_t*>(shared + a.at.distinct);
    units = list_experts(used, a.experts, reinterpret_cast<int32_t*>(shared + a.at.distinct)) * a.panels;
    __syncthreads();
  }

  uint8_t* slab = shared + a.at.slabs + warp * S::kBytes;
  auto copy = [&](int u, int s) {
    const int e = todo[u / a.panels];
    S::copy(a.w, a.where ? a.where[e] : a.w.data + e * a.stride, u % a.panels, s, slab);
  };
  if (unit < units && part < a.slabs) copy(unit, part);
  let_next_start();  // whose weights would come in the way of ours
  if (blockIdx.x == 0)
#pragma unroll 1
    for (int t = warp; t < a.tokens; t += warps)
      store_choice(a.logits + static_cast<int64_t>(t) * a.experts, a.experts, a.chosen, a.renormalise, ids + t * a.chosen, a.ids + t * a.chosen,
                   a.weights + t * a.chosen);

  const int column = lane / 4 < a.tokens ? lane / 4 : 0;  // columns without a token repeat the first and are not stored
  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + a.at.x) + column * a.at.pitch + lane % 4 * S::kCell;
  const float* s0 = reinterpret_cast<const float*>(shared + a.at.scales) + min(lane % 4 * 2, a.tokens - 1) * a.at.chunks;
  const float* s1 = reinterpret_cast<const float*>(shared + a.at.scales) + min(lane % 4 * 2 + 1, a.tokens - 1) * a.at.chunks;
  float4* results = reinterpret_cast<float4*>(shared + a.at.part) + team * 2 * kTeam * 32;
#pragma unroll 1
  for (int round = 0; unit < units; unit += stride, round ^= 1) {
    float total[4] = {};
#pragma unroll 1
    for (int s = part; s < a.slabs; s += kTeam) {
      S::wait();
      S::multiply(slab, slab + S::kScalesAt, x + s * S::kWidth, s0 + s * S::kChunks, s1 + s * S::kChunks, a.w.shift, total);
      __syncwarp();  // the slab has been read by all lanes
      const bool more = s + kTeam < a.slabs;
      const int next = more ? unit : unit + stride;
      if (next < units) copy(next, more ? s + kTeam : part);  // on its way while the team adds up
    }
    float4* mine = results + round * kTeam * 32;
    mine[part * 32 + lane] = make_float4(total[0], total[1], total[2], total[3]);
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam * 32) : "memory");  // the team's; two rounds of results need but one
    if (part == 0) finish_panel(a, mine, ids, todo[unit / a.panels], unit % a.panels);
  }
}

// One token of the usual shape: K up to 2048 in whole slabs, up to 512 experts, at least 16 warps and no more choices than that. A thread
// has a logit, and all warps choose together (fast when more warps than choices have experts): at least `chosen` of their maxima are not
// below the chosen-th largest of these, so the answer is among the logits from there on. A team's panel comes in one piece. Small code, as
// of matvec_k.
__global__ void __launch_bounds__(kMaxTeams * kTeam * 32, 1) moe_gate_up_one_k(const GateUp a) {
  using S = Slab<DType::INT4, true>;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ __align__(16) uint32_t maxima[kQuickWarps];
  __shared__ int candidates;
  __shared__ Barrier full[kMaxTeams];
  Candidate* list = reinterpret_cast<Candidate*>(shared + a.at.list);
  int32_t* ids = reinterpret_cast<int32_t*>(shared + a.at.ids);
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id(), teams = static_cast<int>(blockDim.x) / (kTeam * 32);
  const int team = warp / kTeam, part = warp % kTeam;
  const bool leads = part == team % kTeam;  // asks for the team's panels; that of the next team runs on another scheduler
  if (tid == 0) candidates = 0;
  if (tid < teams) init_barrier(full + tid, kFillArrivals), publish_barriers();
  if (tid < 3) prefetch_l2(tid == 0 ? a.logits : tid == 1 ? a.x : a.inner);
  wait_for_previous();
  const float logit = tid < a.experts ? a.logits[tid] : 0.f;
#pragma unroll 1
  for (int c = warp; c < a.at.chunks; c += teams * kTeam) {
    const float4 v = load4(a.x + c * kActGroup + 4 * lane);
    store_rounded<S::kType>(v, false, reinterpret_cast<uint16_t*>(shared + a.at.x) + c * kActGroup);
  }
  const uint32_t key = tid < a.experts ? rank_key(logit) : 0, most = __reduce_max_sync(kAll, key);
  if (lane == 0 && warp < kQuickWarps) maxima[warp] = most;
  __syncthreads();
  const uint32_t mine = maxima[lane % kQuickWarps];
  int above = 0;
#pragma unroll
  for (int i = 0; i < kQuickWarps; i += 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(maxima + i);
    above += (v.x > mine) + (v.y > mine) + (v.z > mine) + (v.w > mine);
  }
  const uint32_t least = __reduce_min_sync(kAll, above < a.chosen ? mine : ~0u);
  if (key >= least && tid < a.experts) {
    const int at = atomicAdd(&candidates, 1);
    if (at < 32) list[at] = {key, tid};
  }
  __syncthreads();
  const int n = candidates;
  int expert = 0, place = a.chosen;  // of the lane's candidate, in warps that lead
  if (n > 32) {                      // many equal ones
    if (warp == 0) any_top(a.logits, a.experts, a.chosen, ids);
    __syncthreads();
    if (lane < a.chosen) expert = ids[lane], place = lane;
  } else if (leads) {
    const Candidate c = list[lane];
    int before = 0;
#pragma unroll 4
    for (int i = 0; i < n; i++) before += list[i].key > c.key || (list[i].key == c.key && list[i].expert < c.expert);
    if (lane < n) expert = c.expert, place = before;
  }

  const int units = a.chosen * a.panels, stride = static_cast<int>(gridDim.x) * teams;
  uint8_t* panel = shared + a.at.slabs + team * kTeam * S::kBytes;
  auto copy = [&](int unit) {  // by the warp that leads
    const int j = unit / a.panels, e = __shfl_sync(kAll, expert, __ffs(static_cast<int>(__ballot_sync(kAll, place == j))) - 1);
    const uint8_t* from = a.w.data + e * a.stride + static_cast<int64_t>(unit - j * a.panels) * a.w.panel_bytes;
    fill(full + team, 1, [&](int) { return Piece{panel, from, static_cast<uint32_t>(a.w.panel_bytes)}; });
  };
  int unit = static_cast<int>(blockIdx.x) * teams + team;  // (choice, panel)
  if (leads && unit < units) copy(unit);
  let_next_start();  // whose weights would have come in the way of ours
  if (blockIdx.x == 0 && warp == 0) {
    if (n <= 32 && place < a.chosen) ids[place] = expert;
    __syncwarp();
    store_choice(a.logits, a.experts, a.chosen, a.renormalise, ids, a.ids, a.weights);
  }
  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + a.at.x) + lane % 4 * S::kCell + part * S::kWidth;
  float2* results = reinterpret_cast<float2*>(shared + a.at.part) + team * 2 * kTeam * 8;
#pragma unroll 1
  for (int round = 0; unit < units; unit += stride, round ^= 1) {
    float total[4] = {};
    wait_barrier(full + team, round);
    if (part < a.slabs)
      S::multiply(panel + a.w.scale_bytes + part * S::kScalesAt, panel + part * S::kScales, x, nullptr, nullptr, a.w.shift, total);
    float2* sums = results + round * kTeam * 8;  // (parts, rows)
    if (lane % 4 == 0) sums[part * 8 + lane / 4] = make_float2(total[0], total[2]);
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam * 32) : "memory");  // the team's; two rounds of results need but one
    if (leads && unit + stride < units) copy(unit + stride);
    if (part == (team + 1) % kTeam && lane < 8) {
      float2 sum = sums[lane];
#pragma unroll
      for (int i = 1; i < kTeam; i++) sum.x += sums[i * 8 + lane].x, sum.y += sums[i * 8 + lane].y;
      a.inner[static_cast<int64_t>(unit / a.panels) * a.f + unit % a.panels * 8 + lane] = silu(sum.x) * sum.y;
    }
  }
}

// ---- down -------------------------------------------------------------------------------------------------------------

constexpr int kMaxChoiceWarps = 16, kSeveralChoiceWarps = 12, kMaxSharedWarps = 2, kMaxColumns = 4;
constexpr int kSharedSlabs = 2;                               // that a warp of the shared expert has room for
constexpr int kStageSlab = Slab<DType::INT4, false>::kBytes;  // no slab is larger,
constexpr int kStagePitch = 512 + 32;                         // nor wider, with its padding

struct Down {
  const int32_t* ids;         // (T, K)
  const float* weights;       // (T, K)
  const float* inner;         // (T*K, F)
  Matrix w;                   // down (D, F) of expert 0
  int64_t stride;             // bytes from expert to expert
  const uint8_t* const* where; // (E) or null: as above,
  int64_t down_offset;        // and where in the record `down` is
  const float* shared;        // (T, FS)
  const float* shared_scale;  // (T)
  Matrix shared_w;            // (D, FS)
  bool int8, shared_int8;
  int tokens, chosen, d;
  int choice_warps, shared_warps, columns;
  int slabs, shared_slabs;    // in a panel
  int choices, tasks;         // T*K, times slabs
  int results, shared_results, h_at;  // offsets in shared memory
  float* h;                   // (T, D)
};

struct Column {
  int result;       // the row's number among the results
  float weight;     // of the result
  float scales[4];  // activation scales
};
// Shared memory of a warp: up to a.columns rows of activations and a slab to multiply them with. A warp of the shared expert has
// kSharedSlabs of these, and uses nothing but the slab of the later ones.
struct Stage {
  uint8_t* at;
  __device__ Column* columns() const { return reinterpret_cast<Column*>(at); }
  __device__ uint8_t* slab() const { return at + kMaxColumns * sizeof(Column); }
  __device__ uint16_t* x() const { return reinterpret_cast<uint16_t*>(slab() + kStageSlab); }  // (columns, kStagePitch)
};
QN_HD constexpr int stage_bytes(int columns) { return kMaxColumns * static_cast<int>(sizeof(Column)) + kStageSlab + columns * kStagePitch * 2; }
QN_HD constexpr int stages_bytes(int choice_warps, int shared_warps, int columns) {
  return (choice_warps + shared_warps * kSharedSlabs) * stage_bytes(columns);
}
static_assert(kMaxColumns * sizeof(Column) % 16 == 0 && kStageSlab % 16 == 0 && kStagePitch % 8 == 0);
// results of the slabs, h
QN_HD constexpr int result_bytes(int tokens, int chosen, int slabs, int shared_slabs) {
  return tokens * (chosen * slabs + shared_slabs + 1) * kPanelRows * 4;
}

template <class S>
struct Row {  // the part of a row of activations that meets a slab
  float4 v[S::kChunks];
  float weight;
  // k: columns from here to the end of the row
  __device__ __forceinline__ void load(const float* row, int k, const float* from) {
#pragma unroll
    for (int c = 0; c < S::kChunks; c++) v[c] = c * kActGroup + 4 * lane_id() < k ? load4(row + c * kActGroup + 4 * lane_id()) : float4{};
    weight = *from;
  }
  __device__ __forceinline__ void store(bool int8, const Stage& stage, int column, int result) const {
#pragma unroll
    for (int c = 0; c < S::kChunks; c++) {
      const float scale = store_rounded<S::kType>(v[c], !S::kPlain && int8, stage.x() + column * (S::kWidth + S::kPad) + c * kActGroup);
      if (!S::kPlain && lane_id() == 0) stage.columns()[column].scales[c] = scale;
    }
    if (lane_id() == 0) stage.columns()[column].result = result, stage.columns()[column].weight = weight;
  }
};

// results[result of a column] (16) = its weight * (slab times column)
template <class S, bool One>
__device__ __forceinline__ void multiply_columns(const Stage& stage, const uint8_t* slab, const uint8_t* scales, int columns, int shift,
                                                 float* results) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  if constexpr (One) columns = 1;
  const Column *even = stage.columns() + min(2 * t, columns - 1), *odd = stage.columns() + min(2 * t + 1, columns - 1);
  float total[4] = {};
  S::multiply(slab, scales, stage.x() + (g < columns ? g : 0) * (S::kWidth + S::kPad) + t * S::kCell, even->scales, odd->scales, shift, total);
  if (2 * t < columns) {
    float* to = results + even->result * kPanelRows + g;
    to[0] = even->weight * total[0], to[8] = even->weight * total[2];
  }
  if (2 * t + 1 < columns) {
    float* to = results + odd->result * kPanelRows + g;
    to[0] = odd->weight * total[1], to[8] = odd->weight * total[3];
  }
  __syncwarp();  // slab and columns may be replaced
}

// results (T*K, slabs, 16): weight * (panel of the expert times the slab's part of inner). A warp takes a choice and a slab; the
// first choice of an expert does the others of that expert too.
template <class S, bool One>
__device__ __forceinline__ void down_choices(const Down& a, int panel, const Stage& stage, Barrier* full, float* results) {
  [[maybe_unused]] uint32_t phase = 0;
#pragma unroll 1
  for (int task = warp_id(); task < a.tasks; task += a.choice_warps) {
    const int first = task / a.slabs, s = task % a.slabs;
    Row<S> row;
    auto load = [&](int c) { row.load(a.inner + static_cast<int64_t>(c) * a.w.k + s * S::kWidth, a.w.k - s * S::kWidth, a.weights + c); };
    load(first);
    const int e = a.ids[first];
    const uint8_t* const expert = a.where ? a.where[e] : a.w.data + e * a.stride;
    if (!expert) {
      if (lane_id() < kPanelRows) results[task * kPanelRows + lane_id()] = 0;
      continue;
    }
    const uint8_t* const down = a.where ? expert + a.down_offset : expert;
    if (!One && find(a.ids, 0, a.choices, e) != first) continue;
    if constexpr (One) {  // the panel is one slab, and comes in one piece
      const uint8_t* from = down + static_cast<int64_t>(panel) * a.w.panel_bytes;
      fill(full, 1, [&](int) { return Piece{stage.slab(), from, static_cast<uint32_t>(a.w.panel_bytes)}; });
    } else S::copy(a.w, down, panel, s, stage.slab());
    let_next_start();  // whose weights would have come in the way of ours
    if constexpr (One) {
      row.store(false, stage, 0, task);
      wait_barrier(full, phase++ & 1);
      multiply_columns<S, One>(stage, stage.slab() + a.w.scale_bytes, stage.slab(), 1, a.w.shift, results);
      continue;
    }
    int columns = 0;
#pragma unroll 1
    for (int c = first; c >= 0;) {
      row.store(a.int8, stage, columns++, c * a.slabs + s);
      c = find(a.ids, c + 1, a.choices, e);
      if (c < 0 || columns == a.columns) {
        S::wait();
        multiply_columns<S, One>(stage, stage.slab(), stage.slab() + S::kScalesAt, columns, a.w.shift, results);
        columns = 0;
      }
      if (c >= 0) load(c);
    }
  }
}

// results (T, slabs, 16): shared_scale * (panel of the shared expert times the slab's part of `shared`). Waits for the kernel before
// when it has asked for as many slabs as there is room for.
template <class S, bool One>
__device__ __forceinline__ void down_shared(const Down& a, int warp, int panel, const Stage& stage, float* results) {
  auto copy = [&](int s, int room) {
    if (s < a.shared_slabs) S::copy(a.shared_w, a.shared_w.data, panel, s, stage.slab() + room * stage_bytes(a.columns));
  };
#pragma unroll
  for (int i = 0; i < kSharedSlabs; i++) copy(warp + i * a.shared_warps, i);
  wait_for_previous();
#pragma unroll 1
  for (int s = warp, room = 0; s < a.shared_slabs; s += a.shared_warps, room = (room + 1) % kSharedSlabs) {
#pragma unroll 1
    for (int t = 0; t < (One ? 1 : a.tokens); t += One ? 1 : a.columns) {
      const int columns = One ? 1 : min(a.columns, a.tokens - t);
#pragma unroll 1
      for (int c = 0; c < columns; c++) {
        Row<S> row;
        row.load(a.shared + static_cast<int64_t>(t + c) * a.shared_w.k + s * S::kWidth, a.shared_w.k - s * S::kWidth, a.shared_scale + t + c);
        row.store(!One && a.shared_int8, stage, c, (t + c) * a.shared_slabs + s);
      }
      S::wait();
      const uint8_t* slab = stage.slab() + room * stage_bytes(a.columns);
      multiply_columns<S, One>(stage, slab, slab + S::kScalesAt, columns, a.shared_w.shift, results);
    }
    copy(s + kSharedSlabs * a.shared_warps, room);
  }
}

// Shared: of the shared expert
template <DType W, bool Plain, bool One, DType Shared>
__global__ void __launch_bounds__((kMaxChoiceWarps + kMaxSharedWarps) * 32, 1) moe_down_few_k(const Down a) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ Barrier full[kMaxChoiceWarps];  // of the warps' slabs
  const int warp = warp_id(), panel = static_cast<int>(blockIdx.x);
  const int extra = warp - a.choice_warps;  // of the shared expert
  const Stage stage{shared + (extra < 0 ? warp : a.choice_warps + extra * kSharedSlabs) * stage_bytes(a.columns)};
  float* choices = reinterpret_cast<float*>(shared + a.results);        // (T, K*slabs, 16)
  float* others = reinterpret_cast<float*>(shared + a.shared_results);  // (T, shared_slabs, 16)
  const int t = static_cast<int>(threadIdx.x) / kPanelRows, r = static_cast<int>(threadIdx.x) % kPanelRows;
  float* h = reinterpret_cast<float*>(shared + a.h_at) + threadIdx.x;  // of the output that this thread, of a choice warp, adds up
  if (extra < 0) {
    if (One && lane_id() == 0) init_barrier(full + warp, kFillArrivals), publish_barriers();
    __syncwarp();
    const float* soon[4] = {a.weights, a.inner, a.h, reinterpret_cast<const float*>(a.ids)};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (threadIdx.x == i) prefetch_l2(soon[i]);
    wait_for_previous();
    if (t < a.tokens) copy_async4(h, a.h + static_cast<int64_t>(t) * a.d + panel * kPanelRows + r);
    copy_async_commit();  // a warp without choices commits nothing else, and waits only for what is committed
    down_choices<Slab<W, Plain>, One>(a, panel, stage, full + warp, choices);
  } else {
    down_shared<Slab<Shared, false>, One>(a, extra, panel, stage, others);
  }
  let_next_start();  // a warp may have had nothing to ask for
  copy_async_wait<0>();
  __syncthreads();
  if (t >= a.tokens) return;
  float sum = 0;
#pragma unroll 2
  for (int i = 0; i < a.chosen * a.slabs; i++) sum += choices[(t * a.chosen * a.slabs + i) * kPanelRows + r];
#pragma unroll 2
  for (int i = 0; i < a.shared_slabs; i++) sum += others[(t * a.shared_slabs + i) * kPanelRows + r];
  a.h[static_cast<int64_t>(t) * a.d + panel * kPanelRows + r] = *h + sum;
}

// ---- launchers --------------------------------------------------------------------------------------------------------

constexpr int kSumWarps = kFewTokens * kPanelRows / 32;  // whose threads add up a panel of the output

constexpr int slab_width(DType t) { return t == DType::INT4 ? 512 : t == DType::INT8 ? 256 : 128; }
static_assert(slab_width(DType::INT4) == Slab<DType::INT4, true>::kWidth && slab_width(DType::INT8) == Slab<DType::INT8, false>::kWidth &&
              slab_width(DType::BF16) == Slab<DType::BF16, false>::kWidth);

int count(int64_t n) { return static_cast<int>(n); }

Matrix make_matrix(const Tensor& w, int step, int pair) {
  Matrix m{};
  m.data = w.bytes(), m.k = count(w.cols()), m.step = step, m.pair = pair;
  if (!is_t16(w.dtype)) return m;
  m.shift = w.group == 32 ? 5 : w.group == 64 ? 6 : 7, m.slab_scales = slab_width(w.dtype) / w.group * kPanelRows * 2;
  m.panel_bytes = count(t16_panel_bytes(w.dtype, w.cols(), w.group)), m.scale_bytes = count(t16_scale_bytes(w.cols(), w.group));
  m.tiles = (m.panel_bytes - m.scale_bytes) / kTileBytes;
  return m;
}

bool plain(Act act, const Experts& e) { return e.dtype == DType::INT4 && e.group == 128 && act == Act::BF16; }

template <DType W, bool Plain>
void launch_gate_up(const Context& c, const MoeGateUpArgs& args, GateUp a) {
  using S = Slab<W, Plain>;
  if (gate_up_layout<S>(kFewTokens, a.w.k, a.experts, a.chosen, 1).bytes > static_cast<int64_t>(c.shared_max)) {  // whatever T is
    moe_exact_gate_up(c, args);
    return;
  }
  // As few rounds as the multiprocessors can do it in with one block each, and no more teams than that takes
  int64_t most = a.tokens > 1 ? kSeveralTeams : kMaxTeams;
  while (gate_up_layout<S>(a.tokens, a.w.k, a.experts, a.chosen, count(most)).bytes > static_cast<int64_t>(c.shared_max)) most--;
  const int64_t units = std::min<int64_t>(int64_t{a.tokens} * a.chosen, a.experts) * (a.f / 8), sms = c.sms;
  const int64_t rounds = (units + sms * most - 1) / (sms * most), teams = (units + sms * rounds - 1) / (sms * rounds);
  const int64_t blocks = std::min(sms, (units + teams - 1) / teams);
  a.at = gate_up_layout<S>(a.tokens, a.w.k, a.experts, a.chosen, count(teams));
  a.panels = a.f / 8, a.slabs = a.at.chunks / S::kChunks;
  if constexpr (Plain) {
    if (a.tokens == 1 && !a.where && a.w.k % S::kWidth == 0 && a.slabs <= kTeam && a.experts <= kQuickExperts && a.chosen <= kQuickWarps &&
        teams * kTeam >= kQuickWarps) {
      launch(c, "moe_gate_up", moe_gate_up_one_k, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(teams * kTeam * 32)),
             static_cast<size_t>(a.at.bytes), a);
      return;
    }
  }
  launch(c, "moe_gate_up", moe_gate_up_few_k<W, Plain>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(teams * kTeam * 32)),
         static_cast<size_t>(a.at.bytes), a);
}

template <DType W, bool Plain, bool One>
auto down_kernel(bool t16) {
  return t16 ? moe_down_few_k<W, Plain, One, DType::INT8> : moe_down_few_k<W, Plain, One, DType::BF16>;
}

}  // namespace

void moe_route(const Context& c, const MoeGateUpArgs& args) {
  const int64_t t = args.x.rows(), chosen = args.ids.cols();
  launch(c, "moe_route", moe_route_k, dim3(static_cast<unsigned>((t + kRouteWarps - 1) / kRouteWarps)), dim3(32 * kRouteWarps),
         static_cast<size_t>(kRouteWarps * chosen * 4), args.logits.f32(), count(t), args.experts.count, count(chosen), args.renormalise,
         args.ids.i32(), args.weights.f32());
}

void moe_few_gate_up(const Context& c, const MoeGateUpArgs& args) {
  if (args.act == Act::F32 || args.experts.dtype == DType::F32) {
    moe_exact_gate_up(c, args);
    return;
  }
  GateUp a{};
  a.x = args.x.f32(), a.logits = args.logits.f32();
  a.f = count(args.inner.cols()), a.w = make_matrix(args.experts.gate_up(0), 8, a.f), a.stride = args.experts.layout().stride;
  a.where = args.experts.home ? args.experts.home->at : nullptr;
  a.tokens = count(args.x.rows()), a.experts = args.experts.count, a.chosen = count(args.ids.cols());
  a.renormalise = args.renormalise, a.int8 = args.act == Act::INT8;
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32();
  if (plain(args.act, args.experts)) launch_gate_up<DType::INT4, true>(c, args, a);
  else if (args.experts.dtype == DType::INT4) launch_gate_up<DType::INT4, false>(c, args, a);
  else if (args.experts.dtype == DType::INT8) launch_gate_up<DType::INT8, false>(c, args, a);
  else launch_gate_up<DType::BF16, false>(c, args, a);
}

void moe_few_down(const Context& c, const MoeDownArgs& args) {
  const DType type = args.experts.dtype, shared = args.shared_down.dtype;
  Down a{};
  a.tokens = count(args.h.rows()), a.chosen = count(args.ids.cols()), a.d = count(args.h.cols());
  const int64_t f = args.inner.cols(), fs = args.shared.cols();
  a.slabs = count((f + slab_width(type) - 1) / slab_width(type)), a.shared_slabs = count((fs + slab_width(shared) - 1) / slab_width(shared));
  const size_t room = c.shared_max - 256;  // barriers besides
  // The choice must not depend on T
  const int most = stages_bytes(kSumWarps, kMaxSharedWarps, kMaxColumns) + result_bytes(kFewTokens, a.chosen, a.slabs, a.shared_slabs);
  if (args.act == Act::F32 || type == DType::F32 || args.shared_act == Act::F32 || (shared != DType::BF16 && shared != DType::INT8) ||
      static_cast<size_t>(most) > room) {
    moe_exact_down(c, args);
    return;
  }
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32();
  a.w = make_matrix(args.experts.down(0), 16, 8), a.stride = args.experts.layout().stride;
  a.where = args.experts.home ? args.experts.home->at : nullptr, a.down_offset = args.experts.layout().down_offset;
  a.shared = args.shared.f32(), a.shared_scale = args.shared_scale.f32(), a.shared_w = make_matrix(args.shared_down, 16, 8), a.h = args.h.f32();
  a.int8 = args.act == Act::INT8, a.shared_int8 = args.shared_act == Act::INT8;
  a.shared_warps = std::min(a.shared_slabs, kMaxSharedWarps), a.columns = std::min(a.tokens, kMaxColumns);
  auto bytes = [&] {
    return stages_bytes(a.choice_warps, a.shared_warps, a.columns) + result_bytes(a.tokens, a.chosen, a.slabs, a.shared_slabs);
  };
  a.choices = a.tokens * a.chosen, a.tasks = a.choices * a.slabs;
  a.choice_warps = std::clamp(a.tasks, kSumWarps, a.tokens > 1 ? kSeveralChoiceWarps : kMaxChoiceWarps);
  while (static_cast<size_t>(bytes()) > room) a.choice_warps--;
  a.results = stages_bytes(a.choice_warps, a.shared_warps, a.columns), a.shared_results = a.results + a.tasks * kPanelRows * 4;
  a.h_at = a.shared_results + a.tokens * a.shared_slabs * kPanelRows * 4;
  const bool t16 = shared == DType::INT8;
  const bool fast = plain(args.act, args.experts), one = a.tokens == 1 && !a.shared_int8 && f == slab_width(type);
  const auto kernel = fast && one                   ? down_kernel<DType::INT4, true, true>(t16)
                      : fast                        ? down_kernel<DType::INT4, true, false>(t16)
                      : type == DType::INT4         ? down_kernel<DType::INT4, false, false>(t16)
                      : type == DType::INT8         ? down_kernel<DType::INT8, false, false>(t16)
                                                    : down_kernel<DType::BF16, false, false>(t16);
  launch(c, "moe_down", kernel, dim3(static_cast<unsigned>(a.d / kPanelRows)),
         dim3(static_cast<unsigned>((a.choice_warps + a.shared_warps) * 32)), static_cast<size_t>(bytes()), a);
}

size_t moe_scratch(const OpLimits&) { return 0; }

}  // namespace qn::cuda
