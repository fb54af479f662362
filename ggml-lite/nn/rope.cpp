#include "ggml-lite/nn/rope.h"

#include <algorithm>
#include <cmath>

#include "ggml-lite/core/limits.h"

namespace qn {

RopeScaling read_rope(const QnFile& f, int dim, int context) {
  RopeScaling r;
  r.dim = dim, r.original = context;
  r.theta = f.real("rope.theta", kMinRopeTheta, kMaxRopeTheta);
  r.factor = f.real("rope.yarn_factor", 1, kMaxYarnFactor);
  r.attention_factor = f.real("rope.attention_factor", 1e-3, 1e3);
  if (r.factor == 1) return r;
  r.original = static_cast<double>(f.integer("rope.yarn_original_context", 1, kMaxYarnContext));
  r.beta_fast = f.real("rope.yarn_beta_fast", 1e-3, 1e6), r.beta_slow = f.real("rope.yarn_beta_slow", 1e-3, 1e6);
  r.truncate = f.integer("rope.yarn_truncate", 0, 1);
  return r;
}

std::vector<float> rope_frequencies(const RopeScaling& r) {
  std::vector<float> out(static_cast<size_t>(r.dim / 2));
  double lo = 0, hi = 0;
  if (r.factor != 1) {
    auto pair = [&](double rotations) { return r.dim * std::log(r.original / (2 * M_PI * rotations)) / (2 * std::log(r.theta)); };
    lo = pair(r.beta_fast), hi = pair(r.beta_slow);
    if (r.truncate) lo = std::floor(lo), hi = std::ceil(hi);
    lo = std::max(lo, 0.0), hi = std::min(hi, r.dim - 1.0);
    if (lo == hi) hi += 0.001;
  }
  for (int i = 0; i < r.dim / 2; i++) {
    const double plain = std::pow(r.theta, -2.0 * i / r.dim);
    const double ramp = r.factor == 1 ? 0 : std::clamp((i - lo) / (hi - lo), 0.0, 1.0);
    out[static_cast<size_t>(i)] = static_cast<float>(ramp * plain / r.factor + (1 - ramp) * plain);
  }
  return out;
}

double yarn_attention_factor(double factor) { return factor <= 1 ? 1 : 0.1 * std::log(factor) + 1; }

}  // namespace qn
