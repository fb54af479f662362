// The memory of one sequence in a model of attention and recurrent layers.
//
// Keys and values of attention layers can be cut at any position: what lies behind is overwritten. The recurrent part (delta rule
// states and convolution inputs) cannot: going back needs a checkpoint, a copy taken when the sequence was there. Checkpoints hold
// the recurrent part only; a checkpoint at position p stays true as long as the tokens before p are the same.
//
// Inside of the last pass, when it was short and logged its tokens (log()), going back costs hardly anything: it has left the state as it
// began, and the next pass begins by taking that over the tokens that count (StepParams::from). Convolution inputs lie in a ring by
// position, which then has room for the tokens of a pass beside the three that are read.
#pragma once
#include <cstdint>
#include <vector>

#include "ggml-lite/core/device.h"

namespace qn {

struct StateShape {
  std::vector<bool> attention;       // per layer: attention, else recurrent
  int key_heads = 0, value_heads = 0;
  int64_t key_dim = 0, value_dim = 0;
  int kv_heads = 0;
  int64_t head_dim = 0, context = 0;
  DType kv_type = DType::BF16;       // F32, BF16 or I8
  int conv_slots = 4;                // convolution inputs kept: three are read, the others written; a power of two
  int lagging = 0;                   // trailing attention layers whose cache is one position behind (multi-token prediction)
  bool logs = false;                 // passes of several tokens log them
  int64_t tail = 0;                  // floats carried beside the layers (last hidden row, logits): saved with a checkpoint

  int64_t conv_channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  uint64_t recurrent_bytes() const;  // of all layers, with the tail: one checkpoint
  int64_t log_floats() const { return logs ? kDeltaLogRows * delta_log_width(key_heads, value_heads, key_dim, value_dim) : 0; }  // of a layer
  uint64_t log_bytes() const;        // of all layers
  uint64_t kv_bytes() const;
};

// Keys and values of one attention layer (core/blocks.h says how codes and scales lie).
struct KvCache {
  Tensor k, v;                       // (HK, C, DH)
  Tensor k_scales, v_scales;         // (HK, C, ceil(DH/128)) F16 of codes, else empty
  std::vector<Tensor> tensors() const { return k_scales ? std::vector{k, v, k_scales, v_scales} : std::vector{k, v}; }
};

class HybridState {
 public:
  // How many checkpoints checkpoint_bytes are enough for, at least three.
  static uint64_t checkpoints_kept(const StateShape& shape, uint64_t checkpoint_bytes);
  // Keeps up to `keep` checkpoints. On a device with memory of its own they are allocated here, so that nothing can run out later.
  // Which ones are kept follows from positions alone: the states of the parts of a model, asked alike, keep the same.
  HybridState(Device& device, const StateShape& shape, uint64_t keep);

  Tensor conv_ring(int layer) const;  // (slots, CH)
  Tensor delta(int layer) const { return state_in(recurrent_, layer); }  // (GV, DK, DV)
  Tensor log(int layer) const;        // of DeltaNetArgs; empty: there is none
  KvCache cache(int layer) const;
  float* tail() const;                // device memory, shape().tail floats

  void reset();                       // position 0
  // For benchmarks: random values everywhere, as if `position` tokens had been seen; no checkpoints.
  void randomise(int position, uint64_t seed);
  // A place inside of the last pass: behind its first `from` tokens (0: it had but one), and where the pieces of the tail of that place lie.
  struct Place {
    int from = 0;
    std::vector<std::pair<const float*, int64_t>> tail;  // device memory, floats
  };
  void settle(int position, const Place& place);  // once after a pass: makes it the state, which is then that of `position`
  // Copies the recurrent part, which is that of `position` now, or at a place. A passing checkpoint replaces the passing one before it.
  void checkpoint(int position, bool passing = false, const Place* place = nullptr);
  // Restores the newest checkpoint at or before `position` (the start if there is none), forgets those behind it; returns where.
  int restore(int position);
  void forget_after(int position);    // checkpoints behind `position` are no longer true
  std::vector<int> checkpoints() const;  // positions, rising

  const StateShape& shape() const { return shape_; }
  // Of all that what comes after `position` depends on; of the parts of a model, in order, that of the whole when each is given the one before.
  uint64_t hash(int position) const { return hash(position, static_cast<uint32_t>(position)); }
  uint64_t hash(int position, uint64_t before) const;

 private:
  struct Checkpoint {
    int position;
    bool passing;
    Buffer memory;
  };
  float* layer_in(const Buffer& recurrent, int layer) const;
  Tensor state_in(const Buffer& recurrent, int layer) const;
  void gather(const Buffer& to, int position, const Place& place);
  int64_t slot(int layer) const { return slots_[static_cast<size_t>(layer)]; }

  Device& device_;
  StateShape shape_;
  std::vector<int64_t> slots_;  // of each layer among the layers of its kind
  size_t keep_;
  Buffer recurrent_;            // [per recurrent layer: S (GV, DK, DV), ring (slots, CH)] then the tail
  Buffer log_;                  // [per recurrent layer: log]
  // [per attention layer: K (HK, C, DH), V (HK, C, DH)], then of codes [per layer: scales of K, scales of V]: behind everything, for
  // with an odd C they would leave the next layer's codes where no 16-byte load may begin.
  Buffer kv_;
  std::vector<Checkpoint> checkpoints_;  // by rising position
  std::vector<Buffer> spare_;
};

}  // namespace qn
