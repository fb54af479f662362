#include "ggml-lite/nn/hybrid_state.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/hash.h"

namespace qn {

static int64_t state_floats(const StateShape& s) { return s.value_heads * s.key_dim * s.value_dim; }
static int64_t layer_floats(const StateShape& s) { return state_floats(s) + s.conv_slots * s.conv_channels(); }
static int64_t cache_rows(const StateShape& s) { return s.kv_heads * s.context; }
static int64_t cache_bytes(const StateShape& s) { return cache_rows(s) * s.head_dim * item_bytes(s.kv_type); }  // of K or V, without scales
static int64_t scale_bytes(const StateShape& s) { return s.kv_type == DType::I8 ? cache_rows(s) * kv_groups(s.head_dim) * item_bytes(DType::F16) : 0; }
static int64_t layers_of(const StateShape& s, bool attention) { return std::ranges::count(s.attention, attention); }

uint64_t StateShape::recurrent_bytes() const {
  return static_cast<uint64_t>(layers_of(*this, false) * layer_floats(*this) + tail) * sizeof(float);
}
uint64_t StateShape::log_bytes() const { return static_cast<uint64_t>(layers_of(*this, false) * log_floats()) * sizeof(float); }
uint64_t StateShape::kv_bytes() const { return static_cast<uint64_t>(layers_of(*this, true) * 2 * (cache_bytes(*this) + scale_bytes(*this))); }

uint64_t HybridState::checkpoints_kept(const StateShape& shape, uint64_t checkpoint_bytes) {
  return std::max<uint64_t>(3, std::min<uint64_t>(64, checkpoint_bytes / shape.recurrent_bytes()));
}

HybridState::HybridState(Device& device, const StateShape& shape, uint64_t keep) : device_(device), shape_(shape), keep_(keep) {
  int64_t next[2] = {0, 0};
  for (const bool attention : shape_.attention) slots_.push_back(next[attention]++);
  recurrent_ = device_.alloc(shape_.recurrent_bytes(), "recurrent state");
  if (shape_.log_bytes()) log_ = device_.alloc(shape_.log_bytes(), "log of the tokens of a pass");
  if (shape_.kv_bytes()) kv_ = device_.alloc(shape_.kv_bytes(), "KV cache");
  if (device_.memory())
    for (size_t i = 0; i < keep_; i++) spare_.push_back(device_.alloc(recurrent_.bytes(), "checkpoint of the recurrent state"));
}

float* HybridState::layer_in(const Buffer& recurrent, int layer) const {
  return static_cast<float*>(recurrent.data()) + slot(layer) * layer_floats(shape_);
}
Tensor HybridState::log(int layer) const {
  if (!log_.data()) return {};
  return view(static_cast<float*>(log_.data()) + slot(layer) * shape_.log_floats(), DType::F32, kDeltaLogRows, shape_.log_floats() / kDeltaLogRows);
}
Tensor HybridState::state_in(const Buffer& recurrent, int layer) const {
  return view(layer_in(recurrent, layer), DType::F32, shape_.value_heads, shape_.key_dim, shape_.value_dim);
}
Tensor HybridState::conv_ring(int layer) const {
  const Tensor s = delta(layer);
  return view(s.f32(shape_.value_heads), DType::F32, shape_.conv_slots, shape_.conv_channels());
}
KvCache HybridState::cache(int layer) const {
  const StateShape& s = shape_;
  KvCache c;
  uint8_t* p = static_cast<uint8_t*>(kv_.data()) + slot(layer) * 2 * cache_bytes(s);
  c.k = view(p, s.kv_type, s.kv_heads, s.context, s.head_dim);
  c.v = view(p + cache_bytes(s), s.kv_type, s.kv_heads, s.context, s.head_dim);
  if (const int64_t scales = scale_bytes(s)) {
    p = static_cast<uint8_t*>(kv_.data()) + layers_of(s, true) * 2 * cache_bytes(s) + slot(layer) * 2 * scales;
    c.k_scales = view(p, DType::F16, s.kv_heads, s.context, kv_groups(s.head_dim));
    c.v_scales = view(p + scales, DType::F16, s.kv_heads, s.context, kv_groups(s.head_dim));
  }
  return c;
}
float* HybridState::tail() const {
  return static_cast<float*>(recurrent_.data()) + layers_of(shape_, false) * layer_floats(shape_);
}

void HybridState::reset() {
  device_.zero(recurrent_.data(), recurrent_.bytes());
  forget_after(0);
}

void HybridState::randomise(int position, uint64_t seed) {
  forget_after(-1);
  uint64_t noise = seed | 1;
  auto draw = [&noise] {  // sum of four bytes, about normal with sd 1
    noise ^= noise << 13, noise ^= noise >> 7, noise ^= noise << 17;
    return (static_cast<float>((noise & 255) + (noise >> 8 & 255) + (noise >> 16 & 255) + (noise >> 24 & 255)) - 510.f) / 148.f;
  };
  constexpr size_t kValues = 1 << 20;
  std::vector<float> f(kValues);
  std::vector<uint16_t> b(kValues);
  std::vector<int8_t> codes(kValues);
  for (size_t i = 0; i < kValues; i++) f[i] = draw(), b[i] = float_to_bf16(f[i]), codes[i] = kv_code(f[i], 1.f / 37);
  const std::vector<uint16_t> scales(kValues, float_to_half(1.f / 37));
  auto fill = [&](void* to, int64_t values, const void* from, int64_t item) {
    for (int64_t i = 0; i < values; i += static_cast<int64_t>(kValues))
      device_.upload(static_cast<uint8_t*>(to) + i * item, from, static_cast<size_t>(std::min<int64_t>(values - i, kValues) * item));
  };
  for (int layer = 0; layer < static_cast<int>(shape_.attention.size()); layer++) {
    if (!shape_.attention[static_cast<size_t>(layer)]) continue;
    for (const Tensor& t : cache(layer).tensors()) {
      const void* from = f.data();
      if (t.dtype == DType::BF16) from = b.data();
      if (t.dtype == DType::I8) from = codes.data();
      if (t.dtype == DType::F16) from = scales.data();
      for (int64_t head = 0; head < shape_.kv_heads; head++) fill(t.slice(head, 1).data, position * t.shape[2], from, item_bytes(t.dtype));
    }
  }
  for (float& v : f) v *= 0.1f;
  fill(recurrent_.data(), static_cast<int64_t>(recurrent_.bytes() / 4), f.data(), 4);
  if (log_.data()) fill(log_.data(), static_cast<int64_t>(log_.bytes() / 4), f.data(), 4);
}

void HybridState::forget_after(int position) {
  std::erase_if(checkpoints_, [&](Checkpoint& c) {
    if (c.position <= position) return false;
    spare_.push_back(std::move(c.memory));
    return true;
  });
}

// Takes a copy of recurrent_, or itself, to this place.
void HybridState::gather(const Buffer& to, int position, const Place& place) {
  for (int layer = 0; place.from > 0 && layer < static_cast<int>(shape_.attention.size()); layer++)
    if (!shape_.attention[static_cast<size_t>(layer)])
      device_.delta_replay({log(layer), state_in(to, layer), shape_.key_heads, position, place.from});
  float* at = static_cast<float*>(to.data()) + layers_of(shape_, false) * layer_floats(shape_);
  for (const auto& [from, floats] : place.tail) device_.copy(at, from, static_cast<size_t>(floats) * sizeof(float)), at += floats;
}

void HybridState::settle(int position, const Place& place) { gather(recurrent_, position, place); }

void HybridState::checkpoint(int position, bool passing, const Place* place) {
  forget_after(position);
  if (passing)
    std::erase_if(checkpoints_, [&](Checkpoint& c) {
      if (!c.passing) return false;
      spare_.push_back(std::move(c.memory));
      return true;
    });
  if (position == 0 || (!checkpoints_.empty() && checkpoints_.back().position == position)) return;
  if (checkpoints_.size() >= keep_) {
    // Drop the one whose neighbours are closest together; the newest stays, whatever the gap before it.
    size_t drop = 0;
    for (size_t i = 0, best = SIZE_MAX; i + 1 < checkpoints_.size(); i++) {
      const size_t gap = static_cast<size_t>(checkpoints_[i + 1].position - (i ? checkpoints_[i - 1].position : 0));
      if (gap < best) best = gap, drop = i;
    }
    spare_.push_back(std::move(checkpoints_[drop].memory));
    checkpoints_.erase(checkpoints_.begin() + static_cast<std::ptrdiff_t>(drop));
  }
  Buffer memory;
  if (!spare_.empty()) memory = std::move(spare_.back()), spare_.pop_back();
  else memory = device_.alloc(recurrent_.bytes(), "checkpoint of the recurrent state");
  device_.copy(memory.data(), recurrent_.data(), recurrent_.bytes());
  if (place) gather(memory, position, *place);
  checkpoints_.push_back({position, passing, std::move(memory)});
}

int HybridState::restore(int position) {
  forget_after(position);
  if (checkpoints_.empty()) {
    reset();
    return 0;
  }
  device_.copy(recurrent_.data(), checkpoints_.back().memory.data(), recurrent_.bytes());
  return checkpoints_.back().position;
}

std::vector<int> HybridState::checkpoints() const {
  std::vector<int> p;
  for (const Checkpoint& c : checkpoints_) p.push_back(c.position);
  return p;
}

uint64_t HybridState::hash(int position, uint64_t before) const {
  std::vector<uint8_t> host;
  uint32_t recurrent = static_cast<uint32_t>(before >> 32), kv = static_cast<uint32_t>(before);
  auto add = [&](const float* from, int64_t floats) {
    host.resize(static_cast<size_t>(floats) * sizeof(float));
    device_.download(host.data(), from, host.size());
    recurrent = crc32c(host, recurrent);
  };
  const int layers = static_cast<int>(shape_.attention.size());
  for (int layer = 0; layer < layers; layer++) {
    if (shape_.attention[static_cast<size_t>(layer)]) continue;
    add(delta(layer).f32(), state_floats(shape_));
    const Tensor ring = conv_ring(layer);  // other slots hold what nobody will read
    for (int p = std::max(0, position - 3); p < position; p++) add(ring.f32(p & (shape_.conv_slots - 1)), ring.cols());
  }
  if (shape_.tail) add(tail(), shape_.tail);
  for (int layer = 0; layer < layers; layer++) {
    if (!shape_.attention[static_cast<size_t>(layer)]) continue;
    const int valid = std::max(0, position - (layer >= layers - shape_.lagging));
    for (const Tensor& t : cache(layer).tensors())
      for (int64_t head = 0; head < shape_.kv_heads; head++) {
        host.resize(static_cast<size_t>(valid * t.shape[2] * item_bytes(t.dtype)));
        device_.download(host.data(), t.slice(head, 1).data, host.size());
        kv = crc32c(host, kv);
      }
  }
  return static_cast<uint64_t>(recurrent) << 32 | kv;
}

}  // namespace qn
