// A view of memory on some device; it never owns. Shared with nvcc.
//
// Letters used in shapes everywhere:
//   T tokens of a call   D model width   V vocabulary   C positions of the context
//   H query heads   HK key/value heads   DH width of an attention head   R rotated dims of it
//   GK key heads, GV value heads of the delta rule   DK, DV their widths   CH = 2*GK*DK + GV*DV convolution channels
//   E routed experts   K experts chosen per token   F width of an expert   FS width of the shared expert
#pragma once
#include <cstdint>

#include "ggml-lite/core/blocks.h"
#include "ggml-lite/core/types.h"

namespace qn {

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::F32;
  uint8_t ndim = 0;
  uint16_t group = 0;         // INT8/INT4: values per scale; else 0
  int64_t shape[4] = {};      // outermost first
  int64_t row_stride = 0;     // row-major only: values between successive indices of shape[0] (a column slice has it larger)

  explicit operator bool() const { return data != nullptr; }
  int64_t rows() const { return ndim ? shape[0] : 0; }
  int64_t cols() const { return ndim > 1 ? shape[1] : 1; }
  float* f32(int64_t row = 0) const { return static_cast<float*>(data) + row * row_stride; }
  int32_t* i32(int64_t row = 0) const { return static_cast<int32_t*>(data) + row * row_stride; }
  uint16_t* bf16(int64_t row = 0) const { return static_cast<uint16_t*>(data) + row * row_stride; }
  int8_t* i8(int64_t row = 0) const { return static_cast<int8_t*>(data) + row * row_stride; }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
  // (rows, n) view of columns [begin, begin + n). Panels cannot be cut along K: of T16 it is empty, which every contract refuses.
  Tensor columns(int64_t begin, int64_t n) const {
    if (is_t16(dtype)) return {};
    Tensor t = *this;
    t.data = static_cast<uint8_t*>(data) + begin * item_bytes(dtype);
    t.shape[1] = n;
    return t;
  }
  // (n, cols) view of rows [begin, begin + n). T16: begin must be that of a panel, else the view is empty.
  Tensor slice(int64_t begin, int64_t n) const {
    if (is_t16(dtype) && begin % kPanelRows) return {};
    Tensor t = *this;
    t.data = static_cast<uint8_t*>(data) + (is_t16(dtype) ? begin / kPanelRows * t16_panel_bytes(dtype, shape[1], group)
                                                           : begin * row_stride * item_bytes(dtype));
    t.shape[0] = n;
    return t;
  }
};

// Row-major view (d0, d1, ...) of plain memory.
inline Tensor view(void* data, DType dtype, int64_t d0, int64_t d1 = 0, int64_t d2 = 0, int64_t d3 = 0) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.shape[0] = d0, t.shape[1] = d1, t.shape[2] = d2, t.shape[3] = d3;
  t.ndim = static_cast<uint8_t>(d3 ? 4 : d2 ? 3 : d1 ? 2 : 1);
  t.row_stride = 1;
  for (int i = 1; i < t.ndim; i++) t.row_stride *= t.shape[i];
  return t;
}

// A stored weight matrix (N, K); F32 and BF16 row-major, INT8 and INT4 as T16 panels.
inline Tensor weight(const void* data, DType dtype, int64_t n, int64_t k, int group = 0) {
  Tensor t = view(const_cast<void*>(data), dtype, n, k);
  t.group = static_cast<uint16_t>(group);
  return t;
}

struct ExpertHome;  // core/experts.h

// All routed experts of one layer: E records of expert_layout(dtype, d, f, group).
struct Experts {
  const uint8_t* data = nullptr;
  DType dtype = DType::F32;
  uint16_t group = 0;
  int32_t count = 0;  // E
  int64_t d = 0, f = 0;
  const ExpertHome* home = nullptr;  // not null: they do not all lie in memory of the device; data is memory of the host
  explicit operator bool() const { return data != nullptr; }
  ExpertLayout layout() const { return expert_layout(dtype, d, f, group); }
  Tensor gate_up(int64_t e) const { return weight(data + e * layout().stride, dtype, 2 * f, d, group); }
  Tensor down(int64_t e) const {
    const ExpertLayout l = layout();
    return weight(data + e * l.stride + l.down_offset, dtype, d, f, group);
  }
};

}  // namespace qn
