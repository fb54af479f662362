// Causal attention of many tokens with the matrix instructions of sm_90a (wgmma): what attn_prefill.cu does there otherwise. Over a BF16 cache;
// one of codes is first written out as BF16 into scratch memory, all positions so far: 3 bytes moved for each code where the products
// take hundreds of FLOP, and so half the time of the kernel that widens every tile again.
//
//   block    128 rows, row = token * G + head. Three groups of 4 warps: the first copies K and V, the other two multiply, 64 rows each.
//   tile     64 keys. Of K and of V it is two halves, dims 0..127 and 128..255; a half has a slot of the ring.
//   q        hi + lo, both BF16: two products, q K' is as good as fp32 with the rounded cache.
//   p        rounded to BF16. l sums what p was rounded to: the weights of a row add up to 1.
//   result   o (64 x 256 per group) in registers, 128 per thread.
//
//   shared memory   bytes
//   q hi            65536    4 panels (64 dims) of 128 rows
//   q lo            65536    the same
//   ring            98304    6 slots of 16384: 2 panels (64 dims) of 64 keys
//   barriers           96    full, empty of each slot
//
// A panel is what wgmma calls 128-byte swizzle: rows of 128 bytes, atoms of 8 rows, chunk c (16 bytes) of row r at c ^ (r & 7). The same
// bytes are K, whose rows run along the sum (K-major), and V, whose rows run across it (MN-major); only the descriptors differ.
//
//   descriptor    start / 16, bits 0..13     leading / 16, 16..29          stride / 16, 32..45       bits 62..63
//   q, K          + 32 bytes for 16 dims     not used                      1024: 8 rows              1
//   V             + 2048 bytes for 16 keys   8192: the next 64 dims        1024: 8 keys              1
//
// Order of the ring: K0 K1 V0 K2 V1 K3 ... K(n-1) V(n-2) V(n-1), as a group of warps issues its products: q K' of a tile, then p V of the tile
// before it. o is scaled under the one, softmax runs under the other. Each half is filled by one warp, up to four at a time; it waits for its own
// copies, makes them visible to wgmma (which reads past the path of ordinary accesses) and says so at the barrier.
#include <utility>

#include "cuda/attn.cuh"

namespace qn::cuda {
namespace {

constexpr int kRows = 128, kKeys = 64, kGroupThreads = 128, kThreads = 3 * kGroupThreads;
constexpr int kQueryPanel = kRows * 128, kPanel = kKeys * 128;
constexpr int kSlot = 2 * kPanel, kPlaces = 3, kSlots = 2 * kPlaces;  // a place: the slots of two halves
constexpr size_t kBarriersAt = static_cast<size_t>(8 * kQueryPanel + kSlots * kSlot), kBytes = kBarriersAt + 2 * kSlots * sizeof(Barrier);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// 24 + 2 * 240 = 3 * 168, what threads of 384 start with. With 232 the compiler finds no room for the products' operands and serialises them.
constexpr int kCopyRegisters = 24, kProductRegisters = 240;

// The half of a descriptor that differs, and the one that does not: stride and swizzle
__device__ __forceinline__ uint32_t descriptor(uint32_t at, uint32_t leading) { return at >> 4 | leading >> 4 << 16; }
constexpr uint32_t kDescriptorHigh = 1024 >> 4 | 1u << 30;
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Bounds for the compiler: values are computed before and read after.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

#define QN_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])

// d (64 x 64) = or += A B; both in shared memory, K-major. d[4n + 0,1] of row g of the warp's 16, columns 8n + 2t, + 1; d[4n + 2,3] of row g + 8.
__device__ __forceinline__ void product_64(float (&d)[32], uint32_t a, uint32_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %34, 0;\nmov.b64 a, {%32, %35};\nmov.b64 b, {%33, %35};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "a, b, p, 1, 1, 0, 0;\n}"
      : QN_8(d, 0), QN_8(d, 8), QN_8(d, 16), QN_8(d, 24)
      : "r"(a), "r"(b), "r"(add), "n"(kDescriptorHigh));
}
// d (64 x 128) += A B; A in registers as mma_16816() has it (a + 0..3), B in shared memory, MN-major.
__device__ __forceinline__ void product_128(float (&d)[64], const uint32_t* a, uint32_t b) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %70, 0;\nmov.b64 b, {%68, %69};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, b, p, 1, 1, 1;\n}"
      : QN_8(d, 0), QN_8(d, 8), QN_8(d, 16), QN_8(d, 24), QN_8(d, 32), QN_8(d, 40), QN_8(d, 48), QN_8(d, 56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), "r"(1));
}
#undef QN_8

// What ordinary accesses of this thread have written, and what others have written and this thread has waited for, wgmma may read.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 2^x; below 2^-126 zero, which exp2f() spends three more instructions to avoid
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Where in the ring a tile of K or of V is, and the parity of its barriers' phases
struct Place {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ Place next() const { return at + 1 < kPlaces ? Place{at + 1, parity} : Place{0, parity ^ 1}; }
};

// The 16 rows of q of this warp (0..7) -> hi and lo. Rows without a token are zero. `row`: 256 floats of the warp. The values of the next row
// are on their way while one is normed and rotated.
__device__ __forceinline__ void load_queries(const Attn& a, int head, int first, int stop, int pos, int warp, float* row, uint8_t* hi, uint8_t* lo) {
  const int lane = static_cast<int>(threadIdx.x & 31), group = a.heads / a.kv_heads, end = 16 * warp + 16;
  HeadRow<kWidth> next;
  const auto load = [&](int r) {
    const int t = first + r / group;
    if (t < stop) next.load(a, a.query(t, head * group + r % group), a.q_norm);
  };
  load(16 * warp);
#pragma unroll 1
  for (int r = 16 * warp; r < end; r++) {
    const int t = first + r / group;
    const HeadRow<kWidth> q = next;
    if (r + 1 < end) load(r + 1);
    uint4 h = make_uint4(0, 0, 0, 0), l = h;
    if (t < stop) {
      norm_rotate(a, q, pos + t, row);
      const float4 x = reinterpret_cast<const float4*>(row)[2 * lane], y = reinterpret_cast<const float4*>(row)[2 * lane + 1];
      split_bf16(x.x * a.q_scale, x.y * a.q_scale, h.x, l.x), split_bf16(x.z * a.q_scale, x.w * a.q_scale, h.y, l.y);
      split_bf16(y.x * a.q_scale, y.y * a.q_scale, h.z, l.z), split_bf16(y.z * a.q_scale, y.w * a.q_scale, h.w, l.w);
    }
    const int at = (lane >> 3) * kQueryPanel + r * 128 + (((lane & 7) ^ (r & 7)) << 4);
    *reinterpret_cast<uint4*>(hi + at) = h;
    *reinterpret_cast<uint4*>(lo + at) = l;
    __syncwarp();
  }
}

// All fills of warp 0..3: half (warp & 1) of every other tile of the ring's order. Positions from `keys` on are zeros.
__device__ __forceinline__ void copy_tiles(const Attn& a, int head, int keys, int warp, uint8_t* ring, Barrier* full, Barrier* empty) {
  const int lane = static_cast<int>(threadIdx.x & 31), tiles = (keys + kKeys - 1) / kKeys, half = warp & 1;
  const int row = lane >> 4, c = lane & 15;  // two rows at once, 256 bytes of each
  const int64_t from = static_cast<int64_t>(row) * kWidth + half * (kWidth / 2) + c * 8;
  const uint16_t* k = static_cast<const uint16_t*>(a.k_cache) + head * a.k_stride + from;
  const uint16_t* v = static_cast<const uint16_t*>(a.v_cache) + head * a.v_stride + from;
  const int to = (c >> 3) * kPanel + row * 128 + (((c & 7) ^ row) << 4);
  int at = warp >> 1;  // a Place
  uint32_t parity = 0;
#pragma unroll 1
  for (int g = warp >> 1; g < 2 * tiles; g += 2) {
    const bool values = g == 2 * tiles - 1 || (g > 0 && g % 2 == 0);
    const int first = (g == 2 * tiles - 1 ? tiles - 1 : values ? g / 2 - 1 : (g + 1) / 2) * kKeys, rest = keys - first - row;
    const uint16_t* x = (values ? v : k) + static_cast<int64_t>(first) * kWidth;
    const int slot = 2 * at + half;
    uint8_t* y = ring + slot * kSlot;
    wait_barrier(empty + slot, parity);
#pragma unroll
    for (int i = 0; i < kKeys / 2; i++) copy_async16_if(2 * i < rest, y + ((to ^ (i % 4 * 2) << 4) + i * 256), x + i * 2 * kWidth);
    copy_async_commit();
    copy_async_wait<0>();
    publish_to_products();
    arrive(full + slot);  // every lane for what it has copied
    at += 2;
    if (at >= kPlaces) at -= kPlaces, parity ^= 1;
  }
}

// s = q K', issued as two groups of products. `hi`: descriptor of the first panel's 64 rows of q hi; lo is 4 panels on.
__device__ __forceinline__ void issue_scores(float (&s)[32], uint32_t hi, uint32_t ring, const Barrier* full, Place k) {
  wait_barrier(full + 2 * k.at, k.parity), wait_barrier(full + 2 * k.at + 1, k.parity);
  asm volatile("" : "+r"(hi));  // or else 32 descriptors occupy registers across the loop over the tiles
  pin(s);
  products_begin();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t keys = ring + (2 * k.at + half) * (kSlot >> 4);
#pragma unroll
    for (int j = 0; j < 8; j++) {  // 16 dims
      const uint32_t q = hi + (((2 * half + j / 4) * kQueryPanel + j % 4 * 32) >> 4), b = keys + ((j / 4 * kPanel + j % 4 * 32) >> 4);
      product_64(s, q, b, half + j > 0);
      product_64(s, q + (4 * kQueryPanel >> 4), b, 1);
    }
    products_commit();
  }
}

// o += p V, issued as two groups of products
__device__ __forceinline__ void issue_values(float (&o)[2][64], uint32_t (&p)[16], uint32_t ring, const Barrier* full, Place v) {
  wait_barrier(full + 2 * v.at, v.parity), wait_barrier(full + 2 * v.at + 1, v.parity);
  pin(o[0]), pin(o[1]), pin(p);
  products_begin();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t values = ring + (2 * v.at + half) * (kSlot >> 4);
#pragma unroll
    for (int j = 0; j < kKeys / 16; j++) product_128(o[half], p + 4 * j, values + (j * 16 * 128 >> 4));
    products_commit();
  }
}

// s becomes p, rounded to BF16; m: maxima of rows g and g + 8 (powers of two); alpha: what o is to be multiplied by. Key 0 is in the first tile
// and before every row, hence no maximum is infinite.
__device__ __forceinline__ void softmax(float (&s)[32], float (&m)[2], float (&l)[2], float (&alpha)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = m[r];
#pragma unroll
    for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
    alpha[r] = power_of_two(m[r] - top);
    m[r] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      const uint32_t x = pack_bf16(power_of_two(s[4 * n + 2 * r] - top), power_of_two(s[4 * n + 2 * r + 1] - top));
      s[4 * n + 2 * r] = bf16_lo(x), s[4 * n + 2 * r + 1] = bf16_hi(x);
      sum += s[4 * n + 2 * r] + s[4 * n + 2 * r + 1];
    }
    l[r] = fmaf(l[r], alpha[r], sum);
  }
}

// p -> the A operand of p V
__device__ __forceinline__ void pack(const float (&s)[32], uint32_t (&p)[16]) {
#pragma unroll
  for (int i = 0; i < 16; i++) p[i] = __byte_perm(__float_as_uint(s[2 * i]), __float_as_uint(s[2 * i + 1]), 0x7632);
}

__device__ __forceinline__ void scale_rows(float (&o)[2][64], const float (&by)[2]) {
#pragma unroll
  for (int i = 0; i < 128; i++) o[i >> 6][i & 63] *= by[i >> 1 & 1];
}
#endif

// Grid: tiles of queries x HK. Empty where the code is not for sm_90a; attention_wgmma() sees that.
__global__ __launch_bounds__(kThreads, 1) void attn_wgmma_k([[maybe_unused]] const Attn a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *hi = shared, *lo = hi + 4 * kQueryPanel, *ring = lo + 4 * kQueryPanel;
  Barrier *full = reinterpret_cast<Barrier*>(shared + kBarriersAt), *empty = full + kSlots;
  let_next_start();
  const int group = a.heads / a.kv_heads, each = kRows / group;  // tokens of a tile
  const int head = static_cast<int>(blockIdx.x) % a.kv_heads, tile = static_cast<int>(gridDim.x - 1 - blockIdx.x) / a.kv_heads;
  const int first = tile * each, stop = min(first + each, a.tokens);
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x >> 5), 0), lane = static_cast<int>(threadIdx.x & 31);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; i++) init_barrier(full + i, 32), init_barrier(empty + i, i < kSlots - 1 ? 8 : 8 * 32);
    publish_barriers();
  }
  __syncthreads();
  wait_for_previous();
  const int pos = a.start(), keys = pos + stop;
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    copy_tiles(a, head, keys, warp, ring, full, empty);
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kProductRegisters));
  const int part = (warp >> 2) - 1, start = kKeys * part;  // first of 64 rows
  const auto release = [&](Place x, int half) {
    if (lane == 0) arrive(empty + 2 * x.at + half);
  };
  // The last slot is where rows of q are normed: empty when every lane says so. From then on one lane of a warp speaks for all, as for the others.
  for (int i = 0; i < kSlots - 1; i++) release({i / 2, 0}, i % 2);
  load_queries(a, head, first, stop, pos, warp - 4, reinterpret_cast<float*>(ring + (kSlots - 1) * kSlot) + (warp - 4) * kWidth, hi, lo);
  lane == 0 ? arrive(empty + kSlots - 1) : arrive_and_drop(empty + kSlots - 1);
  publish_to_products();
  asm volatile("bar.sync %0, %1;" ::"r"(1 + part), "n"(kGroupThreads) : "memory");

  // This group's rows see `tiles` tiles: all, or all but the last one. What it does not visit there nobody waits to fill again.
  const int mine = pos + min(stop, first + (start + 63) / group + 1), tiles = (mine + kKeys - 1) / kKeys;
  const uint32_t queries = descriptor(shared_address(hi) + start * 128, 16);
  const uint32_t k_ring = descriptor(shared_address(ring), 16), v_ring = descriptor(shared_address(ring), kPanel);
  float s[32] = {}, o[2][64] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {}, alpha[2];
  uint32_t p[16];
  const auto mask = [&](int key) {
    if (key + kKeys - 1 <= pos + first + start / group) return;  // every row sees all of it
    const int thread = thread_anew(), row = start + 16 * (thread >> 5 & 3) + (thread >> 2 & 7), left = pos + first - key - 2 * (thread & 3);
    const int at[2] = {left + row / group, left + (row + 8) / group};
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (i / 4 * 8 + (i & 1) > at[i >> 1 & 1]) s[i] = -INFINITY;
  };

  Place now;
  issue_scores(s, queries, k_ring, full, now);
  products_wait<0>();
  pin(s);
  release(now, 0), release(now, 1);
  mask(0);
  softmax(s, m, l, alpha);
  pack(s, p);
  now = now.next();
#pragma unroll 1
  for (int i = 1; i < tiles; i++) {
    const Place k = now, v = now.next();
    issue_scores(s, queries, k_ring, full, k);
    scale_rows(o, alpha);
    issue_values(o, p, v_ring, full, v);
    products_wait<3>();
    release(k, 0);
    products_wait<2>();
    pin(s);
    mask(i * kKeys);
    softmax(s, m, l, alpha);
    pin(s);
    if (!(l[0] + l[1] < 0)) release(k, 1);  // always. Or else the compiler has softmax wait for p V as well, with nothing to do meanwhile.
    products_wait<1>();
    release(v, 0);
    products_wait<0>();
    pin(o[0]), pin(o[1]), pin(p);
    release(v, 1);
    pack(s, p);
    now = v.next();
  }
  if (tiles * kKeys < keys) now = now.next();  // K of the tile that is not visited
  scale_rows(o, alpha);
  issue_values(o, p, v_ring, full, now);
  products_wait<0>();
  pin(o[0]), pin(o[1]), pin(p);

  const int thread = thread_anew();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
    l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
    const int row = start + 16 * (thread >> 5 & 3) + (thread >> 2 & 7) + 8 * r, t = first + row / group, h = head * group + row % group;
    if (t >= stop) continue;
    float* to = a.o + (static_cast<int64_t>(t) * a.heads + h) * kWidth + 2 * (thread & 3);
    const float scale = 1.f / l[r];
#pragma unroll
    for (int n = 0; n < 32; n++)
      *reinterpret_cast<float2*>(to + 8 * n) = make_float2(o[n / 16][n % 16 * 4 + 2 * r] * scale, o[n / 16][n % 16 * 4 + 2 * r + 1] * scale);
  }
#endif
}

// Codes -> code * scale in BF16, positions 0 .. pos + T - 1. k, v (HK, C, 256). 16 values a thread.
__global__ __launch_bounds__(256) void attn_widen_cache_k(const Attn a, uint16_t* k, uint16_t* v) {
  let_next_start();
  wait_for_previous();
  const int64_t keys = a.start() + a.tokens, pieces = 2 * a.kv_heads * keys * (kWidth / 16);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < pieces; i += static_cast<int64_t>(gridDim.x) * 256) {
    const int c = static_cast<int>(i % (kWidth / 16));
    const int64_t row = i / (kWidth / 16), position = row % keys;
    const int plane = static_cast<int>(row / keys), head = plane >> 1;
    const bool values = plane & 1;
    const int8_t* codes = values ? static_cast<const int8_t*>(a.v_cache) + head * a.v_stride : static_cast<const int8_t*>(a.k_cache) + head * a.k_stride;
    const uint16_t* scales = values ? a.v_scales + head * a.v_scales_stride : a.k_scales + head * a.k_scales_stride;
    const float scale = half_bits_to_float(scales[2 * position + c / 8]);
    const uint4 x = reinterpret_cast<const uint4*>(codes + position * kWidth)[c];
    uint4* to = reinterpret_cast<uint4*>((values ? v : k) + (static_cast<int64_t>(head) * a.context + position) * kWidth) + 2 * c;
    const auto pair = [&](uint32_t w, int at) {
      return pack_bf16(static_cast<float>(static_cast<int8_t>(w >> at)) * scale, static_cast<float>(static_cast<int8_t>(w >> (at + 8))) * scale);
    };
    to[0] = make_uint4(pair(x.x, 0), pair(x.x, 16), pair(x.y, 0), pair(x.y, 16));
    to[1] = make_uint4(pair(x.z, 0), pair(x.z, 16), pair(x.w, 0), pair(x.w, 16));
  }
}

}  // namespace

// What codes stand for, positions x values of a position: keys, values
static std::pair<uint16_t*, uint16_t*> take_widened(Scratch& s, int64_t context, int64_t values) {
  uint16_t* const k = s.take<uint16_t>(context * values);
  return {k, s.take<uint16_t>(context * values)};
}
size_t attention_wgmma_scratch(const OpLimits& l) {
  Scratch s;
  if (l.tokens > kFewTokens) take_widened(s, l.context, l.kv_codes);
  return s.used();
}

// False: not done, because the device or this build has no such instructions, or for want of blocks, or of room for the widened cache.
bool attention_wgmma(const Context& ctx, Attn a, bool codes) {
  const int64_t each = kRows / (a.heads / a.kv_heads), blocks = (a.tokens + each - 1) / each * a.kv_heads;
  if (2 * blocks < ctx.sms || ctx.shared_max < kBytes) return false;
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, attn_wgmma_k), "attention");
  if (code.numRegs < 128) return false;  // the empty body
  if (codes) {
    Scratch s(ctx), needed;
    const int64_t values = static_cast<int64_t>(a.kv_heads) * kWidth;
    take_widened(needed, a.context, values);
    if (s.left() < needed.used()) return false;
    const auto [k, v] = take_widened(s, a.context, values);
    launch(ctx, "attention", attn_widen_cache_k, dim3(static_cast<unsigned>(8 * ctx.sms)), 256, 0, a, k, v);
    a.k_cache = k, a.v_cache = v, a.k_stride = a.v_stride = static_cast<int64_t>(a.context) * kWidth;
  }
  launch(ctx, "attention", attn_wgmma_k, dim3(static_cast<unsigned>(blocks)), kThreads, kBytes, a);
  return true;
}

}  // namespace qn::cuda
