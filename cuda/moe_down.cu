// Down of few tokens: the routed experts, the shared expert and the sum. A block takes a panel of the output (16 rows); columns of the products
// are choices (of one token's kernel, all the same one). A choice warp does the first choice of an expert and all others of that expert with
// it, two more warps do the shared expert, whose weights are known before the kernel ahead has ended. Results are added in the order choice
// 0, 1, ..., shared expert.
//
//   moe_down_quick_k   INT4 g128, all activations BF16, F = 512: the panel of an expert is one slab and comes in one piece. 1 to 8 tokens.
//   moe_down_one_k     the same for one token whose experts are all here, behind gate_up
//   moe_down_few_k     anything else: slabs copied by their warps, see moe.cu
//
// What the quick one must know to ask for weights are the ids, and gate_up, the kernel before, writes them at its end only. So it chooses once
// more, from the logits, while gate_up is still at work, and has its first slabs when that one ends.
//
//   router   writes logits |end
//   gate_up       waits ---|choice|asks for all it reads: let_next_start()|products ... inner |end
//   down                                                                  |starts: choice|asks: let_next_start()|waits ---|fetches inner, ... sum|
//
// It may read the logits before its own wait_for_previous(): it starts when every block of gate_up has called let_next_start(), which they do
// behind their wait, so the router, which ended before that wait did, is over and its writes are in the L2 cache. The loads go there, past
// the L1 cache (load_past_l1()), which may hold what the logits were a layer ago. Nothing writes logits again before this kernel has ended.
// (The programming model promises visibility only behind the wait; that a kernel which has ended has written to the L2 cache is how the
// hardware works.) A caller that gives logits vouches that gate_up was the operation before.
#include <algorithm>
#include <utility>

#include "cuda/moe_slab.cuh"

namespace qn::cuda {
namespace {

__device__ __forceinline__ void copy_async4(float* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}

constexpr int kMaxChoiceWarps = 16, kMaxSharedWarps = 2, kMaxColumns = 4;
constexpr int kSharedSlabs = 2;                               // that a warp of the shared expert has room for
constexpr int kStageSlab = Slab<DType::INT4, false>::kBytes;  // no slab is larger,
constexpr int kStagePitch = 512 + 32;                         // nor wider, with its padding;
constexpr int kSharedPitch = 256 + 32;                        // the shared expert's is INT8 or BF16

struct Down {
  const int32_t* ids;         // (T, K)
  const float* weights;       // (T, K)
  const float* inner;         // (T*K, F)
  Matrix w;                   // down (D, F) of expert 0
  int64_t stride;             // bytes from expert to expert
  const uint8_t* const* where;  // (E) or null: where the experts are instead (null there: computed elsewhere),
  int64_t down_offset;        // and where in the record `down` is
  const float* shared;        // (T, FS)
  const float* shared_scale;  // (T)
  Matrix shared_w;            // (D, FS)
  bool int8, shared_int8;
  int tokens, chosen, d;
  int choice_warps, shared_warps, columns;
  int slabs, shared_slabs;    // in a panel
  int choices, tasks;         // T*K, times slabs
  int shared_stages, results, shared_results, h_at;  // offsets in shared memory
  float* h;                   // (T, D)

  __device__ __forceinline__ const uint8_t* panel_of(int e) const {  // `down` of expert e; null: computed elsewhere
    if (!where) return w.data + e * stride;
    const uint8_t* const expert = where[e];
    return expert ? expert + down_offset : nullptr;
  }
};

struct Column {
  int result;       // the row's number among the results
  float weight;     // of the result
  float scales[4];  // activation scales
};
// Shared memory of a warp: room for slabs, and up to kMaxColumns rows of activations to multiply them with
struct Stage {
  uint8_t* at;
  int slabs;
  __device__ Column* columns() const { return reinterpret_cast<Column*>(at); }
  __device__ uint8_t* slab(int i = 0) const { return at + kMaxColumns * sizeof(Column) + i * kStageSlab; }
  __device__ uint16_t* x() const { return reinterpret_cast<uint16_t*>(slab(slabs)); }  // (columns, pitch of the slab)
};
QN_HD constexpr int stage_bytes(int slabs, int columns, int pitch) {
  return kMaxColumns * static_cast<int>(sizeof(Column)) + slabs * kStageSlab + columns * pitch * 2;
}
QN_HD constexpr int choice_stage(int columns) { return stage_bytes(1, columns, kStagePitch); }
QN_HD constexpr int shared_stage_one() { return stage_bytes(1, 1, kSharedPitch); }  // of a slab; see down_shared_one()
QN_HD constexpr int shared_stage(int columns) { return stage_bytes(kSharedSlabs, columns, kSharedPitch); }
static_assert(kMaxColumns * sizeof(Column) % 16 == 0 && kStageSlab % 16 == 0 && kStagePitch % 8 == 0 && kSharedPitch % 8 == 0);

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
template <class S>
__device__ __forceinline__ void multiply_columns(const Stage& stage, const uint8_t* slab, int columns, int shift, float* results) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const Column *even = stage.columns() + min(2 * t, columns - 1), *odd = stage.columns() + min(2 * t + 1, columns - 1);
  float total[4] = {};
  S::multiply(slab, slab + S::kScalesAt, stage.x() + (g < columns ? g : 0) * (S::kWidth + S::kPad) + t * S::kCell, even->scales, odd->scales, shift, total);
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
template <class S>
__device__ __forceinline__ void down_choices(const Down& a, int panel, const Stage& stage, float* results) {
#pragma unroll 1
  for (int task = warp_id(); task < a.tasks; task += a.choice_warps) {
    const int first = task / a.slabs, s = task % a.slabs;
    Row<S> row;
    auto load = [&](int c) { row.load(a.inner + static_cast<int64_t>(c) * a.w.k + s * S::kWidth, a.w.k - s * S::kWidth, a.weights + c); };
    load(first);
    const int e = a.ids[first];
    const uint8_t* const down = a.panel_of(e);
    if (!down) {
      if (lane_id() < kPanelRows) results[task * kPanelRows + lane_id()] = 0;
      continue;
    }
    if (find(a.ids, 0, a.choices, e) != first) continue;
    S::copy(a.w, down, panel, s, stage.slab());
    let_next_start();  // whose weights would have come in the way of ours
    int columns = 0;
#pragma unroll 1
    for (int c = first; c >= 0;) {
      row.store(a.int8, stage, columns++, c * a.slabs + s);
      c = find(a.ids, c + 1, a.choices, e);
      if (c < 0 || columns == a.columns) {
        S::wait();
        multiply_columns<S>(stage, stage.slab(), columns, a.w.shift, results);
        columns = 0;
      }
      if (c >= 0) load(c);
    }
  }
}

// results (T, slabs, 16): shared_scale * (panel of the shared expert times the slab's part of `shared`). Waits for the kernel before
// when it has asked for as many slabs as there is room for. Rounded: activations to BF16, which is known when this is compiled.
template <class S, bool Rounded>
__device__ __forceinline__ void down_shared(const Down& a, int warp, int panel, const Stage& stage, float* results) {
  auto copy = [&](int s, int room) {
    if (s < a.shared_slabs) S::copy(a.shared_w, a.shared_w.data, panel, s, stage.slab(room));
  };
#pragma unroll
  for (int i = 0; i < kSharedSlabs; i++) copy(warp + i * a.shared_warps, i);
  wait_for_previous();
#pragma unroll 1
  for (int s = warp, room = 0; s < a.shared_slabs; s += a.shared_warps, room = (room + 1) % kSharedSlabs) {
#pragma unroll 1
    for (int t = 0; t < a.tokens; t += kMaxColumns) {
      const int columns = min(kMaxColumns, a.tokens - t);
      constexpr int kAtOnce = kMaxColumns / S::kChunks;  // that are asked for
#pragma unroll 1
      for (int first = 0; first < columns; first += kAtOnce) {
        Row<S> rows[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          if (const int c = t + first + i; c < a.tokens)
            rows[i].load(a.shared + static_cast<int64_t>(c) * a.shared_w.k + s * S::kWidth, a.shared_w.k - s * S::kWidth, a.shared_scale + c);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          if (first + i < columns) rows[i].store(!Rounded && a.shared_int8, stage, first + i, (t + first + i) * a.shared_slabs + s);
      }
      S::wait();
      multiply_columns<S>(stage, stage.slab(room), columns, a.shared_w.shift, results);
    }
    copy(s + kSharedSlabs * a.shared_warps, room);
  }
}

// The same for one token whose activations are BF16, by warps of at most two slabs: asks for what both are multiplied with before it waits for
// either. Each slab has a stage of its own; they lie behind each other.
template <class S>
__device__ __forceinline__ void down_shared_one(const Down& a, int warp, int panel, uint8_t* stages, float* results) {
  constexpr int kEach = kSharedSlabs;
  auto stage = [&](int i) { return Stage{stages + (warp * kEach + i) * shared_stage_one(), 1}; };
  auto number = [&](int i) { return warp + i * a.shared_warps; };  // of a slab
#pragma unroll
  for (int i = 0; i < kEach; i++)
    if (number(i) < a.shared_slabs) S::copy(a.shared_w, a.shared_w.data, panel, number(i), stage(i).slab());
  if (lane_id() < 2) prefetch_l2(lane_id() ? a.shared : a.shared_scale);
  wait_for_previous();
  Row<S> rows[kEach];
#pragma unroll
  for (int i = 0; i < kEach; i++) rows[i].load(a.shared + number(i) * S::kWidth, a.shared_w.k - number(i) * S::kWidth, a.shared_scale);
#pragma unroll
  for (int i = 0; i < kEach; i++) rows[i].store(false, stage(i), 0, number(i));
  S::wait();
#pragma unroll 1
  for (int i = 0; i < kEach && number(i) < a.shared_slabs; i++) multiply_columns<S>(stage(i), stage(i).slab(), 1, a.shared_w.shift, results);
}

// The end of all kernels: results of choices (T, K * slabs, 16) and of the shared expert (T, shared_slabs, 16) are added to h, which the thread
// has asked for. By all threads of the block; the first ones have an output each.
__device__ __forceinline__ void add_up(const Down& a, int panel, const float* choices, const float* others, const float* h) {
  const int t = static_cast<int>(threadIdx.x) / kPanelRows, r = static_cast<int>(threadIdx.x) % kPanelRows;
  copy_async_wait<0>();
  __syncthreads();
  if (t >= a.tokens) return;
  float sum = 0;
#pragma unroll 5
  for (int i = 0; i < a.chosen * a.slabs; i++) sum += choices[(t * a.chosen * a.slabs + i) * kPanelRows + r];
#pragma unroll 4
  for (int i = 0; i < a.shared_slabs; i++) sum += others[(t * a.shared_slabs + i) * kPanelRows + r];
  a.h[static_cast<int64_t>(t) * a.d + panel * kPanelRows + r] = *h + sum;
}
__device__ __forceinline__ void ask_for_h(const Down& a, int panel, float* h) {
  const int t = static_cast<int>(threadIdx.x) / kPanelRows, r = static_cast<int>(threadIdx.x) % kPanelRows;
  if (t < a.tokens) copy_async4(h, a.h + static_cast<int64_t>(t) * a.d + panel * kPanelRows + r);
  copy_async_commit();  // what the thread has copied by now; who waits, waits only for what is committed
}

// W: of the routed experts, Shared: of the shared one
template <DType W, DType Shared>
__global__ void __launch_bounds__((kMaxChoiceWarps + kMaxSharedWarps) * 32, 1) moe_down_few_k(const __grid_constant__ Down a) {
  extern __shared__ __align__(16) uint8_t shared[];
  const int warp = warp_id(), panel = static_cast<int>(blockIdx.x);
  const int extra = warp - a.choice_warps;  // of the shared expert
  float* choices = reinterpret_cast<float*>(shared + a.results);        // (T, K*slabs, 16)
  float* others = reinterpret_cast<float*>(shared + a.shared_results);  // (T, shared_slabs, 16)
  float* h = reinterpret_cast<float*>(shared + a.h_at) + threadIdx.x;
  if (extra < 0) {
    const float* soon[4] = {a.weights, a.inner, a.h, reinterpret_cast<const float*>(a.ids)};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (threadIdx.x == i) prefetch_l2(soon[i]);
    wait_for_previous();
    ask_for_h(a, panel, h);
    down_choices<Slab<W, false>>(a, panel, {shared + warp * choice_stage(a.columns), 1}, choices);
  } else {
    down_shared<Slab<Shared, false>, false>(a, extra, panel, {shared + a.shared_stages + extra * shared_stage(a.columns), kSharedSlabs}, others);
  }
  let_next_start();  // a warp may have had nothing to ask for
  add_up(a, panel, choices, others, h);
}

// ---- INT4 g128, F = 512 ---------------------------------------------------------------------------------------------------

constexpr int kMostAtOnce = 2;                // slabs that a warp has room for
constexpr int kMaxChoices = kFewTokens * 16;  // of all tokens, one for each thread of the fewest choice warps
static_assert(kMaxChoices <= kFewTokens * kPanelRows);
using QuickSlab = Slab<DType::INT4, true>;
constexpr int kQuickPitch = QuickSlab::kWidth + QuickSlab::kPad;

struct QuickDown {
  Down down;             // its offsets too
  const float* logits;   // (T, E) or null: the ids are to be read
  const uint16_t* rounded;  // rounded_inner(), or null: inner is to be rounded
  int experts, at_once;
  int x, ids, order, list;  // offsets: (T*K, kQuickPitch) BF16, (T*K), (T*K), (T, 32) Candidate; slabs lie at 0
};

constexpr int kBounds = 1024;  // 64 registers a thread: blocks of gate_up and of what comes behind have room on the same multiprocessor

template <DType Shared>
__global__ void __launch_bounds__(kBounds, 1) moe_down_quick_k(const __grid_constant__ QuickDown q) {
  using S = QuickSlab;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ Barrier full[kMaxChoiceWarps * kMostAtOnce];  // of the warps' slabs
  const Down& a = q.down;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id(), panel = static_cast<int>(blockIdx.x);
  float* choices = reinterpret_cast<float*>(shared + a.results);        // (T*K, 16)
  float* others = reinterpret_cast<float*>(shared + a.shared_results);  // (T, shared_slabs, 16)
  float* h = reinterpret_cast<float*>(shared + a.h_at) + tid;
  if (warp >= a.choice_warps) {
    const int extra = warp - a.choice_warps;
    down_shared<Slab<Shared, false>, true>(a, extra, panel, {shared + a.shared_stages + extra * shared_stage(a.columns), kSharedSlabs}, others);
    add_up(a, panel, choices, others, h);
    return;
  }
  const int threads = a.choice_warps * 32;
  auto sync = [&] { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); };  // of the choice warps
  int32_t *ids = reinterpret_cast<int32_t*>(shared + q.ids), *order = reinterpret_cast<int32_t*>(shared + q.order);
  if (lane < q.at_once) init_barrier(full + warp * q.at_once + lane, kFillArrivals), publish_barriers();
  if (tid < 4) prefetch_l2(tid == 0 ? a.weights : tid == 1 ? a.inner : tid == 2 ? a.h : reinterpret_cast<const float*>(a.ids));
  const bool early = q.logits;
  if (!early) wait_for_previous();
  if (early) {
#pragma unroll 1
    for (int t = warp; t < a.tokens; t += a.choice_warps)
      top(EarlyLogits{q.logits + static_cast<int64_t>(t) * q.experts}, q.experts, a.chosen, ids + t * a.chosen,
          reinterpret_cast<Candidate*>(shared + q.list) + t * 32, reinterpret_cast<float*>(shared + warp * q.at_once * a.w.panel_bytes));
    publish_barriers();  // the logits lay where slabs will be
  } else if (tid < a.choices) {
    ids[tid] = a.ids[tid];
  }
  sync();
  // Choices in the order of their experts: expert << 16 | choice
  if (tid < a.choices) {
    const int e = ids[tid];
    int before = 0;
#pragma unroll 4
    for (int c = 0; c < a.choices; c++) before += ids[c] < e + (c < tid);
    order[before] = e << 16 | tid;
  }
  sync();
  auto expert = [&](int i) { return order[i] >> 16; };
  auto next = [&](int i) {  // from i on, the first place of the warp's where an expert begins
    while (i < a.choices && i > 0 && expert(i) == expert(i - 1)) i += a.choice_warps;
    return i;
  };
  auto ask = [&](int i, int room) {
    const uint8_t* const down = a.panel_of(expert(i));
    const int slot = warp * q.at_once + room, bytes = a.w.panel_bytes;
    fill(full + slot, 1, [&](int) {
      return Piece{shared + slot * bytes, down + static_cast<int64_t>(panel) * bytes, down ? static_cast<uint32_t>(bytes) : 0};
    });
  };
  const int begin = next(warp);
  int ahead = begin;
#pragma unroll 1
  for (int room = 0; room < q.at_once && ahead < a.choices; room++) ask(ahead, room), ahead = next(ahead + a.choice_warps);
  if (ahead >= a.choices) let_next_start();  // whose weights would have come in the way of ours
  if (early) wait_for_previous();
  if (q.rounded) {  // a warp fetches all rows that it multiplies with, and waits here only for those of its first expert
#pragma unroll 1
    for (int i = begin; i < a.choices; i = next(i + a.choice_warps)) {
#pragma unroll 1
      for (int same = i; same < a.choices && expert(same) == expert(i); same++) {
        const int c = order[same] & 0xffff;
        const uint16_t* from = q.rounded + c * S::kWidth + 8 * lane;
        uint16_t* to = reinterpret_cast<uint16_t*>(shared + q.x) + c * kQuickPitch + 8 * lane;
        static_assert(S::kWidth == 2 * 256);
        copy_async16(to, from), copy_async16(to + 256, from + 256);
      }
      if (i == begin) copy_async_commit();
    }
    ask_for_h(a, panel, h);
    copy_async_wait<1>();
    __syncwarp();
  } else {
    constexpr int kBatch = 8;  // loads of a lane at once
#pragma unroll 1
    for (int base = warp; base < a.choices * S::kChunks; base += kBatch * a.choice_warps) {
      float4 v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int c = base + i * a.choice_warps;
        v[i] = c < a.choices * S::kChunks ? load4(a.inner + static_cast<int64_t>(c) * kActGroup + 4 * lane) : float4{};
      }
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        const int c = base + i * a.choice_warps;
        if (c < a.choices * S::kChunks)
          store_rounded<S::kType>(v[i], false,
                                  reinterpret_cast<uint16_t*>(shared + q.x) + c / S::kChunks * kQuickPitch + c % S::kChunks * kActGroup);
      }
    }
    ask_for_h(a, panel, h);
    sync();
  }
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int i = begin, room = 0, phase = 0; i < a.choices; i = next(i + a.choice_warps)) {
    const int e = expert(i);
    const bool here = a.panel_of(e);
    const uint8_t* slab = shared + (warp * q.at_once + room) * a.w.panel_bytes;
#pragma unroll 1
    for (int first = i; first < a.choices && expert(first) == e; first += 8) {
      auto choice = [&](int column) {  // -1: there is none
        const int at = first + column;
        return at < a.choices && expert(at) == e ? order[at] & 0xffff : -1;
      };
      const int mine = choice(g), even = choice(2 * t), odd = choice(2 * t + 1);
      // loaded while the slab is on its way
      const float w_even = even >= 0 ? a.weights[even] : 0.f, w_odd = odd >= 0 ? a.weights[odd] : 0.f;
      float total[4] = {};
      const uint16_t* x = reinterpret_cast<const uint16_t*>(shared + q.x) + max(mine, 0) * kQuickPitch + t * S::kCell;
      wait_barrier(full + warp * q.at_once + room, phase);
      if (here) S::multiply(slab + a.w.scale_bytes, slab, x, nullptr, nullptr, a.w.shift, total);
      if (even >= 0) choices[even * kPanelRows + g] = w_even * total[0], choices[even * kPanelRows + g + 8] = w_even * total[2];
      if (odd >= 0) choices[odd * kPanelRows + g] = w_odd * total[1], choices[odd * kPanelRows + g + 8] = w_odd * total[3];
    }
    if (q.rounded) copy_async_wait<0>();  // the rows of the others
    __syncwarp();  // the slab may be replaced
    if (ahead < a.choices) ask(ahead, room), ahead = next(ahead + a.choice_warps);
    if (++room == q.at_once) room = 0, phase ^= 1;
    if (ahead >= a.choices) let_next_start();
  }
  let_next_start();
  add_up(a, panel, choices, others, h);
}

// One token behind gate_up, each choice with a warp and a slab of its own: nothing is sorted, and a warp waits only for the row that it multiplies
// with. What the quick one does, in the same order, with a third less code (measured on H200: a token is 1 % faster with BF16 rest, 3 % with INT8).
template <DType Shared>
__global__ void __launch_bounds__(kBounds, 1) moe_down_one_k(const __grid_constant__ QuickDown q) {
  using S = QuickSlab;
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ Barrier full[kMaxChoiceWarps];
  const Down& a = q.down;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id(), panel = static_cast<int>(blockIdx.x);
  float* choices = reinterpret_cast<float*>(shared + a.results);        // (K, 16)
  float* others = reinterpret_cast<float*>(shared + a.shared_results);  // (shared_slabs, 16)
  float* h = reinterpret_cast<float*>(shared + a.h_at) + tid;
  if (warp >= a.choice_warps) {
    down_shared_one<Slab<Shared, false>>(a, warp - a.choice_warps, panel, shared + a.shared_stages, others);
    add_up(a, panel, choices, others, h);
    return;
  }
  int32_t* ids = reinterpret_cast<int32_t*>(shared + q.ids);
  uint8_t* const slab = shared + warp * a.w.panel_bytes;
  uint16_t* const x = reinterpret_cast<uint16_t*>(shared + q.x) + warp * S::kWidth;
  if (lane == 0) init_barrier(full + warp, kFillArrivals), publish_barriers();
  if (tid < 3) prefetch_l2(tid == 0 ? a.weights : tid == 1 ? a.h : reinterpret_cast<const float*>(q.rounded));
  if (warp == 0) {
    top(EarlyLogits{q.logits}, q.experts, a.chosen, ids, reinterpret_cast<Candidate*>(shared + q.list), reinterpret_cast<float*>(slab));
    publish_barriers();  // the logits lay where the slab will be
  }
  asm volatile("bar.sync 1, %0;" ::"r"(a.choice_warps * 32) : "memory");
  const uint8_t* const down = a.panel_of(ids[warp]) + static_cast<int64_t>(panel) * a.w.panel_bytes;
  fill(full + warp, 1, [&](int) { return Piece{slab, down, static_cast<uint32_t>(a.w.panel_bytes)}; });
  let_next_start();  // whose weights would have come in the way of ours
  wait_for_previous();
  const uint16_t* const from = q.rounded + warp * S::kWidth + 8 * lane;
  static_assert(S::kWidth == 2 * 256);
  copy_async16(x + 8 * lane, from), copy_async16(x + 256 + 8 * lane, from + 256);
  ask_for_h(a, panel, h);
  const float weight = a.weights[warp];
  copy_async_wait<0>();
  __syncwarp();
  wait_barrier(full + warp, 0);
  float total[4] = {};
  S::multiply(slab + a.w.scale_bytes, slab, x + lane % 4 * S::kCell, nullptr, nullptr, a.w.shift, total);  // all columns are the same
  if (lane % 4 == 0) choices[warp * kPanelRows + lane / 4] = weight * total[0], choices[warp * kPanelRows + lane / 4 + 8] = weight * total[2];
  add_up(a, panel, choices, others, h);
}

// ---- launchers --------------------------------------------------------------------------------------------------------

constexpr int kSumWarps = kFewTokens * kPanelRows / 32;  // whose threads add up a panel of the output

template <DType W>
auto down_kernel(DType shared) {
  return shared == DType::INT8 ? moe_down_few_k<W, DType::INT8> : moe_down_few_k<W, DType::BF16>;
}

struct SharedMemory {  // of a block, cut from its begin on
  int end = 0;
  int take(int bytes) { return std::exchange(end, count(round_up(end + bytes, 16))); }
};

// Where things lie behind the slabs of the choice warps; returns the end.
int lay_out(Down& a, int slab_bytes) {
  SharedMemory s;
  s.take(slab_bytes);
  a.shared_stages = s.take(a.shared_warps * std::max(shared_stage(a.columns), kSharedSlabs * shared_stage_one()));
  a.results = s.take(a.tasks * kPanelRows * 4), a.shared_results = s.take(a.tokens * a.shared_slabs * kPanelRows * 4);
  a.h_at = s.take(a.tokens * kPanelRows * 4);
  return s.end;
}
int lay_out(QuickDown& q) {
  Down& a = q.down;
  SharedMemory s{lay_out(a, a.choice_warps * q.at_once * a.w.panel_bytes)};
  q.x = s.take(a.choices * kQuickPitch * 2), q.ids = s.take(a.choices * 4), q.order = s.take(a.choices * 4);
  q.list = s.take(q.logits ? a.tokens * 32 * static_cast<int>(sizeof(Candidate)) : 0);
  return s.end;
}

}  // namespace

void moe_few_down(const Context& c, const MoeDownArgs& args) {
  const DType type = args.experts.dtype, shared = args.shared_down.dtype;
  Down a{};
  a.tokens = count(args.h.rows()), a.chosen = count(args.ids.cols()), a.d = count(args.h.cols());
  const int64_t f = args.inner.cols(), fs = args.shared.cols();
  a.slabs = count((f + slab_width(type) - 1) / slab_width(type)), a.shared_slabs = count((fs + slab_width(shared) - 1) / slab_width(shared));
  const int room = count(static_cast<int64_t>(c.shared_max)) - 512;  // barriers besides
  a.w = make_matrix(args.experts.down(0), 16, 8), a.stride = args.experts.layout().stride;
  a.shared_warps = std::min(a.shared_slabs, kMaxSharedWarps);
  auto sized = [&](int tokens) {
    a.tokens = tokens, a.columns = std::min(tokens, kMaxColumns);
    a.choices = a.tokens * a.chosen, a.tasks = a.choices * a.slabs;
  };
  auto bytes = [&] { return lay_out(a, a.choice_warps * choice_stage(a.columns)); };
  sized(kFewTokens), a.choice_warps = kSumWarps;  // the choice of a kernel must not depend on T
  if (args.act == Act::F32 || type == DType::F32 || args.shared_act == Act::F32 || (shared != DType::BF16 && shared != DType::INT8) || bytes() > room) {
    moe_exact_down(c, args);
    return;
  }
  sized(count(args.h.rows()));
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32();
  a.where = args.experts.home ? args.experts.home->at : nullptr, a.down_offset = args.experts.layout().down_offset;
  a.shared = args.shared.f32(), a.shared_scale = args.shared_scale.f32(), a.shared_w = make_matrix(args.shared_down, 16, 8), a.h = args.h.f32();
  a.int8 = args.act == Act::INT8, a.shared_int8 = args.shared_act == Act::INT8;
  const auto run = [&](auto kernel, int shared_bytes, const auto& what) {
    launch(c, "moe_down", kernel, dim3(static_cast<unsigned>(a.d / kPanelRows)), dim3(static_cast<unsigned>((a.choice_warps + a.shared_warps) * 32)),
           static_cast<size_t>(shared_bytes), what);
  };
  if (plain(args.act, args.experts) && args.shared_act == Act::BF16 && f == QuickSlab::kWidth && a.chosen <= kMaxChoices / kFewTokens &&
      args.experts.count < 1 << 15) {
    // Up to 4 tokens: what has room beside gate_up (measured: of 8 to 16 warps with 1 or 2 slabs)
    const bool behind = args.logits && moe_gate_up_waits_first(c, a.d, count(f), args.experts.count, a.chosen), early = behind && !a.where;
    QuickDown q{};
    q.down = a, q.logits = early ? args.logits.f32() : nullptr, q.rounded = behind ? rounded_inner(c, a.choices, f) : nullptr;
    q.experts = args.experts.count, q.at_once = a.tokens > 4 ? 2 : 1;
    q.down.choice_warps = std::clamp(a.choices, kSumWarps, a.tokens > 4 ? 12 : a.tokens > 1 ? 10 : kMaxChoiceWarps);
    while (lay_out(q) > room && q.at_once > 1) q.at_once--;
    while (lay_out(q) > room && q.down.choice_warps > kSumWarps) q.down.choice_warps--;
    a.choice_warps = q.down.choice_warps;
    if (const int need = lay_out(q); need <= room) {  // else the other one, which gives the same bits
      const bool one = a.tokens == 1 && early && a.choice_warps == a.chosen && a.shared_slabs <= kSharedSlabs * a.shared_warps;
      if (one) run(shared == DType::INT8 ? moe_down_one_k<DType::INT8> : moe_down_one_k<DType::BF16>, need, q);
      else run(shared == DType::INT8 ? moe_down_quick_k<DType::INT8> : moe_down_quick_k<DType::BF16>, need, q);
      return;
    }
  }
  a.choice_warps = std::clamp(a.tasks, kSumWarps, kMaxChoiceWarps);
  while (bytes() > room) a.choice_warps--;
  const auto kernel = type == DType::INT4 ? down_kernel<DType::INT4> : type == DType::INT8 ? down_kernel<DType::INT8> : down_kernel<DType::BF16>;
  run(kernel(shared), bytes(), a);
}

}  // namespace qn::cuda
