// Causal attention of many tokens. One kernel norms and rotates the keys and appends them and the values to the cache; a second
// one passes over the cache with tiles of queries and an online softmax.
//
//   rows    16 per warp: the query heads of one key head for some successive tokens, row = token * G + head, so that K and V are
//           read once for all of them. Normed, rotated and scaled by the block itself, kept in shared memory as hi + lo (BF16).
//   tile    K keys of K and of V, one buffer each: V of a tile arrives during q K', K of the next one during p V.
//   result  o (16 x 256 per warp) in registers, 128 per thread.
//
// q = hi + lo and p = hi + lo, each to 16 bits of mantissa: two products each, and the result is as good as fp32 with the rounded
// cache. Blocks of late positions are the long ones and start first; tiles behind the last row's position are not visited.
//
// An INT8 cache: codes of the next tiles of K and of V arrive in buffers of their own; when a tile's turn comes, each thread widens what it
// copied itself to BF16 (exactly: codes, not values) in one buffer that K and V share. Scales stay fp32: those of K meet the sums of dims
// 0..127 and of 128..255, those of V meet p, which is split anew for the second half of the dims. So here, too, nothing is rounded
// that was not rounded when it was stored, and the shared memory is what BF16 needs and 24 bytes a key.
//
// Each __syncwarp() among the products is a bound for the compiler, which would load fragments ahead until registers spill.
//
//   rows x keys   shared memory   where
//   128 x 64      192 KB          sm_90, when there are blocks for all multiprocessors
//   128 x 32      160 KB          sm_80
//   64 x 32        96 KB          short calls, and sm_86 and its kin
#include "cuda/attn.cuh"

namespace qn::cuda {
namespace {

// Shared memory: hi | lo | K | V; of codes: hi | lo | K or V, widened | codes of K | codes of V | scales of K, of V as they come (Keys, 2)
// fp16 | and as they are used (Keys, 2) fp32
template <int Warps, int Keys, bool Codes = false>
constexpr size_t flash_bytes() {
  return static_cast<size_t>(2 * 16 * Warps + 2 * Keys) * kRowBytes + (Codes ? 2 * Keys * (kScaleBytes + sizeof(float2)) : 0);
}

// Codes that this thread copied with load_codes() -> rows of BF16
template <int Keys, int Threads>
__device__ __forceinline__ void widen_tile(const uint8_t* codes, uint8_t* tile) {
  const int thread = thread_anew(), c = thread & 15, row = thread >> 4;
#pragma unroll
  for (int i = 0; i < Keys * 16 / Threads; i++) {
    const int r = row + i * (Threads / 16);
    const uint4 x = *reinterpret_cast<const uint4*>(codes + code_chunk(r, c));
    uint32_t even[4], odd[4];
    widen_codes(x.x, even[0], odd[0]), widen_codes(x.y, even[1], odd[1]), widen_codes(x.z, even[2], odd[2]), widen_codes(x.w, even[3], odd[3]);
    const auto in_order = [&](int j) {  // bytes 0, 2 | 1, 3 -> 0, 1 | 2, 3
      return make_uint4(__byte_perm(even[j], odd[j], 0x5410), __byte_perm(even[j], odd[j], 0x7632), __byte_perm(even[j + 1], odd[j + 1], 0x5410),
                        __byte_perm(even[j + 1], odd[j + 1], 0x7632));
    };
    *reinterpret_cast<uint4*>(tile + row_chunk(r, 2 * c)) = in_order(0);
    *reinterpret_cast<uint4*>(tile + row_chunk(r, 2 * c + 1)) = in_order(2);
  }
}
// Scales that this thread copied with load_scales<Keys>(..., 0)
template <int Keys>
__device__ __forceinline__ void widen_scales(const uint8_t* halves, float2* scales) {
  const int i = thread_anew();
  if (i < Keys) scales[i] = scale_pair(*reinterpret_cast<const uint32_t*>(halves + i * kScaleBytes));
}

// q of row r (of `Warps` * 16) -> hi and lo. Rows without a token are zero. `rows`: 256 floats per warp.
template <int Warps>
__device__ __forceinline__ void load_queries(const Attn& a, int head, int first, int stop, int pos, float* rows, uint8_t* hi, uint8_t* lo) {
  const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(threadIdx.x & 31), group = a.heads / a.kv_heads;
  float* row = rows + warp * kWidth;
  for (int r = 16 * warp; r < 16 * warp + 16; r++) {
    const int t = first + r / group;
    uint4 h = make_uint4(0, 0, 0, 0), l = h;
    if (t < stop) {
      HeadRow<kWidth> q;
      q.load(a, a.query(t, head * group + r % group), a.q_norm);
      norm_rotate(a, q, pos + t, row);
      const float4 x = reinterpret_cast<const float4*>(row)[2 * lane], y = reinterpret_cast<const float4*>(row)[2 * lane + 1];
      split_bf16(x.x * a.q_scale, x.y * a.q_scale, h.x, l.x);
      split_bf16(x.z * a.q_scale, x.w * a.q_scale, h.y, l.y);
      split_bf16(y.x * a.q_scale, y.y * a.q_scale, h.z, l.z);
      split_bf16(y.z * a.q_scale, y.w * a.q_scale, h.w, l.w);
    }
    *reinterpret_cast<uint4*>(hi + row_chunk(r, lane)) = h;
    *reinterpret_cast<uint4*>(lo + row_chunk(r, lane)) = l;
    __syncwarp();
  }
}

// s (16 rows of the warp x Keys): s[n][0,1] of row g, keys 8n + 2t, + 1; s[n][2,3] of row g + 8. `scales` (Keys): of codes.
template <int Keys, bool Codes>
__device__ __forceinline__ void flash_scores(const uint8_t* hi, const uint8_t* lo, const uint8_t* k, const float2* scales, float (&s)[Keys / 8][4]) {
  float first[Codes ? Keys / 8 : 1][4];  // the part of dims 0..127
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, row = 16 * (thread >> 5) + (lane & 15);
  const int query = row_chunk(row, lane >> 4), key = row_chunk((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
#pragma unroll
  for (int n = 0; n < Keys / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int j = 0; j < 16; j++) {  // 16 dims
    uint32_t h[4], l[4], b[Keys / 16][4];
    load_matrix_x4(h, hi + step_chunk(query, j));
    load_matrix_x4(l, lo + step_chunk(query, j));
#pragma unroll
    for (int n = 0; n < Keys / 16; n++) load_matrix_x4(b[n], k + 16 * n * kRowBytes + step_chunk(key, j));
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) mma_16816(s[n], h, b[n >> 1][2 * (n & 1)], b[n >> 1][2 * (n & 1) + 1]);
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) mma_16816(s[n], l, b[n >> 1][2 * (n & 1)], b[n >> 1][2 * (n & 1) + 1]);
    if (j % 2) __syncwarp();
    if constexpr (Codes) {
      if (j % 8 != 7) continue;
#pragma unroll
      for (int n = 0; n < Keys / 8; n++) {
        const float4 x = *reinterpret_cast<const float4*>(scales + 8 * n + 2 * (lane & 3));  // of two keys: first, second half
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (j == 7) first[n][i] = s[n][i] * (i & 1 ? x.z : x.x), s[n][i] = 0;
          else s[n][i] = fmaf(s[n][i], i & 1 ? x.w : x.y, first[n][i]);
        }
      }
      __syncwarp();
    }
  }
}

// s becomes p; o and l are rescaled to the new maxima of rows g and g + 8 (m: powers of two). Key 0 is in the first tile and
// before every row, hence no maximum is infinite.
template <int Keys>
__device__ __forceinline__ void softmax(float (&s)[Keys / 8][4], float (&m)[2], float (&l)[2], float (&o)[32][4]) {
  float alpha[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = m[r];
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    alpha[r] = exp2f(m[r] - top);
    m[r] = top;
    l[r] *= alpha[r];
#pragma unroll
    for (int n = 0; n < Keys / 8; n++) {
      s[n][2 * r] = exp2f(s[n][2 * r] - top);
      s[n][2 * r + 1] = exp2f(s[n][2 * r + 1] - top);
      l[r] += s[n][2 * r] + s[n][2 * r + 1];
    }
  }
#pragma unroll
  for (int n = 0; n < 32; n++) o[n][0] *= alpha[0], o[n][1] *= alpha[0], o[n][2] *= alpha[1], o[n][3] *= alpha[1];
}

// o += p V. `scales` (Keys): of codes.
template <int Keys, bool Codes>
__device__ __forceinline__ void flash_values(const float (&s)[Keys / 8][4], const uint8_t* v, const float2* scales, float (&o)[32][4]) {
  const int lane = static_cast<int>(threadIdx.x & 31), key = row_chunk(lane & 15, lane >> 4);
#pragma unroll
  for (int j = 0; j < Keys / 16; j++) {  // 16 keys
    uint32_t h[4], l[4];
#pragma unroll
    for (int n = 0; n < 8; n++) {  // 32 dims
      if (n == 0 || (Codes && n == 4)) {
#pragma unroll
        for (int i = 0; i < 4; i++) {  // 8 keys, of row g or of row g + 8
          const float* p = &s[2 * j + i / 2][i % 2 * 2];
          float2 x = make_float2(1, 1);
          if constexpr (Codes) {
            const float4 y = *reinterpret_cast<const float4*>(scales + 16 * j + i / 2 * 8 + 2 * (lane & 3));  // of two keys: first, second half
            x = n ? make_float2(y.y, y.w) : make_float2(y.x, y.z);
          }
          if constexpr (Codes) split_bf16(p[0] * x.x, p[1] * x.y, h[i], l[i]);
          else split_bf16(p[0], p[1], h[i], l[i]);
        }
      }
      uint32_t b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) load_matrix_x4_transposed(b[i], v + 16 * j * kRowBytes + step_chunk(key, 2 * n + i));
#pragma unroll
      for (int i = 0; i < 4; i++) mma_16816(o[4 * n + i], h, b[i >> 1][2 * (i & 1)], b[i >> 1][2 * (i & 1) + 1]);
#pragma unroll
      for (int i = 0; i < 4; i++) mma_16816(o[4 * n + i], l, b[i >> 1][2 * (i & 1)], b[i >> 1][2 * (i & 1) + 1]);
      if (n == 3) __syncwarp();
    }
    __syncwarp();
  }
}

// Grid: tiles of queries x HK
template <int Warps, int Keys, bool Codes>
__global__ __launch_bounds__(32 * Warps, Warps == 4 ? 2 : 1) void attn_flash_k(const Attn a) {
  constexpr int kThreads = 32 * Warps, kRows = 16 * Warps;
  static_assert(Warps * kWidth * 4 <= Keys * kRowBytes);  // the rows of load_queries() fit into the buffer of V, or the one of K and V
  extern __shared__ __align__(128) uint8_t shared[];
  uint8_t *hi = shared, *lo = hi + kRows * kRowBytes, *k = lo + kRows * kRowBytes, *v = Codes ? k : k + Keys * kRowBytes;
  uint8_t *k_codes = k + Keys * kRowBytes, *v_codes = k_codes + Keys * kWidth;
  uint8_t *k_halves = v_codes + Keys * kWidth, *v_halves = k_halves + Keys * kScaleBytes;
  float2 *k_scales = reinterpret_cast<float2*>(v_halves + Keys * kScaleBytes), *v_scales = k_scales + Keys;
  let_next_start();
  const int group = a.heads / a.kv_heads, each = kRows / group;  // tokens of a tile
  const int head = static_cast<int>(blockIdx.x) % a.kv_heads, tile = static_cast<int>(gridDim.x - 1 - blockIdx.x) / a.kv_heads;
  const int first = tile * each, stop = min(first + each, a.tokens);
  wait_for_previous();
  const int pos = a.start(), keys = pos + stop;
  // One group of copies each. BF16 goes where it is used, codes and their scales where they wait for their turn.
  const auto load_keys = [&](int key) {
    if constexpr (Codes) {
      load_codes<Keys, kThreads>(k_codes, static_cast<const int8_t*>(a.k_cache) + head * a.k_stride, key, keys);
      load_scales<Keys>(k_halves, a.k_scales + head * a.k_scales_stride, key, keys, 0);
    } else {
      load_rows<Keys, kThreads>(k, static_cast<const uint16_t*>(a.k_cache) + head * a.k_stride, key, keys);
    }
  };
  const auto load_values = [&](int key) {
    if constexpr (Codes) {
      load_codes<Keys, kThreads>(v_codes, static_cast<const int8_t*>(a.v_cache) + head * a.v_stride, key, keys);
      load_scales<Keys>(v_halves, a.v_scales + head * a.v_scales_stride, key, keys, 0);
    } else {
      load_rows<Keys, kThreads>(v, static_cast<const uint16_t*>(a.v_cache) + head * a.v_stride, key, keys);
    }
  };
  load_keys(0);
  copy_async_commit();
  if constexpr (Codes) {
    load_values(0);
    copy_async_commit();
  }
  load_queries<Warps>(a, head, first, stop, pos, reinterpret_cast<float*>(v), hi, lo);

  float o[32][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  for (int key = 0; key < keys; key += Keys) {
    if constexpr (Codes) {
      copy_async_wait<1>();  // what this thread copied of K is there; all are done with V
      __syncthreads();
      widen_tile<Keys, kThreads>(k_codes, k);
      widen_scales<Keys>(k_halves, k_scales);
      if (key + Keys < keys) load_keys(key + Keys);  // over codes that nobody else reads
    } else {
      copy_async_wait<0>();  // K is there for all, and all are done with V
      __syncthreads();
      load_values(key);
    }
    copy_async_commit();
    if constexpr (Codes) __syncthreads();
    float s[Keys / 8][4];
    flash_scores<Keys, Codes>(hi, lo, k, k_scales, s);
    if (key + Keys - 1 > pos + first) {  // some row must not see all of it
      const int thread = thread_anew(), row = 16 * (thread >> 5) + (thread >> 2 & 7), left = pos + first - key - 2 * (thread & 3);
      const int at[2] = {left + row / group, left + (row + 8) / group};
#pragma unroll
      for (int n = 0; n < Keys / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (8 * n + (i & 1) > at[i >> 1]) s[n][i] = -INFINITY;
    }
    if constexpr (Codes) {
      copy_async_wait<1>();  // what this thread copied of V is there; all are done with K
      __syncthreads();
      widen_tile<Keys, kThreads>(v_codes, v);
      widen_scales<Keys>(v_halves, v_scales);
      if (key + Keys < keys) load_values(key + Keys);
    } else {
      copy_async_wait<0>();  // V is there for all, and all are done with K
      __syncthreads();
      if (key + Keys < keys) load_keys(key + Keys);
    }
    copy_async_commit();
    softmax<Keys>(s, m, l, o);
    if constexpr (Codes) __syncthreads();
    flash_values<Keys, Codes>(s, v, v_scales, o);
  }

  const int thread = thread_anew();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
    const int row = 16 * (thread >> 5) + (thread >> 2 & 7) + 8 * r, t = first + row / group, h = head * group + row % group;
    if (t >= stop) continue;
    float* to = a.o + (static_cast<int64_t>(t) * a.heads + h) * kWidth + 2 * (thread & 3);
    const float scale = 1.f / l[r];
#pragma unroll
    for (int n = 0; n < 32; n++) *reinterpret_cast<float2*>(to + 8 * n) = make_float2(o[n][2 * r] * scale, o[n][2 * r + 1] * scale);
  }
}

template <int Warps, int Keys, bool Codes>
void flash(const Context& ctx, const Attn& a) {
  const int each = 16 * Warps / (a.heads / a.kv_heads), tiles = (a.tokens + each - 1) / each;
  launch(ctx, "attention", attn_flash_k<Warps, Keys, Codes>, dim3(static_cast<unsigned>(tiles) * static_cast<unsigned>(a.kv_heads)), 32 * Warps,
         flash_bytes<Warps, Keys, Codes>(), a);
}

template <bool Codes>
void many(const Context& ctx, const Attn& a) {
  const int64_t each = 128 / (a.heads / a.kv_heads), blocks = (a.tokens + each - 1) / each * a.kv_heads;
  if (blocks < ctx.sms || ctx.shared_max < flash_bytes<8, 32, Codes>()) flash<4, 32, Codes>(ctx, a);
  else if (ctx.shared_max < flash_bytes<8, 64, Codes>()) flash<8, 32, Codes>(ctx, a);
  else flash<8, 64, Codes>(ctx, a);
}

}  // namespace

void attention_many(const Context& ctx, const AttentionArgs& args) {
  Attn a = make_attn(args);
  if (!attention_is_fast(args) || ctx.shared_max < flash_bytes<4, 32, true>()) return attention_exact(ctx, a, args.k_cache.dtype);
  attention_append(ctx, a, args.k_cache.dtype);
  a.q_scale *= kLog2e;
  const bool codes = args.k_cache.dtype == DType::I8;
  if (args.act != Act::F32 && attention_wgmma(ctx, a, codes)) return;
  if (codes) many<true>(ctx, a);
  else many<false>(ctx, a);
}

}  // namespace qn::cuda
