// Gated DeltaNet: convolution, SiLU, L2 norm, gates and the delta rule, token by token (model-spec 3.3 - 3.5).
//
// Value heads, and the columns of a head's state, are independent of each other given q, k and v. A task is a block of columns
// of one head for all tokens of the call: the block (DK x columns fp32, 64 KB for a whole head) stays in the cache over the tokens.
// Tasks that share a key head each compute its convolution again, which is 1 % of the work and saves a barrier and a buffer.
#include <cmath>
#include <cstring>

#include "ggml-lite/cpu/cpu_device.h"

namespace qn::cpu {

struct CpuDevice::DeltaCall {
  int64_t tokens, dk, dv, columns, blocks;  // blocks of columns per head
};

static float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

static float tap(const Tensor& conv, int64_t channel, int j) {
  return conv.dtype == DType::F32 ? conv.f32(channel)[j] : bf16_to_float(conv.bf16(channel)[j]);
}

void CpuDevice::delta_columns(const DeltaNetArgs& a, const DeltaCall& c, int64_t task, float* local) const {
  const int64_t dk = c.dk, columns = c.columns, gk = a.key_heads, gv = a.value_heads;
  const int64_t head = task / c.blocks, column = task % c.blocks * columns, key = head / (gv / gk);
  // q, k and the columns of v: where their channels begin, how many, and their taps as (4, n) one after the other
  struct Part {
    int64_t channel, n;
    float *y, *taps;
  } parts[3] = {{key * dk, dk, local, nullptr},
                {(gk + key) * dk, dk, local + dk, nullptr},
                {2 * gk * dk + head * c.dv + column, columns, local + 2 * dk, nullptr}};
  float* nothing = local + 2 * dk + columns;  // the inputs before the sequence
  float* next = nothing + std::max(dk, columns);
  std::fill(nothing, next, 0.f);
  for (Part& p : parts) {
    p.taps = next, next += 4 * p.n;
    for (int64_t i = 0; i < p.n; i++)
      for (int j = 0; j < 4; j++) p.taps[j * p.n + i] = tap(a.conv, p.channel + i, j);
  }
  const int64_t start = a.step->pos, mask = a.conv_ring.rows() - 1;
  float* state = a.state.f32(head) + column;
  const auto copy_columns = [&](const float* from, float* to) {
    for (int64_t i = 0; i < dk; i++) std::memcpy(to + i * c.dv, from + i * c.dv, columns * 4);
  };
  const auto slot = [&](int64_t i) { return a.states.f32(i) + head * dk * c.dv + column; };
  if (a.states && a.step->from > 0) copy_columns(slot(a.step->from - 1), state);
  for (int64_t t = 0; t < c.tokens; t++) {
    for (const Part& p : parts) {
      const float* x[4];
      for (int j = 0; j < 4; j++) {
        const int64_t row = t - 3 + j, pos = start + row;
        x[j] = row >= 0 ? a.qkv.f32(row) + p.channel : pos >= 0 ? a.conv_ring.f32(pos & mask) + p.channel : nothing;
      }
      kernels_.conv_silu(x, p.taps, p.n, p.y);
    }
    float *q = parts[0].y, *k = parts[1].y, *v = parts[2].y;
    const float q_scale = 1.f / std::sqrt(kernels_.sum_squares(q, dk) + 1e-6f) * (1.f / std::sqrt(static_cast<float>(dk)));
    kernels_.scale(q, nullptr, q_scale, dk, q);
    kernels_.scale(k, nullptr, 1.f / std::sqrt(kernels_.sum_squares(k, dk) + 1e-6f), dk, k);
    const float* ba = a.ba.f32(t);
    const float beta = 1.f / (1.f + std::exp(-ba[head]));
    const float alpha = std::exp(a.neg_a.f32()[head] * softplus(ba[gv + head] + a.dt_bias.f32()[head]));
    kernels_.delta_step(state, c.dv, dk, columns, q, k, v, alpha, beta, a.o.f32(t) + head * c.dv + column);
    if (a.states && t + 1 < c.tokens) copy_columns(state, slot(t));
  }
}

void CpuDevice::do_delta_net(const DeltaNetArgs& a) {
  DeltaCall c;
  c.tokens = a.qkv.rows(), c.dk = a.state.shape[1], c.dv = a.state.shape[2];
  // whole heads where there are enough of them for an even share, else as many blocks of columns as that takes
  c.blocks = 1;
  for (int64_t n = 2; n <= c.dv / 32 && a.value_heads * c.blocks < 4 * threads_.size() && threads_.size() > 1; n++)
    if (c.dv / 32 % n == 0) c.blocks = n;
  c.columns = c.dv / c.blocks;
  check_local("delta_net", 11 * c.dk + 5 * c.columns + std::max(c.dk, c.columns));
  const int64_t channels = a.qkv.cols(), slots = a.conv_ring.rows();
  threads_.run([&](int thread) {
    for (int64_t task; (task = threads_.next_task()) < a.value_heads * c.blocks;) delta_columns(a, c, task, local(thread));
    threads_.barrier(thread);  // the ring is read up to here
    const Range mine = share(channels, thread, threads_.size());
    for (int64_t t = std::max<int64_t>(0, c.tokens - slots); t < c.tokens; t++)
      std::memcpy(a.conv_ring.f32((a.step->pos + t) & (slots - 1)) + mine.begin, a.qkv.f32(t) + mine.begin,
                  (mine.end - mine.begin) * 4);
  });
}

}  // namespace qn::cpu
