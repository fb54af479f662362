// Mixture of experts: router, gate_up, down.
//
// A token reads K of E experts. For several tokens the pairs (token, choice) are sorted by expert first, so that every expert's
// weights are read once per call, for up to kBlock tokens at a time. The result of a token is the sum over its experts in order
// of their ids, whatever other tokens are there: each output panel belongs to one thread, which goes through the experts in
// that order, so there is neither a second buffer nor an atomic.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "ggml-lite/cpu/cpu_device.h"

namespace qn::cpu {

// Expert i of the active ones has id[i] and the pairs pair[first[i]] .. pair[first[i + 1] - 1]; a pair is t * K + j.
struct CpuDevice::Routed {
  int active = 0;
  int32_t *id, *first, *pair;
};

static float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

void CpuDevice::do_moe_router(const MoeRouterArgs& a) {
  const int64_t tokens = a.h.rows(), width = a.h.cols();
  const Matrix router = make_matrix(kernels_, a.router, Act::F32), gate = make_matrix(kernels_, a.shared_gate, Act::F32);
  const Matrix shared = make_matrix(kernels_, a.shared_gate_up, a.shared_act);
  reset_scratch();
  const uint8_t** x = take_pointers(tokens);
  for (int64_t t = 0; t < tokens; t++) x[t] = reinterpret_cast<const uint8_t*>(a.x.f32(t));
  const Rows xs = take_rows(shared, tokens);
  threads_.run([&](int thread) {
    const Range mine = share(tokens, thread, threads_.size());
    for (int64_t t = mine.begin; t < mine.end; t++) {
      norm(a.h.f32(t), a.norm, a.eps, width, a.x.f32(t));
      kernels_.prepare(shared.product, a.shared_act, a.x.f32(t), xs[t]);
    }
    // units: router panels, then 8 columns of the shared expert each, then its gate
    const int64_t routers = router.panels(), columns = shared.rows / kPanelRows;
    if (mine.end == mine.begin) look_ahead(thread, routers + columns + 1, 4, [&](int64_t i) {
      const int64_t half = is_t16(shared.product.dtype) ? 1 : 2;  // of a panel are columns of gates
      return i < routers ? router.data + i * router.panel_stride : shared.data + (i - routers) * (shared.panel_stride / half);
    });
    threads_.barrier(thread);
    pack_rows(shared, xs, tokens, thread);
    spread(thread, routers + columns + 1, 4, [&](Range r) {
      multiply(router, clip(r, 0, routers), {x, tokens}, unpacked(thread), [&](int64_t row, int rows, int64_t t0, int n, const float* tile) {
        for (int t = 0; t < n; t++) std::memcpy(a.logits.f32(t0 + t) + row, tile + t * kPanelRows, rows * 4);
      });
      multiply_swiglu(kernels_, shared, clip(r, routers, routers + columns), {xs.x, tokens, xs.packed}, unpacked(thread),
                      [&](int64_t column, int64_t t, const float* v) { std::memcpy(a.shared.f32(t) + column, v, 8 * 4); });
      multiply(gate, clip(r, routers + columns, routers + columns + 1), {x, tokens}, unpacked(thread),
               [&](int64_t, int, int64_t t0, int n, const float* tile) {
                 for (int t = 0; t < n; t++) a.shared_scale.f32()[t0 + t] = sigmoid(tile[t * kPanelRows]);
               });
    });
  });
}

// Top K of one token by insertion; a later expert must be larger to pass an earlier one, so ties go to the lower index. Any number passes a NaN.
static bool passes(float later, float earlier) { return later > earlier || (std::isnan(earlier) && !std::isnan(later)); }

void CpuDevice::route(const MoeGateUpArgs& a, int64_t t) const {
  const float* logits = a.logits.f32(t);
  int32_t* ids = a.ids.i32(t);
  float* weights = a.weights.f32(t);
  const int32_t experts = a.experts.count;
  const int chosen = static_cast<int>(a.ids.cols());
  int n = 0;
  for (int32_t e = 0; e < experts; e++) {
    if (n == chosen && !passes(logits[e], logits[ids[n - 1]])) continue;
    int at = n < chosen ? n++ : n - 1;
    for (; at > 0 && passes(logits[e], logits[ids[at - 1]]); at--) ids[at] = ids[at - 1];
    ids[at] = e;
  }
  const float top = logits[ids[0]];
  float total = 0;
  if (!a.renormalise)
    for (int32_t e = 0; e < experts; e++) total += std::exp(logits[e] - top);
  for (int j = 0; j < chosen; j++) {
    weights[j] = std::exp(logits[ids[j]] - top);
    if (a.renormalise) total += weights[j];
  }
  for (int j = 0; j < chosen; j++) weights[j] /= total;
}

// Counting sort of the pairs by expert
void CpuDevice::sort_by_expert(const Tensor& ids, int experts, Routed& r) const {
  const int64_t pairs = ids.rows() * ids.cols();
  r.id = lists_, r.first = r.id + experts + 1, r.pair = r.first + experts + 1;
  std::fill_n(r.first, experts + 1, 0);
  const int32_t* id = ids.i32();
  for (int64_t i = 0; i < pairs; i++) r.first[id[i] + 1]++;
  for (int e = 0; e < experts; e++) r.first[e + 1] += r.first[e];
  for (int64_t i = 0; i < pairs; i++) r.pair[r.first[id[i]]++] = static_cast<int32_t>(i);  // first[e] becomes first[e + 1]
  r.active = 0;
  for (int e = 0, begin = 0; e < experts; e++) {
    const int end = r.first[e];
    if (end == begin) continue;
    r.id[r.active] = e;
    r.first[r.active++] = begin;  // at or before e: read already
    begin = end;
  }
  r.first[r.active] = static_cast<int32_t>(pairs);
}

void CpuDevice::do_moe_gate_up(const MoeGateUpArgs& a) {
  const int64_t tokens = a.x.rows(), chosen = a.ids.cols(), columns = a.inner.cols() / 8;
  const Matrix first = make_matrix(kernels_, a.experts.gate_up(0), a.act);
  const int64_t stride = a.experts.layout().stride;
  QN_CHECK(2 * (a.experts.count + 1) + tokens * chosen <= lists_size_, "moe_gate_up: %d experts and %lld choices, reserve() had less",
           a.experts.count, static_cast<long long>(tokens * chosen));
  reset_scratch();
  const Rows x = take_rows(tokens, first.product.bytes);
  const uint8_t** sorted = take_pointers(tokens * chosen);
  Routed r;
  auto sort = [&] {
    sort_by_expert(a.ids, a.experts.count, r);
    for (int64_t i = 0; i < tokens * chosen; i++) sorted[i] = x[r.pair[i] / chosen];
  };
  threads_.run([&](int thread) {
    const Range mine = share(tokens, thread, threads_.size());
    if (tokens > 1) {
      for (int64_t t = mine.begin; t < mine.end; t++) {
        route(a, t);
        kernels_.prepare(first.product, a.act, a.x.f32(t), x[t]);
      }
      threads_.barrier(thread);
      if (thread == 0) sort();
    } else {  // two threads, if there are as many
      if (thread == threads_.size() - 1) kernels_.prepare(first.product, a.act, a.x.f32(), x[0]);
      if (thread == 0) route(a, 0), sort();
    }
    threads_.barrier(thread);
    spread(thread, r.active * columns, 4, [&](Range range) {
      for (int64_t at = range.begin; at < range.end;) {
        const int64_t e = at / columns, end = std::min(range.end, (e + 1) * columns);
        const int32_t begin = r.first[e];
        Matrix m = first;
        m.data += r.id[e] * stride;
        multiply_swiglu(kernels_, m, {at - e * columns, end - e * columns}, {sorted + begin, r.first[e + 1] - begin}, unpacked(thread),
                        [&](int64_t column, int64_t i, const float* v) {
                          std::memcpy(a.inner.f32(r.pair[begin + i]) + column, v, 8 * 4);
                        },
                        end < range.end ? first.data + r.id[e + 1] * stride : nullptr);
        at = end;
      }
    });
  });
}

void CpuDevice::do_moe_down(const MoeDownArgs& a) {
  const int64_t tokens = a.h.rows(), chosen = a.ids.cols(), pairs = tokens * chosen;
  const Matrix first = make_matrix(kernels_, a.experts.down(0), a.act), shared = make_matrix(kernels_, a.shared_down, a.shared_act);
  const int64_t stride = a.experts.layout().stride;
  QN_CHECK(2 * (a.experts.count + 1) + pairs <= lists_size_, "moe_down: %d experts and %lld choices, reserve() had less",
           a.experts.count, static_cast<long long>(pairs));
  for (int64_t i = 0; i < pairs; i++)
    QN_CHECK(a.ids.i32()[i] >= 0 && a.ids.i32()[i] < a.experts.count, "moe_down: expert %d of %d", a.ids.i32()[i], a.experts.count);
  reset_scratch();
  const Rows x = take_rows(pairs, first.product.bytes), xs = take_rows(shared, tokens);
  const uint8_t** sorted = take_pointers(pairs);
  Routed r;
  auto tokens_of = [&](int e) { return r.first[e + 1] - r.first[e]; };
  // Every thread meets all experts, so the rows of each are packed once for all threads. An expert with n >= least of them has ceil(n / kPacked)
  // packs: never more than n / least, nor than n / 8.
  const bool packs = first.takes_packed(tokens);
  uint8_t* const packed = packs ? take_bytes(pairs / std::min(first.many->least, kPacked / 2) * first.product.packed) : nullptr;
  auto packed_bytes = [&](int e) { return packs && first.takes_packed(tokens_of(e)) ? packs_of(tokens_of(e)) * first.product.packed : 0; };
  threads_.run([&](int thread) {
    const Range mine = share(pairs + tokens, thread, threads_.size());
    for (int64_t i = mine.begin; i < mine.end; i++)
      if (i < pairs) kernels_.prepare(first.product, a.act, a.inner.f32(i), x[i]);
      else kernels_.prepare(shared.product, a.shared_act, a.shared.f32(i - pairs), xs[i - pairs]);
    if (thread == 0) {
      sort_by_expert(a.ids, a.experts.count, r);
      for (int64_t i = 0; i < pairs; i++) sorted[i] = x[r.pair[i]];
    }
    const int per_thread = tokens > kBlock ? 4 : 2;
    // where the least of the experts begins: it comes first
    if (thread > 0 && tokens == 1) look_ahead(thread, shared.panels(), per_thread, [&](int64_t i) {
      return first.data + *std::min_element(a.ids.i32(), a.ids.i32() + chosen) * stride + i * first.panel_stride;
    });
    threads_.barrier(thread);
    if (packs) {
      uint8_t* to = packed;
      for (int e = 0; e < r.active; e++) {
        if (packed_bytes(e) && e % threads_.size() == thread) pack(first, sorted + r.first[e], tokens_of(e), to);
        to += packed_bytes(e);
      }
      if (!xs.packed) threads_.barrier(thread);
    }
    pack_rows(shared, xs, tokens, thread);
    auto add = [&](const Matrix& m, Range panels, const Tokens& from, const uint8_t* then, auto token_and_weight) {
      multiply(m, panels, from, unpacked(thread), [&](int64_t row, int rows, int64_t i0, int count, const float* tile) {
        for (int i = 0; i < count; i++) {
          const auto [t, weight] = token_and_weight(i0 + i);
          float* h = a.h.f32(t) + row;
          for (int j = 0; j < rows; j++) h[j] += weight * tile[i * kPanelRows + j];
        }
      }, then);
    };
    spread(thread, shared.panels(), per_thread, [&](Range panels) {
      const uint8_t* of_expert = packed;
      for (int e = 0; e < r.active; e++) {
        const int32_t begin = r.first[e];
        Matrix m = first;
        m.data += r.id[e] * stride;
        // a range of one expert is a few kB: ask for the beginning of the next one, which the hardware cannot foresee
        const uint8_t* then = e + 1 < r.active ? first.data + r.id[e + 1] * stride + panels.begin * m.panel_stride
                                               : shared.data + panels.begin * shared.panel_stride;
        for (int64_t i = 0; i < 2048; i += 64) __builtin_prefetch(then + i);
        add(m, panels, {sorted + begin, tokens_of(e), packed_bytes(e) ? of_expert : nullptr}, then, [&](int64_t i) {
          const int32_t pair = r.pair[begin + i];
          return std::pair(pair / chosen, a.weights.f32()[pair]);
        });
        of_expert += packed_bytes(e);
      }
      add(shared, panels, {xs.x, tokens, xs.packed}, nullptr, [&](int64_t t) { return std::pair(t, a.shared_scale.f32()[t]); });
    });
  });
}

// Piece i of n of a range
static Range piece(Range r, int64_t i, int n) {
  const Range of = share(r.end - r.begin, static_cast<int>(i), n);
  return {r.begin + of.begin, r.begin + of.end};
}

// Each thread reads what it begins with in expert_pairs: caches of other cores are hardly nearer than memory (measured on 15 threads of a
// virtual machine: four experts 100 us, read ahead by other threads 108, by these 50).
size_t CpuDevice::read_ahead(const Experts& experts, std::span<const int32_t> ids, const std::function<bool()>& stop) {
  if (ids.empty()) return 0;
  constexpr int64_t kStep = 4096, kLines = 256;  // bytes between two looks, less than a microsecond; what the kernel takes multiples of
  const Matrix up = make_matrix(kernels_, experts.gate_up(0), Act::F32), down = make_matrix(kernels_, experts.down(0), Act::F32);
  const int64_t columns = experts.f / 8, stride = experts.layout().stride;
  const bool halves = !is_t16(experts.dtype);  // gate rows, then up rows
  std::atomic<size_t> whole{ids.size()};
  threads_.run([&](int thread) {
    for (size_t i = 0; i < ids.size(); i++) {
      const auto read = [&](const uint8_t* from, Range panels, int64_t bytes) {
        const uint8_t* end = from + panels.end * bytes;
        for (from += panels.begin * bytes; end - from >= kLines; from += kStep) {
          if (stop()) return false;
          kernels_.read(from, std::min<int64_t>(kStep, (end - from) / kLines * kLines));
        }
        return true;
      };
      const int64_t at = ids[i] * stride, unit = up.panel_stride / (halves ? 2 : 1);
      const Range mine = part_of_expert(columns, thread, ids[i]);
      if (read(up.data + at, mine, unit) && (!halves || read(up.data + at + columns * unit, mine, unit)) &&
          read(down.data + at, share(down.panels(), thread, threads_.size()), down.panel_stride))
        continue;
      for (size_t n = whole; n > i && !whole.compare_exchange_weak(n, i);) {}
      return;
    }
  });
  return whole;
}

// gate_up and down of any pairs, in one parallel region. It is what a GPU waits for, once per layer, for less than 0.1 ms, so every barrier
// counts: for one token each thread rounds what it multiplies with itself, and only what gate_up leaves is waited for.
void CpuDevice::do_expert_pairs(const ExpertPairsArgs& a) {
  constexpr int kOwnPairs = 16, kPieces = 2;  // of a thread's part (of an expert): with one only, who is late keeps all others waiting
  const int64_t tokens = a.x.rows(), pairs = a.token.rows(), f = a.experts.f, columns = f / 8;
  const Matrix up = make_matrix(kernels_, a.experts.gate_up(0), a.act), down = make_matrix(kernels_, a.experts.down(0), a.act);
  const int64_t stride = a.experts.layout().stride, own_x = round_up(up.product.bytes, 64), own_z = round_up(down.product.bytes, 64);
  QN_CHECK(2 * (a.experts.count + 1) + pairs <= lists_size_, "expert_pairs: %d experts and %lld pairs, reserve() had less", a.experts.count,
           static_cast<long long>(pairs));
  reset_scratch();
  const Rows x = take_rows(tokens, up.product.bytes), inner = take_rows(pairs, round_up(f, 16) * 4), z = take_rows(pairs, down.product.bytes);
  const uint8_t **sorted = take_pointers(pairs), **sorted_inner = take_pointers(pairs);
  Routed r;
  sort_by_expert(view(a.expert.data, DType::I32, pairs, 1), a.experts.count, r);
  for (int64_t i = 0; i < pairs; i++) sorted[i] = x[a.token.i32()[r.pair[i]]], sorted_inner[i] = z[i];
  const bool alone = tokens == 1 && pairs <= kOwnPairs && r.active == pairs && own_x + pairs * own_z <= local_floats_ * 4;
  threads_.run([&](int thread) {
    uint8_t* const own = reinterpret_cast<uint8_t*>(local(thread));  // alone: x, then z of the pairs
    const uint8_t* own_pair[kOwnPairs];
    if (alone) {
      kernels_.prepare(up.product, a.act, a.x.f32(), own);
      std::fill_n(own_pair, pairs, own);
    } else {
      for (int64_t t = thread; t < tokens; t += threads_.size()) kernels_.prepare(up.product, a.act, a.x.f32(t), x[t]);
      threads_.barrier(thread);
    }
    const int64_t each = int64_t{r.active} * kPieces;  // tasks of a thread
    auto expert_of = [&](int64_t task) { return task % each / kPieces; };
    auto columns_in = [&](int64_t task) {
      return piece(part_of_expert(columns, static_cast<int>(task / each), r.id[expert_of(task)]), task % kPieces, kPieces);
    };
    threads_.spread(thread, 0, each * threads_.size(), [&](int64_t i) {
      const int64_t e = expert_of(i);
      const Range columns_of = columns_in(i);
      const int32_t begin = r.first[e];
      Matrix m = up;
      m.data += r.id[e] * stride;
      multiply_swiglu(kernels_, m, columns_of, {(alone ? own_pair : sorted) + begin, r.first[e + 1] - begin}, unpacked(thread),
                      [&](int64_t column, int64_t j, const float* v) { std::memcpy(reinterpret_cast<float*>(inner[begin + j]) + column, v, 8 * 4); },
                      (i + 1) % each ? up.data + r.id[expert_of(i + 1)] * stride + columns_in(i + 1).begin * up.panel_stride : nullptr);
    });
    auto panel_of = [&](int e, int64_t panel) { return down.data + r.id[e] * stride + panel * down.panel_stride; };
    auto ask_for = [&](int e, int64_t panel) {  // the first of a range of an expert, which the hardware cannot foresee
      if (e < r.active)
        for (int64_t i = 0; i < 2048; i += 64) __builtin_prefetch(panel_of(e, panel) + i);
    };
    const Range mine = share(down.panels(), thread, threads_.size());
    for (int e = 0; mine.begin < mine.end && e < 2; e++) ask_for(e, mine.begin);
    threads_.barrier(thread);
    if (alone) {
      for (int64_t i = 0; i < pairs; i++) {
        uint8_t* to = own + own_x + i * own_z;
        kernels_.prepare(down.product, a.act, reinterpret_cast<const float*>(inner[i]), to);
        own_pair[i] = to;
      }
    } else {
      for (int64_t i = thread; i < pairs; i += threads_.size()) kernels_.prepare(down.product, a.act, reinterpret_cast<const float*>(inner[i]), z[i]);
      threads_.barrier(thread);
    }
    threads_.spread(thread, 1, int64_t{kPieces} * threads_.size(), [&](int64_t task) {
      const Range panels = piece(share(down.panels(), static_cast<int>(task / kPieces), threads_.size()), task % kPieces, kPieces);
      const int64_t first = panels.begin * kPanelRows, n = std::min(panels.end * kPanelRows, down.rows) - first;
      for (int64_t t = 0; t < tokens; t++) std::memset(a.y.f32(t) + first, 0, static_cast<size_t>(n) * 4);
      for (int e = 0; e < r.active; e++) {
        const int32_t begin = r.first[e];
        Matrix m = down;
        m.data += r.id[e] * stride;
        ask_for(e + 1, panels.begin);
        const Tokens rows_of = {(alone ? own_pair : sorted_inner) + begin, r.first[e + 1] - begin};
        multiply(m, panels, rows_of, unpacked(thread), [&](int64_t row, int rows, int64_t i0, int count, const float* tile) {
          for (int i = 0; i < count; i++) {
            const int32_t pair = r.pair[begin + i0 + i];
            float* y = a.y.f32(a.token.i32()[pair]) + row;
            for (int j = 0; j < rows; j++) y[j] += a.weight.f32()[pair] * tile[i * kPanelRows + j];
          }
        }, e + 1 < r.active ? panel_of(e + 1, panels.begin) : nullptr);
      }
    });
  });
}

}  // namespace qn::cpu
