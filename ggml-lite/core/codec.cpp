#include "ggml-lite/core/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ggml-lite/base/check.h"

namespace qn {

static uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, 2);
  return v;
}

void decode_row(const Tensor& w, int64_t n, std::span<float> out) {
  const int64_t k = w.shape[1];
  QN_CHECK(w.ndim == 2 && n >= 0 && n < w.shape[0] && static_cast<int64_t>(out.size()) == k,
           "decode_row: row %lld of a matrix of %d dims (%lld, %lld) into %zu floats", static_cast<long long>(n), w.ndim,
           static_cast<long long>(w.shape[0]), static_cast<long long>(k), out.size());
  if (w.dtype == DType::F32) {
    std::copy_n(w.f32(n), k, out.begin());
    return;
  }
  if (w.dtype == DType::BF16) {
    for (int64_t i = 0; i < k; i++) out[i] = bf16_to_float(w.bf16(n)[i]);
    return;
  }
  QN_CHECK(is_t16(w.dtype) && w.group > 0, "decode_row: %s with group %d is no weight format", name(w.dtype), w.group);
  const uint8_t* panel = w.bytes() + n / kPanelRows * t16_panel_bytes(w.dtype, k, w.group);
  const uint8_t* tiles = panel + t16_scale_bytes(k, w.group);
  const int r = static_cast<int>(n % kPanelRows), step = tile_k(w.dtype), zero = code_zero(w.dtype);
  for (int64_t i = 0; i < k; i++) {
    const uint8_t* tile = tiles + i / step * kTileBytes;
    const int c = static_cast<int>(i % step);
    const int code = w.dtype == DType::INT4 ? (tile[int4_byte(r, c)] >> int4_shift(c)) & 15 : tile[int8_byte(r, c)];
    out[i] = static_cast<float>(code - zero) * half_to_float(load16(panel + 2 * (i / w.group * kPanelRows + r)));
  }
}

void quantize_act(std::span<const float> x, std::span<int8_t> codes, std::span<float> scales) {
  QN_CHECK(codes.size() == x.size() && scales.size() == (x.size() + kActGroup - 1) / kActGroup,
           "quantize_act: %zu values, %zu codes, %zu scales", x.size(), codes.size(), scales.size());
  for (size_t g = 0; g < scales.size(); g++) {
    const size_t begin = g * kActGroup, end = std::min(begin + kActGroup, x.size());
    float largest = 0;
    for (size_t i = begin; i < end; i++)
      if (const float a = std::fabs(x[i]); a > largest || std::isnan(a)) largest = a;  // a NaN, once in, stays
    const float scale = scales[g] = largest / 127.0f;
    for (size_t i = begin; i < end; i++) {
      // Nothing to divide by when all is zero or almost; infinities and NaN reach the result through the scale. The clamp is
      // for subnormal scales, which are too coarse for x / scale to stay within 127.
      const bool plain = scale > 0 && std::isfinite(scale);
      codes[i] = plain ? static_cast<int8_t>(std::clamp(std::nearbyint(x[i] / scale), -127.0f, 127.0f)) : int8_t{0};
    }
  }
}

void round_act(Act act, std::span<float> x) {
  if (act == Act::BF16)
    for (float& v : x) v = round_bf16(v);
  if (act != Act::INT8) return;
  for (size_t begin = 0; begin < x.size(); begin += kActGroup) {
    const auto part = x.subspan(begin, std::min<size_t>(kActGroup, x.size() - begin));
    int8_t codes[kActGroup];
    float scale;
    quantize_act(part, {codes, part.size()}, {&scale, 1});
    for (size_t i = 0; i < part.size(); i++) part[i] = static_cast<float>(codes[i]) * scale;
  }
}

void quantize_kv(std::span<const float> x, int8_t* codes, uint16_t* scales) {
  for (size_t begin = 0; begin < x.size(); begin += kKvGroup) {
    const size_t end = std::min<size_t>(begin + kKvGroup, x.size());
    uint32_t largest = 0;
    for (size_t i = begin; i < end; i++) largest = std::max(largest, magnitude_bits(x[i]));
    const uint16_t bits = scales[begin / kKvGroup] = kv_scale(largest);
    const float scale = half_to_float(bits);
    for (size_t i = begin; i < end; i++) codes[i] = kv_code(x[i], scale);
  }
}

// Calls f(row, column, tile byte) for every code of a panel; column runs to the padded K.
template <class F>
static void each_code(DType dtype, int64_t k, int group, F f) {
  QN_CHECK(is_t16(dtype) && group > 0 && k > 0, "panel of %s, group %d, K %lld", name(dtype), group, static_cast<long long>(k));
  const int step = tile_k(dtype);
  const int64_t tiles = t16_scale_bytes(k, group);
  for (int r = 0; r < kPanelRows; r++)
    for (int64_t i = 0; i < round_up(k, kPadK); i++) {
      const int c = static_cast<int>(i % step);
      f(r, i, tiles + i / step * kTileBytes + (dtype == DType::INT4 ? int4_byte(r, c) : int8_byte(r, c)));
    }
}

void write_panel(DType dtype, int64_t k, int group, const uint8_t* codes, const uint16_t* scales, uint8_t* panel) {
  const int64_t kp = round_up(k, kPadK);
  std::memset(panel, 0, t16_panel_bytes(dtype, k, group));  // the nibbles are put in with |=
  std::memcpy(panel, scales, t16_scale_bytes(k, group));
  each_code(dtype, k, group, [&](int r, int64_t i, int64_t at) {
    const int shift = dtype == DType::INT4 ? int4_shift(static_cast<int>(i)) : 0;
    panel[at] = static_cast<uint8_t>(panel[at] | codes[r * kp + i] << shift);
  });
}

void read_panel(DType dtype, int64_t k, int group, const uint8_t* panel, uint8_t* codes, uint16_t* scales) {
  const int64_t kp = round_up(k, kPadK);
  std::memcpy(scales, panel, t16_scale_bytes(k, group));
  each_code(dtype, k, group, [&](int r, int64_t i, int64_t at) {
    codes[r * kp + i] = dtype == DType::INT4 ? (panel[at] >> int4_shift(static_cast<int>(i))) & 15 : panel[at];
  });
}

}  // namespace qn
