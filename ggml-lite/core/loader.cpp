#include "ggml-lite/core/loader.h"

#include <algorithm>
#include <cstdlib>

namespace qn {

void* Loader::place(Device& device, const QnTensor& t, const void* mapped) {
  void* const to = const_cast<void*>(device.place(mapped, t.bytes));
  if (to == mapped) return to;
  for (size_t r = 0; r < t.crc.size(); r++) copy_record(device, t, r, static_cast<uint8_t*>(to) + r * (t.bytes / t.crc.size()));
  return to;
}

Loader::Cargo& Loader::cargo_of(Device& device) {
  const auto cargo = std::ranges::find(cargo_, &device, &Cargo::device);
  return cargo != cargo_.end() ? *cargo : cargo_.emplace_back(Cargo{&device, {}, {}});
}

void Loader::copy_record(Device& device, const QnTensor& t, size_t record, void* to) {
  Cargo& cargo = cargo_of(device);
  const uint64_t each = t.bytes / t.crc.size();  // experts: a checksum per record, all of one size
  cargo.pieces.push_back({t.offset + record * each, each, to, t.crc[record]});
  cargo.sources.emplace_back(&t, record);
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

LayerBytes placed_bytes(const QnFile& f, int layers, bool mtp, bool several) {
  LayerBytes b{std::vector<uint64_t>(static_cast<size_t>(layers)), std::vector<uint64_t>(static_cast<size_t>(layers)), 0, 0, 0};
  for (const QnTensor& t : f.tensors()) {
    const auto bytes = static_cast<uint64_t>(round_up(static_cast<int64_t>(t.bytes), Device::kPlaceAlign));
    if (t.name.starts_with("layers.")) {
      if (const auto n = std::strtoull(t.name.c_str() + 7, nullptr, 10); n < b.layers.size()) b.layers[n] += bytes, b.experts[n] += t.experts ? bytes : 0;
    }
    if (t.name == "embed") b.front += bytes;
    if (t.name == "norm" || t.name == "head" || (mtp && t.name.starts_with("mtp."))) b.back += bytes;
    if (mtp && t.experts && t.name.starts_with("mtp.")) b.back_experts += bytes;
    if (t.name == "embed" && several && (mtp || !f.find("head"))) b.back += bytes;
  }
  return b;
}

}  // namespace qn
