// Stored weights of any format -> fp32, eight at a time: for the exact kernels.
#pragma once
#include "cuda/unpack.cuh"
#include "ggml-lite/core/tensor.h"

namespace qn::cuda {

struct Stored {
  const uint8_t* w;
  DType dtype;
  int group, k;
  int64_t stride;  // values of a row; of T16 bytes of a panel
};
inline Stored stored(const Tensor& w) {
  return {w.bytes(), w.dtype, w.group, static_cast<int>(w.cols()), is_t16(w.dtype) ? t16_panel_bytes(w.dtype, w.cols(), w.group) : w.row_stride};
}

// Weights k .. k+7 of a row, k a multiple of 8. In a T16 tile they are 8 neighbouring bytes, or the low or high nibbles of 8.
__device__ __forceinline__ void decode8(const Stored& s, int64_t row, int k, float (&w)[8]) {
  if (s.dtype == DType::F32) {
    const float* p = reinterpret_cast<const float*>(s.w) + row * s.stride + k;
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = p[i];
  } else if (s.dtype == DType::BF16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(s.w) + row * s.stride + k;
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = bf16_to_float(p[i]);
  } else {
    const uint8_t* panel = s.w + row / kPanelRows * s.stride;
    const int line = static_cast<int>(row % kPanelRows), tile = tile_k(s.dtype), at = k % tile, zero = code_zero(s.dtype);
    const float scale = half_bits_to_float(reinterpret_cast<const uint16_t*>(panel)[k / s.group * kPanelRows + line]);
    const uint8_t* p = panel + t16_scale_bytes(s.k, s.group) + k / tile * kTileBytes;
    const bool int4 = s.dtype == DType::INT4;
    p += int4 ? int4_byte(line, at) : int8_byte(line, at);
    const int shift = int4 ? int4_shift(at) : 0, mask = int4 ? 15 : 255;
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = static_cast<float>((p[i] >> shift & mask) - zero) * scale;
  }
}

}  // namespace qn::cuda
