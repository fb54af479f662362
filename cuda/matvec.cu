// Products of at most 8 tokens, weights BF16, INT8 or INT4, activations rounded to BF16 or INT8: bound by reading the weights.
//
// Tensor cores do the sums: the weights are operand A, the tokens are columns of operand B, so that 1 to 8 tokens cost the same (BF16: 1 to 4).
// One block for each multiprocessor, or two, takes panels of 16 rows: b, b + grid, ... A panel comes in chunks of 16 or 32 KB through a ring of
// slots in shared memory:
//
//   chunk    | units of warp 0 | units of warp 1 | ... | of warp 7 |     a unit is what a warp computes at once, 128 k
//   BF16     2048 k of 8 rows, each with 64 bytes of padding; rows 0 - 7 of the panel, then rows 8 - 15
//   INT8     1024 k, INT4 2048 k of 16 rows: tiles, then the scales of the groups
//
// (A multiprocessor begins one bulk copy in about 46 ns, whatever its size: with 1 KB of a row they were all together no faster than 3.1 TB/s
// even from the L2 cache, with 2 KB 6 TB/s. Measured on H100. With 4 KB it is a third faster still, on H200. Before sm_90 there are none,
// some GPUs have 99 KB of shared memory, and BF16 chunks are 1024 k.)
//
//   a ninth warp, the producer, fills the slots from before wait_for_previous() on, then keeps them full: weights stream in while the kernel
//   before ends and while the prologue computes the norm. full[slot]: a chunk is there; empty[slot]: all 8 warps have used it.
//   After the last chunk of a panel a thread for each output adds the 8 results.
//
// A block that has a multiprocessor to itself needs no more warps than that, and leaves room for what comes next to begin.
//
// BF16: of 8 rows a lane loads 8 values at once, k to k + 7, four registers in a row, and they are operand A as they are: its rows 0 - 7 hold
// k, k + 1 and k + 4, k + 5, its rows 8 - 15 the others of the same weights. B has two columns for each token i: 2 i with the x that meet
// the first, 2 i + 1 with those that meet the others. Of D count (g, 2 i) and (g + 8, 2 i + 1), whose sum is the result.
//
// INT8 weights with BF16 activations: to make BF16 numbers of the codes takes more instructions than there is time for. So the products are of
// fp16 numbers, 1024 + c (cuda/unpack.cuh) times x as BF16 rounds it and a power of two per token and 128 values makes it fit: its largest is
// from 2^14 on, what is 2^25 times smaller is still exact, and less than that loses 2^-39 of the largest. Tensor cores
// take 1152 times the sum of x off again, in chains of their own; what that leaves of the result is some thirtieth of it, in fp32.
//
// Rows that must see unrounded activations (router, gates of heads) are extra tasks behind the panels: 8 rows through the same slots, fp32
// products with fp32 activations.
#include "cuda/matvec.cuh"
#include "cuda/unpack.cuh"

#include <algorithm>
#include <bit>

namespace qn::cuda {
namespace {

constexpr int kWarps = kMatvecWarps, kConsumers = kMatvecThreads, kThreads = kConsumers + 32;
constexpr int kMaxSlots = 8;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBulk = false;
#else
constexpr bool kBulk = true;  // in code of the device; the host looks at Context::overlap, which is true of the same code
#endif
constexpr int kUnderWay = 2;  // chunks of a block that are asked for and not there yet (measured)

constexpr int unit_loads(DType w) { return w == DType::INT4 ? 2 : 4; }
constexpr int kUnit = 128;
constexpr int chunk_k(DType w, bool bulk = kBulk) { return w == DType::INT4 || (w == DType::BF16 && bulk) ? 2048 : 1024; }
constexpr int kChunkRows = 8;  // BF16
// BF16: a row of a chunk, and 64 bytes so that 16-byte loads of the fragments of two rows share no bank
constexpr int row_pitch(bool bulk) { return chunk_k(DType::BF16, bulk) * 2 + 64; }
constexpr int kRowPitch = row_pitch(kBulk);
constexpr int tile_bytes(DType w) { return chunk_k(w) / tile_k(w) * kTileBytes; }  // of a chunk
constexpr int slot_bytes(DType w, bool bulk = kBulk) {
  return w == DType::BF16 ? kChunkRows * row_pitch(bulk) : tile_bytes(w) + chunk_k(w) / 32 * kPanelRows * 2;
}
constexpr int exact_bytes(DType w, bool bulk = kBulk) { return slot_bytes(w, bulk) / kWarps / 512 * 512; }  // of a row in a slot
constexpr bool as_half(DType w, Act a) { return w == DType::INT8 && a == Act::BF16; }
// Rows of x in shared memory: padded with zeros to whole groups of 128, and apart such that loads of two tokens' fragments (4 times 16 bytes in a
// row of BF16 and INT8, with gaps of 16 bytes in INT4) share no bank. Of BF16 the pairs of 8 values are in the order 0 2 1 3.
constexpr int x_stride(DType w, int k) { return (k + 127) / 128 * 128 + (w == DType::INT4 ? 8 : 32); }

struct Matvec {
  Input in;
  const uint8_t* w = nullptr;
  int64_t stride = 0;      // bytes of a panel; of a BF16 row
  int rows = 0, panels = 0, tasks = 0;
  int step = 16, pair = 8; // BF16: the first row of panel p is p * step, its row 8 + g lies `pair` rows behind its row g
  int shift = 0, tiles = 0, scale_bytes = 0;  // T16: a group is 1 << shift values; tiles and bytes of scales of a panel
  Store store = Store::Set;
  float* y = nullptr;
  int64_t ldy = 0;
  ExactRows exact[2];
  float* normed = nullptr;
  bool whole = false;      // see matvec_k
  bool keep = false;       // x unrounded, too
  int signal = 0;          // of one task for each block: chunks to ask for before the next kernel may start
  int slots = 0, chunks = 0, exact_chunks = 0;  // chunks: of a panel, of exact rows
  int barriers = 0, x = 0, x_scale = 0, x_exact = 0, partial = 0, squares = 0, inverse = 0, bytes = 0;  // offsets in shared memory
};

// Where things lie in shared memory. The sizes grow with T; `bytes` is their end.
void lay_out(Matvec& m, DType w, Act act, int tokens, int slots, bool bulk) {
  const int groups = (m.in.k + 127) / 128;
  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    const int64_t begin = at;
    at = round_up(at + bytes, 16);
    return static_cast<int>(begin);
  };
  take(int64_t{slots} * slot_bytes(w, bulk));
  m.barriers = take(2 * kMaxSlots * sizeof(Barrier));  // full and empty
  m.x = take(int64_t{tokens} * x_stride(w, m.in.k) * 2);
  m.x_scale = take(act == Act::INT8 || as_half(w, act) ? int64_t{tokens} * groups * 4 : 0);
  m.x_exact = take(m.keep ? int64_t{tokens} * m.in.k * 4 : 0);
  m.partial = take(int64_t{2} * kWarps * tokens * kPanelRows * 4);
  m.squares = take(std::max<int64_t>({int64_t{tokens} * m.in.spans * m.in.pieces, 16 * kNormsAtOnce, int64_t{tokens} * groups}) * 4);
  m.inverse = take(int64_t{tokens} * m.in.spans * 4);
  m.bytes = static_cast<int>(std::min<int64_t>(at, 1 << 30));
  m.in.tokens = tokens, m.slots = slots;
}

// The rows of a task, of one matrix
struct ExactTask {
  const uint8_t* w = nullptr;  // of the first row
  int64_t stride = 0;          // bytes
  int rows = 0, item = 2;      // at most kWarps; bytes of a weight
  float* y = nullptr;
  int64_t ldy = 0;
  bool squash = false;
};
constexpr int exact_tasks(int64_t rows) { return static_cast<int>((rows + kWarps - 1) / kWarps); }
__device__ __forceinline__ ExactTask exact_task(const Matvec& m, int task) {
  task -= m.panels;
  const int i = task < exact_tasks(m.exact[0].w.shape[0]) ? 0 : 1;
  const ExactRows& e = m.exact[i];
  const int row = (task - (i ? exact_tasks(m.exact[0].w.shape[0]) : 0)) * kWarps, item = e.w.dtype == DType::F32 ? 4 : 2;
  return {static_cast<const uint8_t*>(e.w.data) + row * e.w.row_stride * item, e.w.row_stride * item, min(static_cast<int>(e.w.shape[0]) - row, kWarps), item,
          e.y + row, e.ldy, e.squash};
}

// First of `units` in warp i's slice
__device__ __forceinline__ int slice(int units, int i) { return units * i / kWarps; }

// Where a warp is in the sequence of slots; producer and consumers walk it alike.
struct Place {
  int slot = 0;
  uint32_t phase = 0;  // of the slot: how often it has been used before
  __device__ void next(int slots) {
    if (++slot == slots) slot = 0, phase++;
  }
};

// The producer: asks for everything that the block reads, in the order in which it is used, as far ahead as there are slots, but for a few chunks at
// a time. What is asked for waits in queues that everybody shares: with all slots at once, loads that the kernel before was waiting for took up to
// 5 us longer (measured), and so do loads of the kernel itself and of the next (behind the first round of slots that makes 1.3 % of a token with
// BF16 rest, 0.6 % with INT8: H200). Two chunks of every block keep the memory busy. A lane's pieces of one chunk lie behind those of the one
// before: it is a warp alone, and nothing hides what it computes for each.
template <DType W, bool Whole>
__device__ __forceinline__ void produce(const Matvec& m, uint8_t* shared) {
  constexpr bool kRows = W == DType::BF16;
  constexpr int kPieces = kRows ? kChunkRows : 2;
  Barrier *full = reinterpret_cast<Barrier*>(shared + m.barriers), *empty = full + kMaxSlots;
  const int lane = static_cast<int>(threadIdx.x) % 32, slots = m.slots;
  const bool once = m.tasks <= static_cast<int>(gridDim.x);
  Place at, landed;
  int n = 0;
  auto wait = [&] {  // for the slot
    if (once && n == m.signal) let_next_start();
    if (n >= kUnderWay) wait_barrier(full + landed.slot, landed.phase & 1), landed.next(slots);  // a block with fewer slots has no such n: slots_of()
    wait_barrier(empty + at.slot, (at.phase + 1) & 1);
    return shared + at.slot * slot_bytes(W);
  };
  // Of a whole chunk: the lane's bytes, where they lie in it, and those of all lanes. Tiles are lane 0's, scales lane 1's.
  const int scales = (chunk_k(W) >> (Whole ? 7 : m.shift)) * kPanelRows * 2;
  const int whole = kRows ? chunk_k(W) * 2 : lane ? scales : tile_bytes(W), to = kRows ? lane * kRowPitch : lane * tile_bytes(W);
  const uint32_t all = kRows ? kChunkRows * chunk_k(W) * 2 : tile_bytes(W) + scales;
  int task = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (; task < m.panels; task += static_cast<int>(gridDim.x)) {
    const int row = task * m.step + lane;
    const uint8_t* from = m.w + (kRows ? min(row, m.rows - 1) * m.stride : task * m.stride + (lane ? 0 : m.scale_bytes));
    const uint8_t* lower = m.w + min(row + m.pair, m.rows - 1) * m.stride;  // BF16: rows 8 to 15
    int left = kRows ? m.in.k * 2 : lane ? m.scale_bytes : m.tiles * kTileBytes;
#pragma unroll 1
    for (int c = 0; c < m.chunks; c++, n++, at.next(slots)) {
      uint8_t* const slot = wait();
      const Piece mine{slot + to, kRows && c % 2 ? lower : from, static_cast<uint32_t>(Whole ? whole : min(whole, left))};
      fill(full + at.slot, kPieces, mine, Whole ? all : __reduce_add_sync(0xffffffffu, lane < kPieces ? mine.bytes : 0));
      if (!kRows || c % 2) from += whole, lower += whole, left -= whole;
    }
  }
#pragma unroll 1
  for (; task < m.tasks; task += static_cast<int>(gridDim.x)) {
    const ExactTask e = exact_task(m, task);
#pragma unroll 1
    for (int c = 0; c < m.exact_chunks; c++, n++, at.next(slots)) {
      uint8_t* const slot = wait();
      const int begin = c * exact_bytes(W), bytes = max(0, min(m.in.k * e.item - begin, exact_bytes(W)));
      fill(full + at.slot, kWarps, [&](int i) {
        return Piece{slot + i * exact_bytes(W), e.w + i * e.stride + begin, static_cast<uint32_t>(i < e.rows ? bytes : 0)};
      });
    }
  }
}

// total += sum * (scales of the two rows) * (scales of the two tokens)
template <Act A>
__device__ __forceinline__ void flush(float (&total)[4], float (&sum)[4], float lo, float hi, float2 x) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float scale = i < 2 ? lo : hi;  // fmaf: one token and several, which are instances of their own, must round alike
    total[i] = A == Act::INT8 ? fmaf(scale * sum[i], i % 2 ? x.y : x.x, total[i]) : fmaf(scale, sum[i], total[i]);
    sum[i] = 0;
  }
}

// total += one unit of BF16, row g; total[0] of token t, total[1] of token 4 + t. unit: the lane's first 16 bytes of row g; x: what meets them, of
// token g / 2, and where there are more than four, `more` values on, of token 4 + g / 2; x_scale: of tokens t and 4 + t
template <Act A>
__device__ __forceinline__ void multiply_rows(float (&total)[2], const uint8_t* unit, const uint16_t* x, bool many, int more, float2 x_scale) {
  auto chain = [&](const uint16_t* from, const uint4 (&w)[4]) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint2 b = *reinterpret_cast<const uint2*>(from + i * 32);
      const uint32_t a[4] = {w[i].x, w[i].y, w[i].z, w[i].w};
      mma_16816(sum, a, b.x, b.y);
    }
    return sum[0] + sum[3];
  };
  uint4 w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = *reinterpret_cast<const uint4*>(unit + i * 64);
  const float first = chain(x, w);
  total[0] = A == Act::INT8 ? fmaf(first, x_scale.x, total[0]) : total[0] + first;
  if (!many) return;
  const float second = chain(x + more, w);
  total[1] = A == Act::INT8 ? fmaf(second, x_scale.y, total[1]) : total[1] + second;
}

// total += one unit of tiles: rows g and g + 8, tokens 2t and 2t + 1. unit: its first tile; scales: those of the unit. x: what the lane reads of
// its token g from the first k of the unit on; x_scale: of the unit's k for tokens 2t and 2t+1. Columns without a token may hold anything.
template <DType W, Act A>
__device__ __forceinline__ void multiply(float (&total)[4], const uint8_t* unit, const uint16_t* scales, const uint16_t* x, float2 x_scale, int shift) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  auto weights = [&](int i) { return *reinterpret_cast<const uint4*>(unit + i * kTileBytes + lane * 16); };
  auto tokens = [&](int at) { return *reinterpret_cast<const uint4*>(x + at); };
  uint32_t a[4];
  float sum[4] = {};
  // After the first `end` values of the unit: is a group complete? Then its scales meet its sums.
  auto close_group = [&](int end) {
    if (end & ((1 << shift) - 1)) return;
    const uint16_t* s = scales + ((end >> shift) - 1) * kPanelRows + g;
    flush<A>(total, sum, half_bits_to_float(s[0]), half_bits_to_float(s[8]), x_scale);
  };
  if constexpr (as_half(W, A)) {
    float more[4] = {}, less[2][4] = {};  // chains of their own, so that an instruction need not wait for the one before
    uint32_t lowered[4] = {kLowered, kLowered, kLowered, kLowered};
#pragma unroll
    for (uint32_t& l : lowered) asm volatile("" : "+r"(l));  // four registers in a row, once: the compiler would make them anew for every use
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 v = weights(i), b = tokens(i * 32);
      int8_raised_fragment<0>(v, a);
      mma_16816_half(sum, a, b.x, b.y);
      mma_16816_half(less[0], lowered, b.x, b.y);
      int8_raised_fragment<1>(v, a);
      mma_16816_half(more, a, b.z, b.w);
      mma_16816_half(less[1], lowered, b.z, b.w);
      if ((i + 1) * 32 & ((1 << shift) - 1)) continue;
      const uint16_t* s = scales + (((i + 1) * 32 >> shift) - 1) * kPanelRows + g;
      const float lo = half_bits_to_float(s[0]), hi = half_bits_to_float(s[8]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float codes = (sum[j] + less[0][j]) + (more[j] + less[1][j]);
        total[j] = fmaf(j < 2 ? lo : hi, (j % 2 ? x_scale.y : x_scale.x) * codes, total[j]);
        sum[j] = more[j] = less[0][j] = less[1][j] = 0;
      }
    }
  } else if constexpr (W == DType::INT8) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 v = weights(i), b = tokens(i * 32);
      int8_fragment<0>(v, a);
      mma_16816(sum, a, b.x, b.y);
      int8_fragment<1>(v, a);
      mma_16816(sum, a, b.z, b.w);
      close_group((i + 1) * 32);
    }
  } else {
    // Groups of 32: lanes t = 0, 1 hold the first of a tile, t = 2, 3 the second, and the tile is multiplied twice
    const uint32_t first = shift == 5 && t >= 2 ? 0 : ~0u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = weights(i), b = tokens(i * 64), c = tokens(i * 64 + 8);
      int4_fragment<0>(v, a);
      mma_16816(sum, a, b.x & first, b.y & first);
      int4_fragment<1>(v, a);
      mma_16816(sum, a, b.z & first, b.w & first);
      int4_fragment<2>(v, a);
      mma_16816(sum, a, c.x & first, c.y & first);
      int4_fragment<3>(v, a);
      mma_16816(sum, a, c.z & first, c.w & first);
      if (shift == 5) {
        close_group(i * 64 + 32);
        int4_fragment<0>(v, a);
        mma_16816(sum, a, b.x & ~first, b.y & ~first);
        int4_fragment<1>(v, a);
        mma_16816(sum, a, b.z & ~first, b.w & ~first);
        int4_fragment<2>(v, a);
        mma_16816(sum, a, c.x & ~first, c.y & ~first);
        int4_fragment<3>(v, a);
        mma_16816(sum, a, c.z & ~first, c.w & ~first);
      }
      close_group((i + 1) * 64);
    }
  }
}

// x of all tokens into shared memory: rounded, in the order of the fragments; unrounded too, when that is to be kept. (Blocks that need but one of the two
// could leave out the other. Measured: a pass of 1 token was 1 % slower.)
template <DType W, Act A, bool Quick, bool One>
__device__ __forceinline__ void prologue(const Matvec& m, const float4 (&norm)[kNormQuads], uint8_t* shared) {
  uint16_t* x = reinterpret_cast<uint16_t*>(shared + m.x);                 // (T, x_stride)
  float* x_scale = reinterpret_cast<float*>(shared + m.x_scale);           // (T, groups of 128)
  float* x_exact = reinterpret_cast<float*>(shared + m.x_exact);           // (T, K)
  const int k_all = m.in.k, stride = x_stride(W, k_all), groups = (k_all + 127) / 128;
  auto sink = [&](int t, int k, float4 v) {
    if (m.keep && k < k_all) *reinterpret_cast<float4*>(x_exact + t * k_all + k) = v;
    if (A == Act::INT8) {
      const float scale = int8_codes(v);
      if (threadIdx.x % 32 == 0) x_scale[t * groups + k / 128] = scale;
    }
    uint16_t* to = x + t * stride;
    if constexpr (as_half(W, A)) {
      const uint32_t lo = pack_bf16(v.x, v.y), hi = pack_bf16(v.z, v.w);
      v = {bf16_lo(lo), bf16_hi(lo), bf16_lo(hi), bf16_hi(hi)};
      const float mine = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
      const uint32_t most = __reduce_max_sync(0xffffffffu, __float_as_uint(mine));  // as numbers, which are not negative, so their bits
      const uint32_t e = max(most >> 23, 15u);                                      // 2^(e - 127) is at most that; of tiny numbers more
      const float up = __uint_as_float((268 - e) << 23);         // 2^(14 - (e - 127))
      v = {v.x * up, v.y * up, v.z * up, v.w * up};
      *reinterpret_cast<uint2*>(to + k) = {pack_half(v.x, v.y), pack_half(v.z, v.w)};
      if (threadIdx.x % 32 == 0) x_scale[t * groups + k / 128] = __uint_as_float((e - 14) << 23);
      return;
    }
    if (W == DType::INT4) {  // k and k + 2 are neighbours there, k + 1 and k + 3 lie 4 places behind
      const int at = k / 16 * 16 + int4_position(k % 16);
      *reinterpret_cast<uint32_t*>(to + at) = pack_bf16(v.x, v.z);
      *reinterpret_cast<uint32_t*>(to + at + 4) = pack_bf16(v.y, v.w);
    } else if (W == DType::BF16) {  // pairs 0 and 1 of 8 values, or 2 and 3
      uint32_t* const pair = reinterpret_cast<uint32_t*>(to + k / 8 * 8) + k / 4 % 2;
      pair[0] = pack_bf16(v.x, v.y), pair[2] = pack_bf16(v.z, v.w);
    } else {
      *reinterpret_cast<uint2*>(to + k) = {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
    }
  };
  float* squares = reinterpret_cast<float*>(shared + m.squares);
  if constexpr (Quick) quick_quads<One>(m.in, norm, squares, sink);
  else for_each_quad(m.in, squares, reinterpret_cast<float*>(shared + m.inverse), sink);
}
static_assert(int4_position(6) == int4_position(4) + 1 && int4_position(5) == int4_position(4) + 4 && int4_position(7) == int4_position(4) + 5);
static_assert(int4_position(14) == int4_position(12) + 1 && int4_position(13) == int4_position(12) + 4 && int4_position(15) == int4_position(12) + 5);

constexpr int kExactRows = 4, kExactSpan = kWarps / 2 * 128;  // of a warp: rows; from one of its pieces of 128 values to the next

// sum[r][t] += the warp's values of exact row r times token t's. part: of the warp's first row; x (T, K): where the part begins, which has `left`
// values of a row. Half of the warps have rows 0 to 3, half 4 to 7, in turn 128 values each, so that x comes out of shared memory twice: were a
// row a warp's, that would be eight times (the router of four tokens took 7.2 us, it takes 6.0: H200).
template <int Tokens>
__device__ __forceinline__ void multiply_exact(float (&sum)[kExactRows][Tokens], const uint8_t* part, int pitch, bool f32, const float* x, int tokens, int k_all,
                                               int left) {
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x) % (kExactSpan / 4) * 4; k < left; k += kExactSpan) {
    float4 w[kExactRows];
#pragma unroll
    for (int r = 0; r < kExactRows; r++) {
      const uint8_t* at = part + r * pitch;
      if (f32) {
        w[r] = load4(reinterpret_cast<const float*>(at) + k);
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(at + 2 * k);
        w[r] = {bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y)};
      }
    }
#pragma unroll
    for (int t = 0; t < Tokens; t++) {
      if (t >= tokens) break;
      const float4 a = load4(x + t * k_all + k);
#pragma unroll
      for (int r = 0; r < kExactRows; r++) sum[r][t] = fmaf(w[r].x, a.x, fmaf(w[r].y, a.y, fmaf(w[r].z, a.z, fmaf(w[r].w, a.w, sum[r][t]))));
    }
  }
}

// The sum over the warp of the values of row lane / 8
__device__ __forceinline__ float sum_rows(float a, float b, float c, float d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool hi = lane & 16, odd = lane & 8;
  const float first = (hi ? c : a) + __shfl_xor_sync(0xffffffffu, hi ? a : c, 16), second = (hi ? d : b) + __shfl_xor_sync(0xffffffffu, hi ? b : d, 16);
  float s = (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 8);
#pragma unroll
  for (int i = 4; i; i /= 2) s += __shfl_xor_sync(0xffffffffu, s, i);
  return s;
}

// One: of one token, Quick: quick_shape(), Whole: warps have equal parts of whole chunks, in groups of 128. Nearly all products of decoding are all
// three, and a kernel that is over in microseconds, and again a few kernels later, must be small: what all of them execute has to stay in
// the instruction cache, which holds some 100 KB.
template <DType W, Act A, bool Quick, bool Whole, bool One>
__global__ void __launch_bounds__(kThreads, 2) matvec_k(const __grid_constant__ Matvec m) {
  extern __shared__ uint4 memory[];
  uint8_t* shared = reinterpret_cast<uint8_t*>(memory);
  Barrier *full = reinterpret_cast<Barrier*>(shared + m.barriers), *empty = full + kMaxSlots;
  const int warp = warp_index();
  const bool once = m.tasks <= static_cast<int>(gridDim.x);
  // Where the last unit of a row ends in what lay there before, that has to be finite: x is zero there, but not a number times zero is not
  if (m.in.k % kUnit)
    for (int i = static_cast<int>(threadIdx.x); i < m.slots * slot_bytes(W) / 16; i += kThreads) memory[i] = uint4{};
  if (threadIdx.x < 2 * kMaxSlots) init_barrier(full + threadIdx.x, threadIdx.x < kMaxSlots ? kFillArrivals : kWarps);
  publish_barriers();
  __syncthreads();
  if (warp == kWarps) {
    produce<W, Whole>(m, shared);
    if (once) let_next_start();
    wait_for_previous();
    return;
  }
  float4 norm[kNormQuads] = {};
  if constexpr (Quick) load_norms(m.in, norm);
  else prefetch_norms(m.in);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, g = lane / 4, t = lane % 4, tokens = One ? 1 : m.in.tokens;
  const int k_all = m.in.k, groups = (k_all + 127) / 128, size = tokens * kPanelRows;
  // Results of the lane are of tokens first and second. Columns of B without a token repeat the last one, and nobody looks at what they give.
  constexpr bool kRows = W == DType::BF16;
  const int first = kRows ? t : 2 * t, second = kRows ? t + 4 : 2 * t + 1;
  auto some = [&](int token) { return One ? 0 : min(token, tokens - 1); };
  const bool many = !One && tokens > 4;
  const uint16_t* const x = reinterpret_cast<const uint16_t*>(shared + m.x) + some(kRows ? g / 2 : g) * x_stride(W, k_all) +
                            (W == DType::INT4 ? 16 * t : kRows ? 8 * t + g % 2 * 4 : 8 * t);
  const int more = many ? (some(g / 2 + 4) - some(g / 2)) * x_stride(W, k_all) : 0;
  const float* const x_scale = reinterpret_cast<const float*>(shared + m.x_scale);
  const float *const scale_first = x_scale + some(first) * groups, *const scale_second = x_scale + some(second) * groups;
  float* partial = reinterpret_cast<float*>(shared + m.partial);  // (2, warps, T, 16): while one half is summed the other is written
  const bool swiglu = m.store == Store::SwiGLU;
  const int per_token = swiglu ? kPanelRows / 2 : kPanelRows, row = tid % per_token, out = tid / per_token;  // of the thread: row and token
  if (threadIdx.x < 3) prefetch_l2(threadIdx.x == 0 || (threadIdx.x == 1 && !m.in.b) ? m.in.a : threadIdx.x == 1 ? m.in.b : m.y);
  wait_for_previous();
  prologue<W, A, Quick, One>(m, norm, shared);
  sync_matvec();
  if (m.normed && blockIdx.x == gridDim.x - 1)
#pragma unroll 1
    for (int i = 4 * tid; i < tokens * k_all; i += 4 * kConsumers)
      *reinterpret_cast<float4*>(m.normed + i) = load4(reinterpret_cast<const float*>(shared + m.x_exact) + i);

  Place at;
  int task = static_cast<int>(blockIdx.x), half = kWarps * size;
  for (; task < m.panels; task += static_cast<int>(gridDim.x)) {
    const int n = task * per_token + row;
    const bool mine = out < tokens && (swiglu || n < m.rows);
    float* y = m.y + out * m.ldy + n;
    const float old = mine && m.store == Store::Add ? *y : 0.f;

    float total[4] = {};
    const bool last = !once && task + static_cast<int>(gridDim.x) >= m.panels;
#pragma unroll 1
    for (int c = 0; c < m.chunks; c++, at.next(m.slots)) {
      const uint8_t* slot = shared + at.slot * slot_bytes(W);
      const int k0 = (kRows ? c / 2 : c) * chunk_k(W);
      auto unit = [&](int u) {
        float2 scale{};
        const int k = k0 + u * kUnit;
        if (A == Act::INT8 || as_half(W, A)) scale = {scale_first[k / 128], One ? 0.f : scale_second[k / 128]};
        if constexpr (kRows) {
          float sums[2] = {c % 2 ? total[2] : total[0], c % 2 ? total[3] : total[1]};
          multiply_rows<A>(sums, slot + g * kRowPitch + t * 16 + u * (kUnit * 2), x + k, many, more, scale);
          (c % 2 ? total[2] : total[0]) = sums[0], (c % 2 ? total[3] : total[1]) = sums[1];
        } else {
          const uint16_t* scales = reinterpret_cast<const uint16_t*>(slot + tile_bytes(W)) + u * (kUnit >> (Whole ? 7 : m.shift)) * kPanelRows;
          multiply<W, A>(total, slot + u * unit_loads(W) * kTileBytes, scales, x + k, scale, Whole ? 7 : m.shift);
        }
      };
      if (last && c == m.chunks - 1) let_next_start();  // earlier, it delays us (measured)
      wait_barrier(full + at.slot, at.phase & 1);
      if constexpr (Whole) {
        constexpr int kMine = chunk_k(W) / kUnit / kWarps;
#pragma unroll
        for (int u = 0; u < kMine; u++) unit(warp * kMine + u);
      } else {
        const int units = (min(k_all - k0, chunk_k(W)) + kUnit - 1) / kUnit, end = slice(units, warp + 1);
#pragma unroll 1
        for (int u = slice(units, warp); u < end; u++) unit(u);
      }
      __syncwarp();
      if (lane == 0) arrive(empty + at.slot);
    }
    float* p = partial + warp * size + g;
    if (first < tokens) p[first * kPanelRows] = total[0], p[first * kPanelRows + 8] = total[2];
    if (second < tokens) p[second * kPanelRows] = total[1], p[second * kPanelRows + 8] = total[3];
    sync_matvec();
    if (mine) {
      const float* s = partial + out * kPanelRows + row;
      float sum = 0, up = 0;
#pragma unroll
      for (int i = 0; i < kWarps; i++) sum += s[i * size];
      if (swiglu) {
#pragma unroll
        for (int i = 0; i < kWarps; i++) up += s[i * size + 8];
        sum = silu(sum) * up;
      }
      *y = old + sum;
    }
    partial += half;
    half = -half;
  }

  for (; task < m.tasks; task += static_cast<int>(gridDim.x)) {  // kWarps exact rows, all tokens
    const ExactTask e = exact_task(m, task);
    constexpr int kTokens = One ? 1 : kFewTokens;
    const int first_row = warp / 4 * kExactRows;
    float sum[kExactRows][kTokens] = {};
#pragma unroll 1
    for (int c = 0; c < m.exact_chunks; c++, at.next(m.slots)) {
      const int values = exact_bytes(W) / e.item, begin = c * values;
      wait_barrier(full + at.slot, at.phase & 1);
      multiply_exact(sum, shared + at.slot * slot_bytes(W) + first_row * exact_bytes(W), exact_bytes(W), e.item == 4,
                     reinterpret_cast<const float*>(shared + m.x_exact) + begin, tokens, k_all, min(k_all - begin, values));
      __syncwarp();
      if (lane == 0) arrive(empty + at.slot);
    }
    float* p = partial + warp % 4 * tokens * kWarps + first_row + lane / 8;  // (4, T, 8)
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (i >= tokens) break;
      const float s = sum_rows(sum[0][i], sum[1][i], sum[2][i], sum[3][i]);
      if (lane % 8 == 0) p[i * kWarps] = s;
    }
    sync_matvec();
    if (tid < tokens * kWarps && tid % kWarps < e.rows) {
      float s = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) s += partial[i * tokens * kWarps + tid];
      e.y[tid / kWarps * e.ldy + tid % kWarps] = e.squash ? sigmoid(s) : s;
    }
    partial += half;
    half = -half;
  }
}

// ---- launching ----------------------------------------------------------------------------------------------------------

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <DType W>
void launch_matvec(const Context& c, const char* what, const Matvec& m, Act act, int most_blocks) {
  const dim3 grid(static_cast<unsigned>(std::min(m.tasks, most_blocks)));
  const auto bytes = static_cast<size_t>(m.bytes);
  const bool one = m.in.tokens == 1;
  const auto kernel = act != Act::BF16 ? matvec_k<W, Act::INT8, false, false, false>
                      : !m.in.quick    ? matvec_k<W, Act::BF16, false, false, false>
                      : m.whole        ? (one ? matvec_k<W, Act::BF16, true, true, true> : matvec_k<W, Act::BF16, true, true, false>)
                      : one            ? matvec_k<W, Act::BF16, true, false, true>
                                       : matvec_k<W, Act::BF16, true, false, false>;
  launch(c, what, kernel, grid, kThreads, bytes, m);
}

// False: not even the activations of one token fit into shared memory.
bool matvec_fast(const Context& c, const char* what, const Product& p) {
  const DType w = p.w.dtype;
  Matvec m;
  m.in = p.in, m.in.quick = quick_shape(p.in), m.in.inverse_k = 1.f / static_cast<float>(p.in.k);
  m.w = p.w.bytes(), m.rows = static_cast<int>(p.w.rows());
  m.stride = p.w.row_stride * 2;
  if (is_t16(w)) {
    m.stride = t16_panel_bytes(w, m.in.k, p.w.group);
    m.shift = std::countr_zero(p.w.group);
    m.tiles = static_cast<int>(round_up(m.in.k, kPadK)) / tile_k(w);
    m.scale_bytes = static_cast<int>(t16_scale_bytes(m.in.k, p.w.group));
  }
  const bool halves = p.store == Store::SwiGLU && !is_t16(w);  // gate rows, then up rows
  m.step = halves ? 8 : 16, m.pair = halves ? m.rows / 2 : 8;
  m.panels = static_cast<int>(t16_panels(m.rows));
  m.store = p.store, m.y = p.y, m.ldy = p.ldy, m.normed = p.normed;
  const bool bulk = c.overlap;
  const int chunk = chunk_k(w, bulk), part = exact_bytes(w, bulk), most_slots = w == DType::BF16 && bulk ? kMaxSlots / 2 : kMaxSlots;
  m.chunks = (m.in.k + chunk - 1) / chunk * (w == DType::BF16 ? 2 : 1);
  m.whole = m.in.k % chunk == 0 && (w == DType::BF16 || p.w.group == 128);
  m.tasks = m.panels;
  for (int i = 0; i < 2; i++) {
    m.exact[i] = p.exact[i], m.tasks += exact_tasks(p.exact[i].w.rows());
    if (p.exact[i].w) m.exact_chunks = std::max(m.exact_chunks, (m.in.k * (p.exact[i].w.dtype == DType::F32 ? 4 : 2) + part - 1) / part);
  }
  m.signal = p.exact[0].w ? 0 : 2;  // measured: of the router from its begin on, of output products (4 chunks) behind half of them

  const auto fits = [&](int n, int slots) { return lay_out(m, w, p.act, n, slots, bulk), static_cast<size_t>(m.bytes) <= c.shared_max; };
  const auto most_tokens = [&] {  // of one launch
    int n = p.in.tokens;
    while (n > 0 && !fits(n, 2)) n--;
    return n;
  };
  // Codes take instructions: for one token two blocks, of half the slots, on a multiprocessor are faster (measured on H200: INT8 rest 3 %, a head
  // in INT4 a quarter; of 4 tokens they are slower)
  const auto blocks_of = [&](int n) { return w != DType::BF16 && bulk && n == 1 && m.tasks > c.sms ? 2 : 1; };
  const auto slots_of = [&](int n) {
    // No more than a block uses, which leaves room for the next kernel's beside it. Of two tokens one less, with which it has room beside the `down`
    // of the experts before it (measured on H200: passes of 2 tokens 3 % faster; of 1, where there is room, 5 % slower)
    const int most = n == 2 && w == DType::BF16 && bulk ? most_slots - 1 : most_slots;
    int slots = m.tasks <= c.sms ? std::min(std::max(m.chunks, m.exact_chunks), most_slots) : most / blocks_of(n);
    while (!fits(n, slots)) slots--;
    return slots;
  };

  m.keep = p.exact[0].w || p.exact[1].w;
  const int tokens = most_tokens();
  if (tokens == 0) return false;
  if (p.normed && !m.keep) {  // in shared memory, if that costs neither a slot nor a token; else a kernel of its own writes it
    const int slots = slots_of(tokens);
    m.keep = true;
    if (most_tokens() != tokens || slots_of(tokens) != slots) {
      m.keep = false, m.normed = nullptr;
      Product only = p;
      only.w = {};
      matvec_exact(c, what, only);
    }
  }
  for (int first = 0; first < p.in.tokens; first += tokens) {
    const int n = std::min(tokens, p.in.tokens - first), blocks = blocks_of(n), slots = slots_of(n);
    lay_out(m, w, p.act, n, slots, bulk);
    if (w == DType::BF16) launch_matvec<DType::BF16>(c, what, m, p.act, c.sms);
    else if (w == DType::INT8) launch_matvec<DType::INT8>(c, what, m, p.act, c.sms * blocks);
    else launch_matvec<DType::INT4>(c, what, m, p.act, c.sms * blocks);
    m.in.a += n * m.in.lda, m.y += n * m.ldy;
    if (m.in.b) m.in.b += n * m.in.ldb;
    if (m.normed) m.normed += int64_t{n} * m.in.k;
    for (ExactRows& e : m.exact)
      if (e.w) e.y += n * e.ldy;
  }
  return true;
}

bool takes_fast(const Product& p) {
  return p.w && p.w.dtype != DType::F32 && p.act != Act::F32 && p.in.k % 8 == 0 && (is_t16(p.w.dtype) || p.w.row_stride % 8 == 0);
}

void multiply(const Context& c, const char* what, const Product& p) {
  const Input& in = p.in;
  QN_CHECK(in.tokens > 0 && in.tokens <= kFewTokens, "%s: %d tokens of at most %d", what, in.tokens, kFewTokens);
  QN_CHECK(aligned(in.a) && aligned(in.b) && aligned(in.w) && aligned(in.w2) && aligned(p.normed) && aligned(p.w.data) && in.lda % 4 == 0 &&
               in.ldb % 4 == 0 && in.span % 4 == 0,
           "%s: rows must begin at 16 bytes: they are %lld and %lld values apart, norms %d wide", what, static_cast<long long>(in.lda),
           static_cast<long long>(in.ldb), in.span);
  for (const ExactRows& e : p.exact) QN_CHECK(aligned(e.w.data) && e.w.row_stride % 8 == 0, "%s: exact rows must begin at 16 bytes", what);
  if (!takes_fast(p) || !matvec_fast(c, what, p)) matvec_exact(c, what, p);
}

// p with what the operation before has gated; false: only as it was
bool multiply_gated(const Context& c, const char* what, Product p, const Gated& from, int64_t parts, float eps) {
  const Input as = p.in;
  p.in = {};
  p.in.mix = Mix::Gated, p.in.tokens = as.tokens, p.in.k = as.k, p.in.eps = eps;
  p.in.a = from.o, p.in.lda = as.k, p.in.b = from.squares, p.in.ldb = parts;
  return quick_shape(p.in) && takes_fast(p) && matvec_fast(c, what, p);
}

Input input(Mix mix, const Tensor& a, const Tensor& b, const Tensor& w, const Tensor& w2, float eps) {
  Input in;
  in.mix = mix, in.tokens = static_cast<int>(a.rows()), in.eps = eps;
  in.k = static_cast<int>(mix == Mix::Concat ? 2 * a.cols() : a.cols());
  in.a = a.f32(), in.b = b.f32(), in.w = w.f32(), in.w2 = w2.f32();
  in.lda = in.tokens > 1 ? a.row_stride : 0, in.ldb = in.tokens > 1 ? b.row_stride : 0;
  if (w) in.span = static_cast<int>(w.rows()), in.spans = in.k / in.span, in.pieces = (in.span + 127) / 128;
  return in;
}

}  // namespace

void matvec_norm(const Context& c, const NormMatmulArgs& a) {
  Product p;
  p.in = input(a.norm ? Mix::Norm : Mix::Plain, a.h, {}, a.norm, {}, a.eps);
  p.act = a.act, p.w = a.w, p.y = a.y.f32(), p.ldy = a.y.row_stride;
  p.exact[0] = {a.w_exact, a.y_exact.f32(), a.y_exact.row_stride};
  p.normed = a.normed.f32();
  multiply(c, "norm_matmul", p);
}

void matvec_gated_norm(const Context& c, const GatedNormMatmulArgs& a) {
  Product p;
  p.in = input(Mix::GatedNorm, a.o, a.z, a.norm, {}, a.eps);
  p.act = a.act, p.w = a.w, p.store = Store::Add, p.y = a.h.f32(), p.ldy = a.h.row_stride;
  const int64_t heads = a.o.cols() / a.norm.rows();
  const Gated ready = take_gated(c, a.o.rows(), heads, a.key_dim, a.norm.rows());
  if (ready.o && a.act == Act::BF16 && multiply_gated(c, "gated_norm_matmul", p, ready, heads * Gated::kParts, a.eps)) return;
  multiply(c, "gated_norm_matmul", p);
}

void matvec_gate(const Context& c, const GateMatmulArgs& a, bool gated) {
  Product p;
  p.in = input(Mix::Gate, a.o, a.gate, {}, {}, 0);
  p.act = a.act, p.w = a.w, p.store = Store::Add, p.y = a.h.f32(), p.ldy = a.h.row_stride;
  if (gated && a.act == Act::BF16 && multiply_gated(c, "gate_matmul", p, {Scratch(c).take<float>(a.o.rows() * a.o.cols())}, 0, 0)) return;
  multiply(c, "gate_matmul", p);
}

void matvec_concat(const Context& c, const ConcatMatmulArgs& a) {
  Product p;
  p.in = input(Mix::Concat, a.a, a.b, a.norm_a, a.norm_b, a.eps);
  p.act = a.act, p.w = a.w, p.y = a.y.f32(), p.ldy = a.y.row_stride;
  multiply(c, "concat_matmul", p);
}

void matvec_router(const Context& c, const MoeRouterArgs& a) {
  Product p;
  p.in = input(Mix::Norm, a.h, {}, a.norm, {}, a.eps);
  p.act = a.shared_act, p.w = a.shared_gate_up, p.store = Store::SwiGLU, p.y = a.shared.f32(), p.ldy = a.shared.row_stride;
  p.exact[0] = {a.router, a.logits.f32(), a.logits.row_stride};
  p.exact[1] = {a.shared_gate, a.shared_scale.f32(), 1, true};
  p.normed = a.x.f32();
  multiply(c, "moe_router", p);
}

size_t matvec_scratch(const OpLimits& l) { return matvec_exact_scratch(l); }

}  // namespace qn::cuda
