// Matrix products of many rows (prefill): y (T, N) = W x, in two steps.
//
//   1. prepare_k: x (T, K), what an operation puts in front of its weights (norms, gates), rounded as Act says; one block per row
//   2. the product
//
//        weights             Act::BF16                     Act::F32, Act::INT8
//        BF16                cuBLAS, bf16 tensor cores     decode to fp32, cuBLAS in fp32
//        INT8, INT4          gemm.cu                       decode to fp32, cuBLAS in fp32
//        F32                 cuBLAS in fp32                cuBLAS in fp32
//
//      Weights that see unrounded activations (router, [b|a]) always take the fp32 way: x is not rounded, a BF16 weight is exact
//      in fp32.
//
// cuBLAS is column-major: y (T, N) row-major is its C (N, T), W (N, K) is A (K, N) transposed, x (T, K) is B (K, T).
#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/unpack.cuh"

namespace qn::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kDecoded = 16 << 20;  // floats of decoded weights at a time: 64 MiB

__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
// To L2, where the next kernel finds it. A plain assignment may be taken apart into four stores.
__device__ __forceinline__ void store4(float* p, float4 v) { __stcg(reinterpret_cast<float4*>(p), v); }
__device__ __forceinline__ float squares(float4 v) { return (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w); }
__device__ __forceinline__ float4 times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 times(float4 a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }

// ---- step 1: the rows that enter a product --------------------------------------------------------------------------------
// A source describes one kind of row: begin() is called by the whole block and prepares row t, at() gives columns c .. c+3 of it.
// `shared` has max(64, heads) floats.

// 1 / sqrt(mean of squares + eps) of x (d), in every thread. shared: a float per warp, not in use.
__device__ __forceinline__ float rms_factor(const float* x, int64_t d, float eps, float* shared) {
  float sum = 0;
  for (int64_t c = threadIdx.x * 4; c < d; c += kThreads * 4) sum += squares(load4(x + c));
  return 1.f / sqrtf(block_sum(sum, shared) / static_cast<float>(d) + eps);
}

struct PlainRow {
  const float* x;  // (T, K)
  int64_t ld;
  __device__ void begin(int64_t t, int64_t, float*) { x += t * ld; }
  __device__ float4 at(int64_t c) const { return load4(x + c); }
};

struct NormRow {
  const float *x, *w;  // (T, K), (K)
  int64_t ld;
  float eps, r;
  __device__ void begin(int64_t t, int64_t k, float* shared) {
    x += t * ld;
    r = rms_factor(x, k, eps, shared);
  }
  __device__ float4 at(int64_t c) const { return times(times(load4(x + c), r), load4(w + c)); }
};

struct ConcatRow {
  const float *a, *b, *w_a, *w_b;  // (T, D) twice, (D) twice
  int64_t ld_a, ld_b, d;
  float eps, r_a, r_b;
  __device__ void begin(int64_t t, int64_t, float* shared) {
    a += t * ld_a, b += t * ld_b;
    r_a = rms_factor(a, d, eps, shared), r_b = rms_factor(b, d, eps, shared + 32);
  }
  __device__ float4 at(int64_t c) const {
    return c < d ? times(times(load4(a + c), r_a), load4(w_a + c)) : times(times(load4(b + c - d), r_b), load4(w_b + c - d));
  }
};

struct GatedNormRow {
  const float *o, *z, *w;  // (T, K) twice, (DV)
  int64_t ld_o, ld_z;
  int dv;
  float eps;
  const float* factors;  // one per head
  __device__ void begin(int64_t t, int64_t k, float* shared) {
    o += t * ld_o, z += t * ld_z;
    const int lane = threadIdx.x & 31, heads = static_cast<int>(k / dv);
    for (int head = threadIdx.x >> 5; head < heads; head += kWarps) {
      float sum = 0;
      for (int c = lane * 4; c < dv; c += 128) sum += squares(load4(o + static_cast<int64_t>(head) * dv + c));
      sum = warp_sum(sum);
      if (lane == 0) shared[head] = 1.f / sqrtf(sum / static_cast<float>(dv) + eps);
    }
    factors = shared;
    __syncthreads();
  }
  __device__ float4 at(int64_t c) const {
    const int head = static_cast<int>(c) / dv, i = static_cast<int>(c) - head * dv;
    const float4 g = load4(z + c);
    return times(times(times(load4(o + c), factors[head]), load4(w + i)), make_float4(silu(g.x), silu(g.y), silu(g.z), silu(g.w)));
  }
};

struct GateRow {
  const float *o, *gate;  // (T, K) twice
  int64_t ld_o, ld_gate;
  __device__ void begin(int64_t t, int64_t, float*) { o += t * ld_o, gate += t * ld_gate; }
  __device__ float4 at(int64_t c) const {
    const float4 g = load4(gate + c);
    return times(load4(o + c), make_float4(sigmoid(g.x), sigmoid(g.y), sigmoid(g.z), sigmoid(g.w)));
  }
};

// Where prepared rows go, each (T, K) or null: exact as they are, bf16 rounded to BF16, f32 rounded as `act` says.
struct Prepared {
  Act act;
  float* exact;
  uint16_t* bf16;
  float* f32;
};

// A warp holds one group of 128 values, 4 per lane (0 behind the end of a shorter last group). The bits of |x| order as the
// values do, with NaN above all: a NaN in the group becomes the scale, and so the result.
__device__ __forceinline__ float4 round_int8(float4 v) {
  const uint32_t most = max(max(__float_as_uint(v.x) & 0x7fffffffu, __float_as_uint(v.y) & 0x7fffffffu),
                            max(__float_as_uint(v.z) & 0x7fffffffu, __float_as_uint(v.w) & 0x7fffffffu));
  const float scale = __fdiv_rn(__uint_as_float(__reduce_max_sync(0xffffffffu, most)), 127.f);
  const bool plain = scale > 0 && scale < INFINITY;
  auto value = [&](float x) { return (plain ? fminf(fmaxf(rintf(__fdiv_rn(x, scale)), -127.f), 127.f) : 0.f) * scale; };
  return make_float4(value(v.x), value(v.y), value(v.z), value(v.w));
}

template <class Source>
__global__ void __launch_bounds__(kThreads) prepare_k(Source source, int64_t k, Prepared out) {
  extern __shared__ float shared[];
  let_next_start();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  source.begin(row, k, shared);
  const int lane = threadIdx.x & 31;
  for (int64_t group = (threadIdx.x >> 5) * 128; group < k; group += kWarps * 128) {
    const int64_t c = group + lane * 4, at = row * k + c;
    const bool inside = c < k;
    float4 v = inside ? source.at(c) : float4{};
    if (inside && out.exact) store4(out.exact + at, v);
    if (inside && out.bf16) __stcg(reinterpret_cast<uint2*>(out.bf16 + at), make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)));
    if (!out.f32) continue;
    if (out.act == Act::INT8) v = round_int8(v);
    if (out.act == Act::BF16) v = make_float4(round_bf16(v.x), round_bf16(v.y), round_bf16(v.z), round_bf16(v.w));
    if (inside) store4(out.f32 + at, v);
  }
}

bool aligned16(const float* p, int64_t ld) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && ld % 4 == 0; }

template <class Source>
void prepare(const Context& c, const char* what, const Source& source, int64_t t, int64_t k, const Prepared& out, int64_t heads = 0) {
  launch(c, what, prepare_k<Source>, dim3(static_cast<unsigned>(t)), dim3(kThreads), sizeof(float) * static_cast<size_t>(std::max<int64_t>(heads, 64)),
         source, k, out);
}

// ---- step 2: the product --------------------------------------------------------------------------------------------------

// out (rows, K) fp32 = rows `first` .. of a BF16, INT8 or INT4 matrix. A thread decodes 8 neighbours of a row, which lie together in
// every format.
__global__ void __launch_bounds__(256) decode_rows_k(Tensor w, int64_t first, int64_t rows, float* out) {
  let_next_start();
  wait_for_previous();
  const int64_t k = w.shape[1], i = (blockIdx.x * int64_t{256} + threadIdx.x) * 8;
  if (i >= rows * k) return;
  const int64_t n = first + i / k, c = i % k;
  float v[8];
  if (w.dtype == DType::BF16) {
    const uint4 b = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(w.data) + n * w.row_stride + c);
    const uint32_t pairs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 4; j++) v[2 * j] = bf16_lo(pairs[j]), v[2 * j + 1] = bf16_hi(pairs[j]);
  } else {
    const bool int4 = w.dtype == DType::INT4;
    const uint8_t* panel = static_cast<const uint8_t*>(w.data) + n / kPanelRows * t16_panel_bytes(w.dtype, k, w.group);
    const int r = static_cast<int>(n % kPanelRows), step = tile_k(w.dtype), in_tile = static_cast<int>(c % step);
    const uint8_t* tile = panel + t16_scale_bytes(k, w.group) + c / step * kTileBytes;
    const uint2 b = *reinterpret_cast<const uint2*>(tile + (int4 ? int4_byte(r, in_tile) : int8_byte(r, in_tile)));
    const float scale = half_bits_to_float(reinterpret_cast<const uint16_t*>(panel)[c / w.group * kPanelRows + r]);
    const int shift = int4 ? int4_shift(in_tile) : 0, mask = int4 ? 15 : 255, zero = code_zero(w.dtype);
#pragma unroll
    for (int j = 0; j < 8; j++)
      v[j] = static_cast<float>((static_cast<int>((j < 4 ? b.x : b.y) >> (8 * (j & 3) + shift)) & mask) - zero) * scale;
  }
  store4(out + i, make_float4(v[0], v[1], v[2], v[3]));
  store4(out + i + 4, make_float4(v[4], v[5], v[6], v[7]));
}

void sgemm(const Context& c, const char* what, const float* x, int64_t ldx, int64_t t, const float* w, int64_t ldw, int64_t n, int64_t k, float* y,
           int64_t ldy, bool add) {
  const float one = 1, beta = add ? 1.f : 0.f;
  check_blas(cublasSgemm(c.blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(n), static_cast<int>(t), static_cast<int>(k), &one, w, static_cast<int>(ldw), x,
                         static_cast<int>(ldx), &beta, y, static_cast<int>(ldy)),
             what, "cublasSgemm");
}

// y = or += W x in fp32, for any format of W
void product_f32(const Context& c, Scratch s, const char* what, const float* x, int64_t ldx, int64_t t, const Tensor& w, float* y, int64_t ldy, bool add) {
  const int64_t n = w.rows(), k = w.cols();
  if (w.dtype == DType::F32) return sgemm(c, what, x, ldx, t, w.f32(), w.row_stride, n, k, y, ldy, add);
  const int64_t most = std::min(n, std::max<int64_t>(kDecoded / k, 1));
  float* rows = s.take<float>(most * k);
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    launch(c, what, decode_rows_k, dim3(static_cast<unsigned>((count * k / 8 + 255) / 256)), dim3(256), 0, w, first, count, rows);
    sgemm(c, what, x, ldx, t, rows, k, count, k, y + first, ldy, add);
  }
}

// y = or += W x with x (T, K) in BF16, sums in fp32
void product_bf16(const Context& c, const char* what, const uint16_t* x, int64_t t, const Tensor& w, float* y, int64_t ldy, bool add) {
  const int64_t n = w.rows(), k = w.cols();
  if (w.dtype != DType::BF16) return gemm(c, what, x, k, t, w, y, ldy, add);
  const float one = 1, beta = add ? 1.f : 0.f;
  // The handle is pedantic for the sake of fp32 products; here tensor cores are wanted, with sums that stay fp32.
  check_blas(cublasSetMathMode(c.blas, static_cast<cublasMath_t>(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)), what,
             "cublasSetMathMode");
  const cublasStatus_t status =
      cublasGemmEx(c.blas, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(n), static_cast<int>(t), static_cast<int>(k), &one, w.data, CUDA_R_16BF,
                   static_cast<int>(w.row_stride), x, CUDA_R_16BF, static_cast<int>(k), &beta, y, CUDA_R_32F, static_cast<int>(ldy), CUBLAS_COMPUTE_32F,
                   CUBLAS_GEMM_DEFAULT);
  check_blas(cublasSetMathMode(c.blas, CUBLAS_PEDANTIC_MATH), what, "cublasSetMathMode");
  check_blas(status, what, "cublasGemmEx");
}

// ---- both -----------------------------------------------------------------------------------------------------------------

bool on_tensor_cores(Act act, const Tensor& w) { return act == Act::BF16 && w.dtype != DType::F32; }

// Room for the rows that enter w. Act::F32 rounds nothing: its rows are `exact`, for which there is room then too.
Prepared room(Scratch& s, Act act, const Tensor& w, int64_t t, int64_t k) {
  Prepared p{act, nullptr, nullptr, nullptr};
  if (on_tensor_cores(act, w)) p.bf16 = s.take<uint16_t>(t * k);
  else if (act == Act::F32) p.exact = s.take<float>(t * k);
  else p.f32 = s.take<float>(t * k);
  return p;
}

void product(const Context& c, const Scratch& s, const char* what, const Prepared& x, int64_t t, const Tensor& w, float* y, int64_t ldy, bool add) {
  if (x.bf16) product_bf16(c, what, x.bf16, t, w, y, ldy, add);
  else product_f32(c, s, what, x.f32 ? x.f32 : x.exact, w.cols(), t, w, y, ldy, add);
}

// shared[t] = silu(gate) * up of y[t] (2*FS): gate then up, or interleaved by 8; scale[t] = sigmoid(x[t] . w).   x (T, D), w (D)
__global__ void __launch_bounds__(kThreads) shared_expert_k(const float* y, int64_t fs, bool interleaved, float* shared_out, int64_t ld, const float* x,
                                                            const void* w, bool w_bf16, int64_t d, float* scale) {
  __shared__ float sums[kWarps];
  let_next_start();
  wait_for_previous();
  const int64_t t = blockIdx.x;
  y += t * 2 * fs, x += t * d;
  for (int64_t i = threadIdx.x; i < fs; i += kThreads) {
    const float gate = y[interleaved ? interleave_row(i, fs) : i], up = y[interleaved ? interleave_row(fs + i, fs) : fs + i];
    shared_out[t * ld + i] = silu(gate) * up;
  }
  float sum = 0;
  for (int64_t i = threadIdx.x * 4; i < d; i += kThreads * 4) {
    const float4 v = load4(x + i);
    float4 m;
    if (w_bf16) {
      const uint2 b = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(w) + i);
      m = make_float4(bf16_lo(b.x), bf16_hi(b.x), bf16_lo(b.y), bf16_hi(b.y));
    } else {
      m = load4(static_cast<const float*>(w) + i);
    }
    sum += (v.x * m.x + v.y * m.y) + (v.z * m.z + v.w * m.w);
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) scale[t] = sigmoid(sum);
}

}  // namespace

void matmul_norm(const Context& c, const NormMatmulArgs& a) {
  const char* op = "norm_matmul";
  const int64_t t = a.h.rows(), k = a.h.cols();
  QN_CHECK(aligned16(a.h.f32(), a.h.row_stride), "%s: h: rows must begin at multiples of 16 bytes", op);
  Scratch s(c);
  const bool f32 = a.w && a.act == Act::F32;  // then w, like w_exact, sees what is not rounded
  Prepared x{a.act, nullptr, nullptr, nullptr};
  if (a.w && !f32) x = room(s, a.act, a.w, t, k);
  if (a.normed) x.exact = a.normed.f32();
  else if (a.norm && (a.w_exact || f32)) x.exact = s.take<float>(t * k);
  if (x.exact || x.bf16 || x.f32) {
    if (a.norm) prepare(c, op, NormRow{a.h.f32(), a.norm.f32(), a.h.row_stride, a.eps, 0}, t, k, x);
    else prepare(c, op, PlainRow{a.h.f32(), a.h.row_stride}, t, k, x);
  }
  const float* exact = x.exact ? x.exact : a.h.f32();
  const int64_t ld_exact = x.exact ? k : a.h.row_stride;
  if (f32) product_f32(c, s, op, exact, ld_exact, t, a.w, a.y.f32(), a.y.row_stride, false);
  else if (a.w) product(c, s, op, x, t, a.w, a.y.f32(), a.y.row_stride, false);
  if (a.w_exact) product_f32(c, s, op, exact, ld_exact, t, a.w_exact, a.y_exact.f32(), a.y_exact.row_stride, false);
}

void matmul_gated_norm(const Context& c, const GatedNormMatmulArgs& a) {
  const char* op = "gated_norm_matmul";
  const int64_t t = a.o.rows(), k = a.o.cols(), dv = a.norm.rows();
  QN_CHECK(aligned16(a.z.f32(), a.z.row_stride) && dv % 4 == 0, "%s: rows of z must begin at multiples of 16 bytes, heads of %lld be multiples of 4", op,
           static_cast<long long>(dv));
  Scratch s(c);
  const Prepared x = room(s, a.act, a.w, t, k);
  prepare(c, op, GatedNormRow{a.o.f32(), a.z.f32(), a.norm.f32(), a.o.row_stride, a.z.row_stride, static_cast<int>(dv), a.eps, nullptr}, t, k, x, k / dv);
  product(c, s, op, x, t, a.w, a.h.f32(), a.h.row_stride, true);
}

void matmul_gate(const Context& c, const GateMatmulArgs& a) {
  const char* op = "gate_matmul";
  const int64_t t = a.o.rows(), k = a.o.cols();
  QN_CHECK(aligned16(a.gate.f32(), a.gate.row_stride), "%s: gate: rows must begin at multiples of 16 bytes", op);
  Scratch s(c);
  const Prepared x = room(s, a.act, a.w, t, k);
  prepare(c, op, GateRow{a.o.f32(), a.gate.f32(), a.o.row_stride, a.gate.row_stride}, t, k, x);
  product(c, s, op, x, t, a.w, a.h.f32(), a.h.row_stride, true);
}

void matmul_concat(const Context& c, const ConcatMatmulArgs& a) {
  const char* op = "concat_matmul";
  const int64_t t = a.a.rows(), d = a.a.cols();
  Scratch s(c);
  const Prepared x = room(s, a.act, a.w, t, 2 * d);
  prepare(c, op, ConcatRow{a.a.f32(), a.b.f32(), a.norm_a.f32(), a.norm_b.f32(), a.a.row_stride, a.b.row_stride, d, a.eps, 0, 0}, t, 2 * d, x);
  product(c, s, op, x, t, a.w, a.y.f32(), a.y.row_stride, false);
}

void matmul_router(const Context& c, const MoeRouterArgs& a) {
  const char* op = "moe_router";
  const int64_t t = a.h.rows(), d = a.h.cols(), fs = a.shared.cols();
  Scratch s(c);
  Prepared x{a.shared_act, nullptr, nullptr, nullptr};
  if (a.shared_act != Act::F32) x = room(s, a.shared_act, a.shared_gate_up, t, d);
  x.exact = a.x.f32();
  float* y = s.take<float>(t * 2 * fs);
  prepare(c, op, NormRow{a.h.f32(), a.norm.f32(), a.h.row_stride, a.eps, 0}, t, d, x);
  product_f32(c, s, op, x.exact, d, t, a.router, a.logits.f32(), a.logits.row_stride, false);
  product(c, s, op, x, t, a.shared_gate_up, y, 2 * fs, false);
  launch(c, op, shared_expert_k, dim3(static_cast<unsigned>(t)), dim3(kThreads), 0, y, fs, is_t16(a.shared_gate_up.dtype), a.shared.f32(), a.shared.row_stride,
         x.exact, a.shared_gate.data, a.shared_gate.dtype == DType::BF16, d, a.shared_scale.f32());
}

void matmul(const Context& c, Scratch s, const char* what, const float* x, int64_t ldx, int64_t t, Act act, const Tensor& w, float* y, int64_t ldy, bool add) {
  if (act == Act::F32) return product_f32(c, s, what, x, ldx, t, w, y, ldy, add);
  QN_CHECK(aligned16(x, ldx), "%s: x: rows must begin at multiples of 16 bytes", what);
  const Prepared p = room(s, act, w, t, w.cols());
  prepare(c, what, PlainRow{x, ldx}, t, w.cols(), p);
  product(c, s, what, p, t, w, y, ldy, add);
}

size_t matmul_scratch(const OpLimits& l) {
  Scratch s;
  s.take<float>(l.tokens * l.width);  // rounded rows
  s.take<float>(l.tokens * l.width);  // exact rows, or the shared expert's gate and up
  s.take<float>(kDecoded);            // at least one row: K is far below this
  return s.used();
}

}  // namespace qn::cuda
