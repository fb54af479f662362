// The CPU device from inside: what its operations (matmul.cpp, moe.cpp, delta_net.cpp, attention.cpp) share.
//
// An operation is one parallel region: the threads prepare the activations (norm, rounding), meet at a barrier, and then take
// ranges of output panels from a common counter. A panel is 16 rows of a weight matrix, of T16 and row-major ones alike, and
// is read once for all tokens of the call. Decode is bound by reading weights, so a range is contiguous and long.
#pragma once
#include <algorithm>
#include <map>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"
#include "ggml-lite/base/threads.h"
#include "ggml-lite/core/device.h"
#include "ggml-lite/cpu/cpu.h"
#include "ggml-lite/cpu/kernels.h"

namespace qn::cpu {

// A stored weight matrix together with the kernel that meets it.
struct Matrix {
  Product product;
  ProductFn multiply = nullptr;
  const uint8_t* data = nullptr;
  int64_t rows = 0, panel_stride = 0;  // bytes from panel to panel

  int64_t panels() const { return t16_panels(rows); }
};
Matrix make_matrix(const Kernels& kernels, const Tensor& w, Act act);  // an empty tensor gives 0 rows
int64_t largest_prepared_row(int64_t k);                               // bytes, over all forms

// Rows of prepared activations and pointers to them, which kernels take so that any subset can meet a matrix.
struct Rows {
  uint8_t* data = nullptr;
  int64_t stride = 0;
  const uint8_t** x = nullptr;
  uint8_t* operator[](int64_t i) const { return data + i * stride; }
};

// Null where the machine lacks the level. Avx512 is two tables, with and without the instructions for BF16; `bf16` = false asks
// for the plainer one where either would do.
const Kernels* kernels_of(Isa isa, bool bf16 = true);

class CpuDevice final : public Device {
 public:
  CpuDevice(int threads, const Kernels& kernels, int spin_microseconds = Threads::kSpin) : threads_(threads, spin_microseconds), kernels_(kernels) {}

  std::string name() const override { return format("cpu (%d threads, %s)", threads_.size(), kernels_.name); }
  const void* place(const void* host, size_t) override { return host; }
  void upload(void* to, const void* from, size_t n) override;
  void download(void* to, const void* from, size_t n) override;
  void copy(void* to, const void* from, size_t n) override;
  void zero(void* to, size_t n) override;
  uint64_t scratch_bytes(const OpLimits& limits) const override;
  void reserve(const OpLimits& limits) override;
  double read_bandwidth(uint64_t most) override { return cpu_read_bandwidth(threads_.size(), most); }

 private:
  void* do_alloc(size_t bytes, const char* what) override;
  void do_free(void* p, size_t bytes) override;
  void do_embed(const EmbedArgs&) override;
  void do_norm_matmul(const NormMatmulArgs&) override;
  void do_delta_net(const DeltaNetArgs&) override;
  void do_gated_norm_matmul(const GatedNormMatmulArgs&) override;
  void do_attention(const AttentionArgs&) override;
  void do_gate_matmul(const GateMatmulArgs&) override;
  void do_moe_router(const MoeRouterArgs&) override;
  void do_moe_gate_up(const MoeGateUpArgs&) override;
  void do_moe_down(const MoeDownArgs&) override;
  void do_concat_matmul(const ConcatMatmulArgs&) override;
  void do_expert_pairs(const ExpertPairsArgs&) override;

  // ---- scratch. take_... hand out pieces of the common scratch; reset_scratch() at the start of an operation takes all back.
  void reset_scratch() { rows_used_ = pointers_used_ = 0; }
  Rows take_rows(int64_t n, int64_t stride);                       // and n pointers x[i] to row i
  const uint8_t** take_pointers(int64_t n);
  float* local(int thread) const { return locals_ + thread * local_floats_; }  // of one thread, local_floats_ of them
  void check_local(const char* op, int64_t floats) const;

  // ---- inside a parallel region
  // body(Range) on contiguous ranges of n units, each unit once, over all threads. More ranges than threads even out threads of
  // unequal speed; fewer keep the streams long.
  template <class Body>
  void spread(int64_t n, int per_thread, Body body) {
    const int ranges = static_cast<int>(std::min<int64_t>(n, threads_.size() == 1 ? 1 : per_thread * threads_.size()));
    for (int64_t i; (i = threads_.next_task()) < ranges;) body(share(n, static_cast<int>(i), ranges));
  }
  void norm(const float* x, const Tensor& w, float eps, int64_t n, float* y) const;  // an empty w copies
  struct Routed;
  void route(const MoeGateUpArgs& a, int64_t t) const;
  void sort_by_expert(const Tensor& ids, int experts, Routed& r) const;
  void add_product(const char* op, const Tensor& w, Act act, const Tensor& h, const std::function<void(int64_t, float*)>& fill);
  struct AttentionCall;
  static Attend block(const AttentionArgs& a, const AttentionCall& c, int64_t t, int64_t g, int64_t first, float* scores,
                      float* part);
  void append_and_rotate(const AttentionArgs& a, AttentionCall& c, int thread);
  void attend_pairs(const AttentionArgs& a, AttentionCall& c, int thread);
  void attend_blocks(const AttentionArgs& a, AttentionCall& c, int thread);
  struct DeltaCall;
  void delta_columns(const DeltaNetArgs& a, const DeltaCall& c, int64_t task, float* local) const;

  // Sizes of the pieces of the scratch for these limits, and where they begin in it
  struct Scratch {
    int64_t rows_size, pointers_size, local_floats, parts_floats, lists_size;
    int64_t rows_at, pointers_at, locals_at, parts_at, lists_at, bytes;
  };
  Scratch lay_out(const OpLimits& limits) const;

  Threads threads_;
  const Kernels& kernels_;
  std::map<void*, Arena> arenas_;

  OpLimits limits_;
  Arena scratch_;
  uint8_t* row_bytes_ = nullptr;      // prepared activations
  const uint8_t** pointers_ = nullptr;
  int64_t rows_size_ = 0, pointers_size_ = 0;
  int64_t rows_used_ = 0, pointers_used_ = 0;
  float* locals_ = nullptr;
  int64_t local_floats_ = 0;
  float* parts_ = nullptr;            // partial results of attention over blocks of keys
  int64_t parts_floats_ = 0;
  int32_t* lists_ = nullptr;          // tokens sorted by expert
  int64_t lists_size_ = 0;
};

inline Range clip(Range r, int64_t begin, int64_t end) {
  return {std::max(r.begin, begin) - begin, std::min(r.end, end) - begin};
}

// y = W x for the panels of a range; emit(first row, rows, first token, tokens, tile): tile[16 * t + r]
template <class Emit>
void multiply(const Matrix& m, Range panels, const uint8_t* const* x, int64_t tokens, Emit emit) {
  alignas(64) float tile[kBlock * kPanelRows];
  for (int64_t i = panels.begin; i < panels.end; i++) {
    const int rows = static_cast<int>(std::min<int64_t>(kPanelRows, m.rows - i * kPanelRows));
    for (int64_t t = 0; t < tokens; t += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, tokens - t));
      m.multiply(m.product, m.data + i * m.panel_stride, rows, x + t, n, tile);
      emit(i * kPanelRows, rows, t, n, tile);
    }
  }
}

// silu(gate) * up of a (2F, D) matrix; unit i is columns 8i..8i+7 of the result. A panel of T16 holds 8 rows of both;
// row-major has all gate rows before all up rows. emit(first column, token, 8 values)
template <class Emit>
void multiply_swiglu(const Kernels& kernels, const Matrix& m, Range units, const uint8_t* const* x, int64_t tokens, Emit emit) {
  alignas(64) float tile[kBlock * kPanelRows];
  const int64_t half = m.panel_stride / 2;  // row-major: 8 rows
  for (int64_t i = units.begin; i < units.end; i++)
    for (int64_t t = 0; t < tokens; t += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, tokens - t));
      if (is_t16(m.product.dtype)) {
        m.multiply(m.product, m.data + i * m.panel_stride, kPanelRows, x + t, n, tile);
      } else {
        m.multiply(m.product, m.data + i * half, 8, x + t, n, tile);
        m.multiply(m.product, m.data + (m.rows / 16 + i) * half, 8, x + t, n, tile + 8);
      }
      for (int j = 0; j < n; j++) {
        float* row = tile + j * kPanelRows;
        kernels.silu_mul(row, row + 8, 8, row);
        emit(i * 8, t + j, row);
      }
    }
}

}  // namespace qn::cpu
