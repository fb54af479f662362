// Experts that do not all fit the memory of a device: slots, their tables, and the thread that computes what the device leaves to the host
// (core/experts.h has the rules and the protocol).
//
//   device (a recording)        box (pinned memory)          helper's thread
//   place --- request n, x -->                        -----> polls; experts of the pairs on the CPU device
//         --- likely experts ->
//   fetch, gate_up, down
//   join  <--                   out, done n           <-----
//                                                            reads the likely experts of the next layer into its caches, until that asks
#pragma once
#include <memory>
#include <utility>
#include <vector>

#include "ggml-lite/core/device.h"
#include "ggml-lite/core/loader.h"

namespace qn {

// Computes on the host what devices ask for, one request at a time. One thread polls the boxes of all of them, and is one of the threads of
// `device`, which share the work.
class ExpertHost {
 public:
  explicit ExpertHost(std::unique_ptr<Device> device);
  ~ExpertHost();
  ExpertHost(const ExpertHost&) = delete;

  // layers: by their numbers in ExpertHome, with data in memory of the host. The box must live as long as this object.
  void attach(const ExpertBox& box, std::vector<Experts> layers, int chosen, Act act);
  // Steps that place experts may be under way from here on: the thread polls until it has been idle for a while.
  void expect();
  // Throws what has gone wrong in the thread since it was last asked.
  void check();

  struct Counts {
    uint64_t requests = 0, experts = 0, ahead = 0;  // ahead: of these experts, those it had read ahead of the request
    double seconds = 0;
  };
  Counts counts() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct OffloadShape {
  int slots = 0;          // S, of each layer
  int chosen = 0;         // K
  int fetch_percent = 0;  // of misses that the device fetches, when it can read memory of the host
  Act act = Act::INT8;    // of experts, wherever they are computed
  bool pin = true;        // memory of the host for the device to read; needs as much memory as there are experts
};

class ExpertOffload {
 public:
  // layers: experts whose data lies in memory of the host; all of one shape. Gives each a home; the first S experts of every layer are in
  // slots from the start: their records go to slot() before the first operation. `host` computes what the device does not.
  ExpertOffload(Device& device, ExpertHost& host, const std::vector<Experts*>& layers, const OffloadShape& shape);
  ExpertOffload(const ExpertOffload&) = delete;

  // Bytes of the device: slots, tables, staging
  static uint64_t device_bytes(int64_t layers, const Experts& one, int slots);

  uint8_t* slot(size_t layer, int slot) const;
  bool pinned() const { return pinned_; }
  const ExpertBox& box() const { return box_; }

 private:
  const OffloadShape shape_;
  std::vector<ExpertHome> homes_;
  Buffer slots_, tables_;
  int64_t stride_;
  bool pinned_ = false;
  ExpertBox box_;
};

// For layers of a model file; the loader will fill the slots.
std::unique_ptr<ExpertOffload> offload_experts(Device& device, ExpertHost& host, const std::vector<std::pair<Experts*, const QnTensor*>>& layers, Loader& loader,
                                               const OffloadShape& shape);

}  // namespace qn
