// Stands in for the CUDA device in a build without nvcc.
#include "cuda/cuda.h"
#include "ggml-lite/base/check.h"

namespace qn {

std::vector<CudaDeviceInfo> list_cuda_devices() { return {}; }

std::unique_ptr<Device> make_cuda_device(int, bool) { fail("--device cuda: this build has no CUDA device; use --device cpu"); }

}  // namespace qn
