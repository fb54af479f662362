#include "ggml-lite/core/plan.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/term.h"  // human_gib

namespace qn {

// Positions beside which everything else fits, in steps of 256
static int most_positions(const PlanRequest& r, uint64_t own, int ubatch) {
  const uint64_t fixed = own + r.scratch(ubatch, r.ctx ? r.ctx : r.model_context);
  const uint64_t left = r.budget > fixed ? (r.budget - fixed) / (r.own_memory ? 1 : 2) / std::max<uint64_t>(r.per_position, 1) : 0;
  return static_cast<int>(std::min<uint64_t>(left < 256 ? left : left / 256 * 256, static_cast<uint64_t>(r.model_context)));
}

static uint64_t own_bytes(const PlanRequest& r) { return (r.own_memory ? r.weights + kDeviceMargin : 0) + r.state; }

// Experts in memory of the host; slots 0: not even so
static MemoryPlan plan_offload(const PlanRequest& r) {
  MemoryPlan p;
  p.state = r.state, p.placed = r.weights - r.experts;
  const int few = std::min(r.model_context, 2048);
  // Long passes, for each brings all experts over the bus; but scratch memory for them takes the place of experts
  for (int ubatch = r.ubatch ? r.ubatch : r.budget >= 20ull << 30 ? 4096 : r.budget >= 12ull << 30 ? 2048 : 1024;; ubatch /= 2) {
    for (int ctx = r.ctx ? r.ctx : std::min(r.model_context, 32768);; ctx = std::max(ctx / 2, few)) {
      p.ctx = ctx, p.ubatch = ubatch, p.kv = r.per_position * static_cast<uint64_t>(ctx), p.scratch = r.scratch(ubatch, ctx);
      const uint64_t fixed = p.placed + kDeviceMargin + p.state + p.kv + p.scratch;
      for (int slots = r.slots ? r.slots : r.expert_count - 1; slots >= (r.slots ? r.slots : 1); slots--) {
        if (fixed + r.expert_memory(slots) > r.budget) continue;
        p.slots = slots, p.host = r.experts, p.weights = p.placed + r.expert_memory(slots);
        return p;
      }
      if (r.ctx || ctx <= few) break;
    }
    if (r.ubatch || ubatch <= 256) return p;
  }
}

MemoryPlan plan_memory(const PlanRequest& r) {
  if (r.slots && (!r.experts || r.slots >= r.expert_count))
    fail("--slots: expected a GPU and 1 to %d experts of every layer, got %d; leave it out to have as many as fit", std::max(1, r.expert_count - 1), r.slots);
  if (r.ctx > r.model_context) fail("--ctx: %d positions, but the model was made for %d; choose at most that", r.ctx, r.model_context);
  MemoryPlan p;
  p.weights = p.placed = r.weights, p.state = r.state;
  const uint64_t own = own_bytes(r);
  // A long pass reads every expert once for many tokens: as long as there is room for a decent context.
  p.ubatch = r.ubatch ? r.ubatch : !r.own_memory ? 2048 : r.one_of_several ? 4096 : 8192;
  while (!r.ubatch && p.ubatch > 512 && most_positions(r, own, p.ubatch) < (r.ctx ? r.ctx : std::min(r.model_context, 32768))) p.ubatch /= 2;
  p.ctx = r.ctx ? r.ctx : most_positions(r, own, p.ubatch);
  p.kv = r.per_position * static_cast<uint64_t>(p.ctx);
  p.scratch = r.scratch(p.ubatch, std::max(p.ctx, 1));
  const uint64_t need = own + p.scratch + p.kv;
  const bool fits = p.ctx >= 1 && need <= r.budget && !r.slots;
  if (fits && (!r.experts || r.ctx || p.ctx >= std::min(r.model_context, 8192))) return p;
  if (r.experts && r.expert_count > 1)
    if (const MemoryPlan o = plan_offload(r); o.slots) return o;
  if (fits) return p;

  auto gib = [](uint64_t bytes) { return human_gib(bytes); };
  if (!r.own_memory)
    fail("not enough memory: KV cache %s, recurrent state and checkpoints %s, scratch %s, but only %s may be used; try a smaller --ctx or --ubatch, or a larger --ram",
         gib(p.kv).c_str(), gib(p.state).c_str(), gib(p.scratch).c_str(), gib(r.budget).c_str());
  // Not more positions than were asked for: the scratch was counted for those
  const int ubatch = std::min(p.ubatch, 512), asked = r.ctx ? r.ctx : r.model_context, room = std::min({most_positions(r, own, ubatch), r.others, asked});
  const std::string advice = room >= std::min(256, asked) ? format("try --ctx %d%s", room, p.ubatch > ubatch ? " --ubatch 512" : "")
                                         : "try a file made with --experts int4 --rest int8, a GPU with more memory or several as in --device cuda:0,1, or --device cpu";
  fail("%s does not fit on %s: weights %s, KV cache of %d positions %s, state and checkpoints %s, scratch %s, in all %s with %s to spare, but %s are free: %s are missing; %s",
       r.file.c_str(), r.device.c_str(), gib(p.weights).c_str(), p.ctx, gib(p.kv).c_str(), gib(p.state).c_str(), gib(p.scratch).c_str(), gib(need).c_str(),
       gib(kDeviceMargin).c_str(), gib(r.budget).c_str(), gib(std::max(need, r.budget + r.per_position) - r.budget).c_str(), advice.c_str());
}

bool pins_experts(uint64_t host, uint64_t ram) { return host > 0 && host + (2ull << 30) <= ram; }
bool holds_file(uint64_t file, uint64_t planned, uint64_t ram, bool must) {
  const bool room = planned <= ram && file <= ram - planned && ram - planned - file >= 2ull << 30;
  if (must && !room)
    fail("--no-mmap: the file takes %s of memory, beside %s and 2 GiB to spare, and %s may be used; leave it out", human_gib(file).c_str(),
         human_gib(planned).c_str(), human_gib(ram).c_str());
  return room;
}

std::vector<MemoryPlan> plan_devices(std::vector<PlanRequest> requests) {
  const bool several = requests.size() > 1;
  int others = INT_MAX, ubatch = INT_MAX, ctx = INT_MAX;
  for (const PlanRequest& r : requests) others = std::min(others, most_positions(r, own_bytes(r), r.ubatch ? std::min(r.ubatch, 512) : 512));
  for (PlanRequest& r : requests) r.one_of_several = several, r.others = others;
  // Each in turn may need shorter passes or a shorter context than the others, and less of both fits wherever more does.
  for (const PlanRequest& r : requests) ubatch = std::min(ubatch, plan_memory(r).ubatch);
  for (PlanRequest& r : requests) r.ubatch = ubatch, ctx = std::min(ctx, plan_memory(r).ctx);
  std::vector<MemoryPlan> out;
  for (PlanRequest& r : requests) r.ctx = ctx, out.push_back(plan_memory(r));
  return out;
}

std::vector<int> split_layers(const LayerBytes& b, std::span<const uint64_t> budgets) {
  const size_t layers = b.layers.size(), devices = budgets.size();
  QN_CHECK(devices > 0 && devices <= layers, "%zu layers on %zu devices", layers, devices);
  std::vector<double> before(layers + 1);  // bytes of the layers before layer i
  for (size_t i = 0; i < layers; i++) before[i + 1] = before[i] + static_cast<double>(b.layers[i]);
  const auto load = [&](size_t device, size_t begin, size_t end) {
    const uint64_t ends = (device == 0 ? b.front : 0) + (device + 1 == devices ? b.back : 0);
    return (before[end] - before[begin] + static_cast<double>(ends)) / static_cast<double>(std::max<uint64_t>(budgets[device], 1));
  };
  // least[d][i]: how full the fullest of the first d+1 devices is at best when they hold the first i layers; from[d][i]: where the last begins
  std::vector<std::vector<double>> least(devices, std::vector<double>(layers + 1));
  std::vector<std::vector<size_t>> from(devices, std::vector<size_t>(layers + 1));
  for (size_t i = 1; i <= layers; i++) least[0][i] = load(0, 0, i);
  for (size_t d = 1; d < devices; d++)
    for (size_t i = d + 1; i <= layers; i++)
      for (size_t begin = i - 1; begin >= d; begin--) {
        const double fullest = std::max(least[d - 1][begin], load(d, begin, i));
        if (begin == i - 1 || fullest < least[d][i]) least[d][i] = fullest, from[d][i] = begin;
      }
  std::vector<int> split(devices);
  for (size_t d = devices, end = layers; d-- > 0; end = from[d][end]) split[d] = static_cast<int>(end - from[d][end]);
  return split;
}

void check_split(std::span<const int> split, size_t devices, int layers) {
  std::string text;
  int64_t sum = 0;
  for (int n : split) text += (text.empty() ? "" : ",") + std::to_string(n), sum += n;
  if (split.size() != devices)
    fail("--split %s: expected %zu number%s, layers of each device of --device, got %zu", text.c_str(), devices, devices == 1 ? "" : "s", split.size());
  for (int n : split)
    if (n < 1) fail("--split %s: expected at least 1 layer on each device, got %d", text.c_str(), n);
  if (sum != layers)
    fail("--split %s: expected numbers that add up to the %d layers of the model, got %lld; leave --split out for stages of equal bytes", text.c_str(), layers, static_cast<long long>(sum));
}

}  // namespace qn
