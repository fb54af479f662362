#include "ggml-lite/nn/sparse_moe.h"

namespace qn {

void sparse_moe(Device& device, const MoeWeights& w, const MoeScratch& s, const Tensor& h, float eps, Act act, Act expert_act,
                const MoeWeights* next) {
  const int64_t t = h.rows();
  if (t == 0) return;

  MoeRouterArgs r;
  r.h = h, r.norm = w.norm, r.eps = eps, r.router = w.router, r.shared_gate = w.shared_gate;
  r.shared_act = act, r.shared_gate_up = w.shared_gate_up;
  r.x = s.x.slice(0, t), r.logits = s.logits.slice(0, t), r.shared = s.shared.slice(0, t), r.shared_scale = s.shared_scale.slice(0, t);
  device.moe_router(r);

  const bool placed = w.experts.home && t <= kPlacedTokens;
  if (placed) {
    PlaceExpertsArgs p;
    p.x = r.x, p.logits = r.logits, p.renormalise = w.renormalise, p.experts = w.experts;
    p.ids = s.ids.slice(0, t), p.weights = s.weights.slice(0, t), p.box = s.box;
    if (next && next->experts.home) p.h = h, p.next_norm = next->norm, p.next_router = next->router, p.next = next->experts;
    device.place_experts(p);
  }

  MoeGateUpArgs up;
  up.x = r.x, up.logits = r.logits, up.renormalise = w.renormalise, up.act = expert_act, up.experts = w.experts;
  up.ids = s.ids.slice(0, t), up.weights = s.weights.slice(0, t), up.inner = s.inner.slice(0, t * w.chosen);
  device.moe_gate_up(up);

  MoeDownArgs down;
  down.ids = up.ids, down.weights = up.weights, down.inner = up.inner, down.act = expert_act, down.experts = w.experts;
  if (!placed) down.logits = r.logits;
  down.shared = r.shared, down.shared_scale = r.shared_scale, down.shared_act = act, down.shared_down = w.shared_down, down.h = h;
  device.moe_down(down);
  if (!placed) return;
  JoinExpertsArgs join;
  join.box = s.box, join.h = h;
  device.join_experts(join);
}

}  // namespace qn
