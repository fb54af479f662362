// From logits to a token. Pure: the same logits, history, parameters and position give the same token, on every device.
// Order of filters: penalties, temperature, top-k, top-p, min-p (as transformers); each works on what the one before left.
// Of equal logits the lower id comes first. The token is drawn by inverse CDF over the candidates in order of falling logit.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace qn {

struct SamplerParams {
  float temperature = 0;         // 0: greedy (after penalties)
  int top_k = 0;                 // 0: all
  float top_p = 1;               // keep the smallest set whose probability reaches top_p; 1: all
  float min_p = 0;               // keep p >= min_p * max p; 0: all
  float repetition_penalty = 1;  // > 1: logits of seen tokens are divided (positive) or multiplied (negative)
  float presence_penalty = 0;    // subtracted once from tokens of the answer so far
  float frequency_penalty = 0;   // subtracted per occurrence in the answer so far
  int penalty_window = 0;        // how many of the last tokens count as seen; 0: all of the history given
  uint64_t seed = 0;
};

// Throws Error naming the option for values out of range (negative temperature, top_p not in (0, 1], NaN...).
void check(const SamplerParams& p);

class Sampler {
 public:
  // allowed: per id 1 when the id has a token (others, and those beyond its end, are masked here and nowhere else); empty:
  // all allowed.
  Sampler(const SamplerParams& params, std::vector<uint8_t> allowed);
  // history: prompt and answer so far, oldest first; its last `answer` tokens are the answer. The repetition penalty looks at all
  // of it, presence and frequency at the answer only: a long chat must not be kept from ending its turns.
  // position: of the token to be drawn.
  // Logits of NaN and -inf are never chosen; if nothing can be chosen, throws NoChoice.
  int32_t next(std::span<const float> logits, std::span<const int32_t> history, size_t answer, uint64_t position);

 private:
  void penalise(std::span<const float> logits, std::span<const int32_t> history, size_t answer);
  void gather(std::span<const float> logits);
  void sort_more();
  SamplerParams params_;
  std::vector<uint8_t> allowed_;
  std::vector<float> logits_;     // (V) after penalties
  std::vector<int32_t> counts_;   // (V) zero between calls
  std::vector<uint64_t> keys_;    // candidates, best first: inverted logit << 32 | id
  size_t sorted_ = 0;             // how many of keys_ are in their final place
};

// Index of the largest value (lowest index among equals, NaN ignored); -1 when there is none.
int32_t argmax(std::span<const float> values);
// Uniform in [0, 1), a function of its arguments only (Philox 4x32-10, key = seed, counter = position and stream).
double counter_uniform(uint64_t seed, uint64_t position, uint32_t stream);
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

}  // namespace qn
