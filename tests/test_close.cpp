// The checker must say no to every way a kernel is known to fail. Each case names the failure.
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "tests/close.h"

using qn::close;

static std::vector<float> reference() {
  std::vector<float> r(4096);
  for (size_t i = 0; i < r.size(); i++) r[i] = static_cast<float>(static_cast<int>(i % 23) - 11) / 11.f;
  return r;
}
static bool accepts(const std::vector<float>& got) { return close(reference(), got, 1e-7, 1e-3).ok; }

TEST_CASE("close accepts what is right") {
  auto x = reference();
  CHECK(accepts(x));
  for (auto& v : x) v *= 1.0001f;  // within both bounds
  CHECK(accepts(x));
}

TEST_CASE("close refuses values that are not finite") {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  for (float bad : {nan, -nan, inf, -inf}) {
    auto x = reference();
    x[7] = bad;
    CHECK_FALSE(accepts(x));
    CHECK_FALSE(close(x, x, 1, 1));  // also in the reference, also when equal
    x.assign(x.size(), bad);
    CHECK_FALSE(accepts(x));
  }
}

TEST_CASE("close refuses what kernels do wrong") {
  const auto r = reference();
  auto zero = r;
  for (auto& v : zero) v = 0;
  CHECK_FALSE(accepts(zero));
  auto negated = r;
  for (auto& v : negated) v = -v;
  CHECK_FALSE(accepts(negated));
  auto shifted = r;
  for (size_t i = 0; i < r.size(); i++) shifted[i] = r[(i + 1) % r.size()];
  CHECK_FALSE(accepts(shifted));
  auto tail = r;
  for (size_t i = r.size() - 8; i < r.size(); i++) tail[i] = 0;
  CHECK_FALSE(accepts(tail));
  auto one = r;
  one[7] += .3f;
  CHECK_FALSE(accepts(one));
  auto negatives = r;
  for (auto& v : negatives)
    if (v < 0) v *= 100;
  CHECK_FALSE(accepts(negatives));
  auto tripled = r;
  for (auto& v : tripled) v *= 3;
  CHECK_FALSE(accepts(tripled));
}

TEST_CASE("close refuses references that prove nothing") {
  CHECK_FALSE(close({}, {}, 1, 1));
  const std::vector<float> zeros(9);
  CHECK_FALSE(close(zeros, zeros, 1, 1));
  auto shorter = reference();
  shorter.pop_back();
  CHECK_FALSE(accepts(shorter));
  CHECK_FALSE(close(shorter, reference(), 1, 1));
}

TEST_CASE("each bound bites alone") {
  auto x = reference();
  x[100] += 0.002f;  // nmse 2.5e-9: only the absolute bound sees it
  CHECK(close(reference(), x, 1e-7, 1e-3).why == std::string("absolute bound"));
  x = reference();
  for (auto& v : x) v *= 1.0009f;  // worst 9e-4: only the relative bound sees it
  CHECK(close(reference(), x, 1e-7, 1e-3).why == std::string("relative bound"));
}
