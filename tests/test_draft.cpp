// How many tokens to guess, guesses from the text, how long to sleep for a step: pure, so against simulated machines and texts.
#include <doctest/doctest.h>

#include <chrono>
#include <functional>

#include "ggml-lite/base/check.h"
#include "ggml-lite/nn/chooser.h"
#include "ggml-lite/nn/draft.h"
#include "ggml-lite/text/sampler.h"

using namespace qn;

namespace {

using Ids = std::vector<int32_t>;

struct Machine {
  double slope, first;          // a step with k > 0 guesses takes 1 + first + slope k plain steps
  double step(int k) const { return k ? 1 + first + slope * k : 1; }
};

struct Run {
  double tokens = 0, seconds = 0;
  int with = 0, steps = 0;
  double speed() const { return tokens / seconds; }  // 1: plain
};

// right(step, depth): how likely a guess is right
Run simulate(DraftPolicy& policy, const Machine& m, int steps, const std::function<double(int, int)>& right, uint64_t seed, double noise = 0.05, int most = kMaxDraft) {
  Run r;
  uint64_t n = 0;
  const auto uniform = [&] { return counter_uniform(seed, n++, 0); };
  for (int i = 0; i < steps; i++) {
    const int k = policy.choose(most);
    CHECK(k <= most);
    int accepted = 0;
    while (accepted < k && uniform() < right(i, accepted)) accepted++;
    const double seconds = m.step(k) * (1 + noise * (2 * uniform() - 1)) * (uniform() < 0.01 ? 1.5 : 1);
    policy.result(k, accepted, seconds * 1e-3);
    r.tokens += 1 + accepted, r.seconds += seconds, r.with += k > 0, r.steps++;
  }
  return r;
}

double best_speed(const Machine& m, double p) {
  double best = 1;
  for (int k = 1; k <= kMaxDraft; k++) {
    double tokens = 1, all = 1;
    for (int i = 0; i < k; i++) tokens += all *= p;
    best = std::max(best, tokens / m.step(k));
  }
  return best;
}

}  // namespace

TEST_CASE("--draft: auto, or 0 to 7") {
  CHECK(parse_draft("auto") == kDraftAuto);
  CHECK(parse_draft("0") == 0);
  CHECK(parse_draft("7") == 7);
  for (const char* bad : {"8", "-1", "", "a", "3x", "Auto", "1.5"}) CHECK_THROWS_WITH_AS(parse_draft(bad), doctest::Contains("--draft"), Error);
}

TEST_CASE("a waiter sleeps through most of a long step, and polls for a short one") {
  Patience p;
  const auto wait = [&](int us) {  // for what comes after so many microseconds; how long it takes
    const auto nap = static_cast<int>(p.nap().count());
    const int took = std::max(nap, us);
    p.learn(Patience::Time{took}, nap >= us);
    return std::pair(nap, took);
  };
  for (int i = 0; i < 40; i++) CHECK(wait(2000).first == 0);  // of a GPU alone
  wait(3000000);  // a prompt
  int late = 0;
  for (int i = 0; i < 40; i++) late += wait(5300).second - 5300;
  CHECK(late == 0);
  CHECK(p.nap().count() > 5300 / 2);
  CHECK(p.nap().count() < 5300);
  wait(3000000);
  for (int i = 0; i < 40; i++) late += wait(i % 3 ? 5300 : 12000).second - (i % 3 ? 5300 : 12000);  // steps with guesses and without
  CHECK(late < 5300);
  for (int i = 0; i < 20; i++) late += wait(400).second - 400;
  CHECK(late < 12000);
  CHECK(p.nap().count() == 0);
}

TEST_CASE("drafts: never slower than plain by 2 %, and near the best wherever there is something to gain") {
  for (const Machine m : {Machine{0.08, 0.02}, {0.25, 0.05}, {0.6, 0.1}, {1.0, 0.2}})
    for (const double p : {0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97}) {
      DraftPolicy policy;
      const Run start = simulate(policy, m, 300, [=](int, int) { return p; }, 5);
      const Run r = simulate(policy, m, 4000, [=](int, int) { return p; }, 6);
      const double best = best_speed(m, p);
      INFO("slope ", m.slope, ", right ", p, ": ", r.speed(), ", best ", best, ", at first ", start.speed());
      CHECK(start.speed() > 0.85);          // while it learns
      CHECK(r.speed() > 0.98);
      CHECK(r.speed() > (best > 1.1 ? 0.96 : 0.94) * best);
      if (p <= 0.1 && m.slope > 0.2) CHECK(r.with < r.steps / 10);
    }
}

TEST_CASE("drafts: what changes is noticed") {
  const Machine m{0.25, 0.05};
  DraftPolicy policy;
  const auto phase = [&](double p, uint64_t seed) { return simulate(policy, m, 1500, [=](int, int) { return p; }, seed); };
  CHECK(phase(0.9, 1).speed() > 1.7);
  CHECK(phase(0.02, 2).speed() > 0.96);
  const Run again = phase(0.9, 3);
  CHECK_MESSAGE(again.speed() > 1.5, again.speed());
  CHECK(policy.acceptance(0) > 0.8);
  CHECK(policy.step_seconds(0) == doctest::Approx(1e-3).epsilon(0.1));
}

TEST_CASE("drafts: a first guess that is good and others that are not mean one guess") {
  const Machine m{0.3, 0.05};
  DraftPolicy policy;
  const auto right = [](int, int depth) { return depth ? 0.05 : 0.85; };
  simulate(policy, m, 400, right, 7);
  int ones = 0;
  for (int i = 0; i < 200; i++) {
    const int k = policy.choose(kMaxDraft);
    ones += k == 1;
    policy.result(k, k > 0 && i % 7 ? 1 : 0, 1e-3 * m.step(k));
  }
  CHECK(ones > 150);
}

TEST_CASE("drafts: as many as are asked for, once the plain step is known; never more than there is room for") {
  DraftPolicy fixed(5), none(0);
  int plain = 0;
  for (int i = 0; i < 50; i++) {
    const int k = fixed.choose(kMaxDraft);
    plain += k == 0;
    CHECK((k == 0 || k == 5));
    CHECK(none.choose(kMaxDraft) == 0);
    fixed.result(k, 0, 1e-3 * (k + 1)), none.result(0, 0, 1e-3);
  }
  CHECK(plain == 3);
  CHECK(fixed.choose(3) == 3);
  CHECK(fixed.choose(0) == 0);
  CHECK(fixed.choose(-4) == 0);
  DraftPolicy warm(4, 2);  // steps that a device records are no measure
  for (const double seconds : {9.0, 9.0, 1.0, 8.0, 1.0}) {
    CHECK(warm.choose(7) == 0);
    warm.result(0, 0, seconds);
  }
  CHECK(warm.step_seconds(0) == 1.0);
  CHECK(warm.choose(7) == 4);
  warm.result(4, 0, 100), warm.result(4, 0, 100);
  CHECK(warm.step_seconds(4) == doctest::Approx(2.0));  // still the estimate
  warm.result(4, 0, 1.5);
  CHECK(warm.step_seconds(4) == 1.5);
  CHECK(warm.step_seconds(2) == doctest::Approx(1.25));
  CHECK(warm.step_seconds(6) == doctest::Approx(1.75));
  CHECK_THROWS_AS(warm.result(2, 3, 1), Bug);
}

TEST_CASE("guesses from the text: what followed the longest match, of equally long ones the latest") {
  SuffixDraft d;
  CHECK(d.propose(Ids{}, 4).empty());
  CHECK(d.propose(Ids{1, 2, 3}, 4).empty());
  CHECK(d.propose(Ids{1, 2, 3, 4, 1, 2, 3}, 3) == Ids{4, 1, 2});
  CHECK(d.propose(Ids{1, 2, 3, 4, 1, 2, 3}, 0).empty());
  CHECK(d.propose(Ids{1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3}, 2) == Ids{5, 8});                      // the latest
  CHECK(d.propose(Ids{7, 1, 2, 3, 4, 9, 6, 1, 2, 3, 5, 8, 7, 1, 2, 3}, 2) == Ids{4, 9});             // the longest
  CHECK(d.propose(Ids{5, 5, 5, 5}, 6) == Ids{5, 5, 5, 5, 5, 5});                                     // a run goes on
  CHECK(d.propose(Ids{1, 2, 1, 2, 1}, 5) == Ids{2, 1, 2, 1, 2});
  CHECK(d.propose(Ids{1, 2, 4, 1, 2}, 5).empty());                                                   // two are no match
}

TEST_CASE("guesses from the text: a timeline that grows, is cut and goes on otherwise gives what a fresh look gives") {
  uint64_t n = 0;
  const auto below = [&](int k) { return static_cast<int32_t>(counter_uniform(3, n++, 0) * k); };
  SuffixDraft lasting;
  Ids timeline;
  for (int round = 0; round < 3000; round++) {
    if (below(40) == 0) timeline.resize(static_cast<size_t>(below(static_cast<int>(timeline.size()) + 1)));
    for (int i = below(4); i >= 0; i--) timeline.push_back(below(4));
    const Ids got = lasting.propose(timeline, 5);
    CHECK(got.size() <= 5);
    SuffixDraft fresh;
    if (round % 10 == 0) CHECK(got == fresh.propose(timeline, 5));
  }
}

TEST_CASE("guesses from the text: bounded time, whatever the text") {
  for (const int kinds : {1, 2, 100, 100000}) {
    Ids timeline;
    for (int i = 0; i < 200000; i++) timeline.push_back(kinds == 1 ? 0 : static_cast<int32_t>(counter_uniform(1, static_cast<uint64_t>(i), 0) * kinds));
    SuffixDraft d;
    d.propose(timeline, 7);
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 1000; i++) timeline.push_back(timeline[static_cast<size_t>(i)]), d.propose(timeline, 7);
    const double each = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / 1000;
    CHECK_MESSAGE(each < 1e-4, kinds, " kinds of tokens: ", each * 1e6, " us");
  }
}
