// One .qn file -> another with fewer bits. Whatever the recipe does not touch is copied byte for byte; a file with the layer that predicts but no
// head of its own for guesses gets one, where that is smaller than the head, and loses it where it is not.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "ggml-lite/base/term.h"
#include "quantize/encode.h"
#include "quantize/recipe.h"

namespace qn {

struct RequantizeOptions {
  std::optional<DType> experts, rest;  // not given: as in the input
  int group = 0;                       // of INT4 experts; 0: as in the input if that is INT4, else the largest that divides
  std::optional<DType> draft;          // of the head for guesses where one is made
  ScaleSearch search = ScaleSearch::LeastSquares;
  int threads = 0;                // 0: all
  bool allow_requantize = false;  // INT4 experts may be decoded and stored in another group
};

// All tensors of one kind that went from one format to another.
struct RequantizeRow {
  std::string label, before, after;  // "experts", "bf16", "int4 g128"
  int tensors = 0;
  uint64_t weights = 0, bytes_before = 0, bytes_after = 0;
  QuantError error;  // against what the input holds; count 0: copied
};

struct RequantizeReport {
  std::vector<RequantizeRow> rows;
  std::vector<std::string> notes;              // for the user's eyes, one line each
  uint64_t bytes_before = 0, bytes_after = 0;  // of the files
};

// Refuses what would add bits (they would hold nothing new) and, unless allowed, INT4 that would change. Checks the checksum of
// everything it reads. Memory: some tens of megabytes a thread, at most 1 GiB, whatever the size of the file.
RequantizeReport requantize(const std::string& in, const std::string& out, const RequantizeOptions& options, const Progress& progress = {});

}  // namespace qn
