// What a pass over a model takes and moves: the whole of it, or each kind of operation alone.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "ggml-lite/core/device.h"

namespace qn {

// One kind of operation in a pass, all its calls together.
struct OpTime {
  std::string name;
  int calls;
  double seconds;
  uint64_t bytes;  // that it has to move
};
struct PassTime {
  double seconds;  // from launch to end: of the recording, where such passes are recorded; restoring the state is not in it
  uint64_t bytes;
};

// What guessing ahead is made of, in seconds
struct DraftCosts {
  double first = 0, next = 0;  // guesses: after a pass, and out of a guess; 0: there is no layer for it
  std::vector<std::pair<int, double>> passes;  // over so many tokens, logging them if several; before it such a pass, all of whose tokens count
  double replay = 0;           // of the longest: taking the state over the tokens of the one before
  double settle = 0;           // ending a generation there: once
};

struct Pass {
  std::function<void()> prepare;          // brings back the state before the pass, and what it reads
  std::function<void(bool record)> run;   // the operations; through Device::recorded() if `record` and it is short enough
};

// Bytes as Device::Traffic counts them, of experts those really chosen. The devices of a pass work one after the other: times are sums over
// them, copies between them included.
using Devices = std::span<Device* const>;
PassTime time_pass(Devices devices, const Pass& pass);
std::vector<OpTime> time_operations(Devices devices, const Pass& pass);
double read_bandwidth(Devices devices, std::span<const uint64_t> weights, std::span<const uint64_t> spare);  // of all weights; 0: not measured
uint64_t bytes_asked(Devices devices, const Pass& pass);  // without running anything: for a pass over one token

}  // namespace qn
