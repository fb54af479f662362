#include "ggml-lite/core/device_list.h"

#include <algorithm>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/term.h"  // parse_count

namespace qn {

std::vector<DeviceName> parse_devices(const std::string& text) {
  if (text == "auto" || text == "cuda") return {{text, 0}};
  std::vector<DeviceName> names;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    std::string item = text.substr(at, end - at), kind = item;
    int index = 0;
    if (item.starts_with("cuda:") && names.empty()) item.erase(0, 5), kind = "cuda";
    else if (!names.empty() && names[0].kind == "cuda") kind = "cuda";
    const bool number = !item.empty() && item.find_first_not_of("0123456789") == item.npos;
    if (kind == "cuda" ? !number : (kind != "cpu" && kind != "ref") || (!names.empty() && kind != names[0].kind))
      fail("--device: expected auto, ref, cpu, cuda or cuda:0,1, got \"%s\"", text.c_str());
    if (kind == "cuda") index = parse_count(item, "--device cuda:N", 0, 1023);
    names.push_back({kind, index});
    at = end + 1;
  }
  return names;
}

std::vector<uint64_t> memory_budgets(std::span<Device* const> devices, std::span<const DeviceName> names, uint64_t process) {
  std::vector<uint64_t> budgets;
  for (size_t i = 0; i < devices.size(); i++) {
    const bool own = devices[i]->memory() > 0;
    const auto sharing = static_cast<uint64_t>(own ? std::ranges::count(names, names[i]) : std::ssize(names));
    budgets.push_back((own ? devices[i]->memory_free() : process) / sharing);
  }
  return budgets;
}

std::pair<uint64_t, uint64_t> memory_in_use(std::span<Device* const> devices, std::span<const DeviceName> names) {
  std::pair<uint64_t, uint64_t> sum{0, 0};
  for (size_t i = 0; i < devices.size(); i++)
    if (std::ranges::find(names, names[i]) - names.begin() == static_cast<std::ptrdiff_t>(i)) sum.first += devices[i]->memory_used(), sum.second += devices[i]->memory();
  return sum;
}

}  // namespace qn
