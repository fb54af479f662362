#include "ggml-lite/nn/layer_scratch.h"

#include <algorithm>
#include <bit>

#include "ggml-lite/base/check.h"

namespace qn {

OpLimits LayerDims::limits(int tokens, int context, DType kv_type) const {
  OpLimits l;
  l.tokens = tokens;
  l.width = std::max<int64_t>({qkvz_rows(), qgkv_rows(), 2 * width, heads * head_dim, value_heads * value_dim, 2 * shared_width, 2 * expert_width});
  l.vocab = vocab;
  l.experts = experts, l.chosen = chosen, l.expert_width = expert_width, l.model_width = width;
  l.heads = heads, l.context = context, l.kv_codes = kv_type == DType::I8 ? kv_heads * head_dim : 0;
  l.value_heads = value_heads, l.key_heads = key_heads, l.key_dim = key_dim, l.value_dim = value_dim;
  return l;
}

Tensor ScratchMemory::take(int64_t rows, int64_t cols, DType type) {
  const Tensor t = view(static_cast<uint8_t*>(memory_.data()) + used_, type, rows, cols);
  used_ += static_cast<size_t>(round_up(rows * std::max<int64_t>(cols, 1) * 4, 64));
  QN_CHECK(used_ <= memory_.bytes(), "scratch: planned %zu bytes, need %zu", memory_.bytes(), used_);
  return t;
}

// A layer is of one kind: what its two mixers need may lie in the same place.
static int64_t projected_width(const LayerDims& d) { return std::max(d.qkvz_rows(), d.qgkv_rows()); }
static int64_t mixed_width(const LayerDims& d) { return std::max(d.heads * d.head_dim, d.value_heads * d.value_dim); }

uint64_t LayerScratch::floats(const LayerDims& d, int64_t tokens) {
  return static_cast<uint64_t>(tokens * (projected_width(d) + mixed_width(d) + 2 * d.value_heads + d.width + d.experts + d.shared_width + 1 + 2 * d.chosen +
                                         static_cast<int64_t>(d.chosen) * d.expert_width));
}

LayerScratch::LayerScratch(const LayerDims& d, int64_t t, ScratchMemory& memory) {
  const Tensor projected = memory.take(t, projected_width(d)), mixed = memory.take(t, mixed_width(d));
  delta.qkvz = view(projected.data, DType::F32, t, d.qkvz_rows());
  delta.o = view(mixed.data, DType::F32, t, d.value_heads * d.value_dim);
  delta.ba = memory.take(t, 2 * d.value_heads);
  attn.qgkv = view(projected.data, DType::F32, t, d.qgkv_rows());
  attn.o = view(mixed.data, DType::F32, t, d.heads * d.head_dim);
  moe.x = memory.take(t, d.width), moe.logits = memory.take(t, d.experts);
  moe.shared = memory.take(t, d.shared_width), moe.shared_scale = memory.take(t);
  moe.ids = memory.take(t, d.chosen, DType::I32), moe.weights = memory.take(t, d.chosen), moe.inner = memory.take(t * d.chosen, d.expert_width);
}

std::vector<float> download_floats(Device& device, const Tensor& t) {
  std::vector<float> host(static_cast<size_t>(t.rows() * t.cols()));
  device.download(host.data(), t.data, host.size() * sizeof(float));
  if (t.dtype == DType::I32)
    for (float& v : host) v = static_cast<float>(std::bit_cast<int32_t>(v));
  return host;
}

void each_product(Device& device, const Tensor& x, const Tensor& w, Act act, const Tensor& scratch, const std::function<void(int64_t, std::span<const float>)>& row) {
  const auto n = static_cast<size_t>(scratch.cols());
  for (int64_t r = 0; r < x.rows(); r += scratch.rows()) {
    NormMatmulArgs a;
    a.h = x.slice(r, std::min(scratch.rows(), x.rows() - r)), a.act = act, a.w = w, a.y = scratch.slice(0, a.h.rows());
    device.norm_matmul(a);
    const std::vector<float> host = download_floats(device, a.y);
    for (int64_t j = 0; j < a.h.rows(); j++) row(r + j, std::span(host).subspan(static_cast<size_t>(j) * n, n));
  }
}

}  // namespace qn
