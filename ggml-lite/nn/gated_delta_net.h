// A gated-delta-net mixer: h += W_out( gated_norm( delta_rule( conv(qkv), gates(ba) ), z ) ), its input norm(h).
#pragma once
#include "ggml-lite/core/device.h"

namespace qn {

struct DeltaNetWeights {
  Tensor norm;                  // (D) F32, 1+w folded
  Tensor qkvz;                  // (2*GK*DK + 2*GV*DV, D), rows q | k | v | z
  Tensor ba;                    // (2*GV, D) exact, rows b | a
  Tensor conv;                  // (CH, 4)
  Tensor neg_a, dt_bias;        // (GV)
  Tensor out_norm;              // (DV) plain w
  Tensor out;                   // (D, GV*DV)
  int key_heads = 0, value_heads = 0;
};

struct DeltaNetScratch {
  Tensor qkvz;  // (T, 2*GK*DK + 2*GV*DV)
  Tensor ba;    // (T, 2*GV)
  Tensor o;     // (T, GV*DV)
};

// h (T, D) in/out; conv_ring (slots, CH) and state (GV, DK, DV) carried from call to call; log or empty: see DeltaNetArgs.
void gated_delta_net(Device& device, const DeltaNetWeights& w, const DeltaNetScratch& s, const Tensor& h, const Tensor& conv_ring,
                     const Tensor& state, const Tensor& log, const StepParams* step, float eps, Act act);

}  // namespace qn
