// Gated DeltaNet: convolution, SiLU, L2 norm, gates and the delta rule, token by token (model-spec 3.3 - 3.5).
//
// Value heads, and the columns of a head's state, are independent of each other given q, k and v. A task is a block of columns
// of one head for all tokens of the call, kDeltaBlock of them at a time: first their q, k and v, then the columns of the state few enough
// at once to stay in the first level of cache over these tokens. Tasks that share a key head each compute its q and k again, which
// saves a barrier and a buffer.
#include <cmath>
#include <cstring>

#include "ggml-lite/cpu/cpu_device.h"

namespace qn::cpu {

struct CpuDevice::DeltaCall {
  int64_t tokens, dk, dv, columns, blocks, block;  // blocks of columns per head; tokens of a block
};

namespace {
struct LogRow {  // of a value head: DeltaNetArgs::log
  float *k, *u, *alpha;
  LogRow(const Tensor& log, int64_t pos, int64_t gk, int64_t gv, int64_t head, int64_t dk, int64_t dv)
      : k(log.f32(pos % kDeltaLogRows) + head / (gv / gk) * dk), u(log.f32(pos % kDeltaLogRows) + delta_log_u(gk, dk, dv, head)), alpha(u + dv) {}
};
}  // namespace

static float softplus(float x) { return x > 20.f ? x : std::log1p(std::exp(x)); }

static float tap(const Tensor& conv, int64_t channel, int j) {
  return conv.dtype == DType::F32 ? conv.f32(channel)[j] : bf16_to_float(conv.bf16(channel)[j]);
}

void CpuDevice::delta_columns(const DeltaNetArgs& a, const DeltaCall& c, int64_t task, float* local) const {
  const int64_t dk = c.dk, columns = c.columns, gk = a.key_heads, gv = a.value_heads, block = c.block;
  const int64_t head = task / c.blocks, column = task % c.blocks * columns, key = head / (gv / gk);
  // q, k and the columns of v of a block of tokens: where their channels begin, how many, and their taps as (4, n) one after the other
  struct Part {
    int64_t channel, n;
    float *y, *taps;
  } parts[3] = {{key * dk, dk, local, nullptr},
                {(gk + key) * dk, dk, local + block * dk, nullptr},
                {2 * gk * dk + head * c.dv + column, columns, local + 2 * block * dk, nullptr}};
  float* nothing = parts[2].y + block * columns;  // the inputs before the sequence
  float* next = nothing + std::max(dk, columns);
  std::fill(nothing, next, 0.f);
  float* state = a.state.f32(head) + column;
  int64_t stride = c.dv;
  if (c.tokens == 1)  // the convolutions give memory the time
    for (int64_t i = 0; i < 16 * c.dv; i += c.dv)
      for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(state + i + j, 1, 2);
  for (Part& p : parts) {
    p.taps = next, next += 4 * p.n;
    for (int64_t i = 0; i < p.n; i++)
      for (int j = 0; j < 4; j++) p.taps[j * p.n + i] = tap(a.conv, p.channel + i, j);
  }
  const int64_t start = a.step->pos, mask = a.conv_ring.rows() - 1;
  const bool logs = a.log && c.tokens > 1;
  if (a.log) replay_columns(a.log, a.step->pos, a.step->from, a.state, gk, head, column, columns);
  if (logs) {  // which leaves the state as it is
    float* copy = next;
    for (int64_t i = 0; i < dk; i++) std::memcpy(copy + i * columns, state + i * c.dv, columns * 4);
    state = copy, stride = columns;
  }
  DeltaStep steps[kDeltaBlock];
  for (int64_t t0 = 0; t0 < c.tokens; t0 += block) {
    const int n = static_cast<int>(std::min(block, c.tokens - t0));
    for (int i = 0; i < n; i++) {
      const int64_t t = t0 + i;
      for (const Part& p : parts) {
        const float* x[4];
        for (int j = 0; j < 4; j++) {
          const int64_t row = t - 3 + j, pos = start + row;
          x[j] = row >= 0 ? a.qkv.f32(row) + p.channel : pos >= 0 ? a.conv_ring.f32(pos & mask) + p.channel : nothing;
        }
        kernels_.conv_silu(x, p.taps, p.n, p.y + i * p.n);
      }
      float *q = parts[0].y + i * dk, *k = parts[1].y + i * dk;
      const float q_scale = 1.f / std::sqrt(kernels_.sum_squares(q, dk) + 1e-6f) * (1.f / std::sqrt(static_cast<float>(dk)));
      kernels_.scale(q, nullptr, q_scale, dk, q);
      kernels_.scale(k, nullptr, 1.f / std::sqrt(kernels_.sum_squares(k, dk) + 1e-6f), dk, k);
      const float* ba = a.ba.f32(t);
      steps[i] = {q, k, parts[2].y + i * columns, std::exp(a.neg_a.f32()[head] * softplus(ba[gv + head] + a.dt_bias.f32()[head])),
                  1.f / (1.f + std::exp(-ba[head])), a.o.f32(t) + head * c.dv + column, nullptr};
      if (!logs) continue;
      const LogRow row(a.log, start + t, gk, gv, head, dk, c.dv);
      steps[i].u = row.u + column;
      if (column == 0) *row.alpha = steps[i].alpha;
      if (column == 0 && head % (gv / gk) == 0) std::copy_n(k, dk, row.k);
    }
    kernels_.delta_steps(state, stride, dk, columns, steps, n);
  }
}

// Of a head's columns; other tasks may be writing other rows of the log.
void CpuDevice::replay_columns(const Tensor& log, int64_t pos, int64_t count, const Tensor& state, int64_t key_heads, int64_t head, int64_t column,
                               int64_t columns) const {
  const int64_t dk = state.shape[1], dv = state.shape[2];
  for (int64_t p = pos - count; p < pos; p++) {
    const LogRow row(log, p, key_heads, state.rows(), head, dk, dv);
    kernels_.delta_replay(state.f32(head) + column, dv, dk, columns, row.k, row.u + column, *row.alpha);
  }
}

void CpuDevice::do_delta_replay(const DeltaReplayArgs& a) {
  threads_.run([&](int) {
    for (int64_t head; (head = threads_.next_task()) < a.state.rows();) replay_columns(a.log, a.pos, a.count, a.state, a.key_heads, head, 0, a.state.shape[2]);
  });
}

void CpuDevice::do_delta_net(const DeltaNetArgs& a) {
  DeltaCall c;
  c.tokens = a.qkv.rows(), c.dk = a.state.shape[1], c.dv = a.state.shape[2];
  c.block = std::min<int64_t>(c.tokens, kDeltaBlock);
  // Whole heads where there are enough of them for an even share, else as many blocks of columns as that takes: fewer for many tokens,
  // for every block computes q and k again.
  const int even = c.tokens >= kDeltaBlock ? 2 : 4;
  c.blocks = 1;
  for (int64_t n = 2; n <= c.dv / 32 && a.value_heads * c.blocks < even * threads_.size() && threads_.size() > 1; n++)
    if (c.dv / 32 % n == 0) c.blocks = n;
  c.columns = c.dv / c.blocks;
  check_local("delta_net", c.block * (2 * c.dk + c.columns) + 9 * std::max(c.dk, c.columns) + 4 * c.columns + (a.log ? c.dk * c.columns : 0));
  const int64_t channels = a.qkv.cols(), slots = a.conv_ring.rows();
  threads_.run([&](int thread) {
    for (int64_t task; (task = threads_.next_task()) < a.value_heads * c.blocks;) delta_columns(a, c, task, local(thread));
    // The ring must be read before it is written, unless these tokens go where none of the 3 before them lies.
    if (c.tokens > slots - 3) threads_.barrier(thread);
    const Range mine = share(channels, thread, threads_.size());
    for (int64_t t = std::max<int64_t>(0, c.tokens - slots); t < c.tokens; t++)
      std::memcpy(a.conv_ring.f32((a.step->pos + t) & (slots - 1)) + mine.begin, a.qkv.f32(t) + mine.begin,
                  (mine.end - mine.begin) * 4);
  });
}

}  // namespace qn::cpu
