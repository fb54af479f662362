// The CPU device from inside: what its operations (matmul.cpp, moe.cpp, delta_net.cpp, attention.cpp) share.
//
// An operation is one parallel region: the threads prepare the activations (norm, rounding), meet at a barrier, and then take
// ranges of output panels from a common counter. A panel is 16 rows of a weight matrix, of T16 and row-major ones alike, and
// is read once for all tokens of the call. Decode is bound by reading weights, so a range is contiguous and long.
#pragma once
#include <algorithm>
#include <cstring>
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
  const Many* many = nullptr;  // of T16 and Bytes, where the instruction set has one
  const uint8_t* data = nullptr;
  int64_t rows = 0, panel_stride = 0;  // bytes from panel to panel

  int64_t panels() const { return t16_panels(rows); }
  bool takes_packed(int64_t tokens) const { return many && many->pack && tokens >= many->least; }
};
Matrix make_matrix(const Kernels& kernels, const Tensor& w, Act act);  // an empty tensor gives 0 rows
int64_t largest_prepared_row(int64_t k);                               // bytes, over all forms

// Rows of prepared activations and pointers to them, which kernels take so that any subset can meet a matrix. Where the matrix takes packed ones
// (Many), these as well, kPacked of them behind each other.
struct Rows {
  uint8_t* data = nullptr;
  int64_t stride = 0;
  const uint8_t** x = nullptr;
  uint8_t* packed = nullptr;
  uint8_t* operator[](int64_t i) const { return data + i * stride; }
};

inline int64_t packs_of(int64_t tokens) { return (tokens + kPacked - 1) / kPacked; }
// n <= 0: nothing
inline void pack(const Matrix& m, const uint8_t* const* x, int64_t n, uint8_t* packed) {
  for (int64_t t = 0; t < n; t += kPacked, packed += m.product.packed)
    m.many->pack(m.product, x + t, static_cast<int>(std::min<int64_t>(kPacked, n - t)), packed);
}

// What meets a matrix: rows x[0] .. x[n - 1] of activations, which may be packed already.
struct Tokens {
  const uint8_t* const* x;
  int64_t n;
  const uint8_t* packed = nullptr;
};

// Null where the machine lacks the level. Avx512 is three tables: plain, with the instructions for BF16, with AMX as well; the best
// one there is, unless `most` asks for a plainer one.
enum class Extra { None, Bf16, Amx };
const Kernels* kernels_of(Isa isa, Extra most = Extra::Amx);
double cpu_peak(int threads, const Kernels& kernels);  // as in cpu.h

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
  size_t read_ahead(const Experts& experts, std::span<const int32_t> ids, const std::function<bool()>& stop) override;
  double read_bandwidth(uint64_t most) override { return cpu_read_bandwidth(threads_.size(), most); }
  double int8_peak() override { return cpu_peak(threads_.size(), kernels_); }

 private:
  void* do_alloc(size_t bytes, const char* what) override;
  void do_free(void* p, size_t bytes) override;
  void do_embed(const EmbedArgs&) override;
  void do_norm_matmul(const NormMatmulArgs&) override;
  void do_delta_net(const DeltaNetArgs&) override;
  void do_delta_replay(const DeltaReplayArgs&) override;
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
  Rows take_rows(const Matrix& m, int64_t n);                      // prepared for m, and room for packed ones if it takes them
  uint8_t* take_bytes(int64_t n);
  const uint8_t** take_pointers(int64_t n);
  float* local(int thread) const { return locals_ + thread * local_floats_; }  // of one thread, local_floats_ of them
  void check_local(const char* op, int64_t floats) const;
  uint8_t* unpacked(int thread) const { return unpacked_ + thread * unpacked_size_; }

  // ---- inside a parallel region
  // Behind the barrier where all rows of n tokens are prepared: packs them, if they are to be, and meets the other threads again.
  void pack_rows(const Matrix& m, const Rows& x, int64_t n, int thread) {
    if (!x.packed) return;
    const Range mine = share(packs_of(n), thread, threads_.size());
    const int64_t first = mine.begin * kPacked;
    pack(m, x.x + first, std::min(mine.end * kPacked, n) - first, x.packed + mine.begin * m.product.packed);
    threads_.barrier(thread);
  }
  // body(Range) on contiguous ranges of n units, each unit once, over all threads: a thread's own ranges, one behind the other, then what is
  // left of others'. More ranges than threads even out threads of unequal speed; fewer keep the streams long.
  template <class Body>
  void spread(int thread, int64_t n, int per_thread, Body body) {
    const int count = ranges(n, per_thread);
    threads_.spread(thread, 0, count, [&](int64_t i) { body(share(n, static_cast<int>(i), count)); });
  }
  int ranges(int64_t n, int per_thread) const {
    return static_cast<int>(std::min<int64_t>(n, threads_.size() == 1 ? 1 : per_thread * threads_.size()));
  }
  // For a thread that has nothing to prepare: asks for the weights where(unit) that begin its first range, so that memory works while other
  // threads do.
  template <class Where>
  void look_ahead(int thread, int64_t n, int per_thread, Where where) {
    const int count = ranges(n, per_thread);
    const Range mine = share(count, thread, threads_.size());
    if (mine.begin == mine.end) return;
    const uint8_t* w = where(share(n, static_cast<int>(mine.begin), count).begin);
    for (int64_t at = 0; at < kLookAhead; at += 64) __builtin_prefetch(w + at, 0, 2);
  }
  static constexpr int64_t kLookAhead = 16384;
  void norm(const float* x, const Tensor& w, float eps, int64_t n, float* y) const;  // an empty w copies
  // Of an expert's n units, those of a thread: always the same, so that it can read them ahead; one further with every expert, since shares differ
  Range part_of_expert(int64_t n, int thread, int32_t id) const { return share(n, (thread + id) % threads_.size(), threads_.size()); }
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
  void replay_columns(const Tensor& log, int64_t pos, int64_t count, const Tensor& state, int64_t key_heads, int64_t head, int64_t column, int64_t columns) const;

  // Sizes of the pieces of the scratch for these limits, and where they begin in it
  struct Scratch {
    int64_t rows_size, pointers_size, local_floats, unpacked, parts_floats, lists_size;
    int64_t rows_at, pointers_at, locals_at, unpacked_at, parts_at, lists_at, bytes;
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
  uint8_t* unpacked_ = nullptr;       // of each thread: kPanels panels, or kBlock packed rows
  int64_t unpacked_size_ = 0;
  float* parts_ = nullptr;            // partial results of attention over blocks of keys
  int64_t parts_floats_ = 0;
  int32_t* lists_ = nullptr;          // tokens sorted by expert
  int64_t lists_size_ = 0;
};

inline Range clip(Range r, int64_t begin, int64_t end) {
  return {std::max(r.begin, begin) - begin, std::min(r.end, end) - begin};
}

// Of multiply(): of all tokens, these are `first` and those after it
template <class Emit>
void multiply_tokens(const Matrix& m, Range panels, const Tokens& tokens, int64_t first, bool many, uint8_t* unpacked, Emit& emit,
                     const uint8_t* then) {
  alignas(64) float tile[kPanels * kBlock * kPanelRows];
  const int step = many ? kPanels : 1;
  const bool unpack = many && m.many->unpack;
  for (int64_t i = panels.begin; i < panels.end; i += step) {
    const int n = static_cast<int>(std::min<int64_t>(step, panels.end - i));
    const uint8_t* w = m.data + i * m.panel_stride;
    for (int j = 0; unpack && j < n; j++) m.many->unpack(m.product, w + j * m.panel_stride, unpacked + j * m.product.unpacked);
    const int64_t left = std::min<int64_t>(kPanels, panels.end - i - n);
    const uint8_t* next = left > 0 ? w + n * m.panel_stride : then;
    int64_t next_bytes = next ? (left > 0 ? left : kPanels) * m.panel_stride : 0;
    for (int64_t t = 0; t < tokens.n; t += kBlock, next_bytes = 0) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, tokens.n - t));
      auto rows = [&](int64_t panel) { return static_cast<int>(std::min<int64_t>(kPanelRows, m.rows - panel * kPanelRows)); };
      if (many)
        m.many->multiply(m.product, unpack ? unpacked : w, unpack ? m.product.unpacked : m.panel_stride, n, tokens.x + t,
                         tokens.packed ? tokens.packed + t / kPacked * m.product.packed : nullptr, count, next, next_bytes, tile);
      else m.multiply(m.product, w, next, rows(i), tokens.x + t, count, tile);
      for (int j = 0; j < n; j++) emit((i + j) * kPanelRows, rows(i + j), first + t, count, tile + j * kBlock * kPanelRows);
    }
  }
}

// y = W x for the panels of a range; emit(first row, rows, first token, tokens, tile): tile[16 * t + r]. Many tokens need `unpacked`,
// room for kPanels unpacked panels or kBlock packed rows. `then`: what will be read after these panels, if known.
template <class Emit>
void multiply(const Matrix& m, Range panels, const Tokens& tokens, uint8_t* unpacked, Emit emit, const uint8_t* then = nullptr) {
  const bool many = m.many && tokens.n >= m.many->least;
  if (!m.takes_packed(tokens.n) || tokens.packed) return multiply_tokens(m, panels, tokens, 0, many, unpacked, emit, then);
  for (int64_t t = 0; t < tokens.n; t += kBlock) {
    const Tokens some = {tokens.x + t, std::min<int64_t>(kBlock, tokens.n - t), unpacked};
    pack(m, some.x, some.n, unpacked);
    multiply_tokens(m, panels, some, t, true, nullptr, emit, then);
  }
}

// silu(gate) * up of a (2F, D) matrix; unit i is columns 8i..8i+7 of the result. A panel of T16 holds 8 rows of both;
// row-major has all gate rows before all up rows. emit(first column, token, 8 values)
template <class Emit>
void multiply_swiglu(const Kernels& kernels, const Matrix& m, Range units, const Tokens& tokens, uint8_t* unpacked, Emit emit,
                     const uint8_t* then = nullptr) {
  auto combine = [&](int64_t unit, int64_t t, int n, const float* tile) {
    alignas(64) float gate[kBlock * 8], up[kBlock * 8];  // whole vectors of several tokens
    for (int j = 0; j < n; j++) {
      std::memcpy(gate + 8 * j, tile + j * kPanelRows, 32);
      std::memcpy(up + 8 * j, tile + j * kPanelRows + 8, 32);
    }
    kernels.silu_mul(gate, up, 8 * n, gate);
    for (int j = 0; j < n; j++) emit(unit * 8, t + j, gate + 8 * j);
  };
  if (is_t16(m.product.dtype))
    return multiply(m, units, tokens, unpacked, [&](int64_t row, int, int64_t t, int n, const float* tile) { combine(row / kPanelRows, t, n, tile); }, then);
  alignas(64) float tile[kBlock * kPanelRows];
  const int64_t half = m.panel_stride / 2;  // 8 rows
  for (int64_t i = units.begin; i < units.end; i++)
    for (int64_t t = 0; t < tokens.n; t += kBlock) {
      const int n = static_cast<int>(std::min<int64_t>(kBlock, tokens.n - t));
      m.multiply(m.product, m.data + i * half, nullptr, 8, tokens.x + t, n, tile);
      m.multiply(m.product, m.data + (m.rows / 16 + i) * half, nullptr, 8, tokens.x + t, n, tile + 8);
      combine(i, t, n, tile);
    }
}

}  // namespace qn::cpu
