// Causal attention of few tokens (decode, verification) over a long cache, and the exact kernel for everything unusual.
//
// Few tokens: the cache is read once, at the speed of memory; everything else hides behind that.
//
//   chunk   a run of keys that yields one partial result per row: largest score m, sum l of p = 2^(s-m), sum o of p * v. Where
//           chunks begin depends on the position alone (64 keys each up to 8192, then 64 chunks for every doubling), and a row
//           combines the chunks up to its own position in a fixed order: its bits depend neither on how many tokens
//           the call has nor on which block computed what.
//   block   one per multiprocessor, or two (two_blocks()), bound to one key head. It takes that head's chunks from the last one down,
//           large ones first: the first by its rank, the others by a counter, when it begins to load the last tile of the one before.
//           So all blocks end within about a tile of each other.
//   tile    64 keys: 32 KB of K (16 of codes), then as much of V, through a ring of slots that cp.async fills as far ahead as there are slots.
//
// Tensor cores with the accuracy of fp32: an A tile of m16n8k16 holds 8 query heads of one token twice, rows 0..7 q rounded to
// BF16 and rows 8..15 what that leaves of it, and the two halves of the result are added: q K' to 16 bits of q, where K is exact.
// p is split in the same way. Row g and row g+8 are in the same lane, so that the addition needs no exchange.
//
//   warp w of 8:   scores of keys 8w..8w+7 (all 256 dims, all A tiles)  ->  maxima  ->  p  ->  dims 32w..32w+31 of o (all 64 keys)
//
// An INT8 cache takes the same way with half the bytes: codes become BF16, exactly, in the registers between ldmatrix and mma; scales
// of K meet the fp32 sums of their 128 dims, those of V meet p (see Int8Cache).
//
// New keys and values are never read from the cache: the two blocks that can meet them (chunks are longer than a call has tokens,
// so they are in the last two) compute them themselves, rounded as stored, and put them into the tile; the block of rank 0
// appends them to the cache, where nobody else looks at these positions during the kernel.
#include <algorithm>
#include <type_traits>

#include "cuda/attn.cuh"
#include "ggml-lite/core/limits.h"

namespace qn::cuda {
namespace {

// ---- chunks -----------------------------------------------------------------------------------------------------------

constexpr int kTile = 64;
constexpr int kFirstChunks = 128, kPerDoubling = 64;   // 128 chunks of 64 keys, then 64 of 128, 64 of 256, ...
__host__ __device__ constexpr int chunk_begin(int c) {
  if (c < kFirstChunks) return c * kTile;
  const int e = (c - kFirstChunks) / kPerDoubling, r = (c - kFirstChunks) % kPerDoubling;
  return (kPerDoubling + r) * (kFirstChunks << e);
}
__host__ __device__ constexpr int chunk_of(int position) {
  if (position < kFirstChunks * kTile) return position / kTile;
  int e = 0;
  while (position >> (14 + e)) e++;  // 8192 << e <= position
  return kFirstChunks + kPerDoubling * e + (position / (kFirstChunks << e) - kPerDoubling);
}
static_assert(chunk_begin(kFirstChunks) == kFirstChunks * kTile && chunk_begin(kFirstChunks + kPerDoubling) == 2 * kFirstChunks * kTile);
static_assert(chunk_of(8191) == 127 && chunk_of(8192) == 128 && chunk_of(16383) == 191 && chunk_of(16384) == 192);
static_assert(chunk_begin(chunk_of(100000)) <= 100000 && chunk_begin(chunk_of(100000) + 1) > 100000);
constexpr int kChunksMax = chunk_of(kMaxContext - 1) + 1;
static_assert(kChunksMax <= 1024);

// ---- the kernel for few tokens ----------------------------------------------------------------------------------------

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTilesMax = 8;                         // A tiles of a launch
constexpr int kQueryBytes = 16 * kRowBytes;          // of one A tile: 16 steps of k x 32 lanes x 16
constexpr int kProbBytes = 4 * 32 * 16;              // of one A tile (and half of the dims): 4 steps of k x 32 lanes x 16
constexpr int kReduceBytes = kWarps * 8 * 4;         // of one A tile
constexpr int kQueue = 8, kQueueBytes = 64;

// What differs from one format of the cache to the other; everything else asks these.
//
//   BF16   Registers of ldmatrix are operands as they come.
//   INT8   ldmatrix takes pairs of codes for its 16-bit values. A register then holds codes 4t..4t+3 of a key (K), or dims 2g, 2g+1 of keys
//          2t and 2t+1 (V, transposed); widened, its even and its odd bytes are two operands. So a k step of q K' has its 16 dims in the
//          order 4t, 4t+2 | 4t+1, 4t+3 for q, too, and n tiles of p V hold the even and the odd dims of 16 in turn. q K' has two chains of
//          sums for dims 0..127 and two for 128..255. p is split once for each half of the dims, times the scale of V there; a warp's 32
//          dims lie in one half. Both kinds of scales come with K: p needs those of V before V has to be there.
struct Bf16Cache {
  using Stored = uint16_t;
  static constexpr bool kCodes = false;
  static constexpr int kBytes = kRowBytes, kFreshBytes = kBytes, kSlotBytes = kTile * kBytes, kSlots = 4, kHalves = 1;
  __device__ static int chunk(int row, int c) { return row_chunk(row, c); }
};
struct Int8Cache {
  using Stored = int8_t;
  static constexpr bool kCodes = true;
  static constexpr int kBytes = kWidth, kFreshBytes = kBytes + 16, kHalves = 2, kSlots = 8;  // a new row: codes, scales, padding
  static constexpr int kScalesAt = kTile * kBytes, kValueScalesAt = kScalesAt + kTile * kScaleBytes;  // in a slot of K
  static constexpr int kSlotBytes = kValueScalesAt + kTile * kScaleBytes;
  __device__ static int chunk(int row, int c) { return code_chunk(row, c); }
};
static_assert(Int8Cache::kSlotBytes % 128 == 0 && kThreads >= 2 * kTile);

// One head of the cache
template <class Cache>
struct Planes {
  typename Cache::Stored *k, *v;    // (C, 256)
  uint16_t *k_scales, *v_scales;    // (C, 2) of codes
  __device__ Planes(const Attn& a, int head)
      : k(static_cast<typename Cache::Stored*>(a.k_cache) + head * a.k_stride), v(static_cast<typename Cache::Stored*>(a.v_cache) + head * a.v_stride),
        k_scales(a.k_scales + head * a.k_scales_stride), v_scales(a.v_scales + head * a.v_scales_stride) {}
};

// Over codes, one token: two blocks on a multiprocessor. What they wait for takes as long as with BF16 and there are half as many bytes, so one
// alone reads 2.6 TB/s of an H200's 4.3, two 3.0.
template <class Cache>
constexpr bool two_blocks(int tiles) { return Cache::kCodes && tiles == 1; }

struct Few {
  float* gated;        // (T, H*DH) or null: o * sigmoid(gate) as well
  float* part;         // (chunks, tokens, H, DH)
  float2* stats;       // (tokens, H, chunks): m, l
  uint32_t* counters;  // (HK, kHeadCounters), zero
  int first, tokens;   // the tokens of this launch
  int chunks;          // of the whole cache
  int slots;           // of the ring, 2..Cache::kSlots
  int alone;           // blocks of a head that have a multiprocessor for themselves; the others leave where these have a chunk each, at most
};

// Shared memory: slots of the ring | A tiles of q | new k, new v (tokens, row) | rows while q is made, then p and reductions | queue
template <class Cache>
__host__ __device__ constexpr int work_bytes(int tiles) {
  const int bytes = tiles * (Cache::kHalves * kProbBytes + kReduceBytes);
  return bytes > kWarps * kWidth * 4 ? bytes : kWarps * kWidth * 4;
}
template <class Cache>
constexpr size_t few_bytes(int slots, int tiles, int tokens) {
  return static_cast<size_t>(slots) * Cache::kSlotBytes + tiles * kQueryBytes + 2 * tokens * Cache::kFreshBytes + work_bytes<Cache>(tiles) + kQueueBytes;
}

// Waits until at most `pending` groups are under way, or `Most`, if that is less.
template <int Most>
__device__ __forceinline__ void copy_async_wait_for(int pending) {
  if constexpr (Most > 0) {
    if (pending < Most) return copy_async_wait_for<Most - 1>(pending);
  }
  copy_async_wait<Most>();
}

// One head of one token into its A tile: of each step s of 16 dims, lane 4g + t gets hi and lo of dims 2t, 2t+1, then of 2t+8, 2t+9
// (or the order of codes).
template <class Cache>
__device__ __forceinline__ void store_query(const float* row, float scale, int g, uint4* tile) {
#pragma unroll
  for (int e = static_cast<int>(threadIdx.x & 31); e < 64; e += 32) {
    const int s = e >> 2, t = e & 3;
    float2 a, b;
    if constexpr (Cache::kCodes) {
      const float4 x = *reinterpret_cast<const float4*>(row + 16 * s + 4 * t);
      a = make_float2(x.x, x.z), b = make_float2(x.y, x.w);
    } else {
      a = *reinterpret_cast<const float2*>(row + 16 * s + 2 * t), b = *reinterpret_cast<const float2*>(row + 16 * s + 2 * t + 8);
    }
    uint4 v;
    split_bf16(__fmul_rn(a.x, scale), __fmul_rn(a.y, scale), v.x, v.y);  // not to be contracted: the same bits for any number of tiles
    split_bf16(__fmul_rn(b.x, scale), __fmul_rn(b.y, scale), v.z, v.w);
    tile[s * 32 + 4 * g + t] = v;
  }
}

// What a warp needs first: a row of q, and where `fresh` the key and the value of one of the call's tokens (it has at most 8, a warp each).
// Loads are served in the order of asking, so these are asked for before the tiles.
struct Early {
  HeadRow<kWidth> q, k;
  float v[kWidth / 32];
  __device__ __forceinline__ void load(const Attn& a, const Few& f, int head, bool fresh) {
    const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), group = a.heads / a.kv_heads;
    q.load(a, a.query(f.first, head * group + min(warp, group - 1)), a.q_norm);
    if (!fresh || warp >= f.tokens) return;
    k.load(a, a.key(f.first + warp, head), a.k_norm);
#pragma unroll
    for (int i = 0; i < kWidth / 32; i++) v[i] = a.value(f.first + warp, head)[32 * i + lane];
  }
};
static_assert(kFewTokens <= kWarps);

// q of all A tiles; new keys and values where `fresh`
template <class Cache>
__device__ __forceinline__ void prepare(const Attn& a, const Few& f, const Early& early, int head, int pos, int tiles, bool fresh, uint4* query,
                                        uint8_t* fresh_k, uint8_t* fresh_v, float* rows) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31);
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
  float* row = rows + warp * kWidth;
  HeadRow<kWidth> q = early.q;
  for (int r = warp; r < 8 * tiles; r += kWarps) {
    const int i = r >> 3, g = r & 7, t = i / per_token, h = i % per_token * 8 + g;
    const int j = (r + kWarps) >> 3, t_next = j / per_token, h_next = j % per_token * 8 + g;
    float next[kWidth / 32];  // on its way while this row is made
    if (r + kWarps < 8 * tiles && h_next < group) {
#pragma unroll
      for (int e = 0; e < kWidth / 32; e++) next[e] = a.query(f.first + t_next, head * group + h_next)[32 * e + lane];
    }
    if (h < group) {
      norm_rotate(a, q, pos + t, row);
      store_query<Cache>(row, a.q_scale, g, query + i * (kQueryBytes / 16));
    } else {
      for (int e = lane; e < 64; e += 32) query[i * (kQueryBytes / 16) + (e >> 2) * 32 + 4 * g + (e & 3)] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int e = 0; e < kWidth / 32; e++) q.v[e] = next[e];
    __syncwarp();
  }
  if (!fresh || warp >= f.tokens) return;
  const auto round = [&](uint8_t* to) {  // the row, as it is stored
    if constexpr (Cache::kCodes) {
      quantise_row(row, kWidth, reinterpret_cast<int8_t*>(to), reinterpret_cast<uint16_t*>(to + Cache::kBytes));
    } else {
      const float* x = row + lane * 8;
      reinterpret_cast<uint4*>(to)[lane] = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
    __syncwarp();
  };
#pragma unroll
  for (int i = 0; i < kWidth / 32; i++) row[32 * i + lane] = early.v[i];
  __syncwarp();
  round(fresh_v + warp * Cache::kFreshBytes);
  norm_rotate(a, early.k, pos + warp, row);
  round(fresh_k + warp * Cache::kFreshBytes);
}

// Calls f(token, chunk) of 16 bytes for every chunk of every new row.
template <class Cache, class F>
__device__ __forceinline__ void each_fresh(int tokens, F f) {
  constexpr int kChunks = Cache::kBytes / 16;
  for (int i = static_cast<int>(threadIdx.x); i < tokens * kChunks; i += kThreads) f(i / kChunks, i % kChunks);
}
template <class Cache>
__device__ __forceinline__ uint4 fresh_chunk(const uint8_t* fresh, int t, int c) {
  return *reinterpret_cast<const uint4*>(fresh + t * Cache::kFreshBytes + 16 * c);
}
template <class Cache>
__device__ __forceinline__ uint32_t fresh_scales(const uint8_t* fresh, int t) {
  return *reinterpret_cast<const uint32_t*>(fresh + t * Cache::kFreshBytes + Cache::kBytes);
}

// Puts the new rows that belong there into a tile of K or V; and all their scales into a tile of K.
template <class Cache>
__device__ __forceinline__ void patch(uint8_t* slot, const uint8_t* fresh, int key, int pos, int tokens) {
  each_fresh<Cache>(tokens, [&](int t, int c) {
    const int r = pos + t - key;
    if (r >= 0 && r < kTile) *reinterpret_cast<uint4*>(slot + Cache::chunk(r, c)) = fresh_chunk<Cache>(fresh, t, c);
  });
}
template <class Cache>
__device__ __forceinline__ void patch_scales(uint8_t* slot, const uint8_t* fresh_k, const uint8_t* fresh_v, int key, int pos, int tokens) {
  const int t = static_cast<int>(threadIdx.x), r = pos + t - key;
  if (t >= tokens || r < 0 || r >= kTile) return;
  *reinterpret_cast<uint32_t*>(slot + Cache::kScalesAt + r * kScaleBytes) = fresh_scales<Cache>(fresh_k, t);
  *reinterpret_cast<uint32_t*>(slot + Cache::kValueScalesAt + r * kScaleBytes) = fresh_scales<Cache>(fresh_v, t);
}

// New rows to their places in the cache
template <class Cache>
__device__ __forceinline__ void append(const Planes<Cache>& cache, const uint8_t* fresh_k, const uint8_t* fresh_v, int pos, int tokens) {
  each_fresh<Cache>(tokens, [&](int t, int c) {
    const int64_t at = static_cast<int64_t>(pos + t) * (Cache::kBytes / 16) + c;
    reinterpret_cast<uint4*>(cache.k)[at] = fresh_chunk<Cache>(fresh_k, t, c);
    reinterpret_cast<uint4*>(cache.v)[at] = fresh_chunk<Cache>(fresh_v, t, c);
  });
  if constexpr (Cache::kCodes) {
    const int t = static_cast<int>(threadIdx.x);
    if (t >= tokens) return;
    reinterpret_cast<uint32_t*>(cache.k_scales)[pos + t] = fresh_scales<Cache>(fresh_k, t);
    reinterpret_cast<uint32_t*>(cache.v_scales)[pos + t] = fresh_scales<Cache>(fresh_v, t);
  }
}

// Starts loading the tile of K, or of V, from position `first` on; zeros from `end` on.
template <class Cache>
__device__ __forceinline__ void load_keys(uint8_t* slot, const Planes<Cache>& cache, int first, int end) {
  if constexpr (Cache::kCodes) {
    load_codes<kTile, kThreads>(slot, cache.k, first, end);
    load_scales<kTile>(slot + Cache::kScalesAt, cache.k_scales, first, end, 0);
    load_scales<kTile>(slot + Cache::kValueScalesAt, cache.v_scales, first, end, kTile);
  } else {
    load_rows<kTile, kThreads>(slot, cache.k, first, end);
  }
}
template <class Cache>
__device__ __forceinline__ void load_values(uint8_t* slot, const Planes<Cache>& cache, int first, int end) {
  if constexpr (Cache::kCodes) load_codes<kTile, kThreads>(slot, cache.v, first, end);
  else load_rows<kTile, kThreads>(slot, cache.v, first, end);
}

// The scales, of dims 0..127 and of the rest, of the keys whose scores a lane has: keys 8 warp + 2t, + 1. `at`: where the scales are.
__device__ __forceinline__ void lane_scales(const uint8_t* at, float2 (&scales)[2]) {
  const int warp = static_cast<int>(threadIdx.x >> 5), t = static_cast<int>(threadIdx.x & 3);
  const uint2 w = *reinterpret_cast<const uint2*>(at + (8 * warp + 2 * t) * kScaleBytes);
  scales[0] = scale_pair(w.x), scales[1] = scale_pair(w.y);
}

// B operands of keys 8 warp .. + 7 for each k step of 16 dims
template <class Cache>
__device__ __forceinline__ void key_operands(const uint8_t* slot, uint32_t (&b)[16][2]) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), row = 8 * warp + (lane & 7);
#pragma unroll
  for (int j = 0; j < Cache::kBytes / 64; j++) {
    uint32_t k[4];
    load_matrix_x4(k, slot + Cache::chunk(row, 4 * j + (lane >> 3)));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (Cache::kCodes) widen_codes(k[i], b[4 * j + i][0], b[4 * j + i][1]);
      else b[2 * j + i / 2][i % 2] = k[i];
    }
  }
}

// B operands of keys 16 j .. + 15 for the four n tiles of dims 32 warp .. + 31
template <class Cache>
__device__ __forceinline__ void value_operands(const uint8_t* slot, int j, uint32_t (&b)[4][2]) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), row = 16 * j + (lane & 15);
  uint32_t v[4];
  if constexpr (Cache::kCodes) {
    load_matrix_x4_transposed(v, slot + Cache::chunk(row, 2 * warp + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < 4; i++) widen_codes(v[i], b[i / 2 * 2][i % 2], b[i / 2 * 2 + 1][i % 2]);
  } else {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      load_matrix_x4_transposed(v, slot + Cache::chunk(row, 4 * warp + 2 * n + (lane >> 4)));
#pragma unroll
      for (int i = 0; i < 4; i++) b[2 * n + i / 2][i % 2] = v[i];
    }
  }
}

// Scores of keys 8 warp + 2t, + 1 for head g of each A tile. Four chains of sums, always the same ones.
template <int Tiles, class Cache>
__device__ __forceinline__ void scores(const uint8_t* slot, const uint4* query, int tiles, float (&s)[Tiles][2]) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  uint32_t k[16][2];
  key_operands<Cache>(slot, k);
  float2 scales[2];
  if constexpr (Cache::kCodes) lane_scales(slot + Cache::kScalesAt, scales);
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    if (i >= tiles) continue;
    float d[4][4] = {};
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const uint4 q = query[(i * 16 + j) * 32 + lane];
      const uint32_t x[4] = {q.x, q.y, q.z, q.w};
      mma_16816(d[Cache::kCodes ? j / 8 * 2 + (j & 1) : j & 3], x, k[j][0], k[j][1]);
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if constexpr (Cache::kCodes) {
        const float first = (d[0][c] + d[1][c]) + (d[0][c + 2] + d[1][c + 2]), second = (d[2][c] + d[3][c]) + (d[2][c + 2] + d[3][c + 2]);
        s[i][c] = fmaf(second, scales[c].y, __fmul_rn(first, scales[c].x));  // contracted by hand, as above
      } else {
        const float hi = (d[0][c] + d[1][c]) + (d[2][c] + d[3][c]), lo = (d[0][c + 2] + d[1][c + 2]) + (d[2][c + 2] + d[3][c + 2]);
        s[i][c] = hi + lo;
      }
    }
  }
}

// p of the two keys of a lane (8 warp + 2t, + 1) for head g of A tile i: hi and lo of each set, where add_values() finds them as A operands
template <class Cache>
__device__ __forceinline__ void store_probabilities(uint4* prob, int i, float p0, float p1, const float2 (&scales)[2]) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31);
#pragma unroll
  for (int half = 0; half < Cache::kHalves; half++) {
    uint2 p;
    if constexpr (Cache::kCodes) split_bf16(__fmul_rn(p0, half ? scales[0].y : scales[0].x), __fmul_rn(p1, half ? scales[1].y : scales[1].x), p.x, p.y);
    else split_bf16(p0, p1, p.x, p.y);
    reinterpret_cast<uint2*>(prob + ((i * Cache::kHalves + half) * 4 + (warp >> 1)) * 32 + lane)[warp & 1] = p;
  }
}

// o (dims 32 warp + 8n + 2t, + 1 of head g, or the order of codes; hi and lo apart) = o * alpha + p V
template <int Tiles, class Cache>
__device__ __forceinline__ void add_values(const uint8_t* slot, const uint4* prob, int tiles, const float (&alpha)[Tiles],
                                           float (&o)[Tiles][4][4]) {
  const int lane = static_cast<int>(threadIdx.x & 31), half = Cache::kHalves == 2 ? static_cast<int>(threadIdx.x >> 7) : 0;
#pragma unroll
  for (int i = 0; i < Tiles; i++)
#pragma unroll
    for (int n = 0; n < 16; n++) o[i][n >> 2][n & 3] *= alpha[i];
#pragma unroll
  for (int j = 0; j < 4; j++) {  // 16 keys
    uint32_t v[4][2];
    value_operands<Cache>(slot, j, v);
#pragma unroll
    for (int i = 0; i < Tiles; i++) {
      if (i >= tiles) continue;
      const uint4 p = prob[((i * Cache::kHalves + half) * 4 + j) * 32 + lane];
      const uint32_t x[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
      for (int n = 0; n < 4; n++) mma_16816(o[i][n], x, v[n][0], v[n][1]);
    }
  }
}

// The partial result of a chunk. `reduce` is free: its maxima were read before the last barrier, the next ones come after another.
template <int Tiles, class Cache>
__device__ __forceinline__ void store_part(const Attn& a, const Few& f, int head, int chunk, int tiles, float* reduce,
                                           const float (&o)[Tiles][4][4], const float (&m)[Tiles], float (&l)[Tiles]) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), g = lane >> 2, t2 = 2 * (lane & 3);
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    if (i >= tiles) continue;
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 1);
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 2);
    if (t2 == 0) reduce[(i * kWarps + warp) * 8 + g] = l[i];
    const int t = i / per_token, h = i % per_token * 8 + g;
    if (h >= group) continue;
    float* part = f.part + ((static_cast<int64_t>(chunk) * f.tokens + t) * a.heads + head * group + h) * kWidth + 32 * warp;
    const auto sum = [&](int n, int c) { return o[i][n][c] + o[i][n][c + 2]; };
    if constexpr (Cache::kCodes) {
#pragma unroll
      for (int n = 0; n < 4; n += 2)
        *reinterpret_cast<float4*>(part + 8 * n + 2 * t2) = make_float4(sum(n, 0), sum(n + 1, 0), sum(n, 1), sum(n + 1, 1));
    } else {
#pragma unroll
      for (int n = 0; n < 4; n++) *reinterpret_cast<float2*>(part + 8 * n + t2) = make_float2(sum(n, 0), sum(n, 1));
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    const int t = i / per_token, h = i % per_token * 8 + g;
    if (i >= tiles || warp || t2 || h >= group) continue;
    float sum = 0;
    for (int w = 0; w < kWarps; w++) sum += reduce[(i * kWarps + w) * 8 + g];
    f.stats[(static_cast<int64_t>(t) * a.heads + head * group + h) * f.chunks + chunk] = make_float2(m[i], sum);
  }
}

// ---- the results of all chunks ----------------------------------------------------------------------------------------
//
// Blocks of a head meet when all have stored their parts; then each combines some of the outputs. They can wait for each other: a grid of more
// than one block for each head is no larger than the multiprocessors have room for, one block each, or two where the driver says so; a kernel that
// starts early starts when all of these have, and those before wait for nothing later. That holds on a GPU whose time slices this process has to itself:
// not beside a kernel of this kind on another stream of the same context, or another process under MPS. One device object has one stream.
//
//   counters of a head   [0] chunks taken   [1] blocks that have stored   [2] blocks that have seen all of them
//
// A block stores its parts; the barrier orders that before the thread that makes them visible and counts to [1] (release). Who sees [1] full
// (acquire) orders it before the loads behind the second barrier, which pass by the first-level cache. The last one to count to [2] zeroes all
// three: nobody looks at them any more.

constexpr int kHeadCounters = 3;
constexpr int kHalf = kThreads / 2, kRuns = kHalf / 16;
struct Combine {  // of each half of a block, in shared memory, where the ring was
  float4 sums[kRuns][16];
  float weight[kChunksMax], reduce[2 * kHalf / 32];
};
static_assert(2 * sizeof(Combine) <= 2 * Int8Cache::kSlotBytes);

__device__ __forceinline__ void wait_for_parts(uint32_t* counters, uint32_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t seen;
    __threadfence();
    atomicAdd(counters + 1, 1u);
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counters + 1) : "memory");
    while (seen < blocks);
    if (atomicAdd(counters + 2, 1u) == blocks - 1) counters[0] = counters[1] = counters[2] = 0;
  }
  __syncthreads();
}

// o = sum of 2^(m - M) o_chunk / sum of 2^(m - M) l_chunk. In turns of 64 dims of a row, each half of a block its own: 16 columns of 4 dims x 8 runs
// of every eighth chunk.
__device__ __forceinline__ void combine(const Attn& a, const Few& f, int head, int rank, int blocks, Combine* of_halves) {
  const int group = a.heads / a.kv_heads, half = static_cast<int>(threadIdx.x) / kHalf, tid = static_cast<int>(threadIdx.x) % kHalf;
  const int column = tid & 15, run = tid >> 4;
  Combine& s = of_halves[half];
  const auto sync = [&] {  // of this half; literal numbers, for a kernel with a number in a register is taken to need all 16
    if (half) asm volatile("bar.sync 2, %0;" ::"n"(kHalf) : "memory");
    else asm volatile("bar.sync 1, %0;" ::"n"(kHalf) : "memory");
  };
#pragma unroll 1
  for (int turn = rank + half * blocks; turn < f.tokens * group * 4; turn += 2 * blocks) {
    const int t = turn / (group * 4), h = head * group + turn / 4 % group, dim = turn % 4 * 64 + column * 4;
    const int n = chunk_of(a.start() + f.first + t) + 1;
    const float2* stats = f.stats + (static_cast<int64_t>(t) * a.heads + h) * f.chunks;
    const float4* part = reinterpret_cast<const float4*>(f.part + (static_cast<int64_t>(t) * a.heads + h) * kWidth + dim);
    const int64_t stride = static_cast<int64_t>(f.tokens) * a.heads * (kWidth / 4);
    const float2 mine = tid < n ? __ldcg(stats + tid) : make_float2(-INFINITY, 0.f);
    constexpr int kFirst = 8;
    float4 v[kFirst];  // the first parts: all is asked for at once
#pragma unroll
    for (int i = 0; i < kFirst; i++)
      if (run + kRuns * i < n) v[i] = __ldcg(part + (run + kRuns * i) * stride);
    float4 gate = make_float4(0, 0, 0, 0);
    if (run == 0 && f.gated) gate = *reinterpret_cast<const float4*>(a.query(f.first + t, a.heads + h) + dim);
    float top = mine.x;
#pragma unroll 1
    for (int c = tid + kHalf; c < n; c += kHalf) top = fmaxf(top, __ldcg(stats + c).x);
    top = warp_max(top);
    if ((tid & 31) == 0) s.reduce[tid >> 5] = top;
    sync();
#pragma unroll
    for (int w = 0; w < kHalf / 32; w++) top = fmaxf(top, s.reduce[w]);
    float all = 0;
#pragma unroll 1
    for (int c = tid; c < n; c += kHalf) {
      const float2 stat = c == tid ? mine : __ldcg(stats + c);
      const float w = exp2f(stat.x - top);
      s.weight[c] = w;
      all = fmaf(w, stat.y, all);
    }
    all = warp_sum(all);
    if ((tid & 31) == 0) s.reduce[kHalf / 32 + (tid >> 5)] = all;
    sync();  // also makes the weights visible
    all = 0;
#pragma unroll
    for (int w = 0; w < kHalf / 32; w++) all += s.reduce[kHalf / 32 + w];
    float4 o = make_float4(0, 0, 0, 0);
    const auto add = [&](int c, const float4& x) {
      const float w = s.weight[c];
      o.x = fmaf(w, x.x, o.x), o.y = fmaf(w, x.y, o.y), o.z = fmaf(w, x.z, o.z), o.w = fmaf(w, x.w, o.w);
    };
#pragma unroll
    for (int i = 0; i < kFirst; i++)
      if (run + kRuns * i < n) add(run + kRuns * i, v[i]);
#pragma unroll 4
    for (int c = run + kRuns * kFirst; c < n; c += kRuns) add(c, __ldcg(part + c * stride));
    s.sums[run][column] = o;
    sync();
    if (run == 0) {
#pragma unroll
      for (int r = 1; r < kRuns; r++) {
        const float4 x = s.sums[r][column];
        o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
      }
      const int64_t at = (static_cast<int64_t>(f.first + t) * a.heads + h) * kWidth + dim;
      o = make_float4(o.x / all, o.y / all, o.z / all, o.w / all);
      *reinterpret_cast<float4*>(a.o + at) = o;
      if (f.gated)
        *reinterpret_cast<float4*>(f.gated + at) = make_float4(o.x * sigmoid(gate.x), o.y * sigmoid(gate.y), o.z * sigmoid(gate.z), o.w * sigmoid(gate.w));
    }
    sync();  // before the next turn's weights
  }
}

// Grid: HK x blocks per head. Tiles: at least tokens * ceil(G/8).
template <int Tiles, class Cache>
__global__ __launch_bounds__(kThreads, two_blocks<Cache>(Tiles) ? 2 : 1) void attn_few_k(const Attn a, const Few f) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), g = lane >> 2, t2 = 2 * (lane & 3);
  const int head = static_cast<int>(blockIdx.x) % a.kv_heads, rank = static_cast<int>(blockIdx.x) / a.kv_heads;
  int blocks = static_cast<int>(gridDim.x) / a.kv_heads;
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
  const int tiles = f.tokens * per_token;
  uint8_t* after = shared + f.slots * Cache::kSlotBytes;
  uint4* query = reinterpret_cast<uint4*>(after);
  uint8_t *fresh_k = after + tiles * kQueryBytes, *fresh_v = fresh_k + f.tokens * Cache::kFreshBytes;
  uint4* prob = reinterpret_cast<uint4*>(fresh_v + f.tokens * Cache::kFreshBytes);
  float* reduce = reinterpret_cast<float*>(prob + tiles * Cache::kHalves * (kProbBytes / 16));  // (A tiles, warps, 8)
  // queue[n % 8]: the n-th chunk of this block, counted from the last one; of n < known
  int *queue = reinterpret_cast<int*>(reinterpret_cast<uint8_t*>(prob) + work_bytes<Cache>(tiles)), &known = queue[kQueue];
  if (threadIdx.x == 0) queue[0] = rank, known = 1;
  if (threadIdx.x < 3) prefetch_l2(threadIdx.x == 0 ? a.qgkv : threadIdx.x == 1 ? f.part : reinterpret_cast<const float*>(a.step));
  wait_for_previous();
  const int pos = a.start() + f.first, end = pos + f.tokens, last = chunk_of(end - 1);
  if (two_blocks<Cache>(Tiles) && last < f.alone && blocks > f.alone) {
    blocks = f.alone;
    if (rank >= blocks) return;
  }
  const Planes<Cache> cache(a, head);
  __syncthreads();

  // What is loaded: half-tile number `loaded` (even: K, odd: V of the same keys) is the next one. During phase h, when half-tiles
  // before h are done with, there is room up to h + slots. `known` and queue change only between the second and the third barrier
  // of a tile, where nobody calls fill(): all threads decide alike.
  int loaded = 0, fill_slot = 0, fill_item = 0, fill_key = chunk_begin(last - rank), fill_stop = min(chunk_begin(last - rank + 1), end);
  int taken = 0;
  bool asked = false;
  const auto fill = [&](int h) {
    for (; loaded < h + f.slots; loaded++) {
      uint8_t* slot = shared + fill_slot * Cache::kSlotBytes;
      if (loaded & 1) {
        load_values<Cache>(slot, cache, fill_key, pos);
        fill_key += kTile;
      } else {
        if (fill_key >= fill_stop) {
          if (fill_item + 1 >= known || queue[(fill_item + 1) % kQueue] > last) return;
          const int chunk = last - queue[++fill_item % kQueue];
          fill_key = chunk_begin(chunk), fill_stop = min(chunk_begin(chunk + 1), end);
        }
        if (fill_key + kTile >= fill_stop && threadIdx.x == 0)
          taken = blocks + static_cast<int>(atomicAdd(f.counters + head * kHeadCounters, 1u)), asked = true;
        load_keys<Cache>(slot, cache, fill_key, pos);
      }
      copy_async_commit();
      fill_slot = fill_slot + 1 == f.slots ? 0 : fill_slot + 1;
    }
  };
  const auto publish = [&] {
    if (asked) queue[(fill_item + 1) % kQueue] = taken, known = fill_item + 2, asked = false;
  };

  if (rank <= last) {  // over a short cache the others have no chunk, and only help to combine
    Early early;
    early.load(a, f, head, rank < 2);
    fill(0);
    prepare<Cache>(a, f, early, head, pos, tiles, rank < 2, query, fresh_k, fresh_v, reinterpret_cast<float*>(prob));
  }
  __syncthreads();  // all have left fill(), which reads what publish() writes
  publish();
  __syncthreads();
  let_next_start();  // what it prefetches would come in the way of the first tiles
  if (rank == 0) append<Cache>(cache, fresh_k, fresh_v, pos, f.tokens);

  int h = 0, slot = 0;
  for (int item = 0, chunk = last - rank; chunk >= 0; chunk = last - queue[++item % kQueue]) {
    float o[Tiles][4][4] = {}, m[Tiles], l[Tiles] = {};
#pragma unroll
    for (int i = 0; i < Tiles; i++) m[i] = -INFINITY;
    const int stop = min(chunk_begin(chunk + 1), end);
    for (int key = chunk_begin(chunk); key < stop; key += kTile, h += 2) {
      const bool fresh = key + kTile > pos;
      // K is there for all, and all are done with the V before it
      copy_async_wait_for<Cache::kSlots - 1>(loaded - h - 1);
      __syncthreads();
      fill(h);
      uint8_t* tile = shared + slot * Cache::kSlotBytes;
      if (fresh) {
        patch<Cache>(tile, fresh_k, key, pos, f.tokens);
        if constexpr (Cache::kCodes) patch_scales<Cache>(tile, fresh_k, fresh_v, key, pos, f.tokens);
        __syncthreads();
      }
      float s[Tiles][2];
      scores<Tiles, Cache>(tile, query, tiles, s);
#pragma unroll
      for (int i = 0; i < Tiles; i++) {
        if (i >= tiles) continue;
        const int behind = key + 8 * warp + t2 - (pos + i / per_token);  // causal: keys up to the row's own position
        if (behind > 0) s[i][0] = -INFINITY;
        if (behind >= 0) s[i][1] = -INFINITY;
        float top = fmaxf(s[i][0], s[i][1]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if (t2 == 0) reduce[(i * kWarps + warp) * 8 + g] = top;
      }
      __syncthreads();
      publish();
      float2 v_scales[2];
      if constexpr (Cache::kCodes) lane_scales(tile + Cache::kValueScalesAt, v_scales);
      float alpha[Tiles];
#pragma unroll
      for (int i = 0; i < Tiles; i++) {
        alpha[i] = 1;
        if (i >= tiles) continue;
        float top = m[i];
#pragma unroll
        for (int w = 0; w < kWarps; w++) top = fmaxf(top, reduce[(i * kWarps + w) * 8 + g]);
        const float base = top == -INFINITY ? 0.f : top;  // a chunk behind the row's position: p = 0, and nobody reads the result
        alpha[i] = exp2f(m[i] - base);
        m[i] = top;
        const float p0 = exp2f(s[i][0] - base), p1 = exp2f(s[i][1] - base);
        l[i] = fmaf(l[i], alpha[i], p0 + p1);
        store_probabilities<Cache>(prob, i, p0, p1, v_scales);
      }
      // p and V are there for all, and all are done with K
      copy_async_wait_for<Cache::kSlots - 1>(loaded - h - 2);
      __syncthreads();
      fill(h + 1);
      slot = slot + 1 == f.slots ? 0 : slot + 1;
      tile = shared + slot * Cache::kSlotBytes;
      if (fresh) {
        patch<Cache>(tile, fresh_v, key, pos, f.tokens);
        __syncthreads();
      }
      add_values<Tiles, Cache>(tile, prob, tiles, alpha, o);
      slot = slot + 1 == f.slots ? 0 : slot + 1;
    }
    store_part<Tiles, Cache>(a, f, head, chunk, tiles, reduce, o, m, l);
  }
  wait_for_parts(f.counters + head * kHeadCounters, static_cast<uint32_t>(blocks));
  combine(a, f, head, rank, blocks, reinterpret_cast<Combine*>(shared));
}

// ---- exact ------------------------------------------------------------------------------------------------------------

// One head's keys or values as fp32
template <class Stored>
struct Rows {
  const Stored* x;         // (C, DH)
  const uint16_t* scales;  // of codes: (C, groups)
  int width, groups;
  __device__ float at(int64_t position, int dim) const {
    const Stored v = x[position * width + dim];
    if constexpr (std::is_same_v<Stored, int8_t>) return static_cast<float>(v) * half_bits_to_float(scales[position * groups + dim / kKvGroup]);
    else return static_cast<float>(v);
  }
};
__device__ __forceinline__ void store_rounded(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_rounded(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Grid: T x HK, two warps: one for k, one for v.
template <class Stored>
__global__ __launch_bounds__(64) void attn_append_k(const Attn a) {
  extern __shared__ float row[];  // (DH)
  let_next_start();
  wait_for_previous();
  const int t = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x & 31);
  const int pos = a.start() + t;
  const int64_t at = static_cast<int64_t>(pos) * a.width, scales_at = pos * kv_groups(a.width);
  const auto store = [&](const float* x, Stored* to, uint16_t* scales) {
    if constexpr (std::is_same_v<Stored, int8_t>) quantise_row(x, a.width, to, scales);
    else
      for (int i = lane; i < a.width; i += 32) store_rounded(to + i, x[i]);
  };
  if (threadIdx.x < 32) {
    norm_rotate(a, a.key(t, head), a.k_norm, pos, row);
    store(row, static_cast<Stored*>(a.k_cache) + head * a.k_stride + at, a.k_scales + head * a.k_scales_stride + scales_at);
  } else {
    store(a.value(t, head), static_cast<Stored*>(a.v_cache) + head * a.v_stride + at, a.v_scales + head * a.v_scales_stride + scales_at);
  }
}

// Grid: H * T. Each of 8 warps takes every eighth group of 4 keys, a lane every 32nd dim; then the warps are merged in order.
template <class Stored, int Slices>  // DH <= 32 * Slices
__global__ __launch_bounds__(256, 1) void attn_exact_k(const Attn a) {
  extern __shared__ float row[];   // (DH), then o of the warps (8, DH)
  __shared__ float tops[8], sums[8];
  let_next_start();
  wait_for_previous();
  const int h = static_cast<int>(blockIdx.x) % a.heads, t = static_cast<int>(blockIdx.x) / a.heads, head = h / (a.heads / a.kv_heads);
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), slices = a.width / 32;
  const int pos = a.start() + t, keys = pos + 1;
  if (warp == 0) norm_rotate(a, a.query(t, h), a.q_norm, pos, row);
  __syncthreads();
  const int groups = static_cast<int>(kv_groups(a.width));
  const Rows<Stored> k{static_cast<const Stored*>(a.k_cache) + head * a.k_stride, a.k_scales + head * a.k_scales_stride, a.width, groups};
  const Rows<Stored> v{static_cast<const Stored*>(a.v_cache) + head * a.v_stride, a.v_scales + head * a.v_scales_stride, a.width, groups};
  float q[Slices], o[Slices] = {}, top = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < Slices; i++) q[i] = i < slices ? row[32 * i + lane] : 0.f;
  for (int first = 4 * warp; first < keys; first += 32) {
    float s[4] = {};
    int64_t at[4];
#pragma unroll
    for (int u = 0; u < 4; u++) at[u] = min(first + u, keys - 1);
#pragma unroll
    for (int i = 0; i < Slices; i++) {
      if (i >= slices) continue;
#pragma unroll
      for (int u = 0; u < 4; u++) s[u] += q[i] * k.at(at[u], 32 * i + lane);
    }
    float higher = top;
#pragma unroll
    for (int u = 0; u < 4; u++) {
      s[u] = first + u < keys ? warp_sum(s[u]) * a.q_scale : -INFINITY;
      higher = fmaxf(higher, s[u]);
    }
    const float alpha = expf(top - higher);
    top = higher, sum *= alpha;
#pragma unroll
    for (int u = 0; u < 4; u++) sum += s[u] = expf(s[u] - top);
#pragma unroll
    for (int i = 0; i < Slices; i++) {
      if (i >= slices) continue;
      o[i] *= alpha;
#pragma unroll
      for (int u = 0; u < 4; u++) o[i] += s[u] * v.at(at[u], 32 * i + lane);
    }
  }
  float* part = row + a.width;
#pragma unroll
  for (int i = 0; i < Slices; i++)
    if (i < slices) part[warp * a.width + 32 * i + lane] = o[i];
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  __syncthreads();
  float all = 0;
  top = tops[0];  // warp 0 has seen position 0
  for (int w = 1; w < 8; w++) top = fmaxf(top, tops[w]);
  for (int w = 0; w < 8; w++) all += sums[w] * expf(tops[w] - top);
  for (int i = static_cast<int>(threadIdx.x); i < a.width; i += 256) {
    float x = 0;
    for (int w = 0; w < 8; w++) x += part[w * a.width + i] * expf(tops[w] - top);
    a.o[(static_cast<int64_t>(t) * a.heads + h) * a.width + i] = x / all;
  }
}

template <class Stored>
void exact(const Context& ctx, const Attn& a) {
  const dim3 grid(static_cast<unsigned>(a.heads) * static_cast<unsigned>(a.tokens));
  const size_t bytes = static_cast<size_t>(9 * a.width) * sizeof(float);
  if (a.width <= 256) launch(ctx, "attention", attn_exact_k<Stored, 8>, grid, 256, bytes, a);
  else launch(ctx, "attention", attn_exact_k<Stored, 32>, grid, 256, bytes, a);
}

// How many A tiles a launch can take on this device, leaving room for two slots, of a block that has a multiprocessor for itself
template <class Cache>
int few_tiles(const Context& ctx) {
  int tiles = kTilesMax;
  while (tiles > 0 && few_bytes<Cache>(2, tiles, std::min(tiles, kFewTokens)) > ctx.shared_max) tiles--;
  return tiles;
}

// Blocks of a kernel that a multiprocessor has room for
template <class Kernel>
int blocks_at_once(Kernel kernel, size_t bytes) {
  int blocks = 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), "attention");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes), "attention");
  return blocks;
}

// Tokens that do not fit at once follow in a second launch. False: none fits.
template <class Cache>
bool few(const Context& ctx, Attn a, bool gates) {
  const int per_token = (a.heads / a.kv_heads + 7) / 8, at_once = few_tiles<Cache>(ctx) / per_token;
  if (at_once == 0 || a.kv_heads * kHeadCounters > kCounters) return false;
  a.q_scale *= kLog2e;
  Scratch s(ctx);
  Few f;
  f.gated = s.take<float>(int64_t{a.tokens} * a.heads * kWidth);
  if (!gates) f.gated = nullptr;
  f.chunks = chunk_of(a.context - 1) + 1;
  f.part = s.take<float>(static_cast<int64_t>(f.chunks) * a.tokens * a.heads * kWidth);
  f.stats = s.take<float2>(static_cast<int64_t>(f.chunks) * a.tokens * a.heads);
  f.counters = ctx.counters;
  for (f.first = 0; f.first < a.tokens; f.first += at_once) {
    f.tokens = std::min(at_once, a.tokens - f.first);
    const int tiles = f.tokens * per_token;
    f.alone = std::max(ctx.sms / a.kv_heads, 1);
    const auto slots_in = [&](size_t room) {
      int slots = Cache::kSlots;
      while (slots > 0 && few_bytes<Cache>(slots, tiles, f.tokens) > room) slots--;
      return slots;
    };
    f.slots = slots_in((ctx.shared_max - 1024) / 2);  // 1 KB of each block is the system's
    const bool two = two_blocks<Cache>(tiles) && f.slots >= 2 && a.kv_heads <= ctx.sms &&
                     blocks_at_once(attn_few_k<1, Cache>, few_bytes<Cache>(f.slots, tiles, f.tokens)) >= 2;
    if (!two) f.slots = slots_in(ctx.shared_max);
    const int blocks = std::min(two ? 2 * f.alone : f.alone, f.chunks);
    const size_t bytes = few_bytes<Cache>(f.slots, tiles, f.tokens);
    const dim3 grid(static_cast<unsigned>(blocks * a.kv_heads));
    if (tiles == 1) launch(ctx, "attention", attn_few_k<1, Cache>, grid, kThreads, bytes, a, f);
    else if (tiles == 2) launch(ctx, "attention", attn_few_k<2, Cache>, grid, kThreads, bytes, a, f);
    else if (tiles <= 4) launch(ctx, "attention", attn_few_k<4, Cache>, grid, kThreads, bytes, a, f);
    else launch(ctx, "attention", attn_few_k<8, Cache>, grid, kThreads, bytes, a, f);
  }
  return true;
}

}  // namespace

// ---- launchers --------------------------------------------------------------------------------------------------------

void attention_append(const Context& ctx, const Attn& a, DType cache) {
  const dim3 grid(static_cast<unsigned>(a.tokens), static_cast<unsigned>(a.kv_heads));
  const size_t bytes = static_cast<size_t>(a.width) * sizeof(float);
  if (cache == DType::F32) launch(ctx, "attention", attn_append_k<float>, grid, 64, bytes, a);
  else if (cache == DType::I8) launch(ctx, "attention", attn_append_k<int8_t>, grid, 64, bytes, a);
  else launch(ctx, "attention", attn_append_k<__nv_bfloat16>, grid, 64, bytes, a);
}

void attention_exact(const Context& ctx, const Attn& a, DType cache) {
  attention_append(ctx, a, cache);
  if (cache == DType::F32) exact<float>(ctx, a);
  else if (cache == DType::I8) exact<int8_t>(ctx, a);
  else exact<__nv_bfloat16>(ctx, a);
}

bool attention_few(const Context& ctx, const AttentionArgs& args) {
  QN_CHECK(args.qgkv.rows() <= kFewTokens, "attention_few: %lld tokens", static_cast<long long>(args.qgkv.rows()));
  const Attn a = make_attn(args);
  const DType cache = args.k_cache.dtype;
  const bool gates = args.then_gate && args.qgkv.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(args.qgkv.data) % 16 == 0;
  if (attention_is_fast(args) && (cache == DType::I8 ? few<Int8Cache>(ctx, a, gates) : few<Bf16Cache>(ctx, a, gates))) return gates;
  attention_exact(ctx, a, cache);
  return false;
}

size_t attention_scratch(const OpLimits& limits) {
  const int64_t rows = static_cast<int64_t>(std::min(limits.tokens, kFewTokens)) * limits.heads;
  const int64_t chunks = limits.context > 0 ? chunk_of(static_cast<int>(std::min(limits.context, kMaxContext) - 1)) + 1 : 0;
  Scratch s;
  s.take<float>(rows * kWidth);
  s.take<float>(chunks * rows * kWidth);
  s.take<float2>(chunks * rows);
  return std::max(s.used(), attention_wgmma_scratch(limits));
}

}  // namespace qn::cuda
