#include "ggml-lite/core/measure.h"

#include <chrono>

namespace qn {
namespace {

// Everything as it was, whatever comes
struct Settings {
  explicit Settings(Devices d) : devices(d) {}
  ~Settings() { select(~0u, false); }
  void select(uint32_t mask, bool count_experts) const {
    for (Device* d : devices) d->select(mask), d->count_experts(count_experts);
  }
  Devices devices;
};

void sync(Devices devices) {
  for (Device* d : devices) d->sync();
}

Device::Traffic traffic(Devices devices, Op op) {
  Device::Traffic sum;
  for (const Device* d : devices) sum.calls += d->traffic(op).calls, sum.bytes += d->traffic(op).bytes;
  return sum;
}

uint64_t total(Devices devices) {
  uint64_t sum = 0;
  for (int i = 0; i < kOps; i++) sum += traffic(devices, static_cast<Op>(i)).bytes;
  return sum;
}

// Runs the operations in `mask` and leaves in traffic() what they moved.
void count(Devices devices, const Pass& pass, uint32_t mask, bool count_experts = true) {
  const Settings settings(devices);
  for (Device* d : devices) d->forget_traffic();
  settings.select(mask, count_experts);
  pass.run(false);
}

double time_of(Devices devices, const Pass& pass, uint32_t mask) {
  const Settings settings(devices);
  settings.select(mask, false);
  sync(devices);
  const auto start = std::chrono::steady_clock::now();
  pass.run(true);
  sync(devices);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

PassTime time_pass(Devices devices, const Pass& pass) {
  PassTime r{};
  pass.prepare(), count(devices, pass, ~0u);
  r.bytes = total(devices);
  for (int run = 0; run < 3; run++) pass.prepare(), r.seconds = time_of(devices, pass, ~0u);  // as it is, recording, replaying
  return r;
}

std::vector<OpTime> time_operations(Devices devices, const Pass& pass) {
  std::vector<OpTime> out;
  for (int i = 0; i < kOps; i++) {
    const Op op = static_cast<Op>(i);
    pass.prepare(), pass.run(true);  // leaves plausible values everywhere
    count(devices, pass, bit(op));
    const auto [calls, bytes] = traffic(devices, op);
    if (!calls || op == Op::JoinExperts) continue;  // that is timed with place_experts
    std::vector<double> seconds;
    for (int repeat = -3; repeat < 9; repeat++)
      if (const double took = time_of(devices, pass, bit(op)); repeat >= 0) seconds.push_back(took);
    std::ranges::nth_element(seconds, seconds.begin() + 4);
    out.push_back({name(op), calls, seconds[4], bytes});
  }
  return out;
}

double read_bandwidth(Devices devices, std::span<const uint64_t> weights, std::span<const uint64_t> spare) {
  double bytes = 0, seconds = 0;
  for (size_t i = 0; i < devices.size(); i++) {
    const double measured = devices[i]->read_bandwidth(devices[i]->memory() ? 0 : spare[i]);
    if (measured <= 0) return 0;
    bytes += static_cast<double>(weights[i]), seconds += static_cast<double>(weights[i]) / measured;
  }
  return bytes / seconds;
}

uint64_t bytes_asked(Devices devices, const Pass& pass) {
  count(devices, pass, 0, false);
  return total(devices);
}

}  // namespace qn
