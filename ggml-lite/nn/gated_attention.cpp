#include "ggml-lite/nn/gated_attention.h"

namespace qn {

void gated_attention(Device& device, const AttentionWeights& w, const AttentionScratch& s, const Tensor& h, const KvCache& cache,
                     const Rope& rope, const StepParams* step, float eps, Act act) {
  const int64_t t = h.rows(), width = w.heads * w.q_norm.rows();
  const Tensor qgkv = s.qgkv.slice(0, t), o = s.o.slice(0, t);

  NormMatmulArgs in;  // (T, D) -> (T, 2*H*DH + 2*HK*DH)
  in.h = h, in.norm = w.norm, in.eps = eps, in.act = act, in.w = w.qgkv, in.y = qgkv;
  device.norm_matmul(in);

  AttentionArgs a;  // -> (T, H*DH)
  a.qgkv = qgkv, a.q_norm = w.q_norm, a.k_norm = w.k_norm, a.eps = eps;
  a.inv_freq = rope.inv_freq, a.rope_scale = rope.scale, a.act = act;
  a.k_cache = cache.k, a.v_cache = cache.v, a.k_scales = cache.k_scales, a.v_scales = cache.v_scales;
  a.heads = w.heads, a.kv_heads = w.kv_heads, a.o = o, a.step = step, a.then_gate = true;
  device.attention(a);

  GateMatmulArgs out;  // h += (T, D)
  out.o = o, out.gate = qgkv.columns(width, width), out.act = act, out.w = w.out, out.h = h, out.behind = true;
  device.gate_matmul(out);
}

}  // namespace qn
