// Experts of few tokens (decode and verification): choice and gate_up in one kernel; down, the shared expert and the sum in another
// (moe_down.cu). Both are over in a few microseconds, so what counts is the time between knowing the ids and having asked for every byte.
//
// Tensor cores do the sums: operand A is a panel of 16 rows of weights, the columns of operand B are tokens (gate_up) or choices
// (down), so that an expert that several tokens chose is read once. A warp has one slab of a panel in shared memory: 8 copies of 16
// bytes per lane, all asked for at once. gate_up of plain() experts has it as two halves: one is under way while the other is multiplied.
// One token of the usual shape has a kernel of its own, in which panels come in one piece.
//
//            slab: 16 rows x      of a panel         real shape: gate_up K = 2048      down K = 512
//   INT4     512 k (8 tiles)      + fp16 scales      4 slabs, a warp each              1
//   INT8     256 k (8 tiles)      + fp16 scales      8                                 2
//   BF16     128 k                                   16                                4
//
// Kernels that are over in microseconds wait for their instructions: what is not in a multiprocessor's caches comes from the L2 cache, where it
// queues behind the weights. So this code is short before it is clever: no division, no branch where arithmetic will do.
//
// gate_up: a team of 4 warps takes a panel (8 gate and 8 up rows), slabs part, part + 4, ...; 10 experts x 64 panels are 5 teams on each of
// 128 multiprocessors. Every block finds the top K itself.
//
// A column's sums do not depend on what the other columns hold, nor the cut of K on T: rows are bit-equal to those of single calls.
#include <algorithm>

#include "cuda/moe_slab.cuh"

namespace qn::cuda {
namespace {

// ---- choice of many tokens ---------------------------------------------------------------------------------------------

constexpr int kRouteWarps = 4;

// logits (T, E), ids and weights (T, K): a warp per token
__global__ void __launch_bounds__(32 * kRouteWarps) moe_route_k(const float* logits, int tokens, int experts, int chosen, bool renormalise,
                                                               int32_t* ids, float* weights) {
  extern __shared__ int32_t chosen_ids[];  // (warps, K)
  __shared__ __align__(16) Candidate list[kRouteWarps][32];
  __shared__ __align__(16) float room[kRouteWarps][kQuickExperts];
  let_next_start();
  wait_for_previous();
  const int t = static_cast<int>(blockIdx.x) * kRouteWarps + warp_id();
  if (t >= tokens) return;
  int32_t* mine = chosen_ids + warp_id() * chosen;
  logits += static_cast<int64_t>(t) * experts;
  top(Logits{logits}, experts, chosen, mine, list[warp_id()], room[warp_id()]);
  const int64_t out = static_cast<int64_t>(t) * chosen;
  store_choice(logits, experts, chosen, renormalise, mine, ids + out, weights + out);
}

// ---- gate and up ------------------------------------------------------------------------------------------------------

constexpr int kQuickWarps = kQuickExperts / 32;
constexpr int kTeam = 4;      // warps that share a panel
constexpr int kMaxTeams = 8;  // in a block
// For 2 to 4 and for 5 to 8 tokens fewer are faster: they leave registers and memory for blocks of `down` to begin early. Measured on H100
// at the shapes of the 80B model, of 5 to 8 each: a pass of 4 tokens 6 % and one of 8 tokens 2 % faster than with 8.
constexpr int kTeamsOfFour = 5, kTeamsOfEight = 7;

// What gate_up copies and multiplies at a time: of plain() experts half a slab, of others a whole one. A warp has room for a slab.
template <DType W, bool Plain>
using HalfOrSlab = Slab<W, Plain, Plain ? 4 : 8>;
template <class S>
constexpr int kPieces = S::kPlain ? 2 : 1;  // of a slab

// Shared memory of a block; offsets in bytes
struct GateUpLayout {
  int chunks, pitch;               // of a row of x: groups of 128, values
  int slabs, part, x, list, scales, ids, distinct, used;
  int64_t bytes;
};
QN_HD constexpr int token_pairs(int tokens) { return (tokens + 1) / 2; }
template <class S>
GateUpLayout gate_up_layout(int tokens, int k, int experts, int chosen, int teams) {
  GateUpLayout l{};
  const int width = static_cast<int>(round_up(k, kPieces<S> * S::kWidth));
  l.chunks = width / kActGroup, l.pitch = width + S::kPad;
  l.slabs = 0;                                                    // (teams, kTeam, kPieces) S
  // (teams, 2, kTeam, 8, pairs of tokens) float4: results of the warps, two rounds; of one token (teams, 2, kTeam, 8) float2
  l.part = teams * kTeam * kPieces<S> * S::kBytes;
  l.x = l.part + teams * 2 * kTeam * 8 * token_pairs(tokens) * 16;  // (T, pitch) bf16 or codes
  l.list = l.x + tokens * l.pitch * 2;                            // (T, 32) Candidate
  l.scales = l.list + tokens * 32 * static_cast<int>(sizeof(Candidate));  // (T, chunks)
  l.ids = l.scales + tokens * l.chunks * 4;                       // (T, K)
  l.distinct = l.ids + tokens * chosen * 4;                       // (T * K) experts to compute
  l.used = l.distinct + tokens * chosen * 4;                      // (E) bits
  l.bytes = l.used + (experts + 31) / 32 * 4;
  return l;
}

// n / by for n * by < 2^32, without the 40 instructions of a division
struct Divider {
  uint32_t by = 1, inverse = 0;
  Divider() = default;
  explicit Divider(int n) : by(static_cast<uint32_t>(n)), inverse(static_cast<uint32_t>((uint64_t{1} << 32) / by + 1)) {}
  __device__ __forceinline__ int quotient(int n) const { return by == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), inverse)); }
};

struct GateUp {
  const float *x, *logits;         // (T, D), (T, E)
  Matrix w;                        // gate_up (2F, D) of expert 0
  int64_t stride;                  // bytes from expert to expert
  const uint8_t* const* where;     // (E) or null: where the experts are instead; null there: computed elsewhere
  int tokens, experts, chosen, f;
  bool renormalise, int8;
  int32_t* ids;                    // (T, K)
  float *weights, *inner;          // (T, K), (T*K, F)
  uint16_t* rounded;               // (T*K, F) or null: rounded_inner()
  int panels, pieces;              // of an expert, of a panel
  Divider panel, chunks;           // by `panels`, by at.chunks
  GateUpLayout at;
};

// Rounds x (T, K) into shared memory, chunks of 128 by warps first, first + 1, ... of the block in turn. The last ones of each warp are only
// loaded at once, and stored when weights have been asked for: what is asked for behind those comes behind them.
template <class S>
struct RoundedTokens {
  static constexpr int kAtOnce = 4;
  float4 v[kAtOnce];
  int begin;  // the chunk of v[0]

  __device__ __forceinline__ void load(const GateUp& a, uint8_t* shared, int first) {
    const int step = static_cast<int>(blockDim.x) / 32 - first;
    begin = warp_id() - first;
    if (begin < 0) begin = a.tokens * a.at.chunks;
#pragma unroll 1
    for (;; begin += kAtOnce * step) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const int c = begin + i * step, t = a.chunks.quotient(c), k = (c - t * a.at.chunks) * kActGroup + 4 * lane_id();
        v[i] = t < a.tokens && k < a.w.k ? load4(a.x + t * a.w.k + k) : float4{};
      }
      if (begin + kAtOnce * step >= a.tokens * a.at.chunks) return;
      store(a, shared, first);
    }
  }
  __device__ __forceinline__ void store(const GateUp& a, uint8_t* shared, int first) const {
    const int step = static_cast<int>(blockDim.x) / 32 - first;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int c = begin + i * step, t = a.chunks.quotient(c);
      if (t >= a.tokens) break;
      uint16_t* to = reinterpret_cast<uint16_t*>(shared + a.at.x) + t * a.at.pitch + (c - t * a.at.chunks) * kActGroup;
      const float scale = store_rounded<S::kType>(v[i], !S::kPlain && a.int8, to);
      if (!S::kPlain && lane_id() == 0) reinterpret_cast<float*>(shared + a.at.scales)[c] = scale;
    }
  }
};

// The experts whose bit is set, ascending; returns how many. By all threads; the list may be read after the next barrier.
__device__ __forceinline__ int list_experts(const uint32_t* used, int experts, int32_t* list) {
  const int lane = lane_id(), words = (experts + 31) / 32, warps = static_cast<int>(blockDim.x) / 32;
  int n = 0;
#pragma unroll 1
  for (int begin = 0; begin < words; begin += 32) {  // a word for a lane
    const uint32_t bits = begin + lane < words ? used[begin + lane] : 0;
    const int set = __popc(bits);
#pragma unroll 1
    for (int w = warp_id(); w < min(words - begin, 32); w += warps) {  // a word for a warp, a bit for a lane
      const int before = __reduce_add_sync(kAll, lane < w ? set : 0);
      const uint32_t mine = __shfl_sync(kAll, bits, w);
      if (mine >> lane & 1) list[n + before + __popc(mine & ((1u << lane) - 1))] = (begin + w) * 32 + lane;
    }
    n += __reduce_add_sync(kAll, set);
  }
  return n;
}

// Adds up the four parts of a panel and stores silu(gate) * up for the tokens that chose the expert; by one warp.
__device__ __forceinline__ void finish_panel(const GateUp& a, const float4* part, const int32_t* ids, int e, int panel) {
  const int lane = lane_id(), pairs = token_pairs(a.tokens), at = lane / 4 * pairs + min(lane % 4, pairs - 1);
  float4 s = part[at];
#pragma unroll
  for (int i = 1; i < kTeam; i++) {
    const float4 p = part[i * 8 * pairs + at];
    s.x += p.x, s.y += p.y, s.z += p.z, s.w += p.w;
  }
  const float even = silu(s.x) * s.z, odd = silu(s.y) * s.w;  // rows g: gate, g + 8: up
#pragma unroll 1
  for (int t = 0; t < a.tokens; t++) {
    const int j = find(ids + t * a.chosen, 0, a.chosen, e);
    if (j < 0 || lane % 4 != t / 2) continue;
    const int64_t row = static_cast<int64_t>(t * a.chosen + j) * a.f;
    const int k = panel * 8 + lane / 4;
    a.inner[row + k] = t % 2 ? odd : even;
    if (a.rounded) a.rounded[row + rounded_at(k)] = bf16_bits(t % 2 ? odd : even);
  }
}

template <DType W, bool Plain>
__global__ void __launch_bounds__(kMaxTeams * kTeam * 32, 1) moe_gate_up_few_k(const GateUp a) {
  using S = HalfOrSlab<W, Plain>;
  constexpr int kRooms = kPieces<S>;  // a piece each
  extern __shared__ __align__(16) uint8_t shared[];
  const int lane = lane_id(), warp = warp_id(), warps = static_cast<int>(blockDim.x) / 32, team = warp / kTeam, part = warp % kTeam;
  int32_t* ids = reinterpret_cast<int32_t*>(shared + a.at.ids);
  uint32_t* used = reinterpret_cast<uint32_t*>(shared + a.at.used);
  const int stride = static_cast<int>(gridDim.x) * (warps / kTeam);
  int unit = team * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);  // (expert, panel); blocks have as many, or one more
  const bool lists = a.tokens > 1 || a.where;  // each expert once, and only those that are here
  if (lists) {
    for (int i = static_cast<int>(threadIdx.x); i < (a.experts + 31) / 32; i += static_cast<int>(blockDim.x)) used[i] = 0;
    __syncthreads();
  }
  uint8_t* rooms = shared + a.at.slabs + warp * kRooms * S::kBytes;  // of the warp's pieces; until they are asked for, of the logits it chooses by
  static_assert(kRooms * S::kBytes >= kQuickExperts * 4);
  wait_for_previous();

  const int rounding = warps > a.tokens ? a.tokens : 0;  // the first warp that has time for x
  RoundedTokens<S> rounded;
  rounded.load(a, shared, rounding);
#pragma unroll 1
  for (int t = warp; t < a.tokens; t += warps) {
    top(Logits{a.logits + t * a.experts}, a.experts, a.chosen, ids + t * a.chosen, reinterpret_cast<Candidate*>(shared + a.at.list) + t * 32,
        reinterpret_cast<float*>(rooms));
    if (lists)
#pragma unroll 1
      for (int j = lane; j < a.chosen; j += 32)
        if (const int e = ids[t * a.chosen + j]; !a.where || a.where[e]) atomicOr(&used[e / 32], 1u << (e % 32));
  }
  __syncthreads();
  const int32_t* todo = ids;
  int units = a.chosen * a.panels;
  if (lists) {
    todo = reinterpret_cast<int32_t*>(shared + a.at.distinct);
    units = list_experts(used, a.experts, reinterpret_cast<int32_t*>(shared + a.at.distinct)) * a.panels;
    __syncthreads();
  }

  // Pieces of a panel: the warp's first one, and the one of its own behind s
  const int first = part * kRooms;
  auto behind = [](int s) { return (s + 1) % kRooms == 0 ? s + 1 + (kTeam - 1) * kRooms : s + 1; };
  int ahead = unit, ahead_s = first;  // what is to be asked for next
  if (first >= a.pieces) ahead = units;
  auto ask = [&] {
    if (ahead < units) {
      const int i = a.panel.quotient(ahead), e = todo[i];
      S::copy(a.w, a.where ? a.where[e] : a.w.data + e * a.stride, ahead - i * a.panels, ahead_s, rooms + ahead_s % kRooms * S::kBytes);
      ahead_s = behind(ahead_s);
      if (ahead_s >= a.pieces) ahead += stride, ahead_s = first;
    } else {
      copy_async_commit();  // wait() counts
    }
    if (ahead >= units) let_next_start();  // the team's last panel is on its way: before, the next kernel's weights would come in the way
  };
#pragma unroll
  for (int i = 0; i < kRooms; i++) ask();
  rounded.store(a, shared, rounding);
  if (blockIdx.x == 0)
#pragma unroll 1
    for (int t = warp; t < a.tokens; t += warps)
      store_choice(a.logits + static_cast<int64_t>(t) * a.experts, a.experts, a.chosen, a.renormalise, ids + t * a.chosen, a.ids + t * a.chosen,
                   a.weights + t * a.chosen);

  __syncthreads();  // x is there
  const int column = lane / 4 < a.tokens ? lane / 4 : 0;  // columns without a token repeat the first and are not stored
  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + a.at.x) + column * a.at.pitch + lane % 4 * S::kCell;
  const float* s0 = reinterpret_cast<const float*>(shared + a.at.scales) + min(lane % 4 * 2, a.tokens - 1) * a.at.chunks;
  const float* s1 = reinterpret_cast<const float*>(shared + a.at.scales) + min(lane % 4 * 2 + 1, a.tokens - 1) * a.at.chunks;
  const int pairs = token_pairs(a.tokens);
  float4* results = reinterpret_cast<float4*>(shared + a.at.part) + team * 2 * kTeam * 8 * pairs;
#pragma unroll 1
  for (int round = 0; unit < units; unit += stride, round++) {
    float total[4] = {};
#pragma unroll 1
    for (int s = first; s < a.pieces; s = behind(s)) {
      S::template wait<kRooms - 1>();
      const uint8_t* piece = rooms + s % kRooms * S::kBytes;
      S::multiply(piece, piece + S::kScalesAt, x + s * S::kWidth, s0 + s * S::kChunks, s1 + s * S::kChunks, a.w.shift, total);
      __syncwarp();  // the piece has been read by all lanes
      ask();         // on its way while the team adds up
    }
    float4* mine = results + round % 2 * kTeam * 8 * pairs;
    if (lane % 4 < pairs) mine[(part * 8 + lane / 4) * pairs + lane % 4] = make_float4(total[0], total[1], total[2], total[3]);
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam * 32) : "memory");  // the team's; two rounds of results need but one
    if (part == (team + round) % kTeam) {
      const int i = a.panel.quotient(unit);
      finish_panel(a, mine, ids, todo[i], unit - i * a.panels);
    }
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
  if (tid < 32) list[tid] = 0;
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
    if (at < 32) list[at] = candidate(logit, tid);
  }
  __syncthreads();
  const int n = candidates;
  int expert = 0, place = a.chosen;  // of the lane's candidate, in warps that lead
  if (n > 32) {                      // many equal ones
    if (warp == 0) any_top(Logits{a.logits}, a.experts, a.chosen, ids);
    __syncthreads();
    if (lane < a.chosen) expert = ids[lane], place = lane;
  } else if (leads) {
    const Candidate c = list[lane];
    const int before = place_of(c, list, n);
    if (lane < n) expert = expert_of(c), place = before;
  }

  const int units = a.chosen * a.panels, stride = static_cast<int>(gridDim.x) * teams;
  uint8_t* panel = shared + a.at.slabs + team * kTeam * S::kBytes;
  auto copy = [&](int unit) {  // by the warp that leads
    const int j = a.panel.quotient(unit), e = __shfl_sync(kAll, expert, __ffs(static_cast<int>(__ballot_sync(kAll, place == j))) - 1);
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
    if (part * S::kChunks < a.at.chunks)
      S::multiply(panel + a.w.scale_bytes + part * S::kScalesAt, panel + part * S::kScales, x, nullptr, nullptr, a.w.shift, total);
    float2* sums = results + round * kTeam * 8;  // (parts, rows)
    if (lane % 4 == 0) sums[part * 8 + lane / 4] = make_float2(total[0], total[2]);
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeam * 32) : "memory");  // the team's; two rounds of results need but one
    if (leads && unit + stride < units) copy(unit + stride);
    if (part == (team + 1) % kTeam && lane < 8) {
      float2 sum = sums[lane];
#pragma unroll
      for (int i = 1; i < kTeam; i++) sum.x += sums[i * 8 + lane].x, sum.y += sums[i * 8 + lane].y;
      const int i = a.panel.quotient(unit), k = (unit - i * a.panels) * 8 + lane;
      const int64_t row = static_cast<int64_t>(i) * a.f;
      const float inner = silu(sum.x) * sum.y;
      a.inner[row + k] = inner;
      if (a.rounded) a.rounded[row + rounded_at(k)] = bf16_bits(inner);
    }
  }
}

// ---- launchers --------------------------------------------------------------------------------------------------------

template <class S>
bool fits(const Context& c, int k, int f, int experts, int chosen) {  // whatever T is
  const int64_t panels = f / 8;  // a Divider's bound
  return gate_up_layout<S>(kFewTokens, k, experts, chosen, 1).bytes <= static_cast<int64_t>(c.shared_max) &&
         int64_t{kFewTokens} * chosen * panels * panels < int64_t{1} << 32;
}

template <DType W, bool Plain>
void launch_gate_up(const Context& c, const MoeGateUpArgs& args, GateUp a) {
  using S = HalfOrSlab<W, Plain>;
  if (!fits<S>(c, a.w.k, a.f, a.experts, a.chosen)) {
    moe_exact_gate_up(c, args);
    return;
  }
  // As few rounds as the multiprocessors can do it in with one block each, and no more teams than that takes
  int64_t most = a.tokens == 1 ? kMaxTeams : a.tokens <= 4 ? kTeamsOfFour : kTeamsOfEight;
  while (gate_up_layout<S>(a.tokens, a.w.k, a.experts, a.chosen, count(most)).bytes > static_cast<int64_t>(c.shared_max)) most--;
  const int64_t units = std::min<int64_t>(int64_t{a.tokens} * a.chosen, a.experts) * (a.f / 8), sms = c.sms;
  const int64_t rounds = (units + sms * most - 1) / (sms * most), teams = (units + sms * rounds - 1) / (sms * rounds);
  const int64_t blocks = std::min(sms, (units + teams - 1) / teams);
  a.at = gate_up_layout<S>(a.tokens, a.w.k, a.experts, a.chosen, count(teams));
  a.panels = a.f / 8, a.pieces = a.at.chunks / S::kChunks, a.panel = Divider(a.panels), a.chunks = Divider(a.at.chunks);
  if constexpr (Plain) {
    if (a.tokens == 1 && !a.where && a.w.k % Slab<W, Plain>::kWidth == 0 && a.pieces <= kTeam * kPieces<S> && a.experts <= kQuickExperts &&
        a.chosen <= kQuickWarps && teams * kTeam >= kQuickWarps) {
      launch(c, "moe_gate_up", moe_gate_up_one_k, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(teams * kTeam * 32)),
             static_cast<size_t>(a.at.bytes), a);
      return;
    }
  }
  launch(c, "moe_gate_up", moe_gate_up_few_k<W, Plain>, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(teams * kTeam * 32)),
         static_cast<size_t>(a.at.bytes), a);
}

}  // namespace

bool moe_gate_up_waits_first(const Context& c, int k, int f, int experts, int chosen) {
  return fits<HalfOrSlab<DType::INT4, true>>(c, k, f, experts, chosen);
}

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
  if (plain(args.act, args.experts)) a.rounded = rounded_inner(c, int64_t{a.tokens} * a.chosen, a.f);
  if (plain(args.act, args.experts)) launch_gate_up<DType::INT4, true>(c, args, a);
  else if (args.experts.dtype == DType::INT4) launch_gate_up<DType::INT4, false>(c, args, a);
  else if (args.experts.dtype == DType::INT8) launch_gate_up<DType::INT8, false>(c, args, a);
  else launch_gate_up<DType::BF16, false>(c, args, a);
}

size_t moe_scratch(const OpLimits& l) {
  Scratch s;
  s.take<uint16_t>(kFewTokens * l.chosen * l.expert_width);
  return s.used();
}

}  // namespace qn::cuda
