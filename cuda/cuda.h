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
  uint64_t memory, free_memory;  // bytes
};
std::vector<CudaDeviceInfo> list_cuda_devices();          // empty without a driver or in a build without CUDA
std::unique_ptr<Device> make_cuda_device(int index);      // throws Error

}  // namespace qn
