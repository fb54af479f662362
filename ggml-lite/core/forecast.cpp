#include "ggml-lite/core/forecast.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "ggml-lite/base/check.h"  // format

namespace qn {

constexpr double kGpuReads = 0.87, kOperation = 2.3e-6, kCpuReads = 0.7, kHostReads = 0.65, kRequest = 17e-6;
constexpr double kAhead = 0.35, kAheadTime = 0.8;
constexpr double kMostRead = 3.05e12, kPageable = 8e9;
constexpr double kBytesPerToken = 90e6, kTokensPerThread = 22;

Forecast forecast(std::span<const ForecastPart> parts, int ubatch, const HostPlan& with, const Speeds& s) {
  Forecast f;
  const double gpu = std::min(s.gpu, kMostRead);
  const auto seconds_of = [&](const ForecastPart& p) {  // a token of a long prompt
    return (p.gpu ? kBytesPerToken / gpu : 1 / (kTokensPerThread * with.threads)) * p.work * p.layers / kReferenceLayers;
  };
  double token = 0, bound = 0, slowest = 0;
  int layers = 0;
  for (const ForecastPart& p : parts) layers += p.layers;
  for (const ForecastPart& p : parts) {
    const double chosen = p.chosen, record = static_cast<double>(p.record_bytes), n = p.layers;
    const double missed = p.slots ? chosen * (1 - static_cast<double>(p.slots) / p.experts) : 0;
    const double fetched = missed > 0 && p.fetch_percent > 0 && with.pinned ? std::max(1 - std::exp(-missed), missed * p.fetch_percent / 100) : 0;  // one if any
    const double here = static_cast<double>(p.rest_bytes) + n * (chosen - missed) * record;
    const double disk = s.disk > 0 ? with.from_disk / s.disk : 0;  // seconds a byte
    const double device = p.gpu ? here / (kGpuReads * gpu) + p.operations * kOperation : here / (kCpuReads * s.host) + n * chosen * record * disk;
    const double reads = n * (missed - fetched) * record / (kHostReads * s.host), ahead = std::min(kAhead * reads, kAheadTime * device);
    const double bus = n * fetched * record / s.bus, host = reads - ahead + n * ((missed - fetched) * record * disk + (missed > 0 ? kRequest : 0));
    const double missing = n * missed * record / s.host, others = n * (chosen - missed) * record / (p.gpu ? s.gpu : s.host);
    bound += std::max(missing, others) + static_cast<double>(p.rest_bytes) / (p.gpu ? s.gpu : s.host);
    f.seconds[0] += device;
    if (missed > 0) f.seconds[1] += bus, f.seconds[2] += host;
    token += device + (missed > 0 ? std::max(bus, host) : 0);
    f.misses += missed * n / layers;
    const double each = seconds_of(p);
    slowest = std::max(slowest, each);
    if (p.slots) f.stream += n * (p.experts - p.slots) * record * (1 / (with.pinned ? s.bus : std::min(s.bus, kPageable)) + disk);
    if (!p.gpu) f.stream += n * p.experts * record * disk;
  }
  f.decode = 1 / token, f.bound = 1 / bound;
  for (int i = 0; i < 2; i++) {
    const int prompt = i ? 8192 : 2048, passes = (prompt + ubatch - 1) / ubatch;
    double compute = 0;
    for (const ForecastPart& p : parts) compute += seconds_of(p) * std::min(prompt, ubatch);
    compute += (prompt - std::min(prompt, ubatch)) * slowest;  // the passes behind the first follow in a pipeline
    f.prefill[i] = prompt / std::max(compute, passes * f.stream);
  }
  return f;
}

std::string best_change(std::span<const ForecastPart> parts, int ubatch, const HostPlan& host, const Speeds& speeds, const Choices& now) {
  const double before = forecast(parts, ubatch, host, speeds).decode;
  double best = 1.03;
  std::string text;
  const auto consider = [&](const char* what, double rest, uint64_t freed) {  // rest: what is left of the bytes beside experts
    std::vector<ForecastPart> then(parts.begin(), parts.end());
    for (ForecastPart& p : then) {
      const double room = static_cast<double>(p.rest_bytes) * (1 - rest) + static_cast<double>(freed) / static_cast<double>(parts.size());
      p.rest_bytes = static_cast<uint64_t>(static_cast<double>(p.rest_bytes) * rest);
      if (p.slots && p.layers > 2) p.slots = std::min(p.experts - 1, p.slots + static_cast<int>(room / ((p.layers - 2.0) * static_cast<double>(p.record_bytes))));
    }
    const double gain = forecast(then, ubatch, host, speeds).decode / before;
    if (gain > best) best = gain, text = format("%s: %.1f x", what, gain);
  };
  if (now.bf16_cache) consider("--kv-type int8", 1, now.kv_bytes / 2);
  if (now.ctx > 8192) consider("--ctx 8192", 1, now.kv_bytes - now.kv_bytes / static_cast<uint64_t>(now.ctx) * 8192);
  if (now.bf16_rest) consider("a file made with --rest int8", 0.55, 0);
  return text;
}

}  // namespace qn
