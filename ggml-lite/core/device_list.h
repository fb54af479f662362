// What --device can name.
#pragma once
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ggml-lite/core/device.h"

namespace qn {

struct DeviceName {
  std::string kind;  // "auto", "ref", "cpu", "cuda"
  int index = 0;     // of a GPU
  bool operator==(const DeviceName&) const = default;
};

// "auto", "cuda" (the first GPU), "cuda:0,1", "cpu", "ref", "cpu,cpu". Several hold a part of the layers each; the same one may be named again.
// Throws Error.
std::vector<DeviceName> parse_devices(const std::string& text);

// Bytes that each of these devices may take. Those on one card have an equal share of what is free there; so have those that compute in the
// memory of the process, of `process` bytes.
std::vector<uint64_t> memory_budgets(std::span<Device* const> devices, std::span<const DeviceName> names, uint64_t process);

// Bytes taken, and all, of the devices with memory of their own, each card once
std::pair<uint64_t, uint64_t> memory_in_use(std::span<Device* const> devices, std::span<const DeviceName> names);

}  // namespace qn
