// Device: the one interface between the model and the machine. Three implement it: ref (scalar, the truth), cpu, cuda.
//
// Operations are the phases of a layer, cut where every output needs every input of the phase before; each is one kernel
// launch on a GPU (one or two) and one parallel region on a CPU. A public operation checks its contract once for all devices
// (dtype, shape, divisibility, aliasing: QN_CHECK with both shapes) and calls the private do_...().
//
// Rules for implementations:
//   - An operation allocates nothing: scratch is sized by reserve().
//   - What changes per step (position) is read from `step`, which lies in device memory; shapes are fixed per recording.
//   - Row i of a result depends on row i (and the state left by rows < i) only, and its bits do not depend on how many rows
//     the call has, for calls of 1 to 8 rows. ref and cpu hold this for any number of rows.
//   - Sums over K are fp32. Results of two devices agree within the tolerances of tests/test_ops.cpp.
//   - Operations of one device run in the order they are called. download(), sync() and keep_up() wait for them, nothing else does;
//     upload() has read its source when it returns.
//
// Activations are F32 (T, n). `h` is the residual stream (T, D).
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ggml-lite/base/file.h"
#include "ggml-lite/core/experts.h"
#include "ggml-lite/core/step.h"
#include "ggml-lite/core/tensor.h"

namespace qn {

// Sizes the scratch memory of a device needs to know before the first operation.
struct OpLimits {
  int tokens = 0;       // largest T of a call
  int64_t width = 0;    // largest K of a matrix product and largest N of a fused intermediate
  int64_t vocab = 0;    // V, for choosing tokens
  int experts = 0, chosen = 0;
  int64_t expert_width = 0, model_width = 0;
  int heads = 0;        // H
  int64_t context = 0;  // C
  int64_t kv_codes = 0; // HK*DH where the cache is INT8
  int value_heads = 0, key_heads = 0;  // GV, GK
  int64_t key_dim = 0, value_dim = 0;  // DK, DV
};

// ---------------------------------------------------------------------------------------------------------------------
// Arguments. "out" members are written, all else is read. fp32 unless said otherwise. w1 marks norm weights with 1+w folded.

struct EmbedArgs {
  Tensor ids;    // (T) I32, each in [0, V): an id outside is a contract violation on CPU devices, clamped on CUDA
  Tensor table;  // (V, D) BF16 or F32
  Tensor h;      // out (T, D)
};

// y_i = W_i act(norm(h)); norm(x) = x / sqrt(mean(x^2) + eps) * w1.   D1, A1 and the head.
struct NormMatmulArgs {
  Tensor h;             // (T, D)
  Tensor norm;          // (D); empty: h itself
  float eps = 1e-6f;
  Act act = Act::F32;   // rounding of what enters w
  Tensor w, y;          // (N, D) any weight format -> out (T, N); y may be a column slice
  Tensor w_exact, y_exact;  // optional: BF16 or F32 weights that see unrounded fp32 -> out (T, N2)
  Tensor normed;        // optional out (T, D): norm(h), unrounded
};

// A row of a log of tokens that the delta rule has seen, in floats: what takes S over its token, S <- alpha S + k u'. A device may scale k and u
// as it likes, as long as their product is the same.
//
//   | k (GK, DK) | of each value head: u (DV), alpha, three unused |
constexpr int64_t delta_log_u(int64_t gk, int64_t dk, int64_t dv, int64_t value_head) { return gk * dk + value_head * (dv + 4); }  // where u begins
constexpr int64_t delta_log_width(int64_t gk, int64_t gv, int64_t dk, int64_t dv) { return delta_log_u(gk, dk, dv, gv); }
constexpr int kDeltaLogTokens = 8;                  // most tokens of a call that is logged
constexpr int kDeltaLogRows = 2 * kDeltaLogTokens;  // those of a call beside those of the one before it

// Convolution, SiLU, L2 norm, gates and the gated delta rule (model-spec 3.3-3.5; recurrent form 3.5 or chunked 3.6).   D2
struct DeltaNetArgs {
  Tensor qkv;       // (T, CH): q (GK*DK) | k (GK*DK) | v (GV*DV), before the convolution; may be a column slice
  Tensor ba;        // (T, 2*GV): b | a
  Tensor conv;      // (CH, 4) F32 or BF16: taps, the last one meets the current token
  Tensor neg_a;     // (GV): -exp(A_log)
  Tensor dt_bias;   // (GV)
  Tensor conv_ring; // in/out (slots, CH), slots a power of two >= 4: the input of position p is in slot p & (slots - 1).
                    // Zero before the sequence starts. The call leaves the inputs of its last min(T, slots) positions there.
  Tensor state;     // in/out (GV, DK, DV): S, key index first
  Tensor log;       // optional in/out (kDeltaLogRows, delta_log_width()): position p is in row p % kDeltaLogRows. For calls of at most
                    // kDeltaLogTokens, with slots >= T + 3. S begins as `state` taken over the rows of the step->from positions
                    // before this call (which is 0 without a log). A call of several tokens leaves `state` as it began and its tokens in
                    // the log, so that it can be taken back to any of them; a call of one leaves S behind it, as without a log.
  Tensor o;         // out (T, GV*DV)
  Tensor z, out_norm;  // optional: what D3, the next operation, will be given with this o; a device may prepare what that needs
  int key_heads = 0, value_heads = 0;
  Act act = Act::F32;  // not F32: the chunked form may use BF16 operands; state and inverse stay fp32
  const StepParams* step = nullptr;
};

// What a call with a log leaves undone: S over the rows of the positions [pos - count, pos), once. Same bits as in D2.
struct DeltaReplayArgs {
  Tensor log;      // (kDeltaLogRows, delta_log_width())
  Tensor state;    // in/out (GV, DK, DV)
  int key_heads = 0;
  int pos = 0, count = 0;
};

// h += W act( rms(o per head) * w * silu(z) )    (w plain, not 1+w)      D3
struct GatedNormMatmulArgs {
  Tensor o;     // (T, GV*DV)
  Tensor z;     // (T, GV*DV), may be a column slice
  Tensor norm;  // (DV)
  float eps = 1e-6f;
  Act act = Act::F32;
  Tensor w;     // (D, GV*DV)
  Tensor h;     // in/out (T, D)
  int64_t key_dim = 0;  // DK, if D2 was the operation before and knew this z and norm
};

// q and k norm, RoPE on the first R dims (pairs (i, i+R/2)), append to the cache, causal softmax attention.     A2
struct AttentionArgs {
  Tensor qgkv;            // (T, 2*H*DH + 2*HK*DH): query | gate | k | v; the gate is not read here
  Tensor q_norm, k_norm;  // (DH) w1
  float eps = 1e-6f;
  Tensor inv_freq;        // (R/2): radians per position
  float rope_scale = 1;   // factor on cos and sin (YaRN attention factor)
  Act act = Act::F32;     // not F32: operands of the products of many tokens may be rounded to BF16; softmax stays fp32
  Tensor k_cache, v_cache;  // in/out (HK, C, DH) F32, BF16 (rounded to nearest even when stored) or I8 codes (core/blocks.h). What
                            // is attended to is what was stored, also for the keys and values of this call.
  Tensor k_scales, v_scales;  // in/out (HK, C, ceil(DH/128)) F16: of codes, else empty
  int heads = 0, kv_heads = 0;
  Tensor o;               // out (T, H*DH)
  const StepParams* step = nullptr;
  bool then_gate = false; // A3 comes next, with this o and the gate of qgkv: a device may prepare what that needs
};

// h += W act( o * sigmoid(gate) )     A3
struct GateMatmulArgs {
  Tensor o;     // (T, H*DH)
  Tensor gate;  // (T, H*DH), may be a column slice
  Act act = Act::F32;
  Tensor w;     // (D, H*DH)
  Tensor h;     // in/out (T, D)
  bool behind = false;  // A2 was the operation before, and knew
};

// D4: x = norm(h); router logits; shared expert up to its SwiGLU; its scalar gate.
struct MoeRouterArgs {
  Tensor h;            // (T, D)
  Tensor norm;         // (D) w1
  float eps = 1e-6f;
  Tensor router;       // (E, D) BF16 or F32: sees unrounded fp32
  Tensor shared_gate;  // (1, D) BF16 or F32: sees unrounded fp32
  Act shared_act = Act::F32;
  Tensor shared_gate_up;  // (2*FS, D); row-major: gate rows then up rows; T16: interleaved by 8
  Tensor x;            // out (T, D): norm(h), unrounded
  Tensor logits;       // out (T, E)
  Tensor shared;       // out (T, FS): silu(gate) * up
  Tensor shared_scale; // out (T): sigmoid(shared_gate . x)
};

// D5: top K of softmax(logits) (ties: lower index; NaN last), weights renormalised over the K if `renormalise`; gate_up and SwiGLU.
struct MoeGateUpArgs {
  Tensor x;        // (T, D)
  Tensor logits;   // (T, E)
  bool renormalise = true;
  Act act = Act::F32;
  Experts experts;
  Tensor ids;      // out (T, K) I32, in order of falling probability
  Tensor weights;  // out (T, K)
  Tensor inner;    // out (T*K, F): row t*K + j belongs to expert ids[t][j]
};

// D6: h += sum_j weights[j] * down_{ids[j]} act(inner[j]) + shared_scale * shared_down act(shared)
struct MoeDownArgs {
  Tensor ids, weights, inner;  // as D5 left them
  Tensor logits;               // (T, E) optional: those D5 chose by, if that was the call before; a device may choose again, earlier than ids are there
  Act act = Act::F32;          // of the routed experts
  Experts experts;
  Tensor shared;               // (T, FS)
  Tensor shared_scale;         // (T)
  Act shared_act = Act::F32;
  Tensor shared_down;          // (D, FS)
  Tensor h;                    // in/out (T, D)
};

// Before D5, where experts have a home (core/experts.h), for 1 to kPlacedTokens tokens: the choice of D5, the places of the chosen, and the
// request to the host for those that this device does not compute.
struct PlaceExpertsArgs {
  Tensor x, logits;        // as D5 takes them
  bool renormalise = true;
  Experts experts;         // with a home: in/out
  Tensor ids, weights;     // out, those of D5
  ExpertBox box;           // in/out
  // Optional: the host is told what the next layer, if it chooses as many, will likely ask for (core/experts.h)
  Tensor h;                       // (T, D) as D4 took it
  Tensor next_norm, next_router;  // (D), (E, D) of the next layer's D4
  Experts next;                   // its experts, with a home
};
// After D6: h += what the host was asked for. Waits for it, on the device.
struct JoinExpertsArgs {
  ExpertBox box;
  Tensor h;                // in/out (T, D)
};

// The host's part: y[t] = sum over the pairs of token t, by rising expert, of weight * down(silu(gate x) * up x); ref and cpu only.
struct ExpertPairsArgs {
  Tensor x;                // (T, D)
  Tensor token, expert;    // (P) I32
  Tensor weight;           // (P)
  Act act = Act::F32;
  Experts experts;         // data: memory of the host
  Tensor y;                // out (T, D)
};

// y = W act( concat( norm(a; norm_a), norm(b; norm_b) ) )       the entry of a multi-token-prediction layer
struct ConcatMatmulArgs {
  Tensor a, b;              // (T, D)
  Tensor norm_a, norm_b;    // (D) w1
  float eps = 1e-6f;
  Act act = Act::F32;
  Tensor w;                 // (D, 2D)
  Tensor y;                 // out (T, D)
};

// Chooses the token at position p = step->pos + step->n_tok, which is how many tokens the model has seen, and prepares the next step.
// The meaning of the parameters is that of text/sampler.h: the same logits give the same token.
//
// Of T rows the last one is for p, the first for p - T + 1, where `history` has the tokens that the rows behind it took for granted (drafts).
// Each row chooses as if the drafts before it were right; the first that chooses another token than the draft ends the choice, and p is its
// position.
struct SampleArgs {
  Tensor logits;        // (T, V), T <= 8
  Tensor allowed;       // (V) U8: whether an id may be chosen; empty: all may
  Tensor history;       // in/out (C) I32: the tokens before p are read, [p] is written when p < C
  Tensor ids;           // out (1) I32: the token at p
  const SampleParams* params = nullptr;  // device memory
  StepParams* step = nullptr;            // in/out, device memory: becomes {p - ahead, 1, rows up to p's, or 0 if there was but one}
  Mail* mail = nullptr;                  // out, memory of alloc_mail(): the tokens of all rows up to p's; null: nobody is told
  int ahead = 0;                         // logits of a layer that predicts further: p = step->pos + step->n_tok + ahead
};

// ---------------------------------------------------------------------------------------------------------------------

// The weights of a file on their way to a device.
struct LoadPiece {
  uint64_t offset, bytes;  // in the file
  void* to;                // where place() said
  uint32_t crc;            // crc32c of the bytes
};
struct LoadReport {
  uint64_t bytes = 0;
  int threads = 0;
  double seconds = 0;                  // from first to last byte
  double read = 0, check = 0, wait = 0;  // seconds of all threads together: reading, checksums, waiting for a free buffer
};

class Device;

// Memory of a device, freed with the object (before its device). Zeroed.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* device, void* data, size_t bytes) : device_(device), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& o) noexcept { *this = std::move(o); }
  Buffer& operator=(Buffer&& o) noexcept;
  ~Buffer();
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

enum class Op { Embed, NormMatmul, DeltaNet, GatedNormMatmul, Attention, GateMatmul, MoeRouter, MoeGateUp, MoeDown, ConcatMatmul, Sample, PlaceExperts, JoinExperts, ExpertPairs };
constexpr int kOps = 14;
const char* name(Op op);  // "norm_matmul"
constexpr uint32_t bit(Op op) { return 1u << static_cast<int>(op); }

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;         // "cpu (16 threads, avx512)"
  // Makes this the device that the calling thread talks to, where there may be several of a kind. Every operation begins with it; an
  // implementation that needs it begins its other entry points with it, too.
  virtual void make_current() const {}

  // ---- memory and order
  Buffer alloc(size_t bytes, const char* what);  // zeroed; throws Error naming `what` and the missing bytes
  // Weights as they lie in the mapped file -> where operations can read them. Host devices return the same address. Others cut it
  // from the memory that reserve_weights() took; its contents are undefined until load() has put them there.
  virtual const void* place(const void* host, size_t bytes) = 0;
  static constexpr size_t kPlaceAlign = 256;            // place() takes bytes rounded up to this
  virtual void reserve_weights(uint64_t) {}
  // Copies the pieces and, when `check`, compares their checksums on the way; calls damaged(i), which throws, for the first bad one.
  // progress(done, total) is called by the caller's thread.
  virtual LoadReport load(const File&, std::span<const LoadPiece>, int threads, bool check, const std::function<void(size_t)>& damaged,
                          const std::function<void(uint64_t, uint64_t)>& progress) {
    (void)threads, (void)check, (void)damaged, (void)progress;
    return {};
  }
  // Memory of its own, in which the plan has to find room for everything; 0: it computes in the memory of the process.
  virtual uint64_t memory() const { return 0; }         // bytes of the device
  virtual uint64_t memory_free() const { return 0; }    // bytes nobody holds now
  virtual uint64_t memory_used() const { return 0; }    // bytes taken since this object was made, by whomever
  virtual void upload(void* to, const void* from_host, size_t bytes) = 0;
  virtual void download(void* to_host, const void* from, size_t bytes) = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;  // device to device, ordered with operations
  virtual void zero(void* to, size_t bytes) = 0;
  // From memory of another device of this kind into memory of this one. Ordered behind everything asked of `source` so far, and what is
  // asked of `source` later is ordered behind the copy, so that it may overwrite `from`. Not while recording.
  virtual void copy_from(void* to, Device& source, const void* from, size_t bytes) { source.download(to, from, bytes); }
  virtual void sync() {}
  // Called after each of a row of passes: waits for all but the last `behind` of them, so that the caller is never further ahead.
  virtual void keep_up(size_t behind) { (void)behind, sync(); }
  // Run `body` (a fixed list of operations, copies and zeroings on fixed addresses); a device that records may replay what it
  // recorded for the same (owner, key). The owner of the addresses calls forget() before they go.
  virtual void recorded(const void* owner, uint64_t key, const std::function<void()>& body) {
    (void)owner, (void)key;
    body();
  }
  virtual void forget(const void* owner) { (void)owner; }
  virtual uint64_t scratch_bytes(const OpLimits& limits) const = 0;  // what reserve() will take, for the memory plan
  virtual void reserve(const OpLimits& limits) = 0;                  // again with larger limits is allowed between operations

  // ---- experts that do not all fit (core/experts.h), for devices with memory of their own
  // Makes memory of the host readable by the device for as long as this object lives; what the device sees it as, null: it can't be done.
  virtual const uint8_t* map_host(const void* host, uint64_t bytes) { return (void)host, (void)bytes, nullptr; }
  virtual void* alloc_host(size_t bytes) { return (void)bytes, nullptr; }  // zeroed memory of the host that both see; lives as long as the device
  // Memory for records without a slot, of two layers. slot_of: where the slots of all experts of all layers are (ExpertHome::slot_of).
  virtual void reserve_staging(int64_t records, int64_t record_bytes, int experts, std::span<const int32_t> slot_of) {
    (void)records, (void)record_bytes, (void)experts, (void)slot_of;
  }
  // On a device whose memory is the host's: brings experts into the caches of those who will need them in expert_pairs, one expert after the
  // other, until stop() says so, which any thread may ask. Returns how many were read to their end.
  virtual size_t read_ahead(const Experts& experts, std::span<const int32_t> ids, const std::function<bool()>& stop) { return (void)experts, (void)ids, (void)stop, 0; }
  // Starts to bring the records without a slot into staging memory. Each call is for a layer whose D5 and D6 of many tokens come in the order
  // of these calls, at most one layer ahead of them.
  virtual void stage_experts(const Experts& experts) { (void)experts; }

  // ---- choosing tokens, for devices that can (then generation never waits for logits); the others leave it to text/sampler
  virtual bool samples() const { return false; }
  virtual Mail* alloc_mail() { return nullptr; }  // zeroed, lives as long as the device
  void sample(const SampleArgs&);

  // Throws Error when something that was started has failed; returns whether all of it has ended. Never waits.
  virtual bool idle() { return true; }

  // ---- measuring
  // Operations outside the mask do nothing: to time the ones inside alone. Recordings made under one mask replay only under it.
  // An answer that is asked for must also be fetched, before the next is asked for: join_experts goes with place_experts.
  void select(uint32_t mask) {
    constexpr uint32_t both = bit(Op::PlaceExperts) | bit(Op::JoinExperts);
    selected_ = mask & bit(Op::PlaceExperts) ? mask | both : mask & ~both;
  }
  uint32_t selected() const { return selected_; }
  // What operations asked for so far, whether selected or not: calls, and the bytes they had to move: weights and recurrent state;
  // no activations, and not the KV cache, whose length only the device knows. Of experts each that was chosen, once; that is known
  // of one token, of several only while count_experts() is on: otherwise as many as T tokens can choose. Replays do not count.
  struct Traffic {
    int calls = 0;
    uint64_t bytes = 0;
  };
  Traffic traffic(Op op) const { return traffic_[static_cast<int>(op)]; }
  // On: the ids that expert operations use are fetched and counted, which waits for the device; not while recording.
  void count_experts(bool on) { count_experts_ = on; }
  void forget_traffic() { std::fill(std::begin(traffic_), std::end(traffic_), Traffic{}); }
  // Bytes per second of a plain read of the memory that weights are in; takes a fraction of a second, and `most` bytes of memory.
  // 0: not measured, or that is too little to tell memory from caches.
  virtual double read_bandwidth(uint64_t most) { return (void)most, 0; }
  // Multiplications and additions of int8 codes per second, by the instructions that matrix products are made of, in registers alone. 0: not measured.
  virtual double int8_peak() { return 0; }
  // Bytes per second of copies from pinned memory of the host; 0 where there is no way to go.
  virtual double bus_bandwidth() { return 0; }

  // ---- operations
  void embed(const EmbedArgs&);
  void norm_matmul(const NormMatmulArgs&);
  void delta_net(const DeltaNetArgs&);
  void delta_replay(const DeltaReplayArgs&);
  void gated_norm_matmul(const GatedNormMatmulArgs&);
  void attention(const AttentionArgs&);
  void gate_matmul(const GateMatmulArgs&);
  void moe_router(const MoeRouterArgs&);
  void moe_gate_up(const MoeGateUpArgs&);
  void moe_down(const MoeDownArgs&);
  void concat_matmul(const ConcatMatmulArgs&);
  void place_experts(const PlaceExpertsArgs&);
  void join_experts(const JoinExpertsArgs&);
  void expert_pairs(const ExpertPairsArgs&);

 private:
  friend class Buffer;
  virtual void* do_alloc(size_t bytes, const char* what) = 0;
  virtual void do_free(void* p, size_t bytes) = 0;
  virtual void do_embed(const EmbedArgs&) = 0;
  virtual void do_norm_matmul(const NormMatmulArgs&) = 0;
  virtual void do_delta_net(const DeltaNetArgs&) = 0;
  virtual void do_delta_replay(const DeltaReplayArgs&) = 0;
  virtual void do_gated_norm_matmul(const GatedNormMatmulArgs&) = 0;
  virtual void do_attention(const AttentionArgs&) = 0;
  virtual void do_gate_matmul(const GateMatmulArgs&) = 0;
  virtual void do_moe_router(const MoeRouterArgs&) = 0;
  virtual void do_moe_gate_up(const MoeGateUpArgs&) = 0;
  virtual void do_moe_down(const MoeDownArgs&) = 0;
  virtual void do_concat_matmul(const ConcatMatmulArgs&) = 0;
  virtual void do_sample(const SampleArgs&) {}
  virtual void do_place_experts(const PlaceExpertsArgs&) {}
  virtual void do_join_experts(const JoinExpertsArgs&) {}
  virtual void do_expert_pairs(const ExpertPairsArgs&) {}
  bool begin(Op op, uint64_t bytes);  // counts; whether the operation is selected
  int64_t experts_read(const Tensor& ids, const Experts& experts);

  uint32_t selected_ = ~0u;
  bool count_experts_ = false;
  Traffic traffic_[kOps];
};

}  // namespace qn
