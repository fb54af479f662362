// Slabs of expert weights, and their products with the activations of up to 8 columns; shared by moe.cu and moe_down.cu.
#pragma once
#include "cuda/choice.cuh"
#include "cuda/matvec.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {

// First i in [begin, end) with ids[i] == e, or -1; the same in every lane of the warp.
__device__ __forceinline__ int find(const int32_t* ids, int begin, int end, int e) {
#pragma unroll 1
  for (int i = begin; i < end; i += 32) {
    const unsigned found = __ballot_sync(kAll, i + lane_id() < end && ids[i + lane_id()] == e);
    if (found) return i + __ffs(static_cast<int>(found)) - 1;
  }
  return -1;
}

// ---- slabs ------------------------------------------------------------------------------------------------------------

// A weight matrix of which panels are taken.
struct Matrix {
  const uint8_t* data;
  int32_t k;
  int32_t shift;        // T16: groups of 1 << shift
  int32_t slab_scales;  // T16: bytes of the scales of a slab
  int32_t panel_bytes;  // T16
  int32_t scale_bytes;  // T16: tiles begin there
  int32_t tiles;        // T16: of a panel
  int32_t step, pair;   // BF16: panel p begins at row p * step, its row 8 + g lies `pair` rows behind its row g
};

__device__ __forceinline__ uint4 load_shared(const uint16_t* p) { return *reinterpret_cast<const uint4*>(p); }

// Rounds the four values of each lane, 128 consecutive ones of a row, and stores them as the B fragments of W want them. The
// result is their scale.
template <DType W>
__device__ __forceinline__ float store_rounded(float4 v, bool int8, uint16_t* to) {
  const float scale = int8 ? int8_codes(v) : 1.f;
  const int k = 4 * lane_id();
  if constexpr (W == DType::INT4) {  // k and k + 2 are neighbours there, k + 1 and k + 3 four places on
    uint32_t* p = reinterpret_cast<uint32_t*>(to + (k & ~15) + int4_position(k & 15));
    p[0] = pack_bf16(v.x, v.z);
    p[2] = pack_bf16(v.y, v.w);
  } else {
    *reinterpret_cast<uint2*>(to + k) = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
  }
  return scale;
}

// Where value k of a row lies that store_rounded<INT4> has stored
__device__ __forceinline__ int rounded_at(int k) { return (k & ~15) + int4_position(k & 15); }
__device__ __forceinline__ uint16_t bf16_bits(float v) { return static_cast<uint16_t>(pack_bf16(v, 0.f)); }

// 16 rows x kWidth columns of a matrix, in shared memory of one warp; with copy() each lane copies its fragments itself. What lies beyond K is
// zero, and so must be x there. Plain: groups of 128 and activations without scales, the case that is made to be fast. Loads: of 16 bytes, by
// each lane.
template <DType W, bool Plain, int Loads = 8>
struct Slab {
  static constexpr DType kType = W;
  static constexpr bool kPlain = Plain;
  static constexpr int kBlock = W == DType::INT4 ? 64 : 32;      // k of a block (cuda/unpack.cuh)
  static constexpr int kLoads = Loads, kBlocks = W == DType::BF16 ? kLoads / 2 : kLoads;
  static constexpr int kWidth = kBlock * kBlocks;
  static constexpr int kChunks = kWidth / kActGroup;             // activation scales
  static constexpr int kCell = kBlock / 4;
  static constexpr int kPad = W == DType::INT4 ? 8 : 32;         // values behind a row of x: two tokens' 16-byte loads share no bank
  static constexpr int kScales = is_t16(W) ? kWidth / (Plain ? 128 : 32) * kPanelRows * 2 : 0;  // bytes, at most
  static constexpr int kScalesAt = kLoads * kTileBytes;          // behind tiles, or what lanes load of BF16 rows
  static constexpr int kBytes = kScalesAt + kScales;

  // Asks for slab s of panel p
  __device__ __forceinline__ static void copy(const Matrix& m, const uint8_t* data, int p, int s, uint8_t* to) {
    const int lane = lane_id();
    to += lane * 16;
    if constexpr (W == DType::BF16) {
      const int64_t row = static_cast<int64_t>(p) * m.step + lane / 4, bytes = static_cast<int64_t>(m.k) * 2;
      const uint8_t* lo = data + row * bytes + s * (2 * kWidth) + lane % 4 * 16;
      const uint8_t* hi = lo + m.pair * bytes;
#pragma unroll
      for (int i = 0; i < kBlocks; i++) {
        const bool in = s * kWidth + i * kBlock < m.k;
        copy_async16_or_zero(to + 2 * i * kTileBytes, lo + i * kBlock * 2, in);
        copy_async16_or_zero(to + (2 * i + 1) * kTileBytes, hi + i * kBlock * 2, in);
      }
    } else {
      const uint8_t* panel = data + static_cast<int64_t>(p) * m.panel_bytes;
      const uint8_t* tiles = panel + m.scale_bytes + s * (kBlocks * kTileBytes) + lane * 16;
      const int end = m.tiles - s * kBlocks;
#pragma unroll
      for (int i = 0; i < kBlocks; i++) copy_async16_or_zero(to + i * kTileBytes, tiles + i * kTileBytes, i < end);
      const int bytes = Plain ? kScales : m.slab_scales, at = s * bytes + lane * 16;
      if (lane * 16 < bytes) copy_async16_or_zero(to + kLoads * kTileBytes, panel + at, at < m.scale_bytes);
    }
    copy_async_commit();
  }
  // What has been asked for is there, for the whole warp; Left: but for the last so many slabs
  template <int Left = 0>
  __device__ __forceinline__ static void wait() {
    copy_async_wait<Left>();
    __syncwarp();
  }

  // total += the slab times x, as operand D lies: rows g, g + 8, columns 2t, 2t + 1. row_scales: those of its groups, (groups, 16) fp16;
  // x: the values of column g in shared memory, from cell t on; s0, s1: the activation scales of columns 2t and 2t + 1.
  __device__ __forceinline__ static void multiply(const uint8_t* slab, const uint8_t* row_scales, const uint16_t* x, const float* s0, const float* s1,
                                                  int shift,
                                                  float (&total)[4]) {
    const uint4* tiles = reinterpret_cast<const uint4*>(slab) + lane_id();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(row_scales) + lane_id() / 4;
    auto scale = [&](int q) { return float2{half_bits_to_float(scales[kPanelRows * q]), half_bits_to_float(scales[kPanelRows * q + 8])}; };
    float sum[2][4] = {};  // two chains, so that an instruction need not wait for the one before
#pragma unroll 4
    for (int i = 0; i < kBlocks; i++) {
      const uint4 b = load_shared(x + i * kBlock);
      uint32_t a[4];
      if constexpr (W == DType::BF16) {
        const uint4 lo = tiles[2 * i * 32], hi = tiles[(2 * i + 1) * 32];
        bf16_fragment<0>(lo, hi, a), mma_16816(sum[0], a, b.x, b.y);
        bf16_fragment<1>(lo, hi, a), mma_16816(sum[1], a, b.z, b.w);
        if (i == kBlocks - 1) add(float2{1, 1}, s0[0], s1[0], sum, total);
      } else if constexpr (W == DType::INT8) {
        const uint4 v = tiles[i * 32];
        int8_fragment<0>(v, a), mma_16816(sum[0], a, b.x, b.y);
        int8_fragment<1>(v, a), mma_16816(sum[1], a, b.z, b.w);
        if (((i + 1) * kBlock & ((1 << shift) - 1)) == 0) add(scale(i * kBlock >> shift), s0[i / 4], s1[i / 4], sum, total);
      } else {
        const uint4 v = tiles[i * 32], c = load_shared(x + i * kBlock + 8);
        if constexpr (Plain) {
          multiply_tile(v, b, c, sum);
          if (i % 2 == 1) add(scale(i / 2), 1.f, 1.f, sum, total);
        } else if (shift == 5) {  // cells 0 and 1 belong to the first group of the tile, 2 and 3 to the second
          const bool second = lane_id() % 4 >= 2;
          multiply_tile(v, second ? uint4{} : b, second ? uint4{} : c, sum);
          add(scale(2 * i), s0[i / 2], s1[i / 2], sum, total);
          multiply_tile(v, second ? b : uint4{}, second ? c : uint4{}, sum);
          add(scale(2 * i + 1), s0[i / 2], s1[i / 2], sum, total);
        } else {
          multiply_tile(v, b, c, sum);
          if (((i + 1) * kBlock & ((1 << shift) - 1)) == 0) add(scale(i * kBlock >> shift), s0[i / 2], s1[i / 2], sum, total);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static void multiply_tile(const uint4& v, const uint4& b, const uint4& c, float (&sum)[2][4]) {
    uint32_t a[4];
    int4_fragment<0>(v, a), mma_16816(sum[0], a, b.x, b.y);
    int4_fragment<1>(v, a), mma_16816(sum[1], a, b.z, b.w);
    int4_fragment<2>(v, a), mma_16816(sum[0], a, c.x, c.y);
    int4_fragment<3>(v, a), mma_16816(sum[1], a, c.z, c.w);
  }
  // The end of a group: rows times their scale, columns times theirs. All kernels round alike.
  __device__ __forceinline__ static void add(float2 row, float s0, float s1, float (&sum)[2][4], float (&total)[4]) {
    total[0] = fmaf(row.x * s0, sum[0][0] + sum[1][0], total[0]);
    total[1] = fmaf(row.x * s1, sum[0][1] + sum[1][1], total[1]);
    total[2] = fmaf(row.y * s0, sum[0][2] + sum[1][2], total[2]);
    total[3] = fmaf(row.y * s1, sum[0][3] + sum[1][3], total[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[0][i] = sum[1][i] = 0;
  }
};

// ---- for launchers ------------------------------------------------------------------------------------------------------

constexpr int slab_width(DType t) { return t == DType::INT4 ? 512 : t == DType::INT8 ? 256 : 128; }
static_assert(slab_width(DType::INT4) == Slab<DType::INT4, true>::kWidth && slab_width(DType::INT8) == Slab<DType::INT8, false>::kWidth &&
              slab_width(DType::BF16) == Slab<DType::BF16, false>::kWidth);

inline int count(int64_t n) { return static_cast<int>(n); }

inline Matrix make_matrix(const Tensor& w, int step, int pair) {
  Matrix m{};
  m.data = w.bytes(), m.k = count(w.cols()), m.step = step, m.pair = pair;
  if (!is_t16(w.dtype)) return m;
  m.shift = w.group == 32 ? 5 : w.group == 64 ? 6 : 7, m.slab_scales = slab_width(w.dtype) / w.group * kPanelRows * 2;
  m.panel_bytes = count(t16_panel_bytes(w.dtype, w.cols(), w.group)), m.scale_bytes = count(t16_scale_bytes(w.cols(), w.group));
  m.tiles = (m.panel_bytes - m.scale_bytes) / kTileBytes;
  return m;
}

// moe.cu: whether few tokens' gate_up of plain() experts of that width is its own; that of moe_exact.cu lets the next kernel start before it has
// waited, so that nothing the one before has written may be read early.
bool moe_gate_up_waits_first(const Context&, int k, int f, int experts, int chosen);

// What gate_up of plain() experts leaves for `down`, when that is the next operation: inner once more, (T*K, F), as store_rounded<INT4> has it,
// where scratch memory begins. 128 blocks read all of it: half the bytes, and nothing to round.
inline uint16_t* rounded_inner(const Context& c, int64_t choices, int64_t f) { return Scratch(c).take<uint16_t>(choices * f); }

inline bool plain(Act act, const Experts& e) { return e.dtype == DType::INT4 && e.group == 128 && act == Act::BF16; }

}  // namespace qn::cuda
