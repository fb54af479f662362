// Random weights of real shapes, for benchmarks where the real weights cannot be had: the same file as convert_folder() writes,
// as fast as the disk takes it.
#pragma once
#include <cstdint>
#include <string>

#include "convert/convert.h"

namespace qn {

// "qwen3-next-80b-a3b" with `layers` layers (0: all 48) in the 3:1 pattern. Throws Error for a name that is none.
ModelConfig synthetic_config(const std::string& model, int64_t layers);

struct SyntheticOptions {
  ConvertOptions convert;  // scale is not used
  std::string tokenizer;   // folder of a tokenizer; empty: none
  std::string name = "synthetic";
  uint64_t seed = 1;
};
// The bytes depend on shapes, formats and seed only.
ConvertReport write_synthetic(const ModelConfig& c, const std::string& out, const SyntheticOptions& options, const Progress& progress = {});

}  // namespace qn
