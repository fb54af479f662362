// Stored weights -> A fragments of mma.m16n8k16 (bf16), for 16 output rows. Codes of INT4 and INT8 are small integers, exact in
// bf16; the scale of a group is applied to the fp32 sum of that group, so nothing is rounded that the definition does not round.
//
// Lane 4g + t of a warp owns rows g and g+8 of the panel and, of each block of k, the cell t. `x` is in the order that the lane
// reads as consecutive B fragments:
//
//   format  k of a block   bytes a lane loads                     k16 steps   order of x inside the block
//   INT4    64 (a tile)    16 at 16*lane                          4           each 16 permuted by int4_position()
//   INT8    32 (a tile)    16 at 16*lane                          2           natural
//   BF16    32             16 of row g and 16 of row g+8, at 8t   2           natural
//
// The lane's B fragments for step s of a block at k0 are the 4 bf16 at x[k0 + cell * t + 4 s], cell = 16 (INT4) or 8 (INT8, BF16):
// b0 the first two, b1 the other two; of token g.
#pragma once
#include "cuda/common.cuh"
#include "ggml-lite/core/blocks.h"

namespace qn::cuda {

// Where the value at k (0..15 inside its 16) lies in the order that INT4 tiles want: 0 2 8 10 1 3 9 11 4 6 12 14 5 7 13 15
__host__ __device__ constexpr int int4_position(int k) {
  return (((k & 4) >> 1) + (k & 1)) * 4 + (k >> 3 & 1) * 2 + (k >> 1 & 1);
}
static_assert(int4_position(2) == 1 && int4_position(8) == 2 && int4_position(1) == 4 && int4_position(6) == 9 && int4_position(15) == 15);

__device__ __forceinline__ uint32_t bf162_sub(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

// A bitwise function of three words in one instruction: of expressions with two constants the compiler makes two, and kernels that unpack weights
// are short of instructions too.
constexpr int kAndOr = 0xea, kAndXor = 0x6a;  // (v & mask) | bits, (v & mask) ^ bits
template <int Function>
__device__ __forceinline__ uint32_t bits_of(uint32_t v, uint32_t mask, uint32_t bits) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits), "n"(Function));
  return r;
}

// v: the 16 bytes of the lane: words x, y of row g, z, w of row g+8. The result is code - 8, exact.
// 0x4300 | q is 128 + q in bf16 (its mantissa steps by one there); 136 is 0x4308.
template <int Step>
__device__ __forceinline__ void int4_fragment(const uint4& v, uint32_t (&a)[4]) {
  const uint32_t lo = Step < 2 ? v.x : v.y, hi = Step < 2 ? v.z : v.w;
  constexpr int shift = Step % 2 * 8;
  a[0] = bf162_sub(bits_of<kAndOr>(lo >> shift, 0x000f000fu, 0x43004300u), 0x43084308u);
  a[1] = bf162_sub(bits_of<kAndOr>(hi >> shift, 0x000f000fu, 0x43004300u), 0x43084308u);
  a[2] = bf162_sub(bits_of<kAndOr>(lo >> (shift + 4), 0x000f000fu, 0x43004300u), 0x43084308u);
  a[3] = bf162_sub(bits_of<kAndOr>(hi >> (shift + 4), 0x000f000fu, 0x43004300u), 0x43084308u);
}

// Two bytes c (excess 128) in the low halves' low bytes -> c - 128 twice. 0x4300 | (c & 127) is 128 + (c & 127); from it 128 is
// taken where bit 7 is set and 256 (0x4380) where not.
__device__ __forceinline__ uint32_t int8_pair(uint32_t c) {
  return bf162_sub(bits_of<kAndOr>(c, 0x007f007fu, 0x43004300u), bits_of<kAndXor>(c, 0x00800080u, 0x43804380u));
}
template <int Step>
__device__ __forceinline__ void int8_fragment(const uint4& v, uint32_t (&a)[4]) {
  const uint32_t lo = Step == 0 ? v.x : v.y, hi = Step == 0 ? v.z : v.w;
  a[0] = int8_pair(__byte_perm(lo, 0, 0x4140));
  a[1] = int8_pair(__byte_perm(hi, 0, 0x4140));
  a[2] = int8_pair(__byte_perm(lo, 0, 0x4342));
  a[3] = int8_pair(__byte_perm(hi, 0, 0x4342));
}

// The same codes as fp16 numbers 1024 + c, exact, with one instruction each: 0x64 before a byte. Who multiplies with them takes 1152 times
// the sum of x from the result.
constexpr uint32_t kLowered = 0xe480e480u;  // -1152 twice
template <int Step>
__device__ __forceinline__ void int8_raised_fragment(const uint4& v, uint32_t (&a)[4]) {
  const uint32_t lo = Step == 0 ? v.x : v.y, hi = Step == 0 ? v.z : v.w;
  a[0] = __byte_perm(lo, 0x64646464u, 0x4140);
  a[1] = __byte_perm(hi, 0x64646464u, 0x4140);
  a[2] = __byte_perm(lo, 0x64646464u, 0x4342);
  a[3] = __byte_perm(hi, 0x64646464u, 0x4342);
}

// lo: 8 values of row g, hi: of row g+8
template <int Step>
__device__ __forceinline__ void bf16_fragment(const uint4& lo, const uint4& hi, uint32_t (&a)[4]) {
  a[0] = Step == 0 ? lo.x : lo.z;
  a[1] = Step == 0 ? hi.x : hi.z;
  a[2] = Step == 0 ? lo.y : lo.w;
  a[3] = Step == 0 ? hi.y : hi.w;
}

__device__ __forceinline__ float half_bits_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

}  // namespace qn::cuda
