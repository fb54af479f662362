// The kernel of cuda/step.cuh: a step of few tokens through all phases of a list.
#include "cuda/step.cuh"

#include <bit>
#include <cstring>
#include <vector>

#include "cuda/step_product.cuh"

namespace qn::cuda {
namespace {

// ---- experts ------------------------------------------------------------------------------------------------------------

// A group of 128 columns of a panel in INT4: two tiles and their scales. The codes q enter the tensor cores as 128 + q, for which nothing but
// a shift and a mask is needed, and 136 times the sum of x is taken from the result: codes are excess 8. The numbers that cancel are
// some twenty times the result, in fp32.
struct Group {
  uint4 tile[2];
  uint16_t lo, hi;  // scales of rows g, g + 8
  // tiles, scales: of the lane
  __device__ __forceinline__ void load(const uint8_t* tiles, const uint8_t* scales) {
    tile[0] = load_weights(tiles), tile[1] = load_weights(tiles + kTileBytes);
    lo = __ldg(reinterpret_cast<const uint16_t*>(scales)), hi = __ldg(reinterpret_cast<const uint16_t*>(scales) + 8);
  }
};
// The lane's values of a group of 128 of a row in INT4 order, as B fragments; and 136 times the sum of the group of columns 2t, 2t + 1
struct GroupX {
  uint4 v[4];
  float sum[2];
  __device__ __forceinline__ void load(const uint16_t* row, int group, bool live, int lane) {
    const uint4* at = reinterpret_cast<const uint4*>(row + group * 128 + lane % 4 * 16);
#pragma unroll
    for (int i = 0; i < 2; i++) v[2 * i] = live ? at[8 * i] : uint4{}, v[2 * i + 1] = live ? at[8 * i + 1] : uint4{};
    float d[4] = {};
    const uint32_t ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
#pragma unroll
    for (int i = 0; i < 4; i++) mma_16816(d, ones, v[i].x, v[i].y), mma_16816(d, ones, v[i].z, v[i].w);
    sum[0] = 136.f * d[0], sum[1] = 136.f * d[1];
  }
};
// The tile's codes of one k16 step, plus 128
template <int Step>
__device__ __forceinline__ void raised_fragment(const uint4& v, uint32_t (&a)[4]) {
  const uint32_t lo = Step < 2 ? v.x : v.y, hi = Step < 2 ? v.z : v.w;
  constexpr int shift = Step % 2 * 8;
  a[0] = ((lo >> shift) & 0x000f000fu) | 0x43004300u, a[1] = ((hi >> shift) & 0x000f000fu) | 0x43004300u;
  a[2] = ((lo >> (shift + 4)) & 0x000f000fu) | 0x43004300u, a[3] = ((hi >> (shift + 4)) & 0x000f000fu) | 0x43004300u;
}
__device__ __forceinline__ void multiply_group(const Group& w, const GroupX& x, float (&total)[4]) {
  float sum[2][4] = {};  // two chains, so that an instruction need not wait for the one before
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint4 b = x.v[2 * i], c = x.v[2 * i + 1];
    raised_fragment<0>(w.tile[i], a), mma_16816(sum[0], a, b.x, b.y);
    raised_fragment<1>(w.tile[i], a), mma_16816(sum[1], a, b.z, b.w);
    raised_fragment<2>(w.tile[i], a), mma_16816(sum[0], a, c.x, c.y);
    raised_fragment<3>(w.tile[i], a), mma_16816(sum[1], a, c.z, c.w);
  }
  const float l = half_bits_to_float(w.lo), h = half_bits_to_float(w.hi);
  total[0] += l * ((sum[0][0] - x.sum[0]) + sum[1][0]), total[1] += l * ((sum[0][1] - x.sum[1]) + sum[1][1]);
  total[2] += h * ((sum[0][2] - x.sum[0]) + sum[1][2]), total[3] += h * ((sum[0][3] - x.sum[1]) + sum[1][3]);
}

// c.todo, c.slot, c.distinct of c.ids, by all workers. c.used is zero for tokens > 1. Ends in a barrier.
template <int MaxT>
__device__ __forceinline__ void list_choices(Control& c, int tokens, int chosen) {
  const int tid = thread_anew();
  if (MaxT == 1 || tokens == 1) {  // in the order of choice
    if (tid < chosen) c.todo[tid] = c.ids[tid], c.slot[tid][0] = static_cast<uint8_t>(tid);
    if (tid == 0) c.distinct = chosen;
    workers_sync();
    return;
  }
  const bool mine = tid < tokens * chosen;
  const int e = mine ? c.ids[tid] : 0;
  if (tid < tokens * chosen * kFewTokens / 4) reinterpret_cast<uint32_t*>(c.slot)[tid] = ~0u;
  if (mine) atomicOr(&c.used[e / 32], 1u << (e % 32));
  workers_sync();
  int n = 0, at = 0;
#pragma unroll 1
  for (int i = 0; i < kQuickExperts / 32; i++) {
    const uint32_t bits = c.used[i];
    at += __popc(i < e / 32 ? bits : i == e / 32 ? bits & ((1u << (e % 32)) - 1) : 0);
    n += __popc(bits);
  }
  if (mine) c.todo[at] = e, c.slot[at][tid / chosen] = static_cast<uint8_t>(tid % chosen);
  if (tid == 0) c.distinct = n;
  workers_sync();
}

// c.ids, c.weights = the top K of every token, best first, equal ones by their index; a thread has two experts. Of 16 groups of 32 at least K have a
// maximum that is not below the K-th largest of the 16 maxima, so the answer is among the logits from there on: hardly ever more than
// two dozen, of which each finds its place by counting those before it. Weights are renormalised over the K. c.candidates is zero. Ends in
// a barrier.
template <int MaxT>
__device__ __forceinline__ void choose(const float* logits, int experts, int chosen, int tokens, Control& c) {
  const int tid = thread_anew(), warp = tid >> 5, lane = tid & 31;
  uint32_t key[MaxT][2];
#pragma unroll
  for (int t = 0; t < MaxT; t++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (t < tokens) key[t][h] = tid + h * kStepThreads < experts ? __float_as_uint(logits[t * experts + tid + h * kStepThreads]) : 0x7fffffffu;
#pragma unroll
  for (int t = 0; t < MaxT; t++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (t < tokens) {
        key[t][h] = rank_key(__uint_as_float(key[t][h]));
        const uint32_t most = __reduce_max_sync(kAll, key[t][h]);
        if (lane == 0) c.maxima[t * kMaxima + h * kStepWarps + warp] = most;
      }
  workers_sync();
#pragma unroll
  for (int t = 0; t < MaxT; t++)
    if (t < tokens) {
      const uint32_t mine = c.maxima[t * kMaxima + lane % kMaxima];
      int above = 0;
#pragma unroll
      for (int i = 0; i < kMaxima; i += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(c.maxima + t * kMaxima + i);
        above += (v.x > mine) + (v.y > mine) + (v.z > mine) + (v.w > mine);
      }
      const uint32_t least = __reduce_min_sync(kAll, above < chosen ? mine : ~0u);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int e = tid + h * kStepThreads;
        if (key[t][h] < least || e >= experts) continue;
        const int at = atomicAdd(&c.candidates[t], 1);
        if (at < 32) c.list[t][at] = {key[t][h], e};
      }
    }
  workers_sync();
  if (warp < tokens) {
    const int n = c.candidates[warp];
    int32_t* const ids = c.ids + warp * chosen;
    float* const weights = c.weights + warp * chosen;
    if (n > 32) {
      any_top(logits + warp * experts, experts, chosen, ids);
      if (lane < chosen) weights[lane] = logits[warp * experts + ids[lane]];
    } else if (lane < n) {
      const Candidate mine = c.list[warp][lane];
      int place = 0;
#pragma unroll 4
      for (int i = 0; i < n; i++) {
        const Candidate other = c.list[warp][i];
        place += other.key > mine.key || (other.key == mine.key && other.expert < mine.expert);
      }
      if (place < chosen) ids[place] = mine.expert, weights[place] = value_of(mine.key);
    }
    __syncwarp();
    const float v = lane < chosen ? __expf(weights[lane] - weights[0]) : 0.f, sum = warp_sum(v);
    __syncwarp();
    if (lane < chosen) weights[lane] = __fdividef(v, sum);
  }
  workers_sync();
}

constexpr int kUnits = 5;  // panels at once: 10 experts of 64 panels are five for each of 128 multiprocessors
__host__ __device__ constexpr int gate_up_bytes(int tokens, int k) {
  return kept_bytes(tokens, k) + 2 * kUnits * kStepWarps * tokens * kPanelRows * 4;
}

// Warp w has groups w and w + 8 of K of every panel: two tiles each.
template <int MaxT>
__device__ __forceinline__ void gate_up(const GateUpPhase& a, int tokens, Control& c, uint8_t* work) {
  const int tid = thread_anew(), warp = tid >> 5, lane = tid & 31, g = lane / 4, t = lane % 4, groups = a.k / 128, grid = static_cast<int>(gridDim.x);
  uint16_t* const kept = reinterpret_cast<uint16_t*>(work);
  float* partial = reinterpret_cast<float*>(work + kept_bytes(tokens, a.k));  // (2, kUnits, warps, T, 16)
  if (MaxT > 1 && tid < kQuickExperts / 32) c.used[tid] = 0;
  if (tid < kFewTokens) c.candidates[tid] = 0;
  wait_for_all();
  choose<MaxT>(a.logits, a.experts, a.chosen, tokens, c);
  if (!a.kept)
#pragma unroll 1
    for (int i = 0; i < tokens * groups; i += kStepWarps) {
      const int q = i + warp, k = q % groups * 128 + 4 * lane;
      if (q < tokens * groups) store_int4(kept + q / groups * kept_pitch(a.k), k, load4(a.x + q / groups * a.k + k));
    }
  list_choices<MaxT>(c, tokens, a.chosen);
  const int panels = 1 << a.shift, units = c.distinct << a.shift;
  int tiles_at[kWarpGroups], scales_at[kWarpGroups];  // where there is no group the last one, times zero
#pragma unroll
  for (int h = 0; h < kWarpGroups; h++) {
    const int q = min(warp + h * kStepWarps, groups - 1);
    tiles_at[h] = a.scale_bytes + q * (2 * kTileBytes) + lane * 16, scales_at[h] = q * (kPanelRows * 2) + g * 2;
  }
  const int size = tokens * kPanelRows, halves = groups > kStepWarps ? 2 : 1;
  int half = kUnits * kStepWarps * size;
  bool report = static_cast<int>(blockIdx.x) == min(units, grid) - 1;
#pragma unroll 1
  for (int first = static_cast<int>(blockIdx.x); first < units; first += kUnits * grid) {
    Group w[kUnits][kWarpGroups];
#pragma unroll
    for (int i = 0; i < kUnits; i++) {
      const int u = min(first + i * grid, units - 1);  // of units that are not there nobody reads the results
      const uint8_t* const panel = a.w + c.todo[u >> a.shift] * a.stride + (u & (panels - 1)) * a.panel_bytes;
#pragma unroll
      for (int h = 0; h < kWarpGroups; h++) w[i][h].load(panel + tiles_at[h], panel + scales_at[h]);
    }
    if (report && tid < tokens * a.chosen) a.ids[tid] = c.ids[tid], a.weights[tid] = c.weights[tid];
    report = false;
    GroupX x[kWarpGroups];
#pragma unroll
    for (int h = 0; h < kWarpGroups; h++) x[h].load(kept + g * kept_pitch(a.k), warp + h * kStepWarps, g < tokens && warp + h * kStepWarps < groups, lane);
    float* q = partial + warp * size + 2 * t * kPanelRows + g;
#pragma unroll
    for (int i = 0; i < kUnits; i++) {
      float total[4] = {};
#pragma unroll
      for (int h = 0; h < kWarpGroups; h++)
        if (h < halves) multiply_group(w[i][h], x[h], total);
      if (2 * t < tokens) q[0] = total[0], q[8] = total[2];
      if (MaxT > 1 && 2 * t + 1 < tokens) q[16] = total[1], q[24] = total[3];
      q += kStepWarps * size;
    }
    workers_sync();
#pragma unroll 1
    for (int id = tid; id < kUnits * tokens * 8; id += kStepThreads) {
      const int r = id % 8, i = id / 8 % kUnits, token = id / (8 * kUnits), u = first + i * grid;
      if (u >= units) continue;
      const int j = c.slot[u >> a.shift][token];
      if (j == kNot) continue;
      const float* from = partial + i * kStepWarps * size + token * kPanelRows + r;
      float gate = 0, up = 0;
#pragma unroll
      for (int v = 0; v < kStepWarps; v++) gate += from[v * size], up += from[v * size + 8];
      a.inner[static_cast<int64_t>(token * a.chosen + j) * a.f + (u & (panels - 1)) * 8 + r] = silu(gate) * up;
    }
    partial += half;
    half = -half;
  }
}

__host__ __device__ constexpr int down_bytes(int tokens, int chosen, int k, int shared_k) {
  return static_cast<int>(round_up(tokens * chosen * kept_pitch(k) * 2, 16)) + tokens * natural_pitch(shared_k) * 2 +
         (2 * tokens * chosen + kStepWarps * tokens) * kPanelRows * 4;
}

// A block has a panel of the output; a warp halves of K of its experts, and a slice of the shared expert's K. The results are added in the order
// choice 0, 1, ..., shared expert.
template <DType W, int MaxT>
__device__ __forceinline__ void down(const Phase& phase, const Stream& s, Control& c, uint8_t* ring, uint8_t* work, const StepArgs& args) {
  const DownPhase& a = phase.down;
  const int tokens = phase.tokens;
  const int tid = thread_anew(), warp = tid >> 5, lane = tid & 31, g = lane / 4, t = lane % 4, grid = static_cast<int>(gridDim.x);
  const int groups = a.k / 128, panels = a.d / kPanelRows, rows = tokens * a.chosen;
  uint16_t* const inner = reinterpret_cast<uint16_t*>(work);  // (T*K, pitch)
  uint16_t* const shared = inner + round_up(rows * kept_pitch(a.k), 8);
  float* const results = reinterpret_cast<float*>(shared + tokens * natural_pitch(a.shared_k));  // (T*K, halves of K, 16)
  float* const others = results + rows * 2 * kPanelRows;                                         // (warps, T, 16)
  Group w[kDownTasks][kDownGroups / 2];
  const int tiles_at = a.scale_bytes + lane * 16, scales_at = g * 2;
  auto load = [&](int first, int panel) {
    const int all = 2 * c.distinct;
#pragma unroll
    for (int j = 0; j < kDownTasks; j++) {
      const int i = first + j * kStepWarps;
      if (i >= all) break;
      const uint8_t* from = a.w + c.todo[i / 2] * a.stride + panel * a.panel_bytes;
#pragma unroll
      for (int h = 0; h < kDownGroups / 2; h++) {
        const int q = min(i % 2 * (kDownGroups / 2) + h, groups - 1);
        w[j][h].load(from + tiles_at + q * (2 * kTileBytes), from + scales_at + q * (kPanelRows * 2));
      }
    }
  };
  int panel = static_cast<int>(blockIdx.x);
  if (a.known && panel < panels) load(warp, panel);
  if (!a.known && MaxT > 1 && tid < kQuickExperts / 32) c.used[tid] = 0;
  wait_for_all();
  if (!a.known) {
    if (tid < rows) c.ids[tid] = a.ids[tid], c.weights[tid] = a.weights[tid];
    workers_sync();
    list_choices<MaxT>(c, tokens, a.chosen);
    if (panel < panels) load(warp, panel);
  }
  const int out = tid / kPanelRows, row = tid % kPanelRows;
  const bool mine = out < tokens;
  const float scale = mine ? a.shared_scale[out] : 0.f;
  float* const h = a.h + static_cast<int64_t>(out) * a.d + row;
  float old = mine && panel < panels ? h[panel * kPanelRows] : 0.f;
  // Activations: groups of the experts' rows, then of the shared one's
  const int group_shift = a.group_shift, all = rows << group_shift;
  constexpr int kBatch = 5;
#pragma unroll 1
  for (int first = warp; first < all; first += kBatch * kStepWarps) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; i++)
      if (first + i * kStepWarps < all) v[i] = load4(a.inner + (first + i * kStepWarps) * 128 + 4 * lane);
#pragma unroll
    for (int i = 0; i < kBatch; i++) {
      const int q = first + i * kStepWarps;
      if (q < all) store_int4(inner + (q >> group_shift) * kept_pitch(a.k), (q & (groups - 1)) * 128 + 4 * lane, v[i]);
    }
  }
#pragma unroll 1
  for (int i = 0; i < tokens; i++)
#pragma unroll 1
    for (int k = tid * 4; k < a.shared_k; k += kStepThreads * 4) store_natural(shared + i * natural_pitch(a.shared_k), k, load4(a.shared + i * a.shared_k + k));
  workers_sync();

#pragma unroll 1
  for (; panel < panels; panel += grid) {
#pragma unroll 1
    for (int first = warp; first < 2 * c.distinct; first += kDownTasks * kStepWarps) {
      if (first > warp) load(first, panel);
#pragma unroll
      for (int j = 0; j < kDownTasks; j++) {
        const int i = first + j * kStepWarps;
        if (i >= 2 * c.distinct) break;
        const int column = g < tokens ? c.slot[i / 2][g] : kNot;
        const uint16_t* x = inner + (column == kNot ? 0 : g * a.chosen + column) * kept_pitch(a.k);
        float total[4] = {};
#pragma unroll
        for (int h = 0; h < kDownGroups / 2; h++) {
          const int q = i % 2 * (kDownGroups / 2) + h;
          GroupX v;
          v.load(x, q, column != kNot && q < groups, lane);
          multiply_group(w[j][h], v, total);
        }
#pragma unroll
        for (int n = 0; n < (MaxT > 1 ? 2 : 1); n++) {
          const int token = 2 * t + n, choice = token < tokens ? c.slot[i / 2][token] : kNot;
          if (choice == kNot) continue;
          float* to = results + ((token * a.chosen + choice) * 2 + i % 2) * kPanelRows + g;
          to[0] = total[n], to[8] = total[n + 2];
        }
      }
    }
    const uint16_t* x = shared + g * natural_pitch(a.shared_k) + 8 * t;
    float total[2][4] = {};
#pragma unroll 1
    for (int u = slice<W>(s.k, warp); u < slice<W>(s.k, warp + 1); u++) {
      Feed<W> feed(c, ring, args, phase.stream);
      multiply_unit<W>(total, feed.front(), x + u * step_unit_k(W), g < tokens, s.shift, lane);
      feed.drop(), feed.save();
      top_up<W>(c, ring, args, phase.stream, false);
    }
    store_total<MaxT>(total, others + warp * tokens * kPanelRows, tokens, lane);
    if (panel + grid < panels) load(warp, panel + grid);
    workers_sync();
    if (mine) {
      float sum = 0, other = 0;
#pragma unroll 2
      for (int j = 0; j < a.chosen; j++) {
        const float* from = results + (out * a.chosen + j) * 2 * kPanelRows + row;
        sum += c.weights[out * a.chosen + j] * (from[0] + from[kPanelRows]);
      }
#pragma unroll 4
      for (int i = 0; i < kStepWarps; i++) other += others[(i * tokens + out) * kPanelRows + row];
      h[panel * kPanelRows] = old + (sum + scale * other);
      if (panel + grid < panels) old = h[(panel + grid) * kPanelRows];
    }
    if (panel + grid < panels) workers_sync();  // before the results are replaced
  }
}

// ---- the rest -----------------------------------------------------------------------------------------------------------

template <int MaxT>
__device__ __forceinline__ void delta_phase(const Delta& a, uint8_t* work) {
  const int warp = thread_anew() >> 5, block = static_cast<int>(blockIdx.x), grid = static_cast<int>(gridDim.x), columns = a.dv / kColumns, items = columns * a.gv;
  if (block >= items || warp >= kDeltaWarps) return wait_for_all();
  bool waited = false;
#pragma unroll 1
  for (int item = block; item < items; item += grid) {
    auto ready = [&] {
      if (!waited) wait_for_all();
      waited = true;
    };
    delta_few<kDim / 16, MaxT, true>(a, item % columns, item / columns, reinterpret_cast<float4*>(work), ready, barrier<4, kDeltaThreads>);
    if (item + grid < items) barrier<4, kDeltaThreads>();
  }
}

template <int MaxT>
__device__ __forceinline__ void attention_phase(const AttentionPhase& a, uint8_t* memory) {
  const int block = static_cast<int>(blockIdx.x);
  static_assert(kFewThreads == kStepThreads);
  if (block >= a.blocks * a.a.kv_heads) return wait_for_all();
  attention_few<MaxT == 1 ? 1 : 2, true>(a.a, a.f, block % a.a.kv_heads, block / a.a.kv_heads, a.blocks, memory, wait_for_all, workers_sync);
}

__device__ __forceinline__ void combine_phase(const AttentionPhase& a, uint8_t* work) {
  wait_for_all();
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x); item < a.a.heads * a.f.tokens * 4; item += static_cast<int>(gridDim.x)) {
    combine_few(a.a, a.f, item / 4 % a.a.heads, item / (4 * a.a.heads), item % 4, *reinterpret_cast<CombineRoom*>(work), workers_sync);
    workers_sync();
  }
}

// ---- the kernel ---------------------------------------------------------------------------------------------------------

// A warp beside the workers. It fetches the next phase and one stream more while a phase runs, and speaks for the block at the barrier of
// all blocks: a thread that has copies of its own on their way would wait for them before its release. c.phase[0] and the first streams
// are there.
__device__ __forceinline__ void clerk(const StepArgs& args, const uint8_t* phases, const Stream* streams, Control& c) {
  const int lane = thread_anew() & 31;
  const auto grid = static_cast<uint32_t>(gridDim.x);
#pragma unroll 1
  for (int i = 0; i < args.count; i++) {
    const int stream = reinterpret_cast<const Phase*>(c.phase[i & 1])->stream + kAhead;
    const bool has_phase = i + 1 < args.count && lane < kPhaseBytes / 16, has_stream = stream < args.stream_count && lane < static_cast<int>(sizeof(Stream) / 16);
    uint4 phase{}, more{};
    if (has_phase) phase = reinterpret_cast<const uint4*>(phases + static_cast<int64_t>(i + 1) * kPhaseBytes)[lane];
    if (has_stream) more = reinterpret_cast<const uint4*>(streams + stream)[lane];
    if (i > 0 && lane == 0) {
      const uint32_t all = static_cast<uint32_t>(i) * grid;
      uint32_t v;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(args.counter) : "memory");
      while (v < all);
    }
    __syncwarp();
    wait_for_all();
    if (has_phase) reinterpret_cast<uint4*>(c.phase[(i + 1) & 1])[lane] = phase;  // nobody reads the phase before this one any more
    if (has_stream) reinterpret_cast<uint4*>(&c.window[stream % kWindow])[lane] = more;
    end_phase();
    if (lane == 0) {
      if (i + 1 < args.count) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(args.counter) : "memory");
      else if (args.count > 1 && atomicAdd(args.counter, 1u) == static_cast<uint32_t>(args.count) * grid - 1) *args.counter = 0;
    }
  }
}

template <DType W, int MaxT>
__global__ void __launch_bounds__(kStepThreads + 32, 1) step_k(const __grid_constant__ StepArgs args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t shared[];
  Control& c = *reinterpret_cast<Control*>(shared);
  uint8_t* const ring = shared + kControlBytes;
  uint8_t* const work = ring + args.levels * kLevelBytes;
  const int warp = warp_id(), lane = lane_id();
  const uint8_t* const phases = args.phases ? args.phases : reinterpret_cast<const uint8_t*>(&args.one);
  const Stream* const streams = args.phases ? args.streams : &args.one_stream;
  static_assert(kPhaseBytes / 16 <= 32 && sizeof(Stream) / 16 <= 32 && kAhead <= kStepWarps);
  if (warp < kAhead && warp < args.stream_count && lane < static_cast<int>(sizeof(Stream) / 16))
    reinterpret_cast<uint4*>(&c.window[warp])[lane] = reinterpret_cast<const uint4*>(streams + warp)[lane];
  if (warp == kAhead && lane < static_cast<int>(sizeof(Phase) / 16)) reinterpret_cast<uint4*>(c.phase[0])[lane] = reinterpret_cast<const uint4*>(phases)[lane];
  if (warp < kStepWarps && lane == 0) c.place[warp] = {0, 0, -1, 0, 0, 0, 0, args.levels};
  __syncthreads();
  if (warp == kStepWarps) {
    wait_for_previous();
    clerk(args, phases, streams, c);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < args.count; i++) {
    const Phase& p = *reinterpret_cast<const Phase*>(c.phase[i & 1]);
    const Stream& s = c.window[p.stream % kWindow];
    if (i == 0 || p.resume || p.kind == Kind::Product || p.kind == Kind::Down) top_up<W>(c, ring, args, p.stream, p.resume);
    if (i == 0) wait_for_previous();  // but for weights everything may be of the kernel before
    if (i + 1 == args.count) let_next_start();
    switch (p.kind) {
      case Kind::Product: product<W, MaxT>(p, s, c, ring, work, args); break;
      case Kind::Down: down<W, MaxT>(p, s, c, ring, work, args); break;
      case Kind::Delta: delta_phase<MaxT>(p.delta, work); break;
      case Kind::GateUp: gate_up<MaxT>(p.gate_up, p.tokens, c, work); break;
      case Kind::Attention: attention_phase<MaxT>(p.attention, ring + args.low * kLevelBytes); break;
      case Kind::Combine: combine_phase(p.attention, work); break;
    }
    end_phase();
  }
#else
  (void)args;
#endif
}

// ---- the list -----------------------------------------------------------------------------------------------------------

constexpr int kSharedBytes = 227 * 1024;  // of a block, on every GPU that runs this
constexpr int kMaxPhases = 1000;
constexpr int kLow = 2;                   // levels that the ring keeps during attention

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
int count(int64_t n) { return static_cast<int>(n); }

// Shared memory that a phase works in
int work_of(const Phase& p, const Stream* s) {
  switch (p.kind) {
    case Kind::Product: return product_bytes(p.tokens, s->k, p.product.keep, s->exact_rows[0] > 0);
    case Kind::Delta: return count(static_cast<int64_t>(few_shared(p.tokens == 1 ? 1 : kFewTokens, kDim)));
    case Kind::Attention: return 0;  // has what the ring leaves
    case Kind::Combine: return static_cast<int>(sizeof(CombineRoom));
    case Kind::GateUp: return gate_up_bytes(p.tokens, p.gate_up.k);
    case Kind::Down: return down_bytes(p.tokens, p.down.chosen, p.down.k, p.down.shared_k);
  }
  return 0;
}

}  // namespace

struct StepList::Impl {
  std::vector<Phase> phases;
  std::vector<Stream> streams;
  DType w = DType::F32;        // of the streams; F32: there is none
  int tokens = 0, work = 0;    // the most of any phase
  const float* normed = nullptr;   // what the last product leaves
  const int32_t* chosen = nullptr;  // what the last gate_up leaves

  // Adds a phase and, where it reads one, its stream; false: it does not go with what is there, or nowhere.
  bool add(Phase p, const Stream* s, DType type) {
    if (p.tokens < 1 || p.tokens > kFewTokens || phases.size() >= kMaxPhases) return false;
    if (s && w != DType::F32 && w != type) return false;
    const int most = std::max(tokens, p.tokens), room = std::max(work, work_of(p, s));
    if (levels(room) < 1) return false;
    tokens = most, work = room;
    p.stream = count(static_cast<int64_t>(streams.size()));
    if (s) w = type, streams.push_back(*s), streams.back().pause = pause;
    if (s) pause = 0;
    if (p.kind == Kind::Combine) {  // the last of its layer, as far as is known
      for (size_t i = phases.size(); i-- > 0 && (phases[i].kind == Kind::Attention || phases[i].kind == Kind::Combine);) phases[i].resume = 0;
      p.resume = 1;
    }
    if (p.kind == Kind::Attention) pause = 1;
    phases.push_back(p);
    normed = nullptr, chosen = nullptr;
    return true;
  }
  int pause = 0;
  static int levels(int work) { return std::min((kSharedBytes - kControlBytes - work) / kLevelBytes, kLevelsMax); }
  static int low(int levels) { return std::min(levels, kLow); }
};

StepList::StepList() : impl_(std::make_unique<Impl>()) {}
StepList::~StepList() = default;
size_t StepList::phases() const { return impl_->phases.size(); }

namespace {

// A product's stream and phase; false: not for this kernel. The answer does not depend on T.
bool make_product(const Product& p, Phase& phase, Stream& s) {
  const Input& in = p.in;
  const bool norm = in.mix == Mix::Norm;
  if (!p.w || p.act != Act::BF16 || (p.w.dtype != DType::BF16 && p.w.dtype != DType::INT8) || !quick_shape(in) || (norm && in.k > 2048)) return false;
  if (p.w.dtype == DType::BF16 && p.w.row_stride % 8) return false;
  if (!aligned(p.w.data) || !aligned(in.a) || !aligned(in.b) || !aligned(in.w) || !aligned(p.normed) || in.lda % 4 || in.ldb % 4) return false;
  const int64_t exact = p.exact[0].w.rows() + p.exact[1].w.rows();
  for (const ExactRows& e : p.exact)
    if (e.w && (e.w.dtype != DType::BF16 || e.w.row_stride != in.k || !aligned(e.w.data))) return false;
  if (p.exact[1].w && !p.exact[0].w) return false;
  if ((in.mix != Mix::Norm && (exact > 0 || p.normed)) || in.k % step_unit_k(p.w.dtype)) return false;
  s = {};
  s.w = p.w.bytes(), s.k = in.k, s.rows = count(p.w.rows()), s.panels = count(t16_panels(p.w.rows()));
  if (is_t16(p.w.dtype)) {
    s.stride = t16_panel_bytes(p.w.dtype, in.k, p.w.group);
    s.shift = std::countr_zero(p.w.group), s.scale_bytes = count(t16_scale_bytes(in.k, p.w.group));
    s.tiles = count((s.stride - s.scale_bytes) / kTileBytes);
  } else {
    const bool halves = p.store == Store::SwiGLU;  // gate rows, then up rows
    s.stride = p.w.row_stride * 2, s.step = halves ? 8 : 16, s.pair = halves ? s.rows / 2 : 8;
  }
  s.tasks = s.panels + count((exact + 7) / 8);
  phase = Phase();
  phase.kind = Kind::Product, phase.tokens = in.tokens;
  phase.product = {};
  ProductPhase& q = phase.product;
  q.in = in, q.store = p.store, q.y = p.y, q.ldy = p.ldy, q.normed = p.normed;
  for (int i = 0; i < 2; i++) {
    s.exact[i] = p.exact[i].w.bytes(), s.exact_rows[i] = count(p.exact[i].w.rows());
    q.exact_y[i] = p.exact[i].y, q.exact_ldy[i] = p.exact[i].ldy, q.squash[i] = p.exact[i].squash;
  }
  return true;
}

bool plain(Act act, const Experts& e) { return e.dtype == DType::INT4 && e.group == 128 && act == Act::BF16 && e.d % 128 == 0 && e.f % 128 == 0 && e.d <= 2048 && e.f <= 512 && (e.f & (e.f - 1)) == 0; }

}  // namespace

bool StepList::add(const Context&, const Product& p) {
  Phase phase;
  Stream s;
  if (!make_product(p, phase, s) || !impl_->add(phase, &s, p.w.dtype)) return false;
  impl_->normed = p.normed;
  return true;
}

bool StepList::add(const Context&, const DeltaNetArgs& args) {
  Phase p;
  p.kind = Kind::Delta, p.delta = make_delta(args), p.tokens = p.delta.tokens;
  if (p.delta.dk != kDim || p.delta.slots < kFewTokens + 3) return false;
  p.delta.ring_inside = true;
  return impl_->add(p, nullptr, DType::F32);
}

bool StepList::add(const Context& c, const AttentionArgs& args) {
  Attn a = make_attn(args);
  const int group = a.heads / a.kv_heads;
  if (!attention_is_fast(args) || group > 8 || a.kv_heads > c.sms) return false;
  a.q_scale *= kLog2e;
  const int tokens = a.tokens, at_once = tokens == 1 ? 1 : 2;
  if (impl_->phases.size() + 8 > kMaxPhases) return false;
  const int low = kLow;  // or fewer
  for (int first = 0; first < tokens; first += at_once) {
    Phase p;
    p.kind = Kind::Attention, p.tokens = tokens, p.attention = {};
    AttentionPhase& q = p.attention;
    q.a = a, q.f = make_few(c, a);
    q.f.first = first, q.f.tokens = std::min(at_once, tokens - first);
    q.f.slots = kKeySlotsMax;
    while (few_bytes(q.f.slots, q.f.tokens, q.f.tokens) > static_cast<size_t>(kSharedBytes - kControlBytes - low * kLevelBytes)) q.f.slots--;
    q.blocks = std::min(std::max(c.sms / a.kv_heads, 1), q.f.chunks);
    if (!impl_->add(p, nullptr, DType::F32)) return false;
    p.kind = Kind::Combine;
    if (!impl_->add(p, nullptr, DType::F32)) return false;
  }
  return true;
}

bool StepList::add(const Context&, const MoeGateUpArgs& args) {
  if (!plain(args.act, args.experts) || args.experts.count > kQuickExperts || args.ids.cols() > kStepChosen || !args.renormalise) return false;
  Phase p;
  p.kind = Kind::GateUp, p.tokens = count(args.x.rows()), p.gate_up = {};
  GateUpPhase& a = p.gate_up;
  const Tensor w = args.experts.gate_up(0);
  a.x = args.x.f32(), a.logits = args.logits.f32(), a.w = w.bytes(), a.stride = args.experts.layout().stride;
  a.experts = args.experts.count, a.chosen = count(args.ids.cols()), a.k = count(w.cols()), a.f = count(args.inner.cols());
  a.shift = std::countr_zero(static_cast<unsigned>(a.f / 8));
  a.panel_bytes = count(t16_panel_bytes(w.dtype, w.cols(), w.group)), a.scale_bytes = count(t16_scale_bytes(w.cols(), w.group));
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32();
  if (impl_->normed == a.x && impl_->phases.back().tokens == p.tokens) {
    Phase& before = impl_->phases.back();
    before.product.keep = 1;
    const int room = std::max(impl_->work, work_of(before, &impl_->streams.back()));
    if (Impl::levels(room) >= 1) a.kept = 1, impl_->work = room;
    else before.product.keep = 0;
  }
  if (!impl_->add(p, nullptr, DType::F32)) return false;
  impl_->chosen = a.ids;
  return true;
}

bool StepList::add(const Context&, const MoeDownArgs& args) {
  const Tensor w = args.experts.down(0);
  Product q;
  q.in.mix = Mix::Plain, q.in.tokens = count(args.h.rows()), q.in.k = count(args.shared.cols()), q.in.a = args.shared.f32();
  q.act = args.shared_act, q.w = args.shared_down;
  Phase p, ignored;
  Stream s;
  if (!plain(args.act, args.experts) || args.experts.count > kQuickExperts || args.ids.cols() > kStepChosen || q.in.k > 2048 || !make_product(q, ignored, s)) return false;
  p.kind = Kind::Down, p.tokens = q.in.tokens, p.down = {};
  DownPhase& a = p.down;
  a.ids = args.ids.i32(), a.weights = args.weights.f32(), a.inner = args.inner.f32(), a.w = w.bytes(), a.stride = args.experts.layout().stride;
  a.experts = args.experts.count, a.chosen = count(args.ids.cols()), a.k = count(w.cols()), a.d = count(args.h.cols());
  a.panel_bytes = count(t16_panel_bytes(w.dtype, w.cols(), w.group)), a.scale_bytes = count(t16_scale_bytes(w.cols(), w.group));
  a.group_shift = std::countr_zero(static_cast<unsigned>(a.k / 128));
  a.shared_k = q.in.k, a.shared = args.shared.f32(), a.shared_scale = args.shared_scale.f32(), a.h = args.h.f32();
  a.known = impl_->chosen == a.ids && impl_->phases.back().tokens == p.tokens;
  return impl_->add(p, &s, args.shared_down.dtype);
}

size_t StepList::bytes() const { return impl_->phases.size() * kPhaseBytes + impl_->streams.size() * sizeof(Stream); }

void StepList::write(void* host) const {
  auto* to = static_cast<uint8_t*>(host);
  std::memset(to, 0, bytes());
  for (const Phase& p : impl_->phases) std::memcpy(to, &p, sizeof p), to += kPhaseBytes;
  if (!impl_->streams.empty()) std::memcpy(to, impl_->streams.data(), impl_->streams.size() * sizeof(Stream));
}

void StepList::launch(const Context& c, const void* memory) {
  Impl& l = *impl_;
  StepArgs args;
  args.count = count(static_cast<int64_t>(l.phases.size())), args.stream_count = count(static_cast<int64_t>(l.streams.size()));
  QN_CHECK(args.count > 0 && (memory || (args.count == 1 && args.stream_count <= 1)), "step: %d phases without memory", args.count);
  args.phases = static_cast<const uint8_t*>(memory), args.streams = reinterpret_cast<const Stream*>(args.phases + args.count * int64_t{kPhaseBytes});
  if (!memory) {
    args.one = l.phases[0];
    if (args.stream_count) args.one_stream = l.streams[0];
  }
  args.counter = c.counters + kCounters - 1;
  args.levels = Impl::levels(l.work), args.low = Impl::low(args.levels), args.tokens = l.tokens;
  const size_t bytes = kSharedBytes;
  const auto kernel = l.w == DType::INT8 ? (l.tokens == 1 ? step_k<DType::INT8, 1> : step_k<DType::INT8, kFewTokens>)
                                         : (l.tokens == 1 ? step_k<DType::BF16, 1> : step_k<DType::BF16, kFewTokens>);
  cuda::launch(c, "step", kernel, dim3(static_cast<unsigned>(c.sms)), dim3(kStepThreads + 32), bytes, args);
  l = Impl();
}

}  // namespace qn::cuda
