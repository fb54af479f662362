#include "ggml-lite/core/loader.h"

#include <algorithm>

namespace qn {

void* Loader::place(Device& device, const QnTensor& t, const void* mapped) {
  void* const to = const_cast<void*>(device.place(mapped, t.bytes));
  if (to == mapped) return to;
  auto cargo = std::ranges::find(cargo_, &device, &Cargo::device);
  if (cargo == cargo_.end()) cargo = cargo_.insert(cargo_.end(), Cargo{&device, {}, {}});
  const uint64_t each = t.bytes / t.crc.size();  // experts: a checksum per record, all of one size
  for (size_t r = 0; r < t.crc.size(); r++) {
    cargo->pieces.push_back({t.offset + r * each, each, static_cast<uint8_t*>(to) + r * each, t.crc[r]});
    cargo->sources.emplace_back(&t, r);
  }
  return to;
}

bool Loader::copies(const QnTensor& tensor) const {
  return std::ranges::any_of(cargo_, [&](const Cargo& c) {
    return std::ranges::any_of(c.sources, [&](const auto& s) { return s.first == &tensor; });
  });
}

LoadReport Loader::load(int threads, bool check, const std::function<void(uint64_t, uint64_t)>& progress) {
  uint64_t total = 0;
  for (const Cargo& c : cargo_)
    for (const LoadPiece& p : c.pieces) total += p.bytes;
  LoadReport sum;
  for (const Cargo& c : cargo_) {
    const LoadReport r = c.device->load(
        file_.file(), c.pieces, threads, check, [&](size_t i) { file_.damaged(*c.sources[i].first, c.sources[i].second); },
        [&](uint64_t done, uint64_t) { progress(sum.bytes + done, total); });
    sum.bytes += r.bytes, sum.threads = std::max(sum.threads, r.threads), sum.seconds += r.seconds;
    sum.read += r.read, sum.check += r.check, sum.wait += r.wait;
  }
  return sum;
}

}  // namespace qn
