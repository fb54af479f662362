#include "ggml-lite/core/plan.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/term.h"  // human_gib

namespace qn {

// Positions beside which everything else fits, in steps of 256
static int most_positions(const PlanRequest& r, uint64_t own, int ubatch) {
  const uint64_t fixed = own + r.scratch(ubatch, r.ctx ? r.ctx : r.model_context);
  const uint64_t left = r.budget > fixed ? (r.budget - fixed) / (r.own_memory ? 1 : 2) / r.per_position : 0;
  return static_cast<int>(std::min<uint64_t>(left < 256 ? left : left / 256 * 256, static_cast<uint64_t>(r.model_context)));
}

MemoryPlan plan_memory(const PlanRequest& r) {
  if (r.ctx > r.model_context) fail("--ctx: %d positions, but the model was made for %d; choose at most that", r.ctx, r.model_context);
  MemoryPlan p;
  p.weights = r.weights, p.state = r.state;
  const uint64_t own = (r.own_memory ? r.weights + kDeviceMargin : 0) + r.state;
  // A long pass reads every expert once for many tokens: a GPU wants it as long as there is room for a decent context.
  p.ubatch = r.ubatch ? r.ubatch : r.own_memory ? 8192 : 512;
  while (!r.ubatch && p.ubatch > 512 && most_positions(r, own, p.ubatch) < (r.ctx ? r.ctx : std::min(r.model_context, 32768))) p.ubatch /= 2;
  p.ctx = r.ctx ? r.ctx : most_positions(r, own, p.ubatch);
  p.kv = r.per_position * static_cast<uint64_t>(p.ctx);
  p.scratch = r.scratch(p.ubatch, std::max(p.ctx, 1));
  const uint64_t need = own + p.scratch + p.kv;
  if (p.ctx >= 1 && need <= r.budget) return p;

  auto gib = [](uint64_t bytes) { return human_gib(bytes); };
  if (!r.own_memory)
    fail("not enough memory: KV cache %s, recurrent state and checkpoints %s, scratch %s, but only %s may be used; try a smaller --ctx or --ubatch, or a larger --ram",
         gib(p.kv).c_str(), gib(p.state).c_str(), gib(p.scratch).c_str(), gib(r.budget).c_str());
  // Not more positions than were asked for: the scratch was counted for those
  const int ubatch = std::min(p.ubatch, 512), asked = r.ctx ? r.ctx : r.model_context, fits = std::min(most_positions(r, own, ubatch), asked);
  const std::string advice = fits >= std::min(256, asked) ? format("try --ctx %d%s", fits, p.ubatch > ubatch ? " --ubatch 512" : "")
                                         : "try a file made with --experts int4 --rest int8, a GPU with more memory, or --device cpu";
  fail("%s does not fit on %s: weights %s, KV cache of %d positions %s, state and checkpoints %s, scratch %s, in all %s with %s to spare, but %s are free: %s are missing; %s",
       r.file.c_str(), r.device.c_str(), gib(p.weights).c_str(), p.ctx, gib(p.kv).c_str(), gib(p.state).c_str(), gib(p.scratch).c_str(), gib(need).c_str(),
       gib(kDeviceMargin).c_str(), gib(r.budget).c_str(), gib(std::max(need, r.budget + r.per_position) - r.budget).c_str(), advice.c_str());
}

}  // namespace qn
