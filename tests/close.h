// The tolerance checker. It is tested itself (test_close.cpp) before anything relies on it, because a checker that accepts NaN,
// an all-zero output or a lost tail makes every later test worthless.
//   1. sizes equal, not empty, and the reference not all zero: otherwise nothing is proved and the answer is no
//   2. every value finite, decided on the bits so that no compiler flag can talk it away
//   3. relative bound: sum (got-ref)^2 <= max_nmse * sum ref^2
//   4. absolute bound on each element: |got-ref| <= max_abs  (catches one wrong element among thousands)
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>

namespace qn {

inline bool finite_bits(float f) { return (std::bit_cast<uint32_t>(f) & 0x7f800000u) != 0x7f800000u; }

struct Close {
  bool ok = false;
  const char* why = "";
  double nmse = 0, worst = 0;  // worst: largest absolute difference
  size_t at = 0;               // where it is
  explicit operator bool() const { return ok; }
  std::string text() const {
    char s[160];
    std::snprintf(s, sizeof s, "%s%snmse %.3g, worst %.3g at %zu", why, *why ? ", " : "", nmse, worst, at);
    return s;
  }
};

inline Close close(std::span<const float> ref, std::span<const float> got, double max_nmse, double max_abs) {
  Close c;
  if (ref.empty()) return c.why = "empty reference", c;
  if (ref.size() != got.size()) return c.why = "sizes differ", c;
  double error = 0, norm = 0;
  for (size_t i = 0; i < ref.size(); i++) {
    c.at = i;
    if (!finite_bits(ref[i])) return c.why = "reference not finite", c;
    if (!finite_bits(got[i])) return c.why = "result not finite", c;
  }
  c.at = 0;
  for (size_t i = 0; i < ref.size(); i++) {
    const double e = std::fabs(static_cast<double>(got[i]) - static_cast<double>(ref[i]));
    error += e * e;
    norm += static_cast<double>(ref[i]) * static_cast<double>(ref[i]);
    if (e > c.worst) c.worst = e, c.at = i;
  }
  if (norm == 0) return c.why = "reference all zero", c;
  c.nmse = error / norm;
  if (!(c.nmse <= max_nmse)) return c.why = "relative bound", c;
  if (!(c.worst <= max_abs)) return c.why = "absolute bound", c;
  c.ok = true;
  return c;
}

// Root mean square: the scale at which an absolute bound has to be chosen.
inline double rms(std::span<const float> x) {
  double s = 0;
  for (float v : x) s += static_cast<double>(v) * v;
  return x.empty() ? 0 : std::sqrt(s / static_cast<double>(x.size()));
}

}  // namespace qn
