// Choosing tokens on a device that can: it writes the token where the next step reads it and tells the host by mail (core/step.h),
// so that the host waits for no logits and the steps of a generation are one recording.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "ggml-lite/core/device.h"

namespace qn {

struct Chosen {
  int32_t id;
  int more;  // tokens behind it that were chosen with it, and are there
};

// How long a waiter may sleep before it polls: where experts are in RAM all cores are at work, and one that polls for milliseconds takes the place
// of the system. A step that is short is polled for: waking up takes as long as it. Pure: no clock.
class Patience {
 public:
  using Time = std::chrono::microseconds;
  Time nap() const { return usual_ < kLong ? Time{0} : usual_ * 3 / 4; }
  // What was waited for came after `waited`; overslept: it was there when the waiter woke.
  void learn(Time waited, bool overslept) {
    if (overslept) usual_ /= 2;
    else usual_ = waited < usual_ ? waited : std::min(usual_ + (waited - usual_) / 8, usual_ + usual_ / 4 + kStep);  // a prompt is no step
  }

 private:
  static constexpr Time kLong{3000}, kStep{500};
  Time usual_{0};
};

class Chooser {
 public:
  Chooser() = default;                              // of a device that cannot
  // allowed (V) U8 or empty; context: positions of the timeline; before: devices that work towards the logits, asked for failures, too
  Chooser(Device& device, Tensor allowed, int context, std::vector<Device*> before = {});
  explicit operator bool() const { return mail_; }

  // A generation begins: `timeline` is what the model has seen. Waits for what was started before.
  void begin(const SampleParams& params, std::span<const int32_t> timeline);
  // The operation: logits (T, V) -> ids (1), step, mail.
  void choose(const Tensor& logits, const Tensor& ids, StepParams* step);
  // The same for a token that is only a guess: logits (1, <= V) of a layer that predicts one further than the model; tells nobody.
  void guess(const Tensor& logits, const Tensor& ids, StepParams* step);
  // Guesses that the host made, from `position` on, are history for the rows behind them.
  void assume(int position, std::span<const int32_t> guesses);
  // Waits for the token at `position`; throws Error when none could be chosen or the device failed.
  Chosen wait(int position);

 private:
  SampleArgs args(const Tensor& logits, const Tensor& ids, StepParams* step) const;

  Device* device_ = nullptr;
  std::vector<Device*> before_;
  Tensor allowed_;
  int context_ = 0;
  Buffer history_;  // (C + 1) I32
  Buffer params_;
  Mail* mail_ = nullptr;
  Patience patience_;
};

}  // namespace qn
