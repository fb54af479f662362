// Encoders: floats -> stored weights. The search for scales is here and nowhere in the engine.
#pragma once
#include <cstdint>
#include <span>

#include "ggml-lite/core/tensor.h"

namespace qn {

// Max: the value of largest magnitude gets the code of largest magnitude (INT4: -8, so the scale may be negative).
// LeastSquares: the scale (fp16; either sign for INT4, whose codes are lopsided) and codes that minimise the squared error of
// the group, found by searching candidates and refitting; never worse than Max.
enum class ScaleSearch { Max, LeastSquares };

struct QuantError {
  double squared = 0;      // sum of (decoded - original)^2
  double squared_max = 0;  // the same had ScaleSearch::Max been used
  double reference = 0;    // sum of original^2
  double largest = 0;      // largest |decoded - original|
  uint64_t count = 0;
  void add(const QuantError& o);
  double relative() const;      // sqrt(squared / reference); 0 when all weights are 0
  double relative_max() const;  // sqrt(squared_max / reference)
};

// All encoders: `error`, if given, is added to. They throw Error when a value is not finite or too large for the format
// (fp16 scales: INT4 reaches 8 * 65504, INT8 127 * 65504); the caller knows the name of the tensor and puts it in front.
// Any number of threads may encode at once. The bits written are the same on every machine.

// Rows (n, k) fp32 row-major in stored order (already interleaved) -> bytes of weight_bytes(dtype, n, k, group).
// n need be a multiple of 16 only for parts of a larger matrix; the last panel is padded. Row-major dtypes round to nearest even.
void encode_rows(DType dtype, int64_t n, int64_t k, int group, const float* rows, ScaleSearch search, std::span<uint8_t> out,
                 QuantError* error);

// The two factors of a SwiGLU as one matrix (2F, D): gate (F, D), up (F, D) -> weight_bytes(dtype, 2F, D, group) bytes.
// T16: interleaved by 8 (core/blocks.h), F a multiple of 8; row-major: gate rows, then up rows.
void encode_gate_up(DType dtype, int64_t d, int64_t f, int group, const float* gate, const float* up, ScaleSearch search,
                    std::span<uint8_t> out, QuantError* error);

// One routed expert: gate (F, D), up (F, D), down (D, F) -> record of expert_layout(dtype, d, f, group).stride bytes, padding zeroed.
void encode_expert(DType dtype, int64_t d, int64_t f, int group, const float* gate, const float* up, const float* down, ScaleSearch search,
                   std::span<uint8_t> record, QuantError* error);

// The inverse of encode_expert, for stored experts of any format. record: at least expert_layout().bytes.
void decode_expert(DType dtype, int64_t d, int64_t f, int group, const uint8_t* record, float* gate, float* up, float* down);

}  // namespace qn
