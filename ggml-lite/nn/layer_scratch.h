// Scratch memory of a decoder layer (a mixer, then experts), shared by all layers of a device: each is done before the next begins.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "ggml-lite/core/device.h"
#include "ggml-lite/nn/gated_attention.h"
#include "ggml-lite/nn/gated_delta_net.h"
#include "ggml-lite/nn/sparse_moe.h"

namespace qn {

// What the layers of one model have in common
struct LayerDims {
  int width = 0, vocab = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int key_heads = 0, value_heads = 0, key_dim = 0, value_dim = 0;
  int experts = 0, chosen = 0, expert_width = 0, shared_width = 0;

  int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int qkvz_rows() const { return channels() + value_heads * value_dim; }
  int qgkv_rows() const { return 2 * (heads + kv_heads) * head_dim; }
  OpLimits limits(int tokens, int context, DType kv_type) const;
};

// A piece of device memory that is handed out in tensors.
class ScratchMemory {
 public:
  ScratchMemory(Device& device, uint64_t floats) : memory_(device.alloc(floats * sizeof(float) + kSlack, "scratch")) {}
  Tensor take(int64_t rows, int64_t cols = 0, DType type = DType::F32);

 private:
  static constexpr size_t kSlack = 64 * 32;  // of tensors that begin at multiples of 64 bytes
  Buffer memory_;
  size_t used_ = 0;
};

struct LayerScratch {
  static uint64_t floats(const LayerDims& dims, int64_t tokens);
  LayerScratch() = default;
  LayerScratch(const LayerDims& dims, int64_t tokens, ScratchMemory& memory);

  DeltaNetScratch delta;
  AttentionScratch attn;
  MoeScratch moe;
};

// A copy of values on the device; `what` names them when there is no room
template <class T>
Buffer upload_new(Device& device, std::span<const T> values, const char* what) {
  Buffer b = device.alloc(values.size_bytes(), what);
  device.upload(b.data(), values.data(), values.size_bytes());
  return b;
}
// Values of a tensor of F32 or I32, as numbers
std::vector<float> download_floats(Device& device, const Tensor& t);
// row(i, W act(x_i)) for every row of x, as many at a time as `scratch` (R, N) has rows
void each_product(Device& device, const Tensor& x, const Tensor& w, Act act, const Tensor& scratch, const std::function<void(int64_t, std::span<const float>)>& row);

}  // namespace qn
