// Reading a checkpoint: is everything there, and rows of it as fp32.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "convert/names.h"
#include "ggml-lite/base/safetensors.h"

namespace qn {

// What a thread needs to read rows; grows to what was asked for and is reused.
struct ReadBuffers {
  std::vector<uint8_t> raw;
  std::vector<float> scales;
};

class Checkpoint {
 public:
  // Throws Error for layouts of other programs (MLX, Megatron, Qwen3.5, GPTQ...) by name.
  explicit Checkpoint(const std::string& folder);

  bool has(const std::string& name) const { return tensors_.find(name) != nullptr; }
  bool has_mtp() const;
  bool is_fp8(const std::string& name) const;

  // Holds the checkpoint against what the layout reads. Every tensor that is missing, unexpected, of another shape or of a type
  // that cannot be read is told to `notice` (experts of equal fate in one line); then throws Error. Without `mtp`, mtp.* may be anything.
  void check(const std::vector<Target>& layout, const ModelConfig& c, bool mtp, const Notice& notice) const;

  // Stored rows [begin, begin + n) of m as (n, m.cols) fp32, in stored order, folded. For interleaved matrices begin and n are
  // multiples of 16. FP8: value times block scale in fp32, rounded once to BF16. Throws Error for a value that is not finite.
  // What was read is dropped from the page cache.
  void read(const Matrix& m, int64_t begin, int64_t n, std::span<float> out, ReadBuffers& buffers) const;

 private:
  struct Rows;
  void read_rows(const SourceTensor& s, int64_t cols, const Rows& rows, std::span<float> out, ReadBuffers& buffers) const;
  std::string folder_;
  SafeTensors tensors_;
};

// E4M3 in its "FN" variant: no infinities, 0x7F and 0xFF are NaN, bias 7.
float e4m3_to_float(uint8_t code);

}  // namespace qn
