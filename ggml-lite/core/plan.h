// Where memory goes, decided before any is taken: a pure function of sizes and a budget.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace qn {

struct PlanRequest {
  std::string file, device;           // for the message of a refusal
  bool own_memory = false;            // the device has memory of its own, which must hold the weights, too; else they are mapped
                                      // beside the budget, and half of what is free is left to them
  uint64_t budget = 0, weights = 0;   // bytes
  uint64_t state = 0;                 // recurrent state and its checkpoints
  uint64_t per_position = 1;          // of the KV cache
  int model_context = 1;              // positions the model was made for
  int ctx = 0, ubatch = 0;            // asked for; 0: choose
  std::function<uint64_t(int ubatch, int ctx)> scratch;  // bytes, not falling in either
};

struct MemoryPlan {
  int ctx = 0, ubatch = 0;
  uint64_t weights = 0, kv = 0, state = 0, scratch = 0;  // bytes
};

// Memory of a device that no plan names: kernels loaded on first use, recordings, rounding of allocations.
constexpr uint64_t kDeviceMargin = 384ull << 20;

// Throws Error when it does not fit: what is needed, what is free, how much is missing, what would fit.
MemoryPlan plan_memory(const PlanRequest& request);

}  // namespace qn
