// Rotary position embedding: the angle by which pair i of a head turns from position to position, and what YaRN (Peng et al., 2023) makes
// of it for contexts longer than the model was trained on. model-spec 3.8 and 4.
#pragma once
#include <vector>

#include "ggml-lite/core/qn.h"  // QnFile

namespace qn {

struct RopeScaling {
  double theta = 1e4;
  int dim = 0;               // rotated dims of a head
  double factor = 1;         // YaRN: context / original context; 1: none
  double original = 0;       // context the model was trained on; what follows is of YaRN only
  double beta_fast = 32, beta_slow = 1;  // pairs that turn so often within `original` are kept, or stretched by `factor`; between them a ramp
  bool truncate = true;      // the ends of the ramp are whole pairs
  double attention_factor = 1;  // on cos and sin
};

// What a file says (keys "rope. ..."); context: positions the model was made for, with the scaling of the file.
RopeScaling read_rope(const QnFile& file, int dim, int context);

// (dim/2) radians per position
std::vector<float> rope_frequencies(const RopeScaling&);

// Factor on cos and sin that goes with a factor of the context, where a model names none
double yarn_attention_factor(double factor);

}  // namespace qn
