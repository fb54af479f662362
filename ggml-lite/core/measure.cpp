#include "ggml-lite/core/measure.h"

#include <chrono>

namespace qn {
namespace {

// Everything as it was, whatever comes
struct Settings {
  explicit Settings(Device& d) : device(d) {}
  ~Settings() { device.select(~0u), device.count_experts(false); }
  Device& device;
};

uint64_t total(const Device& d) {
  uint64_t sum = 0;
  for (int i = 0; i < kOps; i++) sum += d.traffic(static_cast<Op>(i)).bytes;
  return sum;
}

// Runs the operations in `mask` and leaves in traffic() what they moved.
void count(Device& d, const Pass& pass, uint32_t mask) {
  const Settings settings(d);
  d.forget_traffic();
  d.select(mask), d.count_experts(true);
  pass.run(false);
}

double time_of(Device& d, const Pass& pass, uint32_t mask) {
  const Settings settings(d);
  d.select(mask);
  d.sync();
  const auto start = std::chrono::steady_clock::now();
  pass.run(true);
  d.sync();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

PassTime time_pass(Device& device, const Pass& pass) {
  PassTime r{};
  pass.prepare(), count(device, pass, ~0u);
  r.bytes = total(device);
  for (int run = 0; run < 3; run++) pass.prepare(), r.seconds = time_of(device, pass, ~0u);  // as it is, recording, replaying
  return r;
}

std::vector<OpTime> time_operations(Device& device, const Pass& pass) {
  std::vector<OpTime> out;
  for (int i = 0; i < kOps; i++) {
    const Op op = static_cast<Op>(i);
    pass.prepare(), pass.run(true);  // leaves plausible values everywhere
    count(device, pass, bit(op));
    const auto [calls, bytes] = device.traffic(op);
    if (!calls) continue;
    std::vector<double> seconds;
    for (int repeat = -3; repeat < 9; repeat++)
      if (const double took = time_of(device, pass, bit(op)); repeat >= 0) seconds.push_back(took);
    std::ranges::nth_element(seconds, seconds.begin() + 4);
    out.push_back({name(op), calls, seconds[4], bytes});
  }
  return out;
}

uint64_t bytes_asked(Device& device, const Pass& pass) {
  const Settings settings(device);
  device.forget_traffic();
  device.select(0);
  pass.run(false);
  return total(device);
}

}  // namespace qn
