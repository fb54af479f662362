// Tokens from logits, as text/sampler.h defines it: penalties, temperature, top-k, top-p, min-p, inverse CDF.
//
// One kernel. Rows of logits are chosen from side by side, each with the drafts of the rows before it in its history; the last row to end
// finds out how many of them count. In a row: A block takes a slice of 2048 ids and makes a key of each, (inverted logit << 32 | id): keys ascending are logits
// falling and, among equals, ids rising, so the order of the definition is the order of the keys, and no two are equal. The last
// block of the row to end has the results of all others and chooses. What is done between depends on the parameters, which are in device
// memory, so one recorded launch serves all:
//
//                          a block leaves                             the last block
//   temperature 0          its smallest key                           takes the smallest
//   top_k 1 .. 64          its k smallest, sorted                     sorts those down to k, then adds up one by one
//   else                   all of its keys sorted, with the sums      bisects keys for the one at which the sum over all slices
//                          of their weights up to each                passes what is looked for (top-k, top-p, the draw)
//
// Sums are doubles in a fixed order and never fall along the keys: where weights are added one by one as on the CPU the bits are the
// same up to exp(), elsewhere up to the last bits.
#include "cuda/common.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kSlice = 2 * kThreads;
constexpr int kTop = 64;              // largest top_k that is sorted out
constexpr int kOwn = 2;               // slices per thread of the last block, at most
constexpr uint64_t kNone = ~0ull;     // no candidate; behind every key
constexpr uint32_t kAll = 0xffffffffu;
constexpr int kRows = kFewTokens;

struct Input {
  const float* logits;     // (T, V)
  const uint8_t* allowed;  // (V) or null
  int64_t vocab;
  int32_t* history;        // (C)
  int64_t context;
  int32_t* ids;            // (1)
  const SampleParams* params;
  StepParams* step;
  Mail* mail;              // or null
  int32_t ahead;
};

// Between the blocks of a row and the last of them
struct Room {
  uint64_t* keys;   // (slices, kSlice)
  double* sums;     // (slices, kSlice): weights relative to the first key of the slice, up to and with this key
  int32_t* counts;  // (slices): keys that are candidates
  uint64_t* chosen; // (T), of all rows: the keys they choose
  __device__ Room of_row(int64_t row, int64_t slices) const {
    return {keys + row * slices * kSlice, sums + row * slices * kSlice, counts + row * slices, chosen};
  }
};

struct Shared {
  uint64_t keys[kSlice];
  int32_t seen[kSlice];    // bit 0: in the prompt; from bit 1: how often in the answer
  double weights[kTop];
  uint64_t least[32];
  double mass[32];
  int32_t count[32];
  uint64_t key;
  bool last;
};

__device__ __forceinline__ uint64_t key_of(float logit, int64_t id) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.f));  // -0 becomes +0
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(uint64_t key) {
  const uint32_t rising = ~static_cast<uint32_t>(key >> 32);
  return __uint_as_float(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}
// Proportional to the probability, 1 for the best; logits of +inf share everything.
__device__ __forceinline__ double weight(float logit, float top, float temperature) {
  const double v = logit, t = top;
  return logit == top ? 1.0 : exp((v - t) / static_cast<double>(temperature));
}

// Philox 4x32-10: uniform in [0, 1) of seed and position, stream 0.
__device__ double counter_uniform(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return static_cast<double>((static_cast<uint64_t>(c0) << 32 | c1) >> 11) * 0x1p-53;
}

// ---- what a block does together --------------------------------------------------------------------------------------------

__device__ uint64_t block_min(uint64_t v, Shared& s) {  // in every thread
  for (int i = 16; i > 0; i >>= 1) v = min(v, __shfl_xor_sync(kAll, v, i));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) s.least[threadIdx.x >> 5] = v;
  __syncthreads();
  v = s.least[threadIdx.x & 31];
  for (int i = 16; i > 0; i >>= 1) v = min(v, __shfl_xor_sync(kAll, v, i));
  return v;
}

struct Total {
  double mass;
  int32_t count;
};
__device__ Total block_total(Total v, Shared& s) {  // in every thread, the same bits
  auto warp_total = [](Total& t) {
    for (int i = 16; i > 0; i >>= 1) t.mass += __shfl_xor_sync(kAll, t.mass, i), t.count += __shfl_xor_sync(kAll, t.count, i);
  };
  warp_total(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) s.mass[threadIdx.x >> 5] = v.mass, s.count[threadIdx.x >> 5] = v.count;
  __syncthreads();
  v = {s.mass[threadIdx.x & 31], s.count[threadIdx.x & 31]};
  warp_total(v);
  return v;
}

// Bitonic, ascending. A thread holds one pair of each step; up to a distance of 32 the pairs of a warp lie in 64 keys of its own, and
// no other warp has to be waited for.
__device__ void sort_keys(Shared& s) {
  const int i = static_cast<int>(threadIdx.x);
  __syncthreads();
  for (int size = 2; size <= kSlice; size *= 2)
    for (int apart = size / 2; apart > 0; apart /= 2) {
      if (size > 64 && apart >= 32) __syncthreads();  // at 32, for what other warps did at 64
      else __syncwarp();
      const int at = 2 * i - (i & (apart - 1));
      const uint64_t a = s.keys[at], b = s.keys[at + apart];
      if ((a > b) == ((at & size) == 0)) s.keys[at] = b, s.keys[at + apart] = a;
    }
  __syncthreads();
}

// Whether all other of `blocks` blocks have left their results, which then are visible.
__device__ bool last_block(uint32_t* counter, unsigned blocks, Shared& s) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    s.last = atomicAdd(counter, 1u) == blocks - 1;
    if (s.last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return s.last;
}

// ---- every block: its slice ------------------------------------------------------------------------------------------------

// s.seen = the part of the history that the penalties look at, counted for the ids of the slice. p: tokens so far.
__device__ void count_history(const Input& in, const SampleParams& params, int64_t p, int64_t base, Shared& s) {
  for (int i = threadIdx.x; i < kSlice; i += kThreads) s.seen[i] = 0;
  __syncthreads();
  const int64_t begin = params.penalty_window > 0 ? max(p - params.penalty_window, int64_t{0}) : 0;
  for (int64_t j = begin + threadIdx.x; j < min(p, in.context); j += kThreads) {
    const int64_t i = in.history[j] - base;
    if (i < 0 || i >= kSlice) continue;
    if (j >= params.answer) atomicAdd(&s.seen[i], 2);
    else atomicOr(&s.seen[i], 1);
  }
  __syncthreads();
}

// Every step rounded for itself, as on the CPU
__device__ float penalised(float v, int32_t seen, const SampleParams& params) {
  if (seen == 0) return v;
  v = v > 0 ? __fdiv_rn(v, params.repetition_penalty) : __fmul_rn(v, params.repetition_penalty);
  if (const int32_t times = seen >> 1; times > 0)
    v = __fsub_rn(v, __fadd_rn(params.presence_penalty, __fmul_rn(params.frequency_penalty, static_cast<float>(times))));
  return v;
}

// s.keys = the slice, not sorted
__device__ void make_keys(const Input& in, const SampleParams& params, int64_t p, int64_t base, Shared& s) {
  float v[2];
  for (int j = 0; j < 2; j++) {  // -inf and NaN are never chosen
    const int64_t id = base + j * kThreads + threadIdx.x;
    v[j] = id < in.vocab && (!in.allowed || in.allowed[id]) ? in.logits[id] : -INFINITY;
  }
  const bool penalties = params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
  if (penalties) count_history(in, params, p, base, s);
  for (int j = 0; j < 2; j++) {
    const int i = j * kThreads + static_cast<int>(threadIdx.x);
    if (penalties) v[j] = penalised(v[j], s.seen[i], params);  // leaves -inf what it is, or NaN
    s.keys[i] = v[j] > -INFINITY ? key_of(v[j], base + i) : kNone;
  }
}

// Leaves the sorted slice and the sums of its weights. Adding is arranged in threes of levels (in a thread, along a warp, along the
// block) each of which begins with the exact end of the one before it: so sums never fall from key to key.
__device__ void leave_all(const Room& room, float temperature, Shared& s) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, i = 2 * static_cast<int>(threadIdx.x);
  const uint64_t a = s.keys[i], b = s.keys[i + 1];
  const float top = logit_of(s.keys[0]);
  const double first = a == kNone ? 0 : weight(logit_of(a), top, temperature);
  const double both = b == kNone ? first : first + weight(logit_of(b), top, temperature);
  double before = 0;
  for (int l = 0; l < 31; l++) {
    const double end = __shfl_sync(kAll, before + both, l);
    if (lane == l + 1) before = end;
  }
  if (lane == 31) s.mass[warp] = before + both;
  const int candidates = __syncthreads_count(a != kNone) + __syncthreads_count(b != kNone);
  double base = 0;
  for (int w = 0; w < warp; w++) base += s.mass[w];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSlice + i;
  room.keys[at] = a, room.keys[at + 1] = b;
  room.sums[at] = base + (before + first), room.sums[at + 1] = base + (before + both);
  if (threadIdx.x == 0) room.counts[blockIdx.x] = candidates;
}

// ---- the last block: top_k 1 .. kTop ----------------------------------------------------------------------------------------

// One after the other, as the definition says. weights: of the n best, in order.
__device__ int draw_in_order(const double* weights, int n, const SampleParams& params, double u) {
  double mass = 0;
  if (params.top_p < 1 || params.min_p == 0)
    for (int i = 0; i < n; i++) mass += weights[i];
  int kept = n;
  if (params.top_p < 1 || params.min_p > 0) {
    const double enough = params.top_p < 1 ? static_cast<double>(params.top_p) * mass : INFINITY;
    double sum = 0;
    for (int i = 0; i < n; i++) {
      const double w = weights[i];
      if (i > 0 && (w < static_cast<double>(params.min_p) || sum >= enough)) {
        kept = i;
        break;
      }
      sum += w;
    }
    mass = sum;
  }
  const double target = u * mass;
  double sum = 0;
  for (int i = 0; i < kept; i++) {
    sum += weights[i];
    if (sum > target) return i;
  }
  return kept - 1;  // rounding left the sum at or below the target
}

__device__ uint64_t choose_of_top(const Room& room, const SampleParams& params, int64_t p, Shared& s) {  // valid in thread 0
  const int k = params.top_k, all = static_cast<int>(gridDim.x) * k, tid = static_cast<int>(threadIdx.x);
  for (int next = 0, kept = 0; next < all; kept = k) {  // the best so far and as many more as there is room for
    for (int i = tid; i < kSlice - kept; i += kThreads) {
      const int c = next + i;
      s.keys[kept + i] = c < all ? __ldcg(room.keys + static_cast<int64_t>(c / k) * kSlice + c % k) : kNone;
    }
    next += kSlice - kept;
    sort_keys(s);
  }
  const int n = __syncthreads_count(tid < k && s.keys[tid] != kNone);
  if (tid < n) s.weights[tid] = weight(logit_of(s.keys[tid]), logit_of(s.keys[0]), params.temperature);
  __syncthreads();
  if (tid > 0 || n == 0) return kNone;
  return s.keys[draw_in_order(s.weights, n, params, counter_uniform(params.seed, static_cast<uint64_t>(p)))];
}

// ---- the last block: everything else ----------------------------------------------------------------------------------------

// A search narrows a range of keys; in each of its slices a thread knows lo .. hi, the indices of the keys inside of the range.
class Search {
 public:
  __device__ Search(const Room& room, float temperature, Shared& s) : room_(room), s_(s) {
    uint64_t head[kOwn], best = kNone;
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      const int slice = static_cast<int>(threadIdx.x) + j * kThreads;
      count_[j] = slice < static_cast<int>(gridDim.x) ? __ldcg(room.counts + slice) : 0;
      head[j] = count_[j] ? __ldcg(keys(j)) : kNone;
      best = min(best, head[j]);
    }
    top_ = block_min(best, s);
#pragma unroll
    for (int j = 0; j < kOwn; j++) scale_[j] = count_[j] ? weight(logit_of(head[j]), logit_of(top_), temperature) : 0;
  }
  __device__ uint64_t top() const { return top_; }  // kNone: there is no candidate

  // All keys below `bound`; what find() looks through
  __device__ Total below(uint64_t bound) {
    for (int j = 0; j < kOwn; j++) lo_[j] = 0, hi_[j] = count_[j];
    const Total t = cut(bound);
    for (int j = 0; j < kOwn; j++) hi_[j] = at_[j];
    bound_ = bound, end_ = t.count;
    return t;
  }
  // Of the keys of the last below(): the first with enough(the total of it and all before), else the last. enough() must not fall
  // from true to false along the keys.
  template <class Enough>
  __device__ uint64_t find(const Enough& enough) {
    uint64_t from = top_, to = bound_;
    int32_t left = 0, right = end_;  // keys below `from`, where it is not enough yet, and below `to`, where it is
    while (right - left > 1) {
      const uint64_t middle = from + (to - from) / 2;
      const Total t = cut(middle);
      const bool there = t.count == right || enough(t);
#pragma unroll
      for (int j = 0; j < kOwn; j++) (there ? hi_[j] : lo_[j]) = at_[j];
      (there ? to : from) = middle;
      (there ? right : left) = t.count;
    }
#pragma unroll
    for (int j = 0; j < kOwn; j++)
      if (lo_[j] < hi_[j]) s_.key = __ldcg(keys(j) + lo_[j]);  // one thread, one slice
    __syncthreads();
    return s_.key;
  }

 private:
  __device__ const uint64_t* keys(int j) const { return room_.keys + static_cast<int64_t>(threadIdx.x + j * kThreads) * kSlice; }
  __device__ const double* sums(int j) const { return room_.sums + static_cast<int64_t>(threadIdx.x + j * kThreads) * kSlice; }
  // at_ = how many keys are below x, for x in the range; their total
  __device__ Total cut(uint64_t x) {
    Total t{0, 0};
#pragma unroll
    for (int j = 0; j < kOwn; j++) {
      int from = lo_[j], to = hi_[j];
      while (from < to) {
        const int middle = (from + to) / 2;
        if (__ldcg(keys(j) + middle) < x) from = middle + 1;
        else to = middle;
      }
      at_[j] = from, t.count += from;
      if (from > 0) t.mass += scale_[j] * __ldcg(sums(j) + from - 1);
    }
    return block_total(t, s_);
  }

  const Room& room_;
  Shared& s_;
  uint64_t top_, bound_ = 0;
  int32_t end_ = 0;
  int count_[kOwn], lo_[kOwn], hi_[kOwn], at_[kOwn];
  double scale_[kOwn];  // weight of the first key of the slice among all
};

// The first key whose weight is below min_p, whether it exists or not
__device__ uint64_t min_p_bound(uint64_t top, const SampleParams& params) {
  uint32_t from = static_cast<uint32_t>(top >> 32), to = static_cast<uint32_t>(key_of(-INFINITY, 0) >> 32);
  while (to - from > 1) {
    const uint32_t middle = from + (to - from) / 2;
    const bool below = weight(logit_of(static_cast<uint64_t>(middle) << 32), logit_of(top), params.temperature) < static_cast<double>(params.min_p);
    (below ? to : from) = middle;
  }
  return static_cast<uint64_t>(to) << 32;
}

__device__ uint64_t choose_of_all(const Room& room, const SampleParams& params, int64_t p, Shared& s) {
  Search search(room, params.temperature, s);
  if (search.top() == kNone) return kNone;
  uint64_t bound = kNone;  // of what is kept
  Total kept = search.below(bound);
  if (params.top_k > 0 && params.top_k < kept.count) {
    bound = search.find([&](const Total& t) { return t.count >= params.top_k; }) + 1;
    kept = search.below(bound);
  }
  const double enough = static_cast<double>(params.top_p) * kept.mass;
  if (params.min_p > 0) {
    if (threadIdx.x == 0) s.key = min_p_bound(search.top(), params);
    __syncthreads();
    bound = min(bound, s.key);
    kept = search.below(bound);
  }
  if (params.top_p < 1) {
    bound = search.find([&](const Total& t) { return t.mass >= enough; }) + 1;
    kept = search.below(bound);
  }
  const double target = counter_uniform(params.seed, static_cast<uint64_t>(p)) * kept.mass;
  return search.find([&](const Total& t) { return t.mass > target; });
}

// ---- all of it --------------------------------------------------------------------------------------------------------------

// One thread, when all rows have chosen; `first` is the position of the first. The message that the host waits for goes last: when it is
// there, it may rely on everything else.
__device__ void finish(const Input& in, const uint64_t* left, int rows, int64_t first) {
  uint64_t chosen[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++) chosen[i] = i < rows ? __ldcg(left + i) : kNone;  // by other blocks
  int more = 0;
  while (more + 1 < rows && first + more < in.context && chosen[more] != kNone && static_cast<int32_t>(chosen[more]) == in.history[first + more]) more++;
  const int64_t p = first + more;
  const int32_t id = chosen[more] == kNone ? 0 : static_cast<int32_t>(chosen[more]);
  in.ids[0] = id;
  if (p < in.context) in.history[p] = id;
  *in.step = {static_cast<int32_t>(p) - in.ahead, 1, rows > 1 ? more + 1 : 0};
  if (!in.mail) return;
  for (int i = more; i >= 0; i--) {
    if (i == more || i == 0) __threadfence_system();
    const uint32_t text = chosen[i] == kNone ? kAll : static_cast<uint32_t>(more - i) << kMailIdBits | static_cast<uint32_t>(chosen[i]);
    *const_cast<volatile uint64_t*>(&in.mail->slot[(first + i) % kMailSlots]) = static_cast<uint64_t>(first + i) << 32 | text;
  }
}

// Grid: slices x T
__global__ void __launch_bounds__(kThreads) sample_k(Input in, const Room all, uint32_t* counters) {
  __shared__ Shared s;
  let_next_start();
  wait_for_previous();
  const SampleParams params = *in.params;
  const int row = static_cast<int>(blockIdx.y), rows = static_cast<int>(gridDim.y);
  const int64_t first = static_cast<int64_t>(in.step->pos) + in.step->n_tok + in.ahead - (rows - 1), p = first + row;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kSlice;
  const Room room = all.of_row(row, gridDim.x);
  in.logits += row * in.vocab;
  const bool greedy = params.temperature == 0, top = !greedy && params.top_k > 0 && params.top_k <= kTop;
  const int tid = static_cast<int>(threadIdx.x);

  make_keys(in, params, p, base, s);
  if (greedy) {
    const uint64_t best = block_min(min(s.keys[tid], s.keys[tid + kThreads]), s);
    if (tid == 0) room.keys[base] = best;
  } else {
    sort_keys(s);
    if (!top) leave_all(room, params.temperature, s);
    else if (tid < params.top_k) room.keys[base + tid] = s.keys[tid];
  }
  if (!last_block(counters + row, gridDim.x, s)) return;

  uint64_t key = kNone;
  if (greedy) {
    for (int i = tid; i < static_cast<int>(gridDim.x); i += kThreads) key = min(key, __ldcg(room.keys + static_cast<int64_t>(i) * kSlice));
    key = block_min(key, s);
  } else if (top) {
    key = choose_of_top(room, params, p, s);
  } else {
    key = choose_of_all(room, params, p, s);
  }
  if (tid == 0) all.chosen[row] = key;
  if (rows > 1 && !last_block(counters + kRows, gridDim.y, s)) return;
  if (tid == 0) finish(in, all.chosen, rows, first);
}

int64_t slices(int64_t vocab) { return (vocab + kSlice - 1) / kSlice; }

Room take_room(Scratch& s, int64_t vocab, int64_t rows) {
  const int64_t n = rows * slices(vocab);
  Room r{};
  r.keys = s.take<uint64_t>(n * kSlice), r.sums = s.take<double>(n * kSlice), r.counts = s.take<int32_t>(n), r.chosen = s.take<uint64_t>(kRows);
  return r;
}

}  // namespace

void sample(const Context& c, const SampleArgs& a) {
  const int64_t vocab = a.logits.cols();
  QN_CHECK(vocab > 0 && slices(vocab) <= kOwn * kThreads, "sample: %lld logits, at most %d", static_cast<long long>(vocab), kOwn * kThreads * kSlice);
  Scratch s(c);
  const Room room = take_room(s, vocab, a.logits.rows());
  const Input in{a.logits.f32(), static_cast<const uint8_t*>(a.allowed.data), vocab, a.history.i32(), a.history.rows(), a.ids.i32(), a.params, a.step, a.mail, a.ahead};
  const dim3 grid(static_cast<unsigned>(slices(vocab)), static_cast<unsigned>(a.logits.rows()));
  launch(c, "sample", sample_k, grid, dim3(kThreads), 0, in, room, c.counters);
}

size_t sample_scratch(int64_t vocab) {
  Scratch s;
  take_room(s, vocab, kRows);
  return s.used();
}

}  // namespace qn::cuda
