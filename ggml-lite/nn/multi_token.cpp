#include "ggml-lite/nn/multi_token.h"

namespace qn {

void multi_token_entry(Device& device, const MultiTokenWeights& w, const Tensor& ids, const Tensor& hidden, const Tensor& embedded, const Tensor& x,
                       float eps, Act act) {
  EmbedArgs e;
  e.ids = ids, e.table = w.embed, e.h = embedded;
  device.embed(e);
  ConcatMatmulArgs c;
  c.a = embedded, c.b = hidden, c.norm_a = w.norm_embed, c.norm_b = w.norm_hidden, c.eps = eps, c.act = act, c.w = w.fc, c.y = x;
  device.concat_matmul(c);
}

}  // namespace qn
