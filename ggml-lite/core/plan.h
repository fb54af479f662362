// Where memory goes, and which layers to which device, decided before any is taken: pure functions of sizes and budgets.
#pragma once
#include <climits>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace qn {

struct PlanRequest {
  std::string file, device;           // for the message of a refusal
  bool own_memory = false;            // the device has memory of its own, which must hold the weights, too; else they are mapped
                                      // beside the budget, and half of what is free is left to them
  uint64_t budget = 0, weights = 0;   // bytes
  uint64_t state = 0;                 // recurrent state and its checkpoints
  uint64_t per_position = 1;          // of the KV cache; 0 where no layer has one
  int model_context = 1;              // positions the model was made for
  int ctx = 0, ubatch = 0;            // asked for; 0: choose
  bool one_of_several = false;        // devices that work on passes one after the other: shorter ones, so that all have work
  int others = INT_MAX;               // positions for which the other devices have room: a refusal advises no more
  std::function<uint64_t(int ubatch, int ctx)> scratch;  // bytes, not falling in either
  // Of weights, what may stay in memory of the host: the routed experts, `expert_count` in every layer
  uint64_t experts = 0;
  int expert_count = 0;
  int slots = 0;                                         // asked for; 0: as many as there is room for
  std::function<uint64_t(int slots)> expert_memory;      // bytes of the device when `slots` of every layer are there
};

struct MemoryPlan {
  int ctx = 0, ubatch = 0;
  uint64_t weights = 0, kv = 0, state = 0, scratch = 0;  // bytes; weights: with slots and staging memory of experts
  uint64_t placed = 0;                                   // of weights, what is not slots or staging memory
  int slots = 0;                                         // experts of every layer on the device; 0: all
  uint64_t host = 0;                                     // experts that memory of the host holds, in or out of the page cache; 0 when slots is
};

// Memory of a device that no plan names: kernels loaded on first use, recordings, rounding of allocations.
constexpr uint64_t kDeviceMargin = 384ull << 20;

// When not everything fits beside a context of 8,192 positions (or that asked for), experts stay in memory of the host but for as many of
// every layer as there is room for.
// Throws Error when it does not fit: what is needed, what is free, how much is missing, what would fit.
MemoryPlan plan_memory(const PlanRequest& request);
// The same of devices that each hold a part of one model: one context and one length of passes, which fit all of them.
std::vector<MemoryPlan> plan_devices(std::vector<PlanRequest> requests);

// Whether experts that memory of the host holds, in all of the plan, are pinned there for the GPUs to read: when that leaves 2 GiB of the
// `ram` that may be used. Otherwise they are pages of the file, which the system keeps or reads again as it sees fit: nothing is swapped.
bool pins_experts(uint64_t host, uint64_t ram);

// Whether a CPU reads weights out of memory of the process, in huge pages, and not out of pages of the file: when `file` and what else is planned
// leave 2 GiB of the `ram` that may be used. must: throws Error when they do not, for memory is never promised that is not there.
bool holds_file(uint64_t file, uint64_t planned, uint64_t ram, bool must = false);

// Bytes of a model in order: what lies before the layers is held by the first device, what lies behind them by the last.
struct LayerBytes {
  std::vector<uint64_t> layers, experts;  // of each layer; of that, its routed experts
  uint64_t front = 0, back = 0, back_experts = 0;
};
// How many layers each device takes, at least one: such that the fullest is as little full as can be, in bytes per budget. At most as
// many devices as layers.
std::vector<int> split_layers(const LayerBytes& bytes, std::span<const uint64_t> budgets);
// Throws Error unless `split` (of --split) gives each of the `devices` at least one layer, and all `layers` away.
void check_split(std::span<const int> split, size_t devices, int layers);

}  // namespace qn
