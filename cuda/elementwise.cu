// Embedding: rows of a table, to fp32. A block per token, 16 bytes of the table per thread and turn.
#include "cuda/common.cuh"

namespace qn::cuda {
namespace {

// ids (T); table (V, D), rows ld_table apart; h (T, D), rows ld apart. An id outside of the table reads its nearest row.
template <bool Bf16>
__global__ void __launch_bounds__(256) embed_k(const int32_t* ids, const void* table, int64_t ld_table, int64_t vocab, float* h, int64_t ld, int64_t d) {
  let_next_start();
  wait_for_previous();
  const int64_t id = min(max(static_cast<int64_t>(ids[blockIdx.x]), int64_t{0}), vocab - 1);
  float* out = h + blockIdx.x * ld;
  if constexpr (Bf16) {
    const uint16_t* row = static_cast<const uint16_t*>(table) + id * ld_table;
    for (int64_t c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
      const uint4 v = *reinterpret_cast<const uint4*>(row + c);
      *reinterpret_cast<float4*>(out + c) = make_float4(bf16_lo(v.x), bf16_hi(v.x), bf16_lo(v.y), bf16_hi(v.y));
      *reinterpret_cast<float4*>(out + c + 4) = make_float4(bf16_lo(v.z), bf16_hi(v.z), bf16_lo(v.w), bf16_hi(v.w));
    }
  } else {
    const float* row = static_cast<const float*>(table) + id * ld_table;
    for (int64_t c = threadIdx.x * 4; c < d; c += blockDim.x * 4)
      *reinterpret_cast<float4*>(out + c) = *reinterpret_cast<const float4*>(row + c);
  }
}

}  // namespace

void embed(const Context& c, const EmbedArgs& a) {
  const int64_t t = a.h.rows();
  if (t == 0) return;
  launch(c, "embed", a.table.dtype == DType::BF16 ? embed_k<true> : embed_k<false>, dim3(static_cast<unsigned>(t)), dim3(256), 0, a.ids.i32(),
         a.table.data, a.table.row_stride, a.table.rows(), a.h.f32(), a.h.row_stride, a.h.cols());
}

}  // namespace qn::cuda
