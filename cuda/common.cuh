// What every kernel file uses: launching with checked errors, programmatic dependent launch, loads, reductions, the tensor-core
// instruction.
//
// Programmatic dependent launch (sm_90 and later). Consecutive kernels of a stream overlap: a kernel may start when every block
// of the one before has called let_next_start(), and must call wait_for_previous() before it touches anything that is not a
// weight. After that wait the kernel before is complete and its writes are visible; as that one waited too, so is everything
// earlier. Hence two rules: EVERY kernel of this folder calls wait_for_previous() in every thread, also where it has little to
// read, and before it only weights may be loaded, and nothing stored (but see load_past_l1()); prefetch_l2() reads no value and is
// allowed. let_next_start() comes as soon as a kernel's own loads from DRAM are on their way, also before its wait: earlier, and what
// the next one prefetches delays them (measured: 3 % of a token). Where the architecture lacks it both are nothing, and kernels start
// when the one before has ended.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "cuda/kernels.h"
#include "ggml-lite/base/check.h"

namespace qn::cuda {

// Throws "<device>: <what>: <name of the error> (<its text>)": Error where memory is short, else DeviceLost.
[[noreturn]] inline void fail_with(cudaError_t e, const std::string& device, const char* what) {
  const std::string message = format("%s: %s: %s (%s)", device.c_str(), what, cudaGetErrorName(e), cudaGetErrorString(e));
  if (e == cudaErrorMemoryAllocation) throw Error(message);
  throw DeviceLost(message);
}
inline void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  int device = -1;
  cudaGetDevice(&device);
  fail_with(e, "cuda:" + std::to_string(device), what);
}

// Of cuBLAS, the same: "<device>: <what>: <its function>: ..."
inline void check_blas(cublasStatus_t s, const char* what, const char* call) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  int device = -1;
  cudaGetDevice(&device);
  const std::string message = format("cuda:%d: %s: %s: %s", device, what, call, cublasGetStatusString(s));
  if (s == CUBLAS_STATUS_ALLOC_FAILED) throw Error(message);
  throw DeviceLost(message);
}

// Launches `kernel` on the context's stream, after the kernels before it (overlapping where the context says so).
template <class... Params, class... Args>
void launch(const Context& c, const char* what, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args&&... args) {
  // Blocks of two kernels can share a multiprocessor only where both want its memory divided the same way.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), what);
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), what);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = c.stream;
  config.attrs = &overlap, config.numAttrs = c.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...), what);
}

__device__ __forceinline__ void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- loads ------------------------------------------------------------------------------------------------------------

// From the L2 cache: for what a kernel has written and may be loaded before wait_for_previous() all the same, because that kernel is known to
// be over (the logits in moe_down.cu), or because an old value does no harm (what gdn.cu prefetches by).
template <class T>
__device__ __forceinline__ T load_past_l1(const T* p) { return __ldcg(p); }

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {  // 16 bytes, both aligned to 16
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
// The same, or 16 zero bytes; `global` need not be readable then.
__device__ __forceinline__ void copy_async16_or_zero(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global), "r"(there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Reads no value. Of what will be read after wait_for_previous() it also finds out where that is in memory, for a multiprocessor that has not
// been there for a while.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- copies that arrive at a barrier ------------------------------------------------------------------------------------
//
// A warp fills a buffer in shared memory with fill(), others wait for it with wait_barrier().
//
// From sm_90 on a lane copies any multiple of 16 bytes with one instruction, past the registers and the units that other loads and
// stores go through: a kernel that fetches weights does not hold up what else runs on its multiprocessor. Before, lanes copy 16 bytes each.
using Barrier = uint64_t;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kFillArrivals = 32;
#else
constexpr uint32_t kFillArrivals = 1;
#endif
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void init_barrier(Barrier* b, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// By the thread that has initialised barriers or zeroed buffers, before others copy
__device__ __forceinline__ void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void arrive(Barrier* b) {
  asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.shared.b64 t, [%0];\n}" ::"r"(shared_address(b)) : "memory");
}
// The same, and later phases want one arrival fewer
__device__ __forceinline__ void arrive_and_drop(Barrier* b) {
  asm volatile("{\n.reg .b64 t;\nmbarrier.arrive_drop.shared.b64 t, [%0];\n}" ::"r"(shared_address(b)) : "memory");
}
// By a whole warp: until the phase of this parity has ended; the phase before the first counts as one of parity 1.
__device__ __forceinline__ void wait_barrier(const Barrier* b, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#else
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
#endif
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  __syncwarp();  // lanes leave one by one
}
struct Piece {  // both ends aligned to 16, bytes a multiple of 16
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes;
};
// mine: the lane's piece, of the first n lanes, at most 32; all: bytes of all of them. By a whole warp.
__device__ __forceinline__ void fill(Barrier* full, int n, const Piece& mine, uint32_t all) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  (void)n;
  if (lane == 0)
    asm volatile("{\n.reg .b64 t;\nmbarrier.arrive.expect_tx.shared.b64 t, [%0], %1;\n}" ::"r"(shared_address(full)), "r"(all) : "memory");
  __syncwarp();
  if (lane < n && mine.bytes)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(mine.to)), "l"(mine.from),
                 "r"(mine.bytes), "r"(shared_address(full))
                 : "memory");
#else
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const auto to = reinterpret_cast<uint8_t*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine.to), i));
    const auto from = reinterpret_cast<const uint8_t*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(mine.from), i));
    const uint32_t bytes = __shfl_sync(0xffffffffu, mine.bytes, i);
#pragma unroll 4
    for (uint32_t at = lane * 16; at < bytes; at += 512) copy_async16(to + at, from + at);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(full)) : "memory");
#endif
}
// piece(i): the i-th
template <class F>
__device__ __forceinline__ void fill(Barrier* full, int n, F piece) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Piece mine = lane < n ? piece(lane) : Piece{nullptr, nullptr, 0};
  fill(full, n, mine, __reduce_add_sync(0xffffffffu, mine.bytes));
}

// ---- numbers ----------------------------------------------------------------------------------------------------------

// With the hardware's exponential and reciprocal, tiny numbers as zero: within 1e-6 of the exact value, in 4 instructions. They gate thousands
// of values in the prologue of kernels that take microseconds.
__device__ __forceinline__ float sigmoid(float x) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {  // round to nearest even; lo in the low half
  const __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&p);
}
__device__ __forceinline__ uint32_t pack_half(float lo, float hi) {
  const __half2 p = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&p);
}
__device__ __forceinline__ float bf16_lo(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_hi(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
// x = hi + lo, both BF16, to 16 bits of mantissa; two values packed
__device__ __forceinline__ void split_bf16(float x0, float x1, uint32_t& hi, uint32_t& lo) {
  hi = pack_bf16(x0, x1);
  lo = pack_bf16(x0 - bf16_lo(hi), x1 - bf16_hi(hi));
}

__device__ __forceinline__ float warp_sum(float v) {  // in every lane, the same bits
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}
// Sum over the block in every thread, in a fixed order. `shared` has room for a float per warp; it may be used again after
// the next __syncthreads().
__device__ __forceinline__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  const int warps = static_cast<int>(blockDim.x + 31) / 32;
  return warp_sum(static_cast<int>(threadIdx.x & 31) < warps ? shared[threadIdx.x & 31] : 0.f);
}

// ---- tensor cores -----------------------------------------------------------------------------------------------------

// D (16 x 8, fp32) += A (16 x 16, bf16) B (16 x 8, bf16).  Lane 4g + t (g 0..7, t 0..3) holds, with pairs packed low half first:
//   a[0] A[g][2t,2t+1]   a[1] A[g+8][2t,2t+1]   a[2] A[g][2t+8,2t+9]   a[3] A[g+8][2t+8,2t+9]
//   b[0] B[2t,2t+1][g]   b[1] B[2t+8,2t+9][g]
//   d[0] D[g][2t]  d[1] D[g][2t+1]  d[2] D[g+8][2t]  d[3] D[g+8][2t+1]
// Any permutation of k applied to A and B alike leaves D as it is: cuda/unpack.cuh uses that.
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of fp16 numbers
__device__ __forceinline__ void mma_16816_half(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16-bit values from shared memory; lanes 8i..8i+7 give the addresses of the rows (16 bytes) of matrix i,
// and lane l receives from each matrix the pair at row l/4, columns 2(l%4) and 2(l%4)+1.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}
__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

}  // namespace qn::cuda
