// A sparse mixture of experts with one shared expert: h += sum_k p_k f_k(norm(h)) + sigmoid(g . norm(h)) f_shared(norm(h)).
#pragma once
#include "ggml-lite/core/device.h"

namespace qn {

struct MoeWeights {
  Tensor norm;            // (D) F32, 1+w folded
  Tensor router;          // (E, D) exact
  Tensor shared_gate;     // (1, D) exact
  Tensor shared_gate_up;  // (2*FS, D)
  Tensor shared_down;     // (D, FS)
  Experts experts;        // (E, D, F)
  int chosen = 0;         // K
  bool renormalise = true;
};

struct MoeScratch {
  Tensor x;             // (T, D)
  Tensor logits;        // (T, E)
  Tensor shared;        // (T, FS)
  Tensor shared_scale;  // (T)
  Tensor ids;           // (T, K) I32
  Tensor weights;       // (T, K)
  Tensor inner;         // (T*K, F)
  ExpertBox box;        // where experts have a home
};

// h (T, D) in/out. next: of the layer behind this one on the same device, or null.
void sparse_moe(Device& device, const MoeWeights& w, const MoeScratch& s, const Tensor& h, float eps, Act act, Act expert_act, const MoeWeights* next = nullptr);

}  // namespace qn
