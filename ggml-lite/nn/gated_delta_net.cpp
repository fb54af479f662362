#include "ggml-lite/nn/gated_delta_net.h"

namespace qn {

void gated_delta_net(Device& device, const DeltaNetWeights& w, const DeltaNetScratch& s, const Tensor& h, const Tensor& conv_ring,
                     const Tensor& state, const Tensor& log, const StepParams* step, float eps, Act act) {
  const int64_t t = h.rows(), ch = w.conv.rows(), z = w.qkvz.rows() - ch;
  const Tensor qkvz = s.qkvz.slice(0, t), ba = s.ba.slice(0, t), o = s.o.slice(0, t);

  NormMatmulArgs in;  // (T, D) -> (T, CH + GV*DV) and (T, 2*GV)
  in.h = h, in.norm = w.norm, in.eps = eps, in.act = act;
  in.w = w.qkvz, in.y = qkvz;
  in.w_exact = w.ba, in.y_exact = ba;
  device.norm_matmul(in);

  DeltaNetArgs rule;  // -> (T, GV*DV)
  rule.qkv = qkvz.columns(0, ch), rule.ba = ba;
  rule.conv = w.conv, rule.neg_a = w.neg_a, rule.dt_bias = w.dt_bias;
  rule.conv_ring = conv_ring, rule.state = state, rule.log = log, rule.o = o;
  rule.key_heads = w.key_heads, rule.value_heads = w.value_heads, rule.act = act, rule.step = step;
  rule.z = qkvz.columns(ch, z), rule.out_norm = w.out_norm;
  device.delta_net(rule);

  GatedNormMatmulArgs out;  // h += (T, D)
  out.o = o, out.z = rule.z, out.norm = w.out_norm, out.key_dim = state.shape[1], out.eps = eps, out.act = act, out.w = w.out, out.h = h;
  device.gated_norm_matmul(out);
}

}  // namespace qn
