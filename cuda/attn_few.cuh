// Attention of few tokens over a long cache, as device functions: attn.cu has kernels of them, step.cu phases.
//
// Few tokens: the cache is read once, at the speed of memory; everything else hides behind that.
//
//   chunk   a run of keys that yields one partial result per row: largest score m, sum l of p = 2^(s-m), sum o of p * v. Where
//           chunks begin depends on the position alone (64 keys each up to 8192, then 64 chunks for every doubling), and a row
//           combines the chunks up to its own position in rising order of position: its bits depend neither on how many tokens
//           the call has nor on which block computed what.
//   block   one per multiprocessor, bound to one key head. It takes that head's chunks from the last one down, large ones first:
//           the first by its rank, the others by a counter, when it begins to load the last tile of the one before. So all blocks
//           end within about a tile of each other.
//   tile    64 keys: 32 KB of K, then 32 KB of V, through a ring of slots that cp.async fills as far ahead as there are slots.
//
// Tensor cores with the accuracy of fp32: an A tile of m16n8k16 holds 8 query heads of one token twice, rows 0..7 q rounded to
// BF16 and rows 8..15 what that leaves of it, and the two halves of the result are added: q K' to 16 bits of q, where K is exact.
// p is split in the same way. Row g and row g+8 are in the same lane, so that the addition needs no exchange.
//
//   warp w of 8:   scores of keys 8w..8w+7 (all 256 dims, all A tiles)  ->  maxima  ->  p  ->  dims 32w..32w+31 of o (all 64 keys)
//
// New keys and values are never read from the cache: the two blocks that can meet them (chunks are longer than a call has tokens,
// so they are in the last two) compute them themselves, rounded as stored, and put them into the tile; the block of rank 0
// appends them to the cache, where nobody else looks at these positions during the kernel.
#pragma once
#include "cuda/attn.cuh"
#include "ggml-lite/core/limits.h"

namespace qn::cuda {

// ---- chunks -----------------------------------------------------------------------------------------------------------

constexpr int kKeyTile = 64;
constexpr int kFirstChunks = 128, kPerDoubling = 64;   // 128 chunks of 64 keys, then 64 of 128, 64 of 256, ...
__host__ __device__ constexpr int chunk_begin(int c) {
  if (c < kFirstChunks) return c * kKeyTile;
  const int e = (c - kFirstChunks) / kPerDoubling, r = (c - kFirstChunks) % kPerDoubling;
  return (kPerDoubling + r) * (kFirstChunks << e);
}
__host__ __device__ constexpr int chunk_of(int position) {
  if (position < kFirstChunks * kKeyTile) return position / kKeyTile;
  int e = 0;
  while (position >> (14 + e)) e++;  // 8192 << e <= position
  return kFirstChunks + kPerDoubling * e + (position / (kFirstChunks << e) - kPerDoubling);
}
static_assert(chunk_begin(kFirstChunks) == kFirstChunks * kKeyTile && chunk_begin(kFirstChunks + kPerDoubling) == 2 * kFirstChunks * kKeyTile);
static_assert(chunk_of(8191) == 127 && chunk_of(8192) == 128 && chunk_of(16383) == 191 && chunk_of(16384) == 192);
static_assert(chunk_begin(chunk_of(100000)) <= 100000 && chunk_begin(chunk_of(100000) + 1) > 100000);
constexpr int kChunksMax = chunk_of(kMaxContext - 1) + 1;
static_assert(kChunksMax <= 1024);

// ---- the kernel for few tokens ----------------------------------------------------------------------------------------

constexpr int kFewWarps = 8, kFewThreads = 32 * kFewWarps;
constexpr int kKeySlotBytes = kKeyTile * kRowBytes;
constexpr int kKeySlotsMax = 4;
constexpr int kTilesMax = 8;                         // A tiles of a launch
constexpr int kQueryBytes = 16 * kRowBytes;          // of one A tile: 16 steps of k x 32 lanes x 16
constexpr int kProbBytes = 4 * 32 * 16;              // of one A tile: 4 steps of k x 32 lanes x 16
constexpr int kReduceBytes = kFewWarps * 8 * 4;         // of one A tile
constexpr int kQueue = 8, kQueueBytes = 64;

struct Few {
  float* part;         // (chunks, tokens, H, DH)
  float2* stats;       // (tokens, H, chunks): m, l
  uint32_t* counters;  // (HK), zero
  int first, tokens;   // the tokens of this launch
  int chunks;          // of the whole cache
  int slots;           // of the ring, 2..kKeySlotsMax
};

inline Few make_few(const Context& ctx, const Attn& a) {  // of all tokens, but for the slots
  Scratch s(ctx);
  Few f{};
  f.chunks = chunk_of(a.context - 1) + 1;
  f.part = s.take<float>(static_cast<int64_t>(f.chunks) * a.tokens * a.heads * kWidth);
  f.stats = s.take<float2>(static_cast<int64_t>(f.chunks) * a.tokens * a.heads);
  f.counters = ctx.counters, f.tokens = a.tokens;
  return f;
}

// Shared memory: slots of the ring | A tiles of q | new k, new v (tokens, 256) | rows while q is made, then p and reductions | queue
__host__ __device__ constexpr int work_bytes(int tiles) { 
  return tiles * (kProbBytes + kReduceBytes) > kFewWarps * kWidth * 4 ? tiles * (kProbBytes + kReduceBytes) : kFewWarps * kWidth * 4;
}
constexpr size_t few_bytes(int slots, int tiles, int tokens) {
  return static_cast<size_t>(slots) * kKeySlotBytes + tiles * kQueryBytes + 2 * tokens * kRowBytes + work_bytes(tiles) + kQueueBytes;
}

__device__ __forceinline__ void copy_async_wait_for(int pending) {
  if (pending <= 0) copy_async_wait<0>();
  else if (pending == 1) copy_async_wait<1>();
  else if (pending == 2) copy_async_wait<2>();
  else copy_async_wait<3>();
}

// One head of one token into its A tile: of each step s of 16 dims, lane 4g + t gets hi and lo of dims 2t, 2t+1, then of 2t+8, 2t+9.
__device__ __forceinline__ void store_query(const float* row, float scale, int g, uint4* tile) {
#pragma unroll
  for (int e = thread_anew() & 31; e < 64; e += 32) {
    const int s = e >> 2, t = e & 3;
    const float2 a = *reinterpret_cast<const float2*>(row + 16 * s + 2 * t), b = *reinterpret_cast<const float2*>(row + 16 * s + 2 * t + 8);
    uint4 v;
    split_bf16(__fmul_rn(a.x, scale), __fmul_rn(a.y, scale), v.x, v.y);  // not to be contracted: the same bits for any number of tiles
    split_bf16(__fmul_rn(b.x, scale), __fmul_rn(b.y, scale), v.z, v.w);
    tile[s * 32 + 4 * g + t] = v;
  }
}

// q of all A tiles; new keys and values where `fresh`
__device__ __forceinline__ void prepare(const Attn& a, const Few& f, int head, int pos, int tiles, bool fresh, uint4* query, uint4* fresh_k,
                                        uint4* fresh_v, float* rows) {
  const int warp = thread_anew() >> 5, lane = thread_anew() & 31;
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
  float* row = rows + warp * kWidth;
  for (int r = warp; r < 8 * tiles; r += kFewWarps) {
    const int i = r >> 3, g = r & 7, t = i / per_token, h = i % per_token * 8 + g;
    if (h < group) {
      norm_rotate<kWidth>(a, a.query(f.first + t, head * group + h), a.q_norm, pos + t, row);
      store_query(row, a.q_scale, g, query + i * (kQueryBytes / 16));
    } else {
      for (int e = lane; e < 64; e += 32) query[i * (kQueryBytes / 16) + (e >> 2) * 32 + 4 * g + (e & 3)] = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
  }
  if (!fresh) return;
  const auto round8 = [](const float* x) {  // 8 values
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  };
  for (int t = warp; t < f.tokens; t += kFewWarps) {
    fresh_v[t * 32 + lane] = round8(a.value(f.first + t, head) + lane * 8);
    norm_rotate<kWidth>(a, a.key(f.first + t, head), a.k_norm, pos + t, row);
    fresh_k[t * 32 + lane] = round8(row + lane * 8);
    __syncwarp();
  }
}

// Puts the new rows that belong there into a tile.
__device__ __forceinline__ void patch(uint8_t* slot, const uint4* fresh, int key, int pos, int tokens) {
  for (int i = thread_anew(); i < tokens * 32; i += kFewThreads) {
    const int r = pos + (i >> 5) - key;
    if (r >= 0 && r < kKeyTile) *reinterpret_cast<uint4*>(slot + row_chunk(r, i & 31)) = fresh[i];
  }
}

// Scores of keys 8 warp + 2t, + 1 for head g of each A tile. Four chains of sums, always the same ones.
template <int Tiles>
__device__ __forceinline__ void scores(const uint8_t* slot, const uint4* query, int tiles, float (&s)[Tiles][2]) {
  const int warp = thread_anew() >> 5, lane = thread_anew() & 31;
  uint32_t k[8][4];  // of 32 dims: b0, b1 of two steps
#pragma unroll
  for (int j = 0; j < 8; j++) load_matrix_x4(k[j], slot + row_chunk(8 * warp + (lane & 7), 4 * j + (lane >> 3)));
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    if (i >= tiles) continue;
    float d[4][4] = {};
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const uint4 q = query[(i * 16 + j) * 32 + lane];
      const uint32_t x[4] = {q.x, q.y, q.z, q.w};
      mma_16816(d[j & 3], x, k[j >> 1][2 * (j & 1)], k[j >> 1][2 * (j & 1) + 1]);
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float hi = (d[0][c] + d[1][c]) + (d[2][c] + d[3][c]), lo = (d[0][c + 2] + d[1][c + 2]) + (d[2][c + 2] + d[3][c + 2]);
      s[i][c] = hi + lo;
    }
  }
}

// o (dims 32 warp + 8n + 2t, + 1 of head g; hi and lo apart) = o * alpha + p V
template <int Tiles>
__device__ __forceinline__ void add_values(const uint8_t* slot, const uint4* prob, int tiles, const float (&alpha)[Tiles],
                                           float (&o)[Tiles][4][4]) {
  const int warp = thread_anew() >> 5, lane = thread_anew() & 31;
#pragma unroll
  for (int i = 0; i < Tiles; i++)
#pragma unroll
    for (int n = 0; n < 16; n++) o[i][n >> 2][n & 3] *= alpha[i];
#pragma unroll
  for (int j = 0; j < 4; j++) {  // 16 keys
    uint32_t v[2][4];            // of 16 dims: b0, b1 of two n tiles
#pragma unroll
    for (int n = 0; n < 2; n++) load_matrix_x4_transposed(v[n], slot + row_chunk(16 * j + (lane & 15), 4 * warp + 2 * n + (lane >> 4)));
#pragma unroll
    for (int i = 0; i < Tiles; i++) {
      if (i >= tiles) continue;
      const uint4 p = prob[(i * 4 + j) * 32 + lane];
      const uint32_t x[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
      for (int n = 0; n < 4; n++) mma_16816(o[i][n], x, v[n >> 1][2 * (n & 1)], v[n >> 1][2 * (n & 1) + 1]);
    }
  }
}

// The partial result of a chunk. `reduce` is free: its maxima were read before the last barrier, the next ones come after another.
template <int Tiles, class Sync>
__device__ __forceinline__ void store_part(const Attn& a, const Few& f, int head, int chunk, int tiles, float* reduce,
                                           const float (&o)[Tiles][4][4], const float (&m)[Tiles], float (&l)[Tiles], Sync sync) {
  const int warp = thread_anew() >> 5, lane = thread_anew() & 31, g = lane >> 2, t2 = 2 * (lane & 3);
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    if (i >= tiles) continue;
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 1);
    l[i] += __shfl_xor_sync(0xffffffffu, l[i], 2);
    if (t2 == 0) reduce[(i * kFewWarps + warp) * 8 + g] = l[i];
    const int t = i / per_token, h = i % per_token * 8 + g;
    if (h >= group) continue;
    float* part = f.part + ((static_cast<int64_t>(chunk) * f.tokens + t) * a.heads + head * group + h) * kWidth + 32 * warp + t2;
#pragma unroll
    for (int n = 0; n < 4; n++) *reinterpret_cast<float2*>(part + 8 * n) = make_float2(o[i][n][0] + o[i][n][2], o[i][n][1] + o[i][n][3]);
  }
  sync();
#pragma unroll
  for (int i = 0; i < Tiles; i++) {
    const int t = i / per_token, h = i % per_token * 8 + g;
    if (i >= tiles || warp || t2 || h >= group) continue;
    float sum = 0;
    for (int w = 0; w < kFewWarps; w++) sum += reduce[(i * kFewWarps + w) * 8 + g];
    f.stats[(static_cast<int64_t>(t) * a.heads + head * group + h) * f.chunks + chunk] = make_float2(m[i], sum);
  }
}

// Block `rank` of `blocks` of a key head, by 256 threads; sync() is their barrier. Tiles: at least tokens * ceil(G/8). ready() returns
// when qgkv is there; with Early the first tiles of the cache are asked for before that (what is cached must have been written long ago).
template <int Tiles, bool Early, class Ready, class Sync>
__device__ __forceinline__ void attention_few(const Attn& a, const Few& f, int head, int rank, int blocks, uint8_t* shared, Ready ready, Sync sync) {
  const int warp = thread_anew() >> 5, lane = thread_anew() & 31, g = lane >> 2, t2 = 2 * (lane & 3);
  const int group = a.heads / a.kv_heads, per_token = (group + 7) / 8;
  const int tiles = f.tokens * per_token;
  uint8_t* after = shared + f.slots * kKeySlotBytes;
  uint4 *query = reinterpret_cast<uint4*>(after), *fresh_k = query + tiles * (kQueryBytes / 16), *fresh_v = fresh_k + f.tokens * 32;
  uint4* prob = fresh_v + f.tokens * 32;
  float* reduce = reinterpret_cast<float*>(prob + tiles * (kProbBytes / 16));  // (A tiles, warps, 8)
  // queue[n % 8]: the n-th chunk of this block, counted from the last one; of n < known
  int *queue = reinterpret_cast<int*>(after + tiles * kQueryBytes + 2 * f.tokens * kRowBytes + work_bytes(tiles)), &known = queue[kQueue];
  if (thread_anew() == 0) queue[0] = rank, known = 1;
  if constexpr (!Early) ready();
  const int pos = a.start() + f.first, end = pos + f.tokens, last = chunk_of(end - 1);
  if (rank > last) {
    if constexpr (Early) ready();
    return;
  }
  const uint16_t* k_cache = static_cast<const uint16_t*>(a.k_cache) + head * a.k_stride;
  const uint16_t* v_cache = static_cast<const uint16_t*>(a.v_cache) + head * a.v_stride;
  sync();

  // What is loaded: half-tile number `loaded` (even: K, odd: V of the same keys) is the next one. During phase h, when half-tiles
  // before h are done with, there is room up to h + slots. `known` and queue change only between the second and the third barrier
  // of a tile, where nobody calls fill(): all threads decide alike.
  int loaded = 0, fill_slot = 0, fill_item = 0, fill_key = chunk_begin(last - rank), fill_stop = min(chunk_begin(last - rank + 1), end);
  int taken = 0;
  bool asked = false;
  const auto fill = [&](int h) {
    for (; loaded < h + f.slots; loaded++) {
      uint8_t* slot = shared + fill_slot * kKeySlotBytes;
      if (loaded & 1) {
        load_rows<kKeyTile, kFewThreads>(slot, v_cache, fill_key, pos);
        fill_key += kKeyTile;
      } else {
        if (fill_key >= fill_stop) {
          if (fill_item + 1 >= known || queue[(fill_item + 1) % kQueue] > last) return;
          const int chunk = last - queue[++fill_item % kQueue];
          fill_key = chunk_begin(chunk), fill_stop = min(chunk_begin(chunk + 1), end);
        }
        if (fill_key + kKeyTile >= fill_stop && thread_anew() == 0)
          taken = blocks + static_cast<int>(atomicAdd(f.counters + head, 1u)), asked = true;
        load_rows<kKeyTile, kFewThreads>(slot, k_cache, fill_key, pos);
      }
      copy_async_commit();
      fill_slot = fill_slot + 1 == f.slots ? 0 : fill_slot + 1;
    }
  };
  const auto publish = [&] {
    if (asked) queue[(fill_item + 1) % kQueue] = taken, known = fill_item + 2, asked = false;
  };

  fill(0);
  if constexpr (Early) ready();
  prepare(a, f, head, pos, tiles, rank < 2, query, fresh_k, fresh_v, reinterpret_cast<float*>(prob));
  sync();  // all have left fill(), which reads what publish() writes
  publish();
  sync();
  if (rank == 0)
    for (int i = thread_anew(); i < f.tokens * 32; i += kFewThreads) {
      const int64_t at = static_cast<int64_t>(pos + (i >> 5)) * kWidth + (i & 31) * 8;
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.k_cache) + head * a.k_stride + at) = fresh_k[i];
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.v_cache) + head * a.v_stride + at) = fresh_v[i];
    }

  int h = 0, slot = 0;
  for (int item = 0, chunk = last - rank; chunk >= 0; chunk = last - queue[++item % kQueue]) {
    float o[Tiles][4][4] = {}, m[Tiles], l[Tiles] = {};
#pragma unroll
    for (int i = 0; i < Tiles; i++) m[i] = -INFINITY;
    const int stop = min(chunk_begin(chunk + 1), end);
    for (int key = chunk_begin(chunk); key < stop; key += kKeyTile, h += 2) {
      const bool fresh = key + kKeyTile > pos;
      // K is there for all, and all are done with the V before it
      copy_async_wait_for(loaded - h - 1);
      sync();
      fill(h);
      uint8_t* tile = shared + slot * kKeySlotBytes;
      if (fresh) {
        patch(tile, fresh_k, key, pos, f.tokens);
        sync();
      }
      float s[Tiles][2];
      scores(tile, query, tiles, s);
#pragma unroll
      for (int i = 0; i < Tiles; i++) {
        if (i >= tiles) continue;
        const int behind = key + 8 * warp + t2 - (pos + i / per_token);  // causal: keys up to the row's own position
        if (behind > 0) s[i][0] = -INFINITY;
        if (behind >= 0) s[i][1] = -INFINITY;
        float top = fmaxf(s[i][0], s[i][1]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if (t2 == 0) reduce[(i * kFewWarps + warp) * 8 + g] = top;
      }
      sync();
      publish();
      float alpha[Tiles];
#pragma unroll
      for (int i = 0; i < Tiles; i++) {
        alpha[i] = 1;
        if (i >= tiles) continue;
        float top = m[i];
#pragma unroll
        for (int w = 0; w < kFewWarps; w++) top = fmaxf(top, reduce[(i * kFewWarps + w) * 8 + g]);
        const float base = top == -INFINITY ? 0.f : top;  // a chunk behind the row's position: p = 0, and nobody reads the result
        alpha[i] = exp2f(m[i] - base);
        m[i] = top;
        const float p0 = exp2f(s[i][0] - base), p1 = exp2f(s[i][1] - base);
        l[i] = fmaf(l[i], alpha[i], p0 + p1);
        uint2 p;
        split_bf16(p0, p1, p.x, p.y);
        reinterpret_cast<uint2*>(prob + (i * 4 + (warp >> 1)) * 32 + lane)[warp & 1] = p;
      }
      // p and V are there for all, and all are done with K
      copy_async_wait_for(loaded - h - 2);
      sync();
      fill(h + 1);
      slot = slot + 1 == f.slots ? 0 : slot + 1;
      tile = shared + slot * kKeySlotBytes;
      if (fresh) {
        patch(tile, fresh_v, key, pos, f.tokens);
        sync();
      }
      add_values(tile, prob, tiles, alpha, o);
      slot = slot + 1 == f.slots ? 0 : slot + 1;
    }
    store_part<Tiles>(a, f, head, chunk, tiles, reduce, o, m, l, sync);
  }
}

// o = sum of 2^(m - M) o_chunk / sum of 2^(m - M) l_chunk, for 64 dims (z of 4) of head h of token t. By 256 threads: 16
// columns of 4 dims x 16 runs of every 16th chunk.
struct CombineRoom {
  float weight[kChunksMax], reduce[16];
  float4 sums[16][16];
};
template <class Sync>
__device__ __forceinline__ void combine_few(const Attn& a, const Few& f, int h, int t, int z, CombineRoom& room, Sync sync) {
  float *const weight = room.weight, *const reduce = room.reduce;
  auto& sums = room.sums;
  const int tid = thread_anew() % 256;
  const int n = chunk_of(a.start() + f.first + t) + 1;
  if (t == 0 && z == 0 && tid == 0 && h < a.kv_heads) f.counters[h] = 0;
  const float2* stats = f.stats + (static_cast<int64_t>(t) * a.heads + h) * f.chunks;
  float top = -INFINITY;
  for (int c = tid; c < n; c += 256) top = fmaxf(top, stats[c].x);
  top = warp_max(top);
  if ((tid & 31) == 0) reduce[tid >> 5] = top;
  sync();
#pragma unroll
  for (int w = 0; w < 8; w++) top = fmaxf(top, reduce[w]);
  float all = 0;
  for (int c = tid; c < n; c += 256) {
    const float2 s = stats[c];
    const float w = exp2f(s.x - top);
    weight[c] = w;
    all += w * s.y;
  }
  all = warp_sum(all);
  if ((tid & 31) == 0) reduce[8 + (tid >> 5)] = all;
  sync();  // also makes the weights visible
  all = warp_sum((tid & 31) < 8 ? reduce[8 + (tid & 31)] : 0.f);
  const int column = tid & 15, run = tid >> 4, dim = z * 64 + column * 4;
  const float* part = f.part + (static_cast<int64_t>(t) * a.heads + h) * kWidth + dim;
  const int64_t stride = static_cast<int64_t>(f.tokens) * a.heads * kWidth;
  float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int c = run; c < n; c += 16) {
    const float4 v = *reinterpret_cast<const float4*>(part + c * stride);
    const float w = weight[c];
    o.x += w * v.x, o.y += w * v.y, o.z += w * v.z, o.w += w * v.w;
  }
  sums[run][column] = o;
  sync();
  if (run) return;
  for (int r = 1; r < 16; r++) {
    const float4 v = sums[r][column];
    o.x += v.x, o.y += v.y, o.z += v.z, o.w += v.w;
  }
  const float4 result = make_float4(o.x / all, o.y / all, o.z / all, o.w / all);
  *reinterpret_cast<float4*>(a.o + (static_cast<int64_t>(f.first + t) * a.heads + h) * kWidth + dim) = result;
}

}  // namespace qn::cuda
