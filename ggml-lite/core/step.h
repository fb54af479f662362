// What changes from step to step. It lives in device memory, written by the host before a step (or by the last operation of
// the step before), so that one recorded graph serves every token. Shared with nvcc.
#pragma once
#include <cstdint>

namespace qn {

struct StepParams {
  int32_t pos;    // position of the first token of this call in the sequence, from 0
  int32_t n_tok;  // T, tokens in this call (equal to shape[0] of the activations)
  int32_t from = 0;  // tokens before `pos` that recurrent layers have in their log, but not in their state
};

// How the next token is chosen, as text/sampler.h defines it (SamplerParams), for devices that choose themselves.
struct SampleParams {
  float temperature;                            // 0: greedy
  float top_p, min_p;
  float repetition_penalty, presence_penalty, frequency_penalty;
  int32_t top_k;                                // 0: all
  int32_t penalty_window;                       // 0: all of the history
  int32_t answer;                               // position of the first token of the answer
  int32_t unused;
  uint64_t seed;
};

// Where a device that chooses tokens leaves them for the host: memory of the host that both see. The token chosen for position p
// is slot[p % kMailSlots] = (p << 32 | more << 24 | id), one 8-byte store, so that the host polls one word and never sees half a
// message. more: how many tokens behind this one were chosen with it, whose messages are there when this one is.
// more and id all ones: nothing could be chosen (every logit NaN, -inf or of an id that is not allowed).
constexpr int kMailSlots = 64;
constexpr int kMailIdBits = 24;  // core/limits.h: a vocabulary is smaller
struct Mail {
  uint64_t slot[kMailSlots];
};

}  // namespace qn
