// Matrix products of many tokens on tensor cores of any architecture from sm_80: BF16, INT8 or INT4 weights, BF16 activations.
//
// A block of 4 warps makes a tile of 256 weight rows x up to 64 tokens; a warp 64 rows (4 panels) x all tokens, 128 fp32 sums a
// lane. (Small matrices of few tokens: 64 rows, a panel a warp.) Weights are the A operand of mma.m16n8k16, tokens its B operand.
// K goes in steps of 64 through a ring of stages in shared memory, filled by cp.async:
//
//   tokens   64 rows of 128 B: 8 chunks of 8 values in natural order, chunk c of row r at place c ^ (r & 1 ? flip : 0)
//   weights  per panel 1 (INT4), 2 (INT8) or 4 (BF16) times 512 B: 16 B a lane, which reads back what it has copied itself
//   scales   per panel 64 B: one group (g64, g128) or two (g32), 16 fp16 each
//
// A step has two halves; in each a lane reads one chunk per token, which is the B fragments of two mma steps (s = 0, 1):
//
//            half u is                      chunk of lane 4g + t     flip: what parts the 8 lanes of a quarter warp (2 rows)
//   INT4     nibble plane u of the tile     2t + u                   1
//   INT8     k 32u .. 32u+31                4u + t                   4
//   BF16     the same                       4u + t                   4
//
// Scales. Codes are exact in BF16; the sum of a group times its scale is what counts. A second set of sums per group would not fit
// the registers, so the sums are kept in units of the current scale: entering a group they are multiplied by old / new scale,
// and at the end by the last one. A scale of zero counts as 2^-60. INT4 with groups of 32 has two groups in every mma step:
// there each tile is multiplied twice, once with either half of its cells emptied.
#include "cuda/unpack.cuh"

namespace qn::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kStep = 64;   // k of a stage
constexpr int kBand = 16;   // row tiles that share their tokens in L2: blocks walk a band of them token tile by token tile

enum class Put : int { Store, Add, SwiGlu };

struct Product {
  const uint16_t* x;          // rows ldx apart
  const uint8_t* w;           // matrix of the first expert
  float* y;                   // rows ldy apart
  const GemmItem* items;      // null: one matrix, tokens in order
  const int32_t* order;
  const uint8_t* const* at;   // (E) or null: where the experts are, instead of at w + e * w_stride,
  int64_t at_offset;          // and where in a record the matrix is
  int64_t ldx, ldy, w_stride; // w_stride: bytes from expert to expert
  int n, k;
  int group_shift;            // T16: a group is 1 << group_shift values
  int tokens;                 // of one matrix
  int row_tiles, token_tiles;
  int divisor;                // row of x = row of y / divisor
  int panel_bytes, scale_bytes;  // T16
  int panel_rows, pair;       // BF16: row g of panel p is panel_rows * p + g, row g + 8 lies `pair` rows below
  Put put;
};

template <DType Type>
constexpr int kPieces = Type == DType::INT4 ? 1 : Type == DType::INT8 ? 2 : 4;
template <DType Type>
constexpr int kStages = Type == DType::INT4 ? 4 : Type == DType::INT8 ? 3 : 2;
template <DType Type>
constexpr int kFlip = Type == DType::INT4 ? 1 : 4;

template <DType Type, int Panels>
struct Stage {
  static constexpr int kWeights = kTileTokens * kStep * 2;
  static constexpr int kScales = kWeights + kWarps * Panels * kPieces<Type> * kTileBytes;
  static constexpr int kBytes = kScales + (is_t16(Type) ? kWarps * Panels * 64 : 0);
  static constexpr int kAll = kStages<Type> * kBytes + kTileTokens * 4;  // and a row of y for each token, -1: none
};

// Two bytes of w -> two bf16, 128 + byte each (0x43xx): bytes 0 and 1, or 2 and 3. Bytes up to 127; 0x80 gives 256.
template <int Pair>
__device__ __forceinline__ uint32_t widen(uint32_t w) {
  return __byte_perm(w, 0x43434343u, Pair == 0 ? 0x4140 : 0x4342);
}
// Four codes of INT4, each in the low nibble of its byte -> code - 8
template <int Pair>
__device__ __forceinline__ uint32_t int4_values(uint32_t w) {
  return bf162_sub(widen<Pair>(w), 0x43084308u);
}
// Four codes of INT8 -> code - 128: 128 + (code & 127), less 128 where bit 7 is set and 256 where not
template <int Pair>
__device__ __forceinline__ uint32_t int8_values(uint32_t w) {
  return bf162_sub(widen<Pair>(w & 0x7f7f7f7fu), widen<Pair>(~w & 0x80808080u));
}

// A fragments of mma step s of half u. v: the lane's 16 bytes of a tile (BF16: of row g, and v2 of row g + 8).
template <DType Type, int U, int S>
__device__ __forceinline__ void fragment(const uint4& v, const uint4& v2, uint32_t (&a)[4]) {
  if constexpr (Type == DType::INT4) {
    const uint32_t lo = ((S == 0 ? v.x : v.y) >> (4 * U)) & 0x0f0f0f0fu, hi = ((S == 0 ? v.z : v.w) >> (4 * U)) & 0x0f0f0f0fu;
    a[0] = int4_values<0>(lo), a[1] = int4_values<0>(hi), a[2] = int4_values<1>(lo), a[3] = int4_values<1>(hi);
  } else if constexpr (Type == DType::INT8) {
    const uint32_t lo = S == 0 ? v.x : v.y, hi = S == 0 ? v.z : v.w;
    a[0] = int8_values<0>(lo), a[1] = int8_values<0>(hi), a[2] = int8_values<1>(lo), a[3] = int8_values<1>(hi);
  } else {
    bf16_fragment<S>(v, v2, a);
  }
}

// Where the lane finds what it needs; one object per thread and tile.
template <DType Type, int Panels, int Tiles>
struct Source {
  using S = Stage<Type, Panels>;
  const Product& p;
  const uint8_t* w;       // T16: first panel of the warp; BF16: the matrix
  int panel, more;        // first panel of the warp and how many follow it in the matrix; the last one stands in for those beyond
  uint32_t from[Tiles / 2];  // 16-byte pieces of x this thread copies, at k 0; ~0: a token that is not there

  __device__ __forceinline__ Source(const Product& product, const uint8_t* matrix, int row_tile, const int* rows) : p(product), w(matrix) {
    const int last = (p.n + kPanelRows - 1) / kPanelRows - 1;
    panel = (row_tile * kWarps + static_cast<int>(threadIdx.x >> 5)) * Panels;
    const int start = min(panel, last);
    more = last - start;
    if (is_t16(Type)) w += static_cast<int64_t>(start) * p.panel_bytes;
    else more = last;
#pragma unroll
    for (int j = 0; j < Tiles / 2; j++) {
      const int row = rows[(threadIdx.x >> 3) + 16 * j];
      from[j] = row < 0 ? ~0u : static_cast<uint32_t>(row / p.divisor) * static_cast<uint32_t>(p.ldx / 8) + (threadIdx.x & 7);
    }
  }

  __device__ __forceinline__ void copy_tokens(int step, uint8_t* stage) const {
    const int r = static_cast<int>(threadIdx.x >> 3), c = static_cast<int>(threadIdx.x & 7);
    uint8_t* to = stage + r * (2 * kStep) + (c ^ (r & 1) * kFlip<Type>) * 16;
    const bool inside = step * kStep + 8 * c < p.k;
#pragma unroll
    for (int j = 0; j < Tiles / 2; j++) {
      const bool there = inside && from[j] != ~0u;
      copy_async16_or_zero(to + j * 16 * (2 * kStep), p.x + (there ? static_cast<int64_t>(from[j]) * 8 + step * kStep : 0), there);
    }
  }

  __device__ __forceinline__ void copy_weights(int step, uint8_t* stage) const {
    const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x >> 5);
    uint8_t* to = stage + S::kWeights + warp * Panels * kPieces<Type> * kTileBytes + lane * 16;
    if constexpr (is_t16(Type)) {
      const uint8_t* tiles = w + p.scale_bytes + step * (kPieces<Type> * kTileBytes) + lane * 16;
#pragma unroll
      for (int i = 0; i < Panels; i++)
#pragma unroll
        for (int q = 0; q < kPieces<Type>; q++)
          copy_async16(to + (i * kPieces<Type> + q) * kTileBytes, tiles + min(i, more) * p.panel_bytes + q * kTileBytes);
      const int shift = p.group_shift == 5 ? 2 : 1, i = lane >> shift, chunk = lane & ((1 << shift) - 1);
      if (i < Panels)  // the scales of a panel for this step: 2 or 4 chunks of 16 bytes
        copy_async16(stage + S::kScales + (warp * Panels + i) * 64 + chunk * 16,
                     w + min(i, more) * p.panel_bytes + ((step * kStep) >> p.group_shift) * 32 + chunk * 16);
    } else {
#pragma unroll
      for (int i = 0; i < Panels; i++)
#pragma unroll
        for (int q = 0; q < 4; q++) {  // q = 2u + half: half 0 is row g, half 1 row g + 8
          const int row = min(min(panel + i, more) * p.panel_rows + (lane >> 2) + (q & 1) * p.pair, p.n - 1);
          const int k = step * kStep + (q >> 1) * 32 + (lane & 3) * 8;
          copy_async16_or_zero(to + (i * 4 + q) * kTileBytes, k < p.k ? w + (static_cast<int64_t>(row) * p.k + k) * 2 : w, k < p.k);
        }
    }
  }
};

// The tile of the block; Tiles: of 8 tokens.
template <DType Type, bool Split, int Panels, int Tiles>
__device__ __forceinline__ void make_tile(const Product& p, const uint8_t* matrix, int row_tile, uint8_t* shared, const int* rows) {
  using S = Stage<Type, Panels>;
  const int lane = threadIdx.x & 31, warp = static_cast<int>(threadIdx.x >> 5), g = lane >> 2, t = lane & 3;
  const Source<Type, Panels, Tiles> source(p, matrix, row_tile, rows);
  const int steps = (p.k + kStep - 1) / kStep;

  float sum[Panels][Tiles][4];
  float scale[Panels][2];  // of rows g and g + 8: the unit of the sums
#pragma unroll
  for (int i = 0; i < Panels; i++) {
    scale[i][0] = scale[i][1] = 1.f;
#pragma unroll
    for (int n = 0; n < Tiles; n++) sum[i][n][0] = sum[i][n][1] = sum[i][n][2] = sum[i][n][3] = 0.f;
  }

  // The sums in units of the scales at `at`, of panel i and row r at 32 * i + r
  auto enter_group = [&](const uint16_t* at) {
#pragma unroll
    for (int i = 0; i < Panels; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float now = half_bits_to_float(at[32 * i + 8 * r + g]);
        if (now == 0.f) now = 0x1p-60f;
        const float ratio = __fdividef(scale[i][r], now);
        scale[i][r] = now;
#pragma unroll
        for (int n = 0; n < Tiles; n++) sum[i][n][2 * r] *= ratio, sum[i][n][2 * r + 1] *= ratio;
      }
  };

  auto multiply = [&]<int U>(const uint8_t* stage, bool keep) {
    const int chunk = Type == DType::INT4 ? 2 * t + U : 4 * U + t;
    const uint8_t* x = stage + g * (2 * kStep) + (chunk ^ (g & 1) * kFlip<Type>) * 16;
    const uint8_t* w = stage + S::kWeights + warp * Panels * kPieces<Type> * kTileBytes + lane * 16;
    uint4 b[Tiles];
#pragma unroll
    for (int n = 0; n < Tiles; n++) b[n] = *reinterpret_cast<const uint4*>(x + n * 8 * (2 * kStep));
#pragma unroll
    for (int i = 0; i < Panels; i++) {
      constexpr int piece = Type == DType::INT4 ? 0 : Type == DType::INT8 ? U : 2 * U;
      const uint8_t* at = w + (i * kPieces<Type> + piece) * kTileBytes;
      uint4 v = *reinterpret_cast<const uint4*>(at), v2 = v;
      if constexpr (Type == DType::BF16) v2 = *reinterpret_cast<const uint4*>(at + kTileBytes);
      if (Split && !keep) v = make_uint4(0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u);
      uint32_t a[4];
      fragment<Type, U, 0>(v, v2, a);
#pragma unroll
      for (int n = 0; n < Tiles; n++) mma_16816(sum[i][n], a, b[n].x, b[n].y);
      fragment<Type, U, 1>(v, v2, a);
#pragma unroll
      for (int n = 0; n < Tiles; n++) mma_16816(sum[i][n], a, b[n].z, b[n].w);
    }
  };

#pragma unroll
  for (int s = 0; s < kStages<Type> - 1; s++) {
    if (s < steps) source.copy_tokens(s, shared + s * S::kBytes), source.copy_weights(s, shared + s * S::kBytes);
    copy_async_commit();
  }
  int slot = 0, free_slot = kStages<Type> - 1;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<kStages<Type> - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the one before, whose place is filled now
    if (const int next = step + kStages<Type> - 1; next < steps) {
      uint8_t* to = shared + free_slot * S::kBytes;
      source.copy_tokens(next, to), source.copy_weights(next, to);
    }
    copy_async_commit();
    const uint8_t* stage = shared + slot * S::kBytes;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(stage + S::kScales) + warp * Panels * 32;
    if constexpr (Split) {
#pragma unroll 1
      for (int part = 0; part < 2; part++) {  // cells 0 and 1 of a tile are its first group, 2 and 3 its second
        enter_group(scales + 16 * part);
        multiply.template operator()<0>(stage, t >> 1 == part);
        multiply.template operator()<1>(stage, t >> 1 == part);
      }
    } else {
      if (is_t16(Type) && ((step * kStep) & ((1 << p.group_shift) - 1)) == 0) enter_group(scales);
      multiply.template operator()<0>(stage, true);
      if (Type == DType::INT8 && p.group_shift == 5) enter_group(scales + 16);
      multiply.template operator()<1>(stage, true);
    }
    slot = slot + 1 == kStages<Type> ? 0 : slot + 1;
    free_slot = free_slot + 1 == kStages<Type> ? 0 : free_slot + 1;
  }

#pragma unroll
  for (int n = 0; n < Tiles; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int token = rows[8 * n + 2 * t + j];
      if (token < 0) continue;
      float* y = p.y + token * p.ldy;
#pragma unroll
      for (int i = 0; i < Panels; i++) {
        const float lo = sum[i][n][j] * scale[i][0], hi = sum[i][n][2 + j] * scale[i][1];
        const int row = (source.panel + i) * kPanelRows + g;
        if (p.put == Put::SwiGlu) {
          if (row < p.n) y[(source.panel + i) * 8 + g] = silu(lo) * hi;
        } else {
          if (row < p.n) y[row] = p.put == Put::Add ? y[row] + lo : lo;
          if (row + 8 < p.n) y[row + 8] = p.put == Put::Add ? y[row + 8] + hi : hi;
        }
      }
    }
}

template <DType Type, bool Split, int Panels>
__global__ void __launch_bounds__(kThreads, 2) gemm_k(const Product p) {
  let_next_start();
  wait_for_previous();
  extern __shared__ uint4 shared_memory[];
  uint8_t* shared = reinterpret_cast<uint8_t*>(shared_memory);
  int* rows = reinterpret_cast<int*>(shared + kStages<Type> * Stage<Type, Panels>::kBytes);

  const int block = static_cast<int>(blockIdx.x), band = block / (kBand * p.token_tiles), rest = block % (kBand * p.token_tiles);
  const int width = min(kBand, p.row_tiles - band * kBand);
  const int row_tile = band * kBand + rest % width, tile = rest / width;
  GemmItem item = {0, tile * kTileTokens, min(kTileTokens, p.tokens - tile * kTileTokens), 0};
  if (p.items) item = p.items[tile];
  if (item.count <= 0) return;
  if (const int i = static_cast<int>(threadIdx.x); i < kTileTokens)
    rows[i] = i >= item.count ? -1 : p.order ? p.order[item.first + i] : item.first + i;
  __syncthreads();

  const uint8_t* matrix = p.at ? p.at[item.expert] + p.at_offset : p.w + item.expert * p.w_stride;
  if (item.count <= 16) make_tile<Type, Split, Panels, 2>(p, matrix, row_tile, shared, rows);
  else if (item.count <= 32) make_tile<Type, Split, Panels, 4>(p, matrix, row_tile, shared, rows);
  else make_tile<Type, Split, Panels, 8>(p, matrix, row_tile, shared, rows);
}

template <DType Type, bool Split, int Panels>
void launch_panels(const Context& c, const char* what, Product p) {
  p.row_tiles = static_cast<int>((t16_panels(p.n) + kWarps * Panels - 1) / (kWarps * Panels));
  const int64_t blocks = static_cast<int64_t>(p.row_tiles) * p.token_tiles;
  QN_CHECK(blocks < 1 << 30, "%s: %lld tiles", what, static_cast<long long>(blocks));
  launch(c, what, gemm_k<Type, Split, Panels>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), Stage<Type, Panels>::kAll, p);
}

// x: rows of it and their distance; w: one matrix, or that of the first expert
void launch_product(const Context& c, const char* what, const Tensor& w, Product p, int64_t token_tiles) {
  const int64_t n = w.rows(), k = w.cols();
  QN_CHECK(k % 32 == 0 && p.ldx % 8 == 0 && n < 1 << 30 && k < 1 << 24, "%s: (%lld, %lld), rows of x %lld apart", what,
           static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(p.ldx));
  p.w = w.bytes(), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.group_shift = w.group == 32 ? 5 : w.group == 64 ? 6 : 7;
  p.token_tiles = static_cast<int>(token_tiles);
  if (is_t16(w.dtype)) {
    p.panel_bytes = static_cast<int>(t16_panel_bytes(w.dtype, k, w.group));
    p.scale_bytes = static_cast<int>(t16_scale_bytes(k, w.group));
  }
  // Tiles of 64 rows where those of 256 would leave multiprocessors idle. Experts are always many.
  const bool narrow = !p.items && (n + 255) / 256 * token_tiles < 2 * c.sms;
  if (w.dtype == DType::INT4 && w.group == 32) launch_panels<DType::INT4, true, 4>(c, what, p);
  else if (w.dtype == DType::INT4) narrow ? launch_panels<DType::INT4, false, 1>(c, what, p) : launch_panels<DType::INT4, false, 4>(c, what, p);
  else if (w.dtype == DType::INT8) narrow ? launch_panels<DType::INT8, false, 1>(c, what, p) : launch_panels<DType::INT8, false, 4>(c, what, p);
  else if (w.dtype == DType::BF16) launch_panels<DType::BF16, false, 4>(c, what, p);
  else QN_CHECK(false, "%s: weights in %s", what, name(w.dtype));
}

Product grouped(const GroupedGemm& a, const uint16_t* x, float* y) {
  Product p{};
  p.x = x, p.y = y, p.items = a.items, p.order = a.order, p.w_stride = a.experts.layout().stride, p.divisor = 1;
  p.at = a.experts.home ? a.experts.home->at : nullptr;
  return p;
}

}  // namespace

void gemm(const Context& c, const char* what, const uint16_t* x, int64_t ldx, int64_t t, const Tensor& w, float* y, int64_t ldy, bool add) {
  Product p{};
  p.x = x, p.y = y, p.ldx = ldx, p.ldy = ldy, p.tokens = static_cast<int>(t), p.divisor = 1;
  p.panel_rows = kPanelRows, p.pair = 8, p.put = add ? Put::Add : Put::Store;
  launch_product(c, what, w, p, (t + kTileTokens - 1) / kTileTokens);
}

void gemm_gate_up(const Context& c, const GroupedGemm& a, const uint16_t* x, float* inner) {
  Product p = grouped(a, x, inner);
  p.ldx = a.experts.d, p.ldy = a.experts.f, p.divisor = static_cast<int>(a.chosen), p.put = Put::SwiGlu;
  p.panel_rows = 8, p.pair = static_cast<int>(a.experts.f);  // BF16: gate rows, then up rows
  launch_product(c, "moe_gate_up: experts", a.experts.gate_up(0), p, a.max_items);
}

void gemm_down(const Context& c, const GroupedGemm& a, const uint16_t* inner, float* y) {
  Product p = grouped(a, inner, y);
  p.ldx = a.experts.f, p.ldy = a.experts.d, p.panel_rows = kPanelRows, p.pair = 8, p.put = Put::Store;
  p.at_offset = a.experts.layout().down_offset;
  launch_product(c, "moe_down: experts", a.experts.down(0), p, a.max_items);
}

}  // namespace qn::cuda
