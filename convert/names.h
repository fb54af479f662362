// The table between a Hugging Face checkpoint and a .qn file: names, shapes, the order of rows (model-spec 2, 3.2, 3.8).
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "convert/config.h"
#include "ggml-lite/core/qn.h"
#include "quantize/recipe.h"

namespace qn {

enum class Fold : uint8_t { None, OnePlus, NegExp };  // what becomes of a value w: w, 1 + w, -exp(w); in fp32

struct SourceTensor {
  std::string name;            // in the checkpoint
  std::vector<int64_t> shape;  // there
};

struct RowRun {
  int from;              // which of Matrix::from
  int64_t begin, count;  // rows of it, seen as (elements / cols, cols)
};

// One matrix as the engine reads it: rows (rows, cols) taken from checkpoint tensors. A vector is one row.
struct Matrix {
  std::string name;  // of the tensor in the .qn file
  DType dtype = DType::F32;
  int group = 0;
  int64_t rows = 0, cols = 0;
  Fold fold = Fold::None;
  bool interleaved = false;  // `order` is two runs of equal length, gate and up, that alternate by 8 rows (core/blocks.h)
  std::vector<SourceTensor> from;
  std::vector<RowRun> order;  // stored rows, one run after the other
};

// One tensor of the .qn file: a matrix, or the routed experts of a layer.
struct Target {
  QnTensor tensor;
  bool section = false;       // starts a section of the file
  Matrix matrix;              // dense
  std::string expert_prefix;  // experts: "model.layers.3.mlp.experts"
  bool fused = false;         // experts: all in two tensors of three dims
};

struct ExpertMatrices {
  Matrix gate_up, down;  // (2F, D), (D, F)
};
ExpertMatrices expert_matrices(const Target& t, int64_t expert);

struct LayoutOptions {
  Recipe recipe;
  bool mtp = true;
  std::function<bool(const std::string& name)> in_checkpoint;  // tells fused from single experts; empty: single
};
// Everything but the tokenizer, in file order: dense tensors, then the experts. Throws Error for a group that does not divide.
std::vector<Target> model_layout(const ModelConfig& c, const LayoutOptions& options);

// Every checkpoint tensor that the layout reads, once, with its shape there.
void for_each_source(const std::vector<Target>& layout, const std::function<void(const SourceTensor&)>& f);

}  // namespace qn
