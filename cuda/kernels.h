// One launcher per operation and size class; shapes and meaning of the arguments are those of core/device.h. Launchers put work
// on the context's stream and never wait. device.cu alone calls them.
//
// A call has few tokens (at most kFewTokens: decode and verification; rows bit-equal to single calls) or many (prefill).
//
//                     few                                  many
//   matrix products   matvec.cu: one kernel each           matmul.cu: activations rounded by a kernel, then cuBLAS (BF16), gemm.cu (T16)
//   experts           moe.cu, moe_down.cu                  moe_prefill.cu: sort by expert, gemm.cu, combine
//   delta rule        gdn.cu                               gdn.cu: groups of eight, fp32; gdn_chunk.cu: chunks of 64 on tensor cores
//   attention         attn.cu: split over the cache        attn_prefill.cu: tiles of queries; attn_wgmma.cu: the same on sm_90a
//
// Combinations outside the fast paths (F32 weights, --act f32) have exact fp32 kernels in the same files.
#pragma once
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include "ggml-lite/core/device.h"

namespace qn::cuda {

constexpr int kFewTokens = 8;   // columns of a tensor-core tile: so many tokens cost little more than one
constexpr int kCounters = 4096;

// What a launcher needs to know of the device and its stream.
struct Context {
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;   // on that stream, host pointers, no TF32
  int sms = 0;                     // multiprocessors
  bool overlap = false;            // programmatic dependent launch (cuda/common.cuh)
  size_t shared_max = 0;           // bytes of shared memory a block may ask for
  // At least the *_scratch() of the operation; free again when the next operation starts. But for what an operation leaves at its beginning for the
  // next one, when the caller vouches that it is the next: rounded_inner() (moe_slab.cuh), Gated.
  uint8_t* scratch = nullptr;
  size_t scratch_bytes = 0;
  uint32_t* counters = nullptr;    // kCounters words, zero before and after every kernel
};

// Cuts the scratch memory of a context into arrays, 256-byte aligned. `planned` versions only count.
class Scratch {
 public:
  explicit Scratch(const Context& c) : base_(c.scratch), end_(c.scratch_bytes) {}
  Scratch() = default;  // counts: take() returns null
  template <class T>
  T* take(int64_t n) {
    const size_t at = used_;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 255) / 256 * 256;
    if (!base_) return nullptr;
    check(used_);
    return reinterpret_cast<T*>(base_ + at);
  }
  size_t used() const { return used_; }
  size_t left() const { return base_ ? end_ - used_ : 0; }
  uint8_t* rest() const { return base_ + used_; }

 private:
  void check(size_t used) const;  // device.cu: QN_CHECK against the size
  uint8_t* base_ = nullptr;
  size_t end_ = 0, used_ = 0;
};

// ---- elementwise.cu
void embed(const Context&, const EmbedArgs&);

// ---- matvec.cu: at most kFewTokens rows, any weight format and rounding
void matvec_norm(const Context&, const NormMatmulArgs&);
void matvec_gated_norm(const Context&, const GatedNormMatmulArgs&);
void matvec_gate(const Context&, const GateMatmulArgs&, bool gated);  // gated: attention_few() has left that
void matvec_concat(const Context&, const ConcatMatmulArgs&);
void matvec_router(const Context&, const MoeRouterArgs&);
size_t matvec_scratch(const OpLimits&);

// ---- matmul.cu: any number of rows
void matmul_norm(const Context&, const NormMatmulArgs&);
void matmul_gated_norm(const Context&, const GatedNormMatmulArgs&);
void matmul_gate(const Context&, const GateMatmulArgs&);
void matmul_concat(const Context&, const ConcatMatmulArgs&);
void matmul_router(const Context&, const MoeRouterArgs&);
// y (T, N) = or += W act(x), x (T, K) fp32 with rows ldx apart; for other files.
void matmul(const Context&, Scratch, const char* what, const float* x, int64_t ldx, int64_t t, Act act, const Tensor& w, float* y, int64_t ldy, bool add);
size_t matmul_scratch(const OpLimits&);

// ---- gemm.cu: x (T, K) BF16, rows ldx apart, in natural order; W any of BF16, INT8, INT4; sums fp32.
// y (T, N) fp32 = W x, or += when `add`.
void gemm(const Context&, const char* what, const uint16_t* x, int64_t ldx, int64_t t, const Tensor& w, float* y, int64_t ldy, bool add);
// Experts: order (T*K) lists the rows t*K + j grouped by expert; items cut it into tiles of one expert and at most kTileTokens rows.
// Both lie in device memory, so the grid has room for max_items, and items without rows end the list.
//   gate_up: inner[order[r]] (fp32) = silu(gate) * up of x[order[r] / K]
//   down:    y[order[r]] (fp32) = down of inner[order[r]]
constexpr int kTileTokens = 64;
struct GemmItem {
  int32_t expert, first, count, zero;  // rows order[first .. first + count)
};
struct GroupedGemm {
  Experts experts;
  const int32_t* order;
  const GemmItem* items;
  int64_t max_items;
  int64_t chosen;         // K
};
void gemm_gate_up(const Context&, const GroupedGemm&, const uint16_t* x, float* inner);      // x (T, D) BF16, inner (T*K, F)
void gemm_down(const Context&, const GroupedGemm&, const uint16_t* inner, float* y);         // inner (T*K, F) BF16, y (T*K, D)

// ---- moe.cu, moe_down.cu
void moe_few_gate_up(const Context&, const MoeGateUpArgs&);   // at most kFewTokens rows; any format and rounding
void moe_few_down(const Context&, const MoeDownArgs&);
void moe_exact_gate_up(const Context&, const MoeGateUpArgs&); // any number of rows, fp32 products, unhurried
void moe_exact_down(const Context&, const MoeDownArgs&);
void moe_route(const Context&, const MoeGateUpArgs&);         // only ids and weights, any number of rows
size_t moe_scratch(const OpLimits&);

// ---- moe_prefill.cu: any number of rows; BF16, INT8 or INT4 experts with Act::BF16
void moe_prefill_gate_up(const Context&, const MoeGateUpArgs&);
void moe_prefill_down(const Context&, const MoeDownArgs&);
size_t moe_prefill_scratch(const OpLimits&);

// ---- gdn.cu, gdn_chunk.cu
void delta_net(const Context&, const DeltaNetArgs&);
void delta_replay(const Context&, const DeltaReplayArgs&);
// What delta_net leaves of few tokens for gated_norm_matmul, when that is the next operation and its z is known: every block of a product would
// read both o and z, and gate. It lies where scratch memory begins; null where the shapes are others.
struct Gated {
  static constexpr int kParts = 16;  // of a head
  float* o = nullptr;        // (T, GV*DV): o * norm * silu(z), without 1 / rms(o); of attention (T, H*DH), o * sigmoid(gate)
  float* squares = nullptr;  // (T, GV, kParts): sums of o^2; of attention null
};
Gated take_gated(const Context&, int64_t tokens, int64_t value_heads, int64_t key_dim, int64_t value_dim);
size_t delta_net_scratch(const OpLimits&);

// ---- attn.cu, attn_prefill.cu, attn_wgmma.cu
// At most kFewTokens rows. Whether it has left, for gate_matmul, if that is the next operation, o times sigmoid(gate) where scratch memory begins:
// every block of a product would read both, and gate.
bool attention_few(const Context&, const AttentionArgs&);
void attention_many(const Context&, const AttentionArgs&);
size_t attention_scratch(const OpLimits&);

// ---- experts.cu: at most kPlacedTokens rows
void place_experts(const Context&, const PlaceExpertsArgs&);
void join_experts(const Context&, const JoinExpertsArgs&);
size_t place_experts_scratch(const OpLimits&);

// ---- sample.cu
void sample(const Context&, const SampleArgs&);
size_t sample_scratch(int64_t vocab);

// ---- load.cu: file -> device memory through pinned buffers, one thread and stream each; see Device::load
LoadReport load(const File&, std::span<const LoadPiece>, int threads, bool check, const std::function<void(size_t)>& damaged,
                const std::function<void(uint64_t, uint64_t)>& progress);

}  // namespace qn::cuda
