#include "ggml-lite/text/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "ggml-lite/base/check.h"

namespace qn {

// ---- random numbers -------------------------------------------------------------------------------------------------

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): ten rounds of two 32x32 multiplications.
std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
    c = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return c;
}

double counter_uniform(uint64_t seed, uint64_t position, uint32_t stream) {
  const auto r = philox4x32({uint32_t(position), uint32_t(position >> 32), stream, 0}, {uint32_t(seed), uint32_t(seed >> 32)});
  return double((uint64_t(r[0]) << 32 | r[1]) >> 11) * 0x1p-53;
}

// ---- parameters -----------------------------------------------------------------------------------------------------

void check(const SamplerParams& p) {
  const auto need = [](bool ok, const char* option, const char* expected, double got) {
    if (!ok) fail("%s: expected %s, got %g", option, expected, got);
  };
  need(std::isfinite(p.temperature) && p.temperature >= 0, "--temp", "a number of at least 0 (0: greedy)", p.temperature);
  need(p.top_k >= 0, "--top-k", "an integer of at least 0 (0: all)", p.top_k);
  need(p.top_p > 0 && p.top_p <= 1, "--top-p", "a number above 0 and at most 1 (1: all)", p.top_p);
  need(p.min_p >= 0 && p.min_p <= 1, "--min-p", "a number from 0 (all) to 1", p.min_p);
  need(std::isfinite(p.repetition_penalty) && p.repetition_penalty > 0, "--repeat-penalty", "a number above 0 (1: none)",
       p.repetition_penalty);
  need(std::isfinite(p.presence_penalty), "--presence-penalty", "a finite number (0: none)", p.presence_penalty);
  need(std::isfinite(p.frequency_penalty), "--frequency-penalty", "a finite number (0: none)", p.frequency_penalty);
  need(p.penalty_window >= 0, "--penalty-window", "an integer of at least 0 (0: everything)", p.penalty_window);
}

// ---- choosing -------------------------------------------------------------------------------------------------------

// allowed: empty, or per id whether it may be chosen; ids beyond its end may not.
static int32_t argmax(std::span<const float> values, std::span<const uint8_t> allowed) {
  const size_t n = allowed.empty() ? values.size() : std::min(values.size(), allowed.size());
  int32_t best = -1;
  float top = -INFINITY;
  for (size_t i = 0; i < n; ++i)
    if ((values[i] > top || (best < 0 && values[i] == top)) && (allowed.empty() || allowed[i])) {
      best = int32_t(i);
      top = values[i];
    }
  return best;
}

int32_t argmax(std::span<const float> values) { return argmax(values, {}); }

// Sorting keys ascending gives falling logits and, among equals, rising ids.
static uint64_t key_of(float logit, size_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);  // -0 becomes +0
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(~rising) << 32 | uint32_t(id);
}
static float logit_of(uint64_t key) {
  const uint32_t rising = ~uint32_t(key >> 32);
  return std::bit_cast<float>(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

Sampler::Sampler(const SamplerParams& params, std::vector<uint8_t> allowed) : params_(params), allowed_(std::move(allowed)) {
  check(params_);
}

void Sampler::penalise(std::span<const float> logits, std::span<const int32_t> history, size_t answer) {
  logits_.assign(logits.begin(), logits.end());
  counts_.resize(logits.size());
  if (params_.penalty_window > 0 && history.size() > size_t(params_.penalty_window))
    history = history.last(size_t(params_.penalty_window));
  const size_t prompt = history.size() - std::min(history.size(), answer);
  const auto inside = [&](int32_t id) { return id >= 0 && size_t(id) < counts_.size(); };
  // counts_: 1 for having been seen at all, plus 1 for each time in the answer
  for (size_t i = 0; i < history.size(); ++i)
    if (const int32_t id = history[i]; inside(id)) counts_[id] = std::max(counts_[id], 1) + (i >= prompt);
  for (int32_t id : history) {
    if (!inside(id) || counts_[id] == 0) continue;
    float& v = logits_[id];
    v = v > 0 ? v / params_.repetition_penalty : v * params_.repetition_penalty;
    const int times = counts_[id] - 1;
    if (times > 0) v -= params_.presence_penalty + params_.frequency_penalty * float(times);
    counts_[id] = 0;
  }
}

// keys_ = the candidates: all that can be chosen, or the top_k of them. With top_k one pass keeps at most 2k of them, so that
// nothing of the size of the vocabulary is sorted or stored.
void Sampler::gather(std::span<const float> logits) {
  const size_t n = allowed_.empty() ? logits.size() : std::min(logits.size(), allowed_.size());
  const size_t k = params_.top_k > 0 ? std::min<size_t>(params_.top_k, n) : n;
  keys_.clear();
  sorted_ = 0;
  float least = -INFINITY;  // what a later id must exceed: an equal logit loses to the lower ids that are there
  for (size_t i = 0; i < n; ++i) {
    if (!(logits[i] > least) || (!allowed_.empty() && !allowed_[i])) continue;
    keys_.push_back(key_of(logits[i], i));
    if (k < n && keys_.size() == 2 * k) {
      std::nth_element(keys_.begin(), keys_.begin() + (k - 1), keys_.end());
      keys_.resize(k);
      least = logit_of(keys_.back());
    }
  }
  if (k < n) {
    std::sort(keys_.begin(), keys_.end());
    keys_.resize(std::min(keys_.size(), k));
    sorted_ = keys_.size();
  }
}

// Puts the next candidates in their place: 256 at first, then three times as many as there are.
void Sampler::sort_more() {
  const size_t n = std::min(keys_.size() - sorted_, std::max<size_t>(256, 3 * sorted_));
  const auto from = keys_.begin() + sorted_, to = from + n;
  if (to != keys_.end()) std::nth_element(from, to, keys_.end());
  std::sort(from, to);
  sorted_ += n;
}

int32_t Sampler::next(std::span<const float> logits, std::span<const int32_t> history, size_t answer, uint64_t position) {
  const bool penalties = params_.repetition_penalty != 1 || params_.presence_penalty != 0 || params_.frequency_penalty != 0;
  if (penalties) {
    penalise(logits, history, answer);
    logits = logits_;
  }
  if (params_.temperature == 0) {
    const int32_t best = argmax(logits, allowed_);
    if (best < 0 || logits[best] == -INFINITY) throw NoChoice();
    return best;
  }

  gather(logits);
  if (keys_.empty()) throw NoChoice();
  const double top = logit_of(*std::min_element(keys_.begin(), keys_.end())), temperature = params_.temperature;
  const auto weight = [&](size_t i) {  // proportional to the probability, 1 for the best; +inf logits share everything
    const double v = logit_of(keys_[i]);
    return v == top ? 1.0 : std::exp((v - top) / temperature);
  };
  double mass = 0;  // of all candidates; not needed where min-p alone decides how many are kept
  if (params_.top_p < 1 || params_.min_p == 0)
    for (size_t i = 0; i < keys_.size(); ++i) mass += weight(i);

  // Both remaining filters keep a beginning of the sorted candidates.
  size_t kept = keys_.size();
  if (params_.top_p < 1 || params_.min_p > 0) {
    const double enough = params_.top_p < 1 ? params_.top_p * mass : INFINITY;
    double sum = 0;
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (i == sorted_) sort_more();
      const double w = weight(i);
      if (i > 0 && (w < params_.min_p || sum >= enough)) {
        kept = i;
        break;
      }
      sum += w;
    }
    mass = sum;
  }
  const double target = counter_uniform(params_.seed, position, 0) * mass;
  double sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    if (i == sorted_) sort_more();
    sum += weight(i);
    if (sum > target) return int32_t(uint32_t(keys_[i]));
  }
  return int32_t(uint32_t(keys_[kept - 1]));  // rounding left the sum at or below the target
}

}  // namespace qn
