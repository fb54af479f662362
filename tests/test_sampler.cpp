// From logits to tokens: each filter by an example worked out by hand, then against a plain reference on random cases.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "ggml-lite/base/check.h"
#include "ggml-lite/text/sampler.h"

using namespace qn;

namespace {

struct Random {
  uint64_t n = 0;
  double uniform() { return counter_uniform(99, n++, 7); }
  int below(int k) { return int(uniform() * k); }
  double normal() { return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform()); }
};

using Set = std::set<int32_t>;

// All tokens that come up in many draws.
Set support(const SamplerParams& p, const std::vector<float>& logits, std::vector<uint8_t> allowed = {},
    std::vector<int32_t> history = {}) {
  Sampler s(p, std::move(allowed));
  Set out;
  for (int i = 0; i < 2000; ++i) out.insert(s.next(logits, history, SIZE_MAX, i));
  return out;
}

int32_t greedy(const SamplerParams& p, const std::vector<float>& logits, const std::vector<int32_t>& history = {}) {
  return Sampler(p, {}).next(logits, history, SIZE_MAX, 0);
}

struct Candidate {
  int32_t id;
  double p;
};

// What is documented, written as plainly as possible: the candidates in order with their probabilities.
std::vector<Candidate> reference(const SamplerParams& p, std::vector<float> logits, const std::vector<uint8_t>& allowed,
    std::vector<int32_t> history) {
  if (p.penalty_window && int(history.size()) > p.penalty_window) history.erase(history.begin(),
      history.end() - p.penalty_window);
  for (size_t id = 0; id < logits.size(); ++id) {
    const auto n = std::count(history.begin(), history.end(), int32_t(id));
    if (n == 0) continue;
    logits[id] = logits[id] > 0 ? logits[id] / p.repetition_penalty : logits[id] * p.repetition_penalty;
    logits[id] -= p.presence_penalty + p.frequency_penalty * float(n);
  }
  std::vector<Candidate> c;
  for (size_t id = 0; id < logits.size(); ++id)
    if (!std::isnan(logits[id]) && logits[id] != -INFINITY && (allowed.empty() || (id < allowed.size() && allowed[id])))
      c.push_back({int32_t(id), logits[id] / double(p.temperature)});
  std::stable_sort(c.begin(), c.end(), [](const Candidate& a, const Candidate& b) { return a.p > b.p; });
  if (p.top_k && int(c.size()) > p.top_k) c.resize(p.top_k);
  const auto normalise = [&] {
    double sum = 0;
    for (auto& x : c) sum += x.p;
    for (auto& x : c) x.p /= sum;
  };
  const double top = c[0].p;
  for (auto& x : c) x.p = std::exp(x.p - top);
  normalise();
  if (p.top_p < 1) {
    double sum = 0;
    size_t n = 0;
    while (n < c.size() && sum < p.top_p) sum += c[n++].p;
    c.resize(n);
    normalise();
  }
  if (p.min_p > 0) {
    const double least = p.min_p * c[0].p;
    std::erase_if(c, [&](const Candidate& x) { return x.p < least; });
    normalise();
  }
  return c;
}

}  // namespace

TEST_CASE("sampler: Philox 4x32-10") {  // the known answers published with the generator
  using A = std::array<uint32_t, 4>;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == A{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == A{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        A{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
  CHECK(counter_uniform(0, 0, 0) == double(0x6627e8d5e169c58dull >> 11) / 9007199254740992.0);
  CHECK(counter_uniform(1, 0, 0) != counter_uniform(0, 0, 0));
  CHECK(counter_uniform(uint64_t(1) << 32, 0, 0) != counter_uniform(0, 0, 0));
  CHECK(counter_uniform(0, uint64_t(1) << 32, 0) != counter_uniform(0, 0, 1));
  double sum = 0, squares = 0, low = 1, high = 0;
  for (int i = 0; i < 100000; ++i) {
    const double u = counter_uniform(5, i, 0);
    sum += u, squares += u * u, low = std::min(low, u), high = std::max(high, u);
  }
  CHECK(std::abs(sum / 1e5 - 0.5) < 0.004);
  CHECK(std::abs(squares / 1e5 - 1.0 / 3) < 0.004);
  CHECK(low >= 0);
  CHECK(high < 1);
}

TEST_CASE("sampler: argmax and greedy") {
  const float inf = INFINITY, nan = NAN;
  using V = std::vector<float>;
  CHECK(argmax(V{}) == -1);
  CHECK(argmax(V{nan, nan}) == -1);
  CHECK(argmax(V{nan, -inf, -inf}) == 1);
  CHECK(argmax(V{1, 3, nan, 3, 2}) == 1);
  CHECK(argmax(V{-0.0f, 0.0f}) == 0);
  CHECK(argmax(V{-5, inf, inf}) == 1);
  CHECK(greedy({}, {0, nan, 7, 7}) == 2);
  CHECK(Sampler({}, {1, 0, 0, 1}).next(V{1, 9, 8, 2, 99}, {}, SIZE_MAX, 0) == 3);  // ids beyond `allowed` have no token either
  for (const float t : {0.0f, 1.0f}) {
    SamplerParams p;
    p.temperature = t;
    CHECK_THROWS_AS(Sampler(p, {}).next(V{}, {}, SIZE_MAX, 0), Error);
    CHECK_THROWS_AS(Sampler(p, {}).next(V{nan, -inf}, {}, SIZE_MAX, 0), Error);
    CHECK_THROWS_AS(Sampler(p, {0, 1}).next(V{1, nan, 1}, {}, SIZE_MAX, 0), Error);
    CHECK(Sampler(p, {0, 0, 1}).next(V{5, 5, -1e30f, 5}, {}, SIZE_MAX, 0) == 2);
  }
}

TEST_CASE("sampler: penalties") {
  SamplerParams p;
  const std::vector<int32_t> seen = {0, 1, 0, -1, 99};  // ids outside the vocabulary do nothing
  p.repetition_penalty = 2;                             // 2 -> 1, -1 -> -2
  CHECK(greedy(p, {2, -1, 0.99f}, seen) == 0);
  CHECK(greedy(p, {2, -1, 1.01f}, seen) == 2);
  CHECK(greedy(p, {-9, -1, -1.99f}, seen) == 2);
  CHECK(greedy(p, {-9, -1, -2.01f}, seen) == 1);
  p.presence_penalty = 0.5f;
  p.frequency_penalty = 0.25f;  // 2 / 2 - 0.5 - 2 * 0.25 = 0; -1 * 2 - 0.5 - 0.25 = -2.75
  CHECK(greedy(p, {2, -9, -0.01f}, seen) == 0);
  CHECK(greedy(p, {2, -9, 0.01f}, seen) == 2);
  CHECK(greedy(p, {-9, -1, -2.74f}, seen) == 2);
  CHECK(greedy(p, {-9, -1, -2.76f}, seen) == 1);
  p.penalty_window = 3;  // 0 is seen once: 2 / 2 - 0.5 - 0.25 = 0.25; 1 is not
  CHECK(greedy(p, {2, -1, 0.24f}, seen) == 0);
  CHECK(greedy(p, {2, -1, 0.26f}, seen) == 2);
  CHECK(greedy(p, {-9, -1, -1.01f}, seen) == 1);
  Sampler s(p, {});  // nothing is left over from the call before
  for (int i = 0; i < 3; ++i) CHECK(s.next(std::vector<float>{2, -1, 0.24f}, seen, SIZE_MAX, 0) == 0);
  CHECK(s.next(std::vector<float>{2, -1, 1.9f}, {}, SIZE_MAX, 0) == 0);
  // Of a prompt of three and an answer of one token, presence and frequency see the answer only.
  SamplerParams chat;
  chat.presence_penalty = 2, chat.frequency_penalty = 1;
  const std::vector<int32_t> turns = {0, 0, 0, 1};
  CHECK(Sampler(chat, {}).next(std::vector<float>{2, 4.5f, 1}, turns, 1, 0) == 0);
  CHECK(Sampler(chat, {}).next(std::vector<float>{2, 5.5f, 1}, turns, 1, 0) == 1);
  CHECK(Sampler(chat, {}).next(std::vector<float>{2, 1, 1.9f}, turns, 0, 0) == 0);
  p.frequency_penalty = -1;  // a reward is possible
  CHECK(greedy(p, {2, 1, 2.4f}, {1, 1, 1}) == 1);
}

TEST_CASE("sampler: filters by hand") {
  const auto params = [](float t, int k, float top_p, float min_p) {
    SamplerParams p;
    p.temperature = t, p.top_k = k, p.top_p = top_p, p.min_p = min_p;
    return p;
  };
  const float ln2 = 0.69314718f;
  const std::vector<float> half = {-3 * ln2, 0, -2 * ln2, -1 * ln2, -3 * ln2};
       // 1/16... : id 1: 1/2, 3: 1/4, 2: 1/8, 0 and 4: 1/16
  CHECK(support(params(1, 0, 1, 0), half) == Set{0, 1, 2, 3, 4});
  CHECK(support(params(1, 3, 1, 0), half) == Set{1, 2, 3});
  CHECK(support(params(1, 4, 1, 0), half) == Set{0, 1, 2, 3});  // of equals the lower id
  CHECK(support(params(1, 1, 1, 0), half) == Set{1});
  CHECK(support(params(1, 99, 1, 0), half) == Set{0, 1, 2, 3, 4});
  CHECK(support(params(1, 0, 0.49f, 0), half) == Set{1});
  CHECK(support(params(1, 0, 0.51f, 0), half) == Set{1, 3});
  CHECK(support(params(1, 0, 0.74f, 0), half) == Set{1, 3});
  CHECK(support(params(1, 0, 0.76f, 0), half) == Set{1, 2, 3});
  CHECK(support(params(1, 0, 0.93f, 0), half) == Set{0, 1, 2, 3});
  CHECK(support(params(1, 0, 1e-9f, 0), half) == Set{1});  // never empty
  CHECK(support(params(1, 0, 1, 0.26f), half) == Set{1, 3});
  CHECK(support(params(1, 0, 1, 0.24f), half) == Set{1, 2, 3});
  CHECK(support(params(1, 0, 1, 1), half) == Set{1});
  // top-k first: of the two left one has 2/3. top-p before min-p: min-p compares with the largest, so it sees the same ratios.
  CHECK(support(params(1, 2, 0.66f, 0), half) == Set{1});
  CHECK(support(params(1, 2, 0.67f, 0), half) == Set{1, 3});
  CHECK(support(params(1, 0, 0.76f, 0.26f), half) == Set{1, 3});
  // Temperature first: at 1/2 the odds are 1, 1/4, 1/16, 1/64, 1/64, the first has 0.744; at 2 it has 0.343.
  CHECK(support(params(0.5f, 0, 0.74f, 0), half) == Set{1});
  CHECK(support(params(0.5f, 0, 0.75f, 0), half) == Set{1, 3});
  CHECK(support(params(2, 0, 0.35f, 0), half) == Set{1, 3});
  CHECK(support(params(2, 0, 1, 0.51f), half) == Set{1, 3});
  CHECK(support(params(0.5f, 0, 1, 0.24f), half) == Set{1, 3});
  // Exactly half each, in bits: the first alone reaches 0.5.
  CHECK(support(params(1, 0, 0.5f, 0), {3, 3}) == Set{0});
  CHECK(support(params(1, 0, 0.5000001f, 0), {3, 3}) == Set{0, 1});
  CHECK(support(params(1, 2, 1, 0), {-0.0f, 0.0f, 0.0f}) == Set{0, 1});
  CHECK(support(params(1, 0, 1, 1), {1, 2, 2}) == Set{1, 2});

  const float nan = NAN, inf = INFINITY;
  CHECK(support(params(1, 0, 1, 0), {1, nan, -inf, 1, 1}, {1, 1, 1, 0}) == Set{0});
  CHECK(support(params(9, 2, 1, 0), {nan, 1, 5, 0, nan, 2}, {1, 1, 0, 1, 1, 1}) == Set{1, 5});
  CHECK(support(params(1, 0, 0.9f, 0), {0, inf, 3, inf}) == Set{1, 3});
  CHECK(support(params(1e-30f, 0, 1, 0), {0, 1, 0.99999f}) == Set{1});
  CHECK(support(params(1e30f, 0, 1, 0), {0, 1, -80}) == Set{0, 1, 2});
  SamplerParams p = params(1, 1, 1, 0);
  p.presence_penalty = 2;
  CHECK(support(p, {1, 2, 0}, {}, {1}) == Set{0});  // penalties before top-k
}

TEST_CASE("sampler: frequencies") {
  const std::vector<float> logits = {1.5f, -0.5f, 2.25f, 0, NAN, 1.5f, 0.75f, -3, 2, 9, -1.25f, 0.1f};
  const std::vector<uint8_t> allowed = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1};
  SamplerParams all, filtered;
  all.temperature = 1.25f;
  all.seed = 12;
  filtered = all;
  filtered.top_k = 8, filtered.top_p = 0.9f, filtered.min_p = 0.1f;
  for (const auto& p : {all, filtered}) {
    const auto expected = reference(p, logits, allowed, {});
    CHECK(expected.size() == (p.top_k ? 6 : 10));
    std::vector<int> counts(logits.size());
    Sampler s(p, allowed);
    const int n = 100000;
    for (int i = 0; i < n; ++i) ++counts[s.next(logits, {}, SIZE_MAX, i)];
    double chi2 = 0;
    int drawn = 0;
    for (const Candidate& c : expected) {
      chi2 += (counts[c.id] - n * c.p) * (counts[c.id] - n * c.p) / (n * c.p);
      drawn += counts[c.id];
    }
    CHECK(drawn == n);
    CHECK(chi2 < 27.9);  // 99.9 % of 9 degrees of freedom
  }
}

TEST_CASE("sampler: a function of seed and position") {
  Random r;
  std::vector<float> logits(500);
  for (float& x : logits) x = float(r.normal());
  SamplerParams p;
  p.temperature = 1;
  p.seed = 77;
  Sampler a(p, {}), b(p, {});
  p.seed = 78;
  Sampler other(p, {});
  int differ = 0, repeats = 0;
  for (int i = 0; i < 200; ++i) {
    const int32_t id = a.next(logits, {}, SIZE_MAX, i);
    CHECK(b.next(logits, std::vector<int32_t>{1, 2}, SIZE_MAX, i) == id);
    CHECK(a.next(logits, {}, SIZE_MAX, i) == id);
    differ += other.next(logits, {}, SIZE_MAX, i) != id;
    repeats += a.next(logits, {}, SIZE_MAX, i + 1) == id;
  }
  for (int i = 200; i-- > 0;) b.next(logits, {}, SIZE_MAX, i);
  CHECK(b.next(logits, {}, SIZE_MAX, 0) == a.next(logits, {}, SIZE_MAX, 0));
  CHECK(differ > 150);
  CHECK(repeats < 50);
}

TEST_CASE("sampler: equals the reference") {
  Random r;
  int close_calls = 0;
  for (int round = 0; round < 1500; ++round) {
    SamplerParams p;
    p.temperature = float(0.05 + 3 * r.uniform() * r.uniform());
    p.seed = round;
    if (r.below(2)) p.top_k = 1 + r.below(r.below(2) ? 50 : 3000);
    if (r.below(2)) p.top_p = float(1 - r.uniform() * r.uniform());
    if (r.below(2)) p.min_p = float(r.uniform() * r.uniform() * r.uniform());
    if (r.below(2)) p.repetition_penalty = float(0.5 + r.uniform());
    if (r.below(2)) p.presence_penalty = float(r.normal());
    if (r.below(2)) p.frequency_penalty = float(r.normal());
    if (r.below(2)) p.penalty_window = 1 + r.below(20);
    std::vector<float> logits(1 + r.below(r.below(4) ? 40 : 3000));
    const double spread = 6 * r.uniform();
    const bool ties = r.below(2);
    for (float& x : logits) {
      x = float(spread * r.normal());
      if (ties) x = std::round(x);
      if (r.below(20) == 0) x = r.below(2) ? NAN : -INFINITY;
    }
    logits[r.below(int(logits.size()))] = 1;
    std::vector<uint8_t> allowed;
    if (r.below(2)) {
      allowed.assign(std::max<int>(1, int(logits.size()) - r.below(3)), 1);
      for (auto& a : allowed) a = r.below(10) != 0;
    }
    std::vector<int32_t> history(r.below(40));
    for (auto& id : history) id = r.below(int(logits.size()) + 2) - 1;
    bool possible = false;
    for (size_t id = 0; id < logits.size(); ++id)
      possible |= logits[id] > -INFINITY && (allowed.empty() || (id < allowed.size() && allowed[id]));
    if (!possible) continue;

    const auto c = reference(p, logits, allowed, history);
    Sampler s(p, allowed);
    for (int position = 0; position < 4; ++position) {
      const double u = counter_uniform(p.seed, position, 0);
      double sum = 0;
      size_t i = 0;
      while (i + 1 < c.size() && sum + c[i].p <= u) sum += c[i++].p;
      const double room = std::min(u - sum, sum + c[i].p - u);
      const int32_t id = s.next(logits, history, SIZE_MAX, position);
      if (id != c[i].id && room < 1e-12) ++close_calls;
      else CHECK_MESSAGE(id == c[i].id, "round " << round << " position " << position);
    }
    SamplerParams g = p;
    g.temperature = 0;
    CHECK(Sampler(g, allowed).next(logits, history, SIZE_MAX, 0) == c[0].id);
  }
  CHECK(close_calls <= 1);
}

TEST_CASE("sampler: refusals") {
  check(SamplerParams{});
  const auto refused = [](const char* option, auto&& change) {
    SamplerParams p;
    change(p);
    try {
      check(p);
    } catch (const Error& e) {
      CHECK_THROWS_AS(Sampler(p, {}), Error);
      return std::string(e.what()).starts_with(option);
    }
    return false;
  };
  for (const float bad : {-1.0f, NAN, INFINITY}) {
    CHECK(refused("--temp", [&](auto& p) { p.temperature = bad; }));
    CHECK(refused("--top-p", [&](auto& p) { p.top_p = bad; }));
    CHECK(refused("--min-p", [&](auto& p) { p.min_p = bad; }));
    CHECK(refused("--repeat-penalty", [&](auto& p) { p.repetition_penalty = bad; }));
  }
  for (const float bad : {NAN, -INFINITY}) {
    CHECK(refused("--presence-penalty", [&](auto& p) { p.presence_penalty = bad; }));
    CHECK(refused("--frequency-penalty", [&](auto& p) { p.frequency_penalty = bad; }));
  }
  CHECK(refused("--top-p", [](auto& p) { p.top_p = 0; }));
  CHECK(refused("--top-p", [](auto& p) { p.top_p = 1.01f; }));
  CHECK(refused("--min-p", [](auto& p) { p.min_p = 1.01f; }));
  CHECK(refused("--repeat-penalty", [](auto& p) { p.repetition_penalty = 0; }));
  CHECK(refused("--top-k", [](auto& p) { p.top_k = -1; }));
  CHECK(refused("--penalty-window", [](auto& p) { p.penalty_window = -1; }));
}

TEST_CASE("sampler: a large vocabulary is no burden") {
  Random r;
  std::vector<float> logits(151936);
  for (float& x : logits) x = float(3 * r.normal());
  SamplerParams p;
  p.temperature = 0.7f, p.top_k = 20, p.top_p = 0.8f, p.presence_penalty = 1;
  Sampler s(p, std::vector<uint8_t>(151669, 1));
  const std::vector<int32_t> history(1000, 5);
  const auto milliseconds = [](auto&& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  };
  const double sampled = milliseconds([&] {
    for (int i = 0; i < 10; ++i) s.next(logits, history, SIZE_MAX, i);
  }) / 10;
  const double sorted = milliseconds([&] { std::sort(logits.begin(), logits.end()); });
  MESSAGE("top-k 20 of 151936: " << sampled << " ms a token; sorting them: " << sorted << " ms");
  CHECK(sampled < sorted);  // by a factor of ten or more
}
