// The door to CUDA; includes no CUDA header. In a build without nvcc there are no devices.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "ggml-lite/core/device.h"

namespace qn {

struct CudaDeviceInfo {
  int index;
  std::string name;
  uint64_t memory;  // bytes
  int capability;   // 90 for compute capability 9.0; below 80 it cannot be used
};
std::vector<CudaDeviceInfo> list_cuda_devices();          // empty without a driver or in a build without CUDA
// graphs: whether recorded() records; without, it runs its body each time (for debugging). Throws Error.
std::unique_ptr<Device> make_cuda_device(int index, bool graphs = true);

}  // namespace qn
