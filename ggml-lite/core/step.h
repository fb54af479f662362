// What changes from step to step. It lives in device memory, written by the host before a step (or by the last operation of
// the step before), so that one recorded graph serves every token. Shared with nvcc.
#pragma once
#include <cstdint>

namespace qn {

struct StepParams {
  int32_t pos;    // position of the first token of this call in the sequence, from 0
  int32_t n_tok;  // T, tokens in this call (equal to shape[0] of the activations)
};

}  // namespace qn
