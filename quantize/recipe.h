// Which tensor is stored how (decisions 8, 9): the one table that qnext-convert and qnext-quantize share.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "ggml-lite/core/types.h"

namespace qn {

struct Recipe {
  DType experts = DType::INT4;  // INT4, INT8, BF16
  DType rest = DType::BF16;     // BF16, INT8
  int group = 0;                // INT4 experts: 32, 64, 128; 0: the largest that divides every K
  std::optional<DType> draft = {};  // INT8, INT4: of the head for guesses alone; draft_format() when it is left open
};

// What a tensor is, by its name in the .qn file.
enum class Kind { Norm, Vector, Exact, Rest, Experts, Draft, Table };  // Exact: router, [b|a], conv, gates, fc, embedding: BF16 (or F32)
Kind kind_of(std::string_view qn_name);                                // Error: no tensor of ours has this name
const char* kind_label(std::string_view qn_name);  // "experts", "delta qkvz", "attention out", "shared expert", "head", ...: for reports

// The largest of 128, 64, 32 that divides k; throws Error when none does.
int largest_group(int64_t k, const std::string& what);
// INT4 for a head (V, D) whose reading is most of what a guess costs, INT8 for a small one. On the test model `stories`, whose tokens are drawn among
// equals, INT4 moves logits by 0.16 and breaks ties otherwise than the head that checks: of 100 guesses 2 to 7 fewer are right; INT8 loses none.
// Where the likeliest token leads by 0.3 or more both choose it.
DType draft_format(const Recipe& r, int64_t v, int64_t d);
// Whether guesses have a head (V, D) of their own, mtp.head: the weights of the head in fewer bits, for a guess reads little else, and cannot
// change an answer. Not where that is no smaller than the `bytes` of the head.
bool has_draft_head(const Recipe& r, int64_t v, int64_t d, uint64_t bytes);
// Group of the routed experts, (E, D, F): r.group for INT4 (Error when it does not divide d and f), else the largest that divides
// both; 0 for BF16.
int expert_group(const Recipe& r, int64_t d, int64_t f);

DType parse_dtype(const std::string& text, const std::string& option, bool experts);  // "int4" ...; Error names the choices

}  // namespace qn
