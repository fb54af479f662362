#include "quantize/encode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/core/codec.h"

namespace qn {
namespace {

struct ScaleCandidate {
  float divisor;  // of the largest magnitude
  bool flipped;   // codes -7..8 instead of -8..7
};

struct ScaleFormat {
  float largest;                 // code on the shorter side: 7 or 127
  bool lopsided;                 // the other side has one more
  float zero;                    // stored code of 0
  const ScaleCandidate* coarse;  // an even number
  int coarse_count;
  const float* fine;  // relative steps to both sides of the best coarse divisor
  int fine_count;
};

// What the search is given and leaves, row r of a panel at [..16 * k + r].
struct ScaleBlock {
  int group;
  alignas(64) float x[128 * kPanelRows];
  alignas(64) float codes[128 * kPanelRows];  // stored codes, as floats
  alignas(64) float scale[kPanelRows];        // fp16 values
  alignas(64) float error[kPanelRows], max_error[kPanelRows], reference[kPanelRows], largest[kPanelRows];
};

// Over all fp16 scales, the squared error of groups of 32 is at most 0.2 % (INT4) and, for weights without many zeros, 1.4 %
// (INT8) above the minimum (tests/test_quantize.cpp). Divisors 1 to 8 keep weights exact that lie on a grid already.
constexpr ScaleCandidate kCoarse4[] = {
    {1, false},     {2, false},    {3, false},     {4, false},     {4.5f, false},  {5, false},    {5.5f, false},  {6, false},
    {6.4f, false},  {6.7f, false}, {7, false},     {7.35f, false}, {7.7f, false},  {7.7f, true},  {8, false},     {8, true},
    {8.3f, false},  {8.3f, true},  {8.7f, false},  {8.7f, true},   {9.1f, false},  {9.1f, true},  {9.6f, false},  {9.6f, true},
    {10.1f, false}, {10.1f, true}, {10.7f, false}, {10.7f, true},  {11.4f, false}, {11.4f, true}, {12.3f, false}, {12.3f, true},
    {13.5f, false}, {13.5f, true}, {15, false},    {15, true},     {17, false},    {17, true},
};
constexpr float kFine4[] = {0.006f, 0.012f, 0.018f, 0.025f};
constexpr auto kCoarse8 = [] {
  std::array<ScaleCandidate, 40> all{};
  for (int i = 0; i < 40; i++) all[static_cast<size_t>(i)] = {127.4f - 0.5f * static_cast<float>(i), false};
  return all;
}();
constexpr float kFine8[] = {0.0006f, 0.0012f, 0.0018f};
static_assert(std::size(kCoarse4) % 2 == 0 && std::size(kCoarse8) % 2 == 0);

constexpr ScaleFormat kFormat4 = {7, true, 8, kCoarse4, std::size(kCoarse4), kFine4, std::size(kFine4)};
constexpr ScaleFormat kFormat8 = {127, false, 128, kCoarse8.data(), std::size(kCoarse8), kFine8, std::size(kFine8)};

}  // namespace
}  // namespace qn

// The same source for two instruction sets; AVX-512 gained nothing where it was measured. "fp-contract=off": a build with
// -march=native must not fuse what others cannot.
#pragma GCC push_options
#pragma GCC optimize("O3", "fp-contract=off")
#define QN_ISA scale_search_sse2
#define QN_LANES 4
#include "quantize/scale_search.inc"
#undef QN_ISA
#undef QN_LANES
#if defined(__x86_64__)
#pragma GCC target("avx2")
#define QN_ISA scale_search_avx2
#define QN_LANES 8
#include "quantize/scale_search.inc"
#undef QN_ISA
#undef QN_LANES
#endif
#pragma GCC pop_options

namespace qn {
namespace {

using SearchBlock = void (*)(const ScaleFormat&, bool, ScaleBlock&);

SearchBlock pick_search() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return scale_search_avx2::search_block;
#endif
  return scale_search_sse2::search_block;
}

[[noreturn]] void refuse_value(DType dtype, float v, float limit, int64_t index) {
  if (!std::isfinite(v)) fail("value %lld is %g: only finite weights can be stored", static_cast<long long>(index), static_cast<double>(v));
  fail("value %lld is %g: %s with fp16 scales reaches %g; store this tensor as bf16", static_cast<long long>(index), static_cast<double>(v),
       name(dtype), static_cast<double>(limit));
}

void check_values(DType dtype, const float* x, int64_t n, float limit) {
  bool bad = false;
  for (int64_t i = 0; i < n; i++) bad |= !(std::fabs(x[i]) <= limit);
  for (int64_t i = 0; bad && i < n; i++)
    if (!(std::fabs(x[i]) <= limit)) refuse_value(dtype, x[i], limit, i);
}

// Panel after panel of one T16 matrix.
class PanelEncoder {
 public:
  PanelEncoder(DType dtype, int64_t k, int group, ScaleSearch search)
      : dtype_(dtype), k_(k), kp_(round_up(k, kPadK)), search_(search), format_(dtype == DType::INT4 ? kFormat4 : kFormat8) {
    QN_CHECK(is_t16(dtype) && (group == 32 || group == 64 || group == 128) && k > 0 && k % group == 0,
             "encode: %s (.., %lld) in groups of %d", name(dtype), static_cast<long long>(k), group);
    block_.group = group;
    codes_.resize(static_cast<size_t>(kPanelRows * kp_), static_cast<uint8_t>(code_zero(dtype)));
    scales_.resize(static_cast<size_t>(kp_ / group * kPanelRows));
  }

  // rows: (16) pointers to K values each; null is a row of zeros.
  void encode(const float* const* rows, uint8_t* panel, QuantError* error) {
    static const SearchBlock search_block = pick_search();
    const float limit = 65504.0f * (format_.largest + (format_.lopsided ? 1.0f : 0.0f));
    for (int r = 0; r < kPanelRows; r++)
      if (rows[r]) check_values(dtype_, rows[r], k_, limit);
    for (int64_t begin = 0; begin < k_; begin += block_.group) {
      for (int r = 0; r < kPanelRows; r++)
        for (int k = 0; k < block_.group; k++) block_.x[k * kPanelRows + r] = rows[r] ? rows[r][begin + k] : 0.0f;
      search_block(format_, search_ == ScaleSearch::LeastSquares, block_);
      for (int r = 0; r < kPanelRows; r++) {
        uint8_t* const codes = codes_.data() + r * kp_ + begin;
        for (int k = 0; k < block_.group; k++) codes[k] = static_cast<uint8_t>(block_.codes[k * kPanelRows + r]);
        scales_[static_cast<size_t>(begin / block_.group * kPanelRows + r)] = float_to_half(block_.scale[r]);
      }
      if (error) add_block(rows, *error);
    }
    write_panel(dtype_, k_, block_.group, codes_.data(), scales_.data(), panel);
  }

 private:
  void add_block(const float* const* rows, QuantError& error) const {
    for (int r = 0; r < kPanelRows; r++) {
      if (!rows[r]) continue;
      error.squared += static_cast<double>(block_.error[r]);
      error.squared_max += static_cast<double>(block_.max_error[r]);
      error.reference += static_cast<double>(block_.reference[r]);
      error.largest = std::max(error.largest, static_cast<double>(block_.largest[r]));
      error.count += static_cast<uint64_t>(block_.group);
    }
  }

  DType dtype_;
  int64_t k_, kp_;
  ScaleSearch search_;
  const ScaleFormat& format_;
  ScaleBlock block_;
  std::vector<uint8_t> codes_;    // (16, Kp)
  std::vector<uint16_t> scales_;  // (Kp/group, 16)
};

void encode_plain(DType dtype, int64_t count, const float* x, uint8_t* out, QuantError* error) {
  QN_CHECK(dtype == DType::F32 || dtype == DType::BF16, "encode: %s is no weight format", name(dtype));
  constexpr float kLargestBf16 = 0x1.fefffep127f;  // what lies above rounds to infinity
  check_values(dtype, x, count, dtype == DType::F32 ? 3.40282347e38f : kLargestBf16);
  QuantError e;
  e.count = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < count; i++) {
    const double v = static_cast<double>(x[i]);
    e.reference += v * v;
    if (dtype == DType::F32) continue;
    const uint16_t h = float_to_bf16(x[i]);
    const double d = static_cast<double>(bf16_to_float(h)) - v;
    e.squared += d * d;
    e.largest = std::max(e.largest, std::fabs(d));
    std::memcpy(out + 2 * i, &h, 2);
  }
  if (dtype == DType::F32) std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
  e.squared_max = e.squared;  // no scale to choose
  if (error) error->add(e);
}

}  // namespace

void QuantError::add(const QuantError& o) {
  squared += o.squared, squared_max += o.squared_max, reference += o.reference;
  largest = std::max(largest, o.largest);
  count += o.count;
}
double QuantError::relative() const { return reference > 0 ? std::sqrt(squared / reference) : 0; }
double QuantError::relative_max() const { return reference > 0 ? std::sqrt(squared_max / reference) : 0; }

void encode_rows(DType dtype, int64_t n, int64_t k, int group, const float* rows, ScaleSearch search, std::span<uint8_t> out,
                 QuantError* error) {
  QN_CHECK(n > 0 && k > 0 && static_cast<int64_t>(out.size()) == weight_bytes(dtype, n, k, group),
           "encode_rows: %s (%lld, %lld) into %zu bytes", name(dtype), static_cast<long long>(n), static_cast<long long>(k), out.size());
  if (!is_t16(dtype)) return encode_plain(dtype, n * k, rows, out.data(), error);
  PanelEncoder encoder(dtype, k, group, search);
  for (int64_t p = 0; p < t16_panels(n); p++) {
    const float* row[kPanelRows];
    for (int64_t r = 0; r < kPanelRows; r++) row[r] = p * kPanelRows + r < n ? rows + (p * kPanelRows + r) * k : nullptr;
    encoder.encode(row, out.data() + p * t16_panel_bytes(dtype, k, group), error);
  }
}

void encode_gate_up(DType dtype, int64_t d, int64_t f, int group, const float* gate, const float* up, ScaleSearch search,
                    std::span<uint8_t> out, QuantError* error) {
  QN_CHECK(d > 0 && f > 0 && (!is_t16(dtype) || f % 8 == 0) && static_cast<int64_t>(out.size()) == weight_bytes(dtype, 2 * f, d, group),
           "encode_gate_up: %s, F %lld, D %lld into %zu bytes", name(dtype), static_cast<long long>(f), static_cast<long long>(d),
           out.size());
  if (!is_t16(dtype)) {
    encode_plain(dtype, f * d, gate, out.data(), error);
    return encode_plain(dtype, f * d, up, out.data() + out.size() / 2, error);
  }
  PanelEncoder encoder(dtype, d, group, search);
  for (int64_t p = 0; p < f / 8; p++) {
    const float* row[kPanelRows];
    for (int64_t r = 0; r < 8; r++) row[r] = gate + (8 * p + r) * d, row[r + 8] = up + (8 * p + r) * d;
    encoder.encode(row, out.data() + p * t16_panel_bytes(dtype, d, group), error);
  }
}

void encode_expert(DType dtype, int64_t d, int64_t f, int group, const float* gate, const float* up, const float* down, ScaleSearch search,
                   std::span<uint8_t> record, QuantError* error) {
  const ExpertLayout l = expert_layout(dtype, d, f, group);
  QN_CHECK(static_cast<int64_t>(record.size()) == l.stride, "encode_expert: record of %lld bytes, got %zu",
           static_cast<long long>(l.stride), record.size());
  const auto part = [&](int64_t begin, int64_t end) {
    return record.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  };
  encode_gate_up(dtype, d, f, group, gate, up, search, part(0, l.down_offset), error);
  encode_rows(dtype, d, f, group, down, search, part(l.down_offset, l.bytes), error);
  std::fill(record.begin() + l.bytes, record.end(), uint8_t{0});
}

void decode_expert(DType dtype, int64_t d, int64_t f, int group, const uint8_t* record, float* gate, float* up, float* down) {
  const Experts one = {record, dtype, static_cast<uint16_t>(group), 1, d, f};
  const Tensor gate_up = one.gate_up(0), second = one.down(0);
  for (int64_t r = 0; r < 2 * f; r++)
    decode_row(gate_up, is_t16(dtype) ? interleave_row(r, f) : r, {r < f ? gate + r * d : up + (r - f) * d, static_cast<size_t>(d)});
  for (int64_t r = 0; r < d; r++) decode_row(second, r, {down + r * f, static_cast<size_t>(f)});
}

}  // namespace qn
