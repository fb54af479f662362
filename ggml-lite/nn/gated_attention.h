// A gated attention mixer: h += W_out( attention(norm(h)) * sigmoid(gate) ).
#pragma once
#include "ggml-lite/core/device.h"
#include "ggml-lite/nn/hybrid_state.h"  // KvCache

namespace qn {

struct AttentionWeights {
  Tensor norm;            // (D) F32, 1+w folded
  Tensor qgkv;            // (2*H*DH + 2*HK*DH, D), rows query | gate | k | v
  Tensor q_norm, k_norm;  // (DH) 1+w folded
  Tensor out;             // (D, H*DH)
  int heads = 0, kv_heads = 0;
};

struct AttentionScratch {
  Tensor qgkv;  // (T, 2*H*DH + 2*HK*DH)
  Tensor o;     // (T, H*DH)
};

// Rotation: radians per position of each pair (R/2) and the factor on cos and sin.
struct Rope {
  Tensor inv_freq;
  float scale = 1;
};

// h (T, D) in/out; the cache is appended to at step->pos.
void gated_attention(Device& device, const AttentionWeights& w, const AttentionScratch& s, const Tensor& h, const KvCache& cache,
                     const Rope& rope, const StepParams* step, float eps, Act act);

}  // namespace qn
