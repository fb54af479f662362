#include "ggml-lite/nn/chooser.h"

#include <atomic>
#include <thread>

#include "ggml-lite/base/check.h"

namespace qn {

Chooser::Chooser(Device& device, Tensor allowed, int context, std::vector<Device*> before)
    : device_(&device), before_(std::move(before)), allowed_(allowed), context_(context) {
  if (!device.samples()) return;
  history_ = device.alloc((static_cast<size_t>(context) + 1) * sizeof(int32_t), "history of tokens");
  params_ = device.alloc(sizeof(SampleParams), "sampling parameters");
  mail_ = device.alloc_mail();
}

void Chooser::begin(const SampleParams& params, std::span<const int32_t> timeline) {
  device_->sync();  // nobody writes mail now: what an ended generation still had chosen must not be taken for ours
  *mail_ = {};
  device_->upload(history_.data(), timeline.data(), timeline.size_bytes());
  device_->upload(params_.data(), &params, sizeof params);
}

SampleArgs Chooser::args(const Tensor& logits, const Tensor& ids, StepParams* step) const {
  SampleArgs a;
  a.logits = logits, a.allowed = allowed_ ? allowed_.slice(0, logits.cols()) : Tensor(), a.ids = ids, a.step = step;
  a.history = view(history_.data(), DType::I32, context_ + 1);
  a.params = static_cast<const SampleParams*>(params_.data());
  return a;
}

void Chooser::choose(const Tensor& logits, const Tensor& ids, StepParams* step) {
  SampleArgs a = args(logits, ids, step);
  a.mail = mail_;
  device_->sample(a);
}

void Chooser::guess(const Tensor& logits, const Tensor& ids, StepParams* step) {
  SampleArgs a = args(logits, ids, step);
  a.ahead = 1;
  device_->sample(a);
}

void Chooser::assume(int position, std::span<const int32_t> guesses) {
  device_->upload(static_cast<int32_t*>(history_.data()) + position, guesses.data(), guesses.size_bytes());
}

Chosen Chooser::wait(int position) {
  using Clock = std::chrono::steady_clock;
  std::atomic_ref<uint64_t> slot(mail_->slot[position % kMailSlots]);
  const auto here = [&](uint64_t v) { return v >> 32 == static_cast<uint64_t>(position); };
  const auto begin = Clock::now();
  const bool waits = !here(slot.load(std::memory_order_acquire));
  const Patience::Time nap = waits ? patience_.nap() : Patience::Time{0};
  if (nap.count()) std::this_thread::sleep_for(nap);
  for (uint64_t n = 1;; n++) {
    const uint64_t v = slot.load(std::memory_order_acquire);
    if (here(v)) {
      if (waits) patience_.learn(std::chrono::duration_cast<Patience::Time>(Clock::now() - begin), nap.count() && n == 1);
      if (static_cast<uint32_t>(v) == UINT32_MAX) throw NoChoice();
      return {static_cast<int32_t>(v & ((1u << kMailIdBits) - 1)), static_cast<int>(static_cast<uint32_t>(v) >> kMailIdBits)};
    }
    // A device that failed never writes; asking it costs more than looking.
    if (n % 4096) continue;
    bool idle = true;
    for (Device* d : before_) idle = d->idle() && idle;
    if (device_->idle() && idle) QN_CHECK(here(slot.load(std::memory_order_acquire)), "no token was chosen for position %d", position);
  }
}

}  // namespace qn
