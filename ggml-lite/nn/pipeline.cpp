#include "ggml-lite/nn/pipeline.h"

#include "ggml-lite/base/check.h"

namespace qn {

PipelineStage::PipelineStage(Device& d, const StateShape& shape, uint64_t keep, int64_t tokens)
    : device(d), state(d, shape, keep), next(d.alloc(2 * sizeof(StepParams) + static_cast<size_t>(tokens + 1) * sizeof(int32_t), "step parameters and ids")),
      step(static_cast<StepParams*>(next.data())), ids(view(step + 2, DType::I32, tokens + 1)) {}

void Pipeline::prepare(const StepParams (&step)[2], std::span<const int32_t> ids, bool ids_at_end) {
  for (PipelineStage* s : stages_) {
    s->device.upload(s->step, step, sizeof step);
    if (s == stages_.front() || (ids_at_end && s == stages_.back())) s->device.upload(s->ids.data, ids.data(), ids.size_bytes());
  }
}

void Pipeline::run(int n, uint64_t key, const std::function<void(size_t)>& body) {
  if (before_pass) before_pass();
  for (size_t i = 0; i < stages_.size(); i++) {
    PipelineStage& s = *stages_[i];
    if (i) s.device.copy_from(s.h.data, stages_[i - 1]->device, stages_[i - 1]->h.data, static_cast<size_t>(n * s.h.cols()) * sizeof(float));
    if (key) s.device.recorded(&s, key, [&] { body(i); });
    else body(i);
  }
}

void Pipeline::hand_back(int n) {
  PipelineStage& last = *stages_.back();
  for (PipelineStage* s : stages_)
    if (s != &last) s->device.copy_from(s->next.data(), last.device, last.next.data(), 2 * sizeof(StepParams) + static_cast<size_t>(n) * sizeof(int32_t));
}

void Pipeline::wait() {  // in order: the failure that shows is that of the device that failed, not of one that waits for it
  for (PipelineStage* s : stages_) s->device.sync();
}

void Pipeline::keep_up() {
  for (PipelineStage* s : stages_) s->device.keep_up(ahead());
}

void Pipeline::reset() {
  for (PipelineStage* s : stages_) s->state.reset();
}

void Pipeline::randomise(int position, uint64_t seed) {
  for (size_t i = 0; i < stages_.size(); i++) stages_[i]->state.randomise(position, seed + i * 2);
}

void Pipeline::settle(int position, const HybridState::Place& place) {
  for (PipelineStage* s : stages_) s->state.settle(position, s == &back() ? place : HybridState::Place{place.from, {}});
}

void Pipeline::checkpoint(int position, bool passing, const HybridState::Place* place) {
  for (PipelineStage* s : stages_) {
    const HybridState::Place here = place ? *place : HybridState::Place{};
    const HybridState::Place there{here.from, {}};
    s->state.checkpoint(position, passing, !place ? nullptr : s == &back() ? &here : &there);
  }
}

int Pipeline::restore(int position) {
  const int at = stages_.front()->state.restore(position);
  for (PipelineStage* s : stages_)
    if (s != stages_.front()) QN_CHECK(s->state.restore(position) == at, "stages went back to different positions, one of them %d", at);
  return at;
}

uint64_t Pipeline::hash(int position) const {
  uint64_t sum = static_cast<uint32_t>(position);
  for (const PipelineStage* s : stages_) sum = s->state.hash(position, sum);
  return sum;
}

}  // namespace qn
