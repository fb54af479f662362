// The reference device: scalar fp32, one thread, never optimised. It settles every argument.
#pragma once
#include <memory>

#include "ggml-lite/core/device.h"

namespace qn {
std::unique_ptr<Device> make_ref_device();
}
