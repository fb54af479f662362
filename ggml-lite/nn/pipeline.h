// A model whose layers are spread over one or more devices, each with a range of them. A pass goes through the devices in order: h, the
// residual stream, is copied from one to the next. The host waits in wait() and keep_up() only. It asks each device for its stage, the
// copies have their place in between, and so one device may be at work on a pass and the device before it on the next.
#pragma once
#include <functional>
#include <span>
#include <vector>

#include "ggml-lite/core/device.h"
#include "ggml-lite/nn/hybrid_state.h"

namespace qn {

// What one device keeps of a sequence. Its recordings have the stage as their owner, so it must stay where it is, and who holds more of what
// they use calls forget() before that goes.
struct PipelineStage {
  // keep: checkpoints of the state, as many on every stage; tokens: most of a pass
  PipelineStage(Device& device, const StateShape& shape, uint64_t keep, int64_t tokens);
  ~PipelineStage() { forget(); }
  void forget() { device.forget(this); }
  PipelineStage(const PipelineStage&) = delete;

  Device& device;
  HybridState state;                     // of its layers
  Buffer next;                           // what the next pass is about, in one piece: step, then ids
  StepParams* step = nullptr;            // [0] of the layers, [1] of a layer behind the last that lags (multi-token prediction)
  Tensor ids;                            // (T+1) I32: read by the first stage, and by a lagging layer
  Tensor h;                              // (T, D): where the stage before leaves its result
};

class Pipeline {
 public:
  void add(PipelineStage& stage) { stages_.push_back(&stage); }  // in the order of the layers
  std::function<void()> before_pass;                             // empty, or called by run() before anything is asked for

  // What the next pass is about. ids to the first stage, and to the last if `ids_at_end`.
  void prepare(const StepParams (&step)[2], std::span<const int32_t> ids, bool ids_at_end);
  // A pass of n tokens: body(i) asks for the operations of stage i, by the recording of this key unless it is 0.
  void run(int n, uint64_t key, const std::function<void(size_t stage)>& body);
  // The last stage has ids[0] ... ids[n - 1] and step of the next pass, a token it has chosen and guesses behind it: now all stages have.
  void hand_back(int n = 1);
  void wait();
  // After each of a row of passes: waits for those before the last `ahead()`, so many that every device has work.
  void keep_up();
  PipelineStage& back() const { return *stages_.back(); }
  size_t size() const { return stages_.size(); }
  size_t ahead() const { return stages_.size() > 1 ? stages_.size() : 0; }

  // States of all stages, as HybridState does for one
  void reset();
  void randomise(int position, uint64_t seed);
  // The tail that a place names is that of the last stage.
  void settle(int position, const HybridState::Place& place);
  void checkpoint(int position, bool passing = false, const HybridState::Place* place = nullptr);
  int restore(int position);
  uint64_t hash(int position) const;  // equal however the layers are cut

 private:
  std::vector<PipelineStage*> stages_;
};

}  // namespace qn
