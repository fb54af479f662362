// A Hugging Face folder -> a .qn file. Streams: a few MiB per thread, whatever the size of the checkpoint.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "convert/config.h"
#include "convert/names.h"
#include "ggml-lite/base/term.h"
#include "ggml-lite/core/qn.h"
#include "quantize/encode.h"
#include "quantize/recipe.h"

namespace qn {

struct ConvertOptions {
  Recipe recipe;
  ScaleSearch scale = ScaleSearch::LeastSquares;
  int threads = 0;                // 0: physical cores
  bool mtp = true;                // keep the multi-token-prediction layer if there is one
  std::optional<ChatStyle> chat;  // instead of what the checkpoint's template says
  Notice notice;                  // warnings, and the names of tensors that do not fit; may be empty
};

struct ConvertReport {
  struct Line {
    std::string label, format;  // "experts", "int4 g128"
    uint64_t bytes = 0;
    QuantError error;  // count 0: not measured
  };
  std::vector<Line> lines;
  uint64_t file_bytes = 0;
  double seconds = 0;
  bool mtp = false;
};

// Throws Error; `out` is then what it was before.
ConvertReport convert_folder(const std::string& folder, const std::string& out, const ConvertOptions& options,
                             const Progress& progress = {});
// general.*, token.* and the tokenizer.
ConvertReport convert_tokenizer(const std::string& folder, const std::string& out, const ConvertOptions& options);

// ---- shared with synthetic.cpp --------------------------------------------------------------------------------------

// What goes into every file: provenance, shapes, words, formats.
void write_meta(QnWriter& writer, const ModelConfig& c, const TextSetup& text, const std::map<std::string, Meta>& origin,
                const std::vector<Target>& layout, const LayoutOptions& options);

// Stored rows [begin, begin + n) of a matrix, encoded, into `to` (weight_bytes of them). `place` tells matrices apart: it is unique
// within a file. Called from many threads, `thread` tells which; begin is a multiple of 16.
struct RowJob {
  const Matrix& matrix;
  uint64_t place;
  int64_t begin, n;
  std::span<uint8_t> to;
  QuantError& error;
  int thread;
};
using RowEncoder = std::function<void(const RowJob& job)>;

// Declares the tensors of the layout (after the tokenizer's tables, if any), checks the free space, and writes them all: a task
// is a dense tensor or one expert, so that blocks of a tensor come in order. Returns the lines of the report.
std::vector<ConvertReport::Line> write_model(QnWriter& writer, const std::string& out, const std::vector<Target>& layout,
                                             const TextSetup& text, int threads, const RowEncoder& encode, const Progress& progress);

// Values of one block of rows: what a thread holds at a time.
inline constexpr int64_t kBlockValues = 512 << 10;

}  // namespace qn
