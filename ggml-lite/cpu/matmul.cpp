// Embedding, and the operations that are one matrix product with something before it: norm, gates, concatenation.
#include <cmath>
#include <cstring>

#include "ggml-lite/cpu/cpu_device.h"

namespace qn::cpu {

void CpuDevice::do_embed(const EmbedArgs& a) {
  const int64_t tokens = a.h.rows(), width = a.h.cols();
  for (int64_t t = 0; t < tokens; t++) {
    const int32_t id = a.ids.i32()[t];
    QN_CHECK(id >= 0 && id < a.table.rows(), "embed: id %d of %lld", id, static_cast<long long>(a.table.rows()));
    if (a.table.dtype == DType::F32) {
      std::memcpy(a.h.f32(t), a.table.f32(id), width * 4);
    } else {
      const uint16_t* row = a.table.bf16(id);
      for (int64_t i = 0; i < width; i++) a.h.f32(t)[i] = bf16_to_float(row[i]);
    }
  }
}

void CpuDevice::norm(const float* x, const Tensor& w, float eps, int64_t n, float* y) const {
  if (!w) {
    std::memcpy(y, x, n * 4);
    return;
  }
  const float r = 1.f / std::sqrt(kernels_.sum_squares(x, n) / static_cast<float>(n) + eps);
  kernels_.scale(x, w.f32(), r, n, y);
}

void CpuDevice::do_norm_matmul(const NormMatmulArgs& a) {
  const int64_t tokens = a.h.rows(), width = a.h.cols();
  const Matrix w = make_matrix(kernels_, a.w, a.act), exact = make_matrix(kernels_, a.w_exact, Act::F32);
  reset_scratch();
  // norm(h) in fp32 is what w_exact sees as it is; it may be an output, too
  const Rows x = a.normed ? Rows{reinterpret_cast<uint8_t*>(a.normed.f32()), width * 4, take_pointers(tokens)}
                          : take_rows(tokens, width * 4);
  for (int64_t t = 0; t < tokens; t++) x.x[t] = x[t];
  const Rows xw = take_rows(w, a.w ? tokens : 0);
  threads_.run([&](int thread) {
    const Range mine = share(tokens, thread, threads_.size());
    for (int64_t t = mine.begin; t < mine.end; t++) {
      float* row = reinterpret_cast<float*>(x[t]);
      norm(a.h.f32(t), a.norm, a.eps, width, row);
      if (a.w) kernels_.prepare(w.product, a.act, row, xw[t]);
    }
    const int64_t units = w.panels() + exact.panels();
    if (mine.end == mine.begin) look_ahead(thread, units, 4, [&](int64_t i) {
      return i < w.panels() ? w.data + i * w.panel_stride : exact.data + (i - w.panels()) * exact.panel_stride;
    });
    threads_.barrier(thread);
    pack_rows(w, xw, tokens, thread);
    auto store = [](const Tensor& y) {
      return [&y](int64_t row, int rows, int64_t t0, int n, const float* tile) {
        for (int t = 0; t < n; t++) std::memcpy(y.f32(t0 + t) + row, tile + t * kPanelRows, rows * 4);
      };
    };
    spread(thread, units, 4, [&](Range r) {
      multiply(w, clip(r, 0, w.panels()), {xw.x, tokens, xw.packed}, unpacked(thread), store(a.y));
      multiply(exact, clip(r, w.panels(), units), {x.x, tokens}, unpacked(thread), store(a.y_exact));
    });
  });
}

// h += W act(x), fill(t, row) writes x of token t
void CpuDevice::add_product(const char* op, const Tensor& weights, Act act, const Tensor& h,
                            const std::function<void(int64_t, float*)>& fill) {
  const int64_t tokens = h.rows();
  const Matrix w = make_matrix(kernels_, weights, act);
  check_local(op, w.product.k);
  reset_scratch();
  const Rows x = take_rows(w, tokens);
  threads_.run([&](int thread) {
    const Range mine = share(tokens, thread, threads_.size());
    for (int64_t t = mine.begin; t < mine.end; t++) {
      fill(t, local(thread));
      kernels_.prepare(w.product, act, local(thread), x[t]);
    }
    if (mine.end == mine.begin) look_ahead(thread, w.panels(), 4, [&](int64_t i) { return w.data + i * w.panel_stride; });
    threads_.barrier(thread);
    pack_rows(w, x, tokens, thread);
    spread(thread, w.panels(), 4, [&](Range r) {
      multiply(w, r, {x.x, tokens, x.packed}, unpacked(thread), [&](int64_t row, int rows, int64_t t0, int n, const float* tile) {
        for (int t = 0; t < n; t++)
          for (int i = 0; i < rows; i++) h.f32(t0 + t)[row + i] += tile[t * kPanelRows + i];
      });
    });
  });
}

void CpuDevice::do_gated_norm_matmul(const GatedNormMatmulArgs& a) {
  const int64_t n = a.o.cols(), head = a.norm.rows();
  add_product("gated_norm_matmul", a.w, a.act, a.h, [&](int64_t t, float* x) {
    for (int64_t i = 0; i < n; i += head) norm(a.o.f32(t) + i, a.norm, a.eps, head, x + i);
    kernels_.silu_mul(a.z.f32(t), x, n, x);
  });
}

void CpuDevice::do_gate_matmul(const GateMatmulArgs& a) {
  add_product("gate_matmul", a.w, a.act, a.h,
              [&](int64_t t, float* x) { kernels_.sigmoid_mul(a.gate.f32(t), a.o.f32(t), a.o.cols(), x); });
}

void CpuDevice::do_concat_matmul(const ConcatMatmulArgs& a) {
  const int64_t width = a.a.cols();
  for (int64_t t = 0; t < a.y.rows(); t++) std::memset(a.y.f32(t), 0, a.y.cols() * 4);
  add_product("concat_matmul", a.w, a.act, a.y, [&](int64_t t, float* x) {
    norm(a.a.f32(t), a.norm_a, a.eps, width, x);
    norm(a.b.f32(t), a.norm_b, a.eps, width, x + width);
  });
}

}  // namespace qn::cpu
