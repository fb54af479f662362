// Scalar decoders of stored weights and the rounding of activations: the definition that every fast kernel is held to.
// Encoders that search for good scales are in quantize/encode.h; nothing here chooses a scale.
#pragma once
#include <cstdint>
#include <span>

#include "ggml-lite/core/tensor.h"

namespace qn {

// Row n (logical row of the stored matrix, after interleaving) of a weight matrix -> K floats.
void decode_row(const Tensor& w, int64_t n, std::span<float> out);
// Rounds x (one token's K values) in place as Act says (core/types.h).
void round_act(Act act, std::span<float> x);
// INT8 activations: codes (K) and scales (ceil(K/128)) of one token.
void quantize_act(std::span<const float> x, std::span<int8_t> codes, std::span<float> scales);
// A row of an INT8 KV cache (core/blocks.h): codes (DH) and scales (ceil(DH / 128), fp16) of one key or value.
void quantize_kv(std::span<const float> x, int8_t* codes, uint16_t* scales);

// Writes rows 16p..16p+15 of a T16 panel from codes (16, Kp) (already excess-8 / excess-128) and scales (Kp/group, 16) fp16.
void write_panel(DType dtype, int64_t k, int group, const uint8_t* codes, const uint16_t* scales, uint8_t* panel);
// The inverse: codes (16, Kp) and scales (Kp/group, 16).
void read_panel(DType dtype, int64_t k, int group, const uint8_t* panel, uint8_t* codes, uint16_t* scales);

}  // namespace qn
