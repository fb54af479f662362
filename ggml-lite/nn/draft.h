// How many tokens to guess ahead, and guesses out of the text itself. Pure: no device, no clock.
//
// A step checks k guesses in one pass over 1 + k tokens and keeps those that were right, so it yields 1 + (guesses right in a row) tokens. It
// pays when that is more than what it costs beside a plain step. Both are measured: per number of guesses the seconds of a step, per depth
// how often a guess is right when those before it were.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace qn {

constexpr int kMaxDraft = 7;    // a pass over 8 tokens is the largest whose rows have the bits of single ones
constexpr int kDraftAuto = -1;

int parse_draft(const std::string& text);  // "auto" or 0 to 7; throws Error

// Chooses k before every step, from what steps before have shown.
//
//   auto: the k with the most tokens a second; 0 unless that gains 2 %. While it is 0, a step with guesses is tried now and then, each time
//   when the steps since have saved up for what it may lose: 1 % of the time altogether. A try that does better than feared gives back
//   what it did not lose, and what it gained. While it is not 0, one step in 256 is a plain one.
class DraftPolicy {
 public:
  // draft: kDraftAuto, or always so many. warm: the first steps of each k that are no measure (a device that records them meanwhile).
  explicit DraftPolicy(int draft = kDraftAuto, int warm = 0);

  int choose(int most);  // at most that many are possible now
  // What became of a step: of `drafted` guesses the first `accepted` were right.
  void result(int drafted, int accepted, double seconds);

  double acceptance(int depth) const { return right_[static_cast<size_t>(depth)]; }  // depth 0: of the first guess
  double step_seconds(int k) const;     // measured or, between and beyond what was, estimated; 0: nothing was measured
  double tokens_per_step(int k) const;  // expected

 private:
  struct Cost {  // the median of the last few: something else may come in the way of a step
    std::array<double, 9> last{};
    double seconds = 0;
    int seen = 0;
  };
  int best(int least, int most) const;

  int fixed_, warm_;
  std::array<double, kMaxDraft> right_;
  std::array<int, kMaxDraft> tried_{};
  std::array<Cost, kMaxDraft + 1> cost_{};
  int since_plain_ = 0;  // steps
  int misses_ = 0;       // first guesses in a row
  double saved_ = 0;  // seconds that may be spent on trying
  double feared_ = 0; // of the try under way: what it may lose
};

// Guesses for files without a layer that predicts: what followed when the last tokens occurred before. The longest match of 3 to 16 tokens
// wins, of equally long ones the latest. An index has the places behind every three tokens in a row, newest first, of which at most 64 are
// looked at; its memory is a few integers per token.
class SuffixDraft {
 public:
  // At most `most` tokens that may follow `timeline`; none when nothing is like it. Cheap when the timeline only grew.
  std::vector<int32_t> propose(std::span<const int32_t> timeline, int most);

 private:
  static constexpr int kKey = 3, kLongest = 16, kLook = 64;
  void follow(std::span<const int32_t> timeline);

  std::vector<int32_t> seen_;                       // what the index is of
  std::vector<int32_t> before_;                     // per position: the last one with the same key
  std::unordered_map<uint64_t, int32_t> latest_;    // key -> the last position behind it
};

}  // namespace qn
