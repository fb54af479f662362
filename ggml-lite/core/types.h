// Number formats and small enums shared by host and device code. Plain data: g++ and nvcc both include this.
#pragma once
#include <cstdint>

namespace qn {

// Stored values. The numbers are part of the .qn format: never renumber.
enum class DType : uint8_t {
  F32 = 0,
  BF16 = 1,
  I32 = 2,
  U8 = 3,    // bytes of tables (tokenizer)
  INT8 = 4,  // T16 panels, 8-bit codes, one fp16 scale per group and row   (core/blocks.h)
  INT4 = 5,  // T16 panels, 4-bit codes, one fp16 scale per group and row
  // From here on in memory only: a file that holds one is refused.
  I8 = 6,    // signed codes of an INT8 KV cache (core/blocks.h)
  F16 = 7,   // their scales
};
inline constexpr int kDTypes = 6;  // of files

constexpr const char* name(DType t) {
  switch (t) {
    case DType::F32: return "f32";
    case DType::BF16: return "bf16";
    case DType::I32: return "i32";
    case DType::U8: return "u8";
    case DType::INT8: return "int8";
    case DType::INT4: return "int4";
    case DType::I8: return "int8";  // as --kv-type says it; nothing takes both kinds
    case DType::F16: return "f16";
  }
  return "?";
}

// T16 formats are stored in panels of 16 rows; the others are plain row-major.
constexpr bool is_t16(DType t) { return t == DType::INT8 || t == DType::INT4; }

// Bytes of one value of a row-major dtype; 0 for T16 formats, whose size core/blocks.h computes.
constexpr int64_t item_bytes(DType t) {
  switch (t) {
    case DType::F32:
    case DType::I32: return 4;
    case DType::BF16:
    case DType::F16: return 2;
    case DType::U8:
    case DType::I8: return 1;
    default: return 0;
  }
}

// What enters a matrix product with stored weights is rounded to this first, on every device alike:
//   BF16: round to nearest even.
//   INT8: per token and group of 128 consecutive values (the last group may be shorter): scale = max|x| / 127 in fp32,
//         code = nearest integer (ties to even) of x / scale, value used = code * scale; an all-zero group has scale 0.
// Router, gate projections ([b|a], shared expert gate), norms, recurrent state and softmax always use fp32.
enum class Act : uint8_t { F32 = 0, BF16 = 1, INT8 = 2 };
inline constexpr int kActGroup = 128;

constexpr const char* name(Act a) { return a == Act::F32 ? "f32" : a == Act::BF16 ? "bf16" : "int8"; }

}  // namespace qn
