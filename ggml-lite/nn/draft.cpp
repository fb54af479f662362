#include "ggml-lite/nn/draft.h"

#include <algorithm>
#include <utility>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/term.h"  // parse_count

namespace qn {

int parse_draft(const std::string& text) { return text == "auto" ? kDraftAuto : parse_count(text, "--draft (auto, or a number)", 0, kMaxDraft); }

// ---- how many -----------------------------------------------------------------------------------------------------------

constexpr double kHope = 0.75;       // how often a guess is right, before any was made
constexpr double kSlope = 0.25;      // of a plain step, for each guess more, before any was measured
constexpr double kGain = 1.02;       // that is worth it
constexpr double kTrying = 0.01;     // share of the time that trying may cost
constexpr double kRate = 0.03;
constexpr double kForget = 0.02;     // of what a depth has shown that is not reached any more
constexpr int kPlainEvery = 256;     // steps, while guessing pays: what a plain one takes changes slowly
constexpr int kPlainFirst = 3;       // plain steps that count, before anything else: what the others are held against

DraftPolicy::DraftPolicy(int draft, int warm) : fixed_(draft), warm_(warm) { right_.fill(kHope); }

double DraftPolicy::tokens_per_step(int k) const {
  double sum = 1, all = 1;
  for (int i = 0; i < k; i++) sum += all *= right_[static_cast<size_t>(i)];
  return sum;
}

double DraftPolicy::step_seconds(int k) const {
  const auto known = [&](int i) { return cost_[static_cast<size_t>(i)].seconds > 0; };
  const auto seconds = [&](int i) { return cost_[static_cast<size_t>(i)].seconds; };
  if (known(k)) return seconds(k);
  int below = k, above = k;
  while (below >= 0 && !known(below)) below--;
  while (above <= kMaxDraft && !known(above)) above++;
  if (below < 0) return above <= kMaxDraft ? seconds(above) : 0;
  if (above <= kMaxDraft) return seconds(below) + (seconds(above) - seconds(below)) * (k - below) / (above - below);
  int other = below - 1;  // beyond what was measured: as the last two go on
  while (other >= 0 && !known(other)) other--;
  const double slope = other >= 0 ? std::max((seconds(below) - seconds(other)) / (below - other), 0.0) : kSlope * seconds(below);
  return seconds(below) + slope * (k - below);
}

int DraftPolicy::best(int least, int most) const {
  int k = least;
  for (int i = least + 1; i <= most; i++)
    if (tokens_per_step(i) / step_seconds(i) > tokens_per_step(k) / step_seconds(k)) k = i;
  return k;
}

int DraftPolicy::choose(int most) {
  most = std::min(most, kMaxDraft);
  if (most <= 0) return 0;
  if (fixed_ != kDraftAuto && fixed_ <= 0) return 0;
  if (cost_[0].seen < warm_ + kPlainFirst) return 0;
  if (fixed_ != kDraftAuto) return std::min(fixed_, most);
  const double plain = step_seconds(0);
  const int k = best(1, most);
  const double tokens = tokens_per_step(k), seconds = step_seconds(k);
  if (tokens / seconds >= kGain / plain) {
    return since_plain_ < kPlainEvery ? k : 0;
  }
  const double loss = std::max(seconds - plain, 0.0);  // when no guess is right
  if (saved_ < loss) return 0;
  saved_ -= feared_ = loss;
  return k;
}

void DraftPolicy::result(int drafted, int accepted, double seconds) {
  QN_CHECK(drafted >= 0 && drafted <= kMaxDraft && accepted >= 0 && accepted <= drafted, "draft: %d of %d accepted", accepted, drafted);
  for (int i = 0; i < drafted && i <= accepted; i++) {
    double& r = right_[static_cast<size_t>(i)];
    int& n = tried_[static_cast<size_t>(i)];
    r += ((i < accepted ? 1.0 : 0.0) - r) * std::max(kRate, 1.0 / (++n + 2));
  }
  if (drafted > 0) {  // many misses in a row say more than a mean that moves slowly
    misses_ = accepted ? 0 : misses_ + 1;
    if (misses_ > 3) right_[0] = std::min(right_[0], 3.0 / (misses_ + 2));
  }
  for (int i = 1; i < kMaxDraft; i++)  // what was not reached is believed ever less, and taken to be like the depth before it
    if (drafted > 0 && i > accepted) right_[static_cast<size_t>(i)] += kForget * (right_[static_cast<size_t>(i) - 1] - right_[static_cast<size_t>(i)]);
  seconds = std::max(seconds, 1e-9);
  since_plain_ = drafted ? since_plain_ + 1 : 0;
  if (const double feared = std::exchange(feared_, 0); feared > 0) saved_ += feared + (1 + accepted) * step_seconds(0) - seconds;
  Cost& c = cost_[static_cast<size_t>(drafted)];
  if (c.seen++ < warm_) return;
  saved_ = std::min(saved_ + kTrying * seconds, 10 * seconds);
  c.last[static_cast<size_t>(c.seen - warm_ - 1) % c.last.size()] = seconds;
  std::array<double, 9> sorted = c.last;
  const size_t n = std::min(static_cast<size_t>(c.seen - warm_), sorted.size());
  std::nth_element(sorted.begin(), sorted.begin() + (n - 1) / 2, sorted.begin() + n);
  c.seconds = sorted[(n - 1) / 2];
}

// ---- guesses out of the text --------------------------------------------------------------------------------------------

static uint64_t key_of(std::span<const int32_t> tokens, size_t end) {  // of the three tokens before `end`
  uint64_t key = 0;
  for (size_t i = end - 3; i < end; i++) key = (key ^ static_cast<uint32_t>(tokens[i])) * 0x9E3779B97F4A7C15u, key ^= key >> 29;
  return key;
}

void SuffixDraft::follow(std::span<const int32_t> timeline) {
  // The end tells whether what was seen has changed. Where it does not, guesses may be worse, no more.
  const size_t n = timeline.size(), old = seen_.size(), check = std::min<size_t>(old, 64);
  if (old > n || !std::equal(seen_.end() - static_cast<std::ptrdiff_t>(check), seen_.end(), timeline.begin() + static_cast<std::ptrdiff_t>(old - check)))
    seen_.clear(), before_.clear(), latest_.clear();
  for (size_t at = seen_.size(); at < n; at++) {
    seen_.push_back(timeline[at]);
    before_.push_back(-1);
    // A place is indexed when a token follows it: it can be gone on from
    if (at >= kKey) {
      const auto [place, fresh] = latest_.try_emplace(key_of(timeline, at), static_cast<int32_t>(at));
      if (!fresh) before_[at] = std::exchange(place->second, static_cast<int32_t>(at));
    }
  }
}

std::vector<int32_t> SuffixDraft::propose(std::span<const int32_t> timeline, int most) {
  follow(timeline);
  const auto n = static_cast<int32_t>(timeline.size());
  if (n < kKey || most <= 0) return {};
  const auto found = latest_.find(key_of(timeline, timeline.size()));
  if (found == latest_.end()) return {};
  int32_t best = -1, longest = 0;
  int looked = 0;
  for (int32_t at = found->second; at >= 0 && looked < kLook && longest < kLongest; at = before_[static_cast<size_t>(at)], looked++) {
    int32_t length = 0;
    while (length < kLongest && length < at && timeline[static_cast<size_t>(at - length - 1)] == timeline[static_cast<size_t>(n - length - 1)]) length++;
    if (length > longest) longest = length, best = at;
  }
  if (longest < kKey) return {};
  std::vector<int32_t> out;  // a run may go on into what it itself guesses
  for (int32_t i = best; static_cast<int>(out.size()) < most; i++) out.push_back(i < n ? timeline[static_cast<size_t>(i)] : out[static_cast<size_t>(i - n)]);
  return out;
}

}  // namespace qn
