// The entry of a layer for multi-token prediction: x = W [norm(embedding of the next token), norm(final norm of this position)].
#pragma once
#include "ggml-lite/core/device.h"

namespace qn {

struct MultiTokenWeights {
  Tensor embed;                     // (V, D), on the device of the layer
  Tensor norm_embed, norm_hidden;   // (D) 1+w folded
  Tensor fc;                        // (D, 2D)
  Tensor norm;                      // (D), behind the layer
  Tensor head;                      // (V, D), for guesses: the model's, or a copy in fewer bits
};

// ids (T), hidden (T, D) -> x (T, D); embedded (T, D) is scratch
void multi_token_entry(Device& device, const MultiTokenWeights& w, const Tensor& ids, const Tensor& hidden, const Tensor& embedded, const Tensor& x,
                       float eps, Act act);

}  // namespace qn
