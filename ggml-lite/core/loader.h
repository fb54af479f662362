// Weights on their way from a file to the devices that will hold them. Where a device computes in the memory of the process there is no way to
// go: its operations read the mapped file.
#pragma once
#include <utility>
#include <vector>

#include "ggml-lite/core/device.h"
#include "ggml-lite/core/plan.h"
#include "ggml-lite/core/qn.h"

namespace qn {

class Loader {
 public:
  explicit Loader(const QnFile& file) : file_(file) {}
  // Where operations of `device` will find the tensor: `mapped`, where it lies in the file, or memory that load() fills.
  void* place(Device& device, const QnTensor& tensor, const void* mapped);
  void copy_record(Device& device, const QnTensor& experts, size_t record, void* to);  // one expert, to memory of the device
  bool copies(const QnTensor& tensor) const;  // load() will read it, and can check it on the way
  // Device after device. Throws the Error of QnFile::verify() for what is damaged, when `check`.
  LoadReport load(int threads, bool check, const std::function<void(uint64_t done, uint64_t total)>& progress);

 private:
  struct Cargo {
    Device* device;
    std::vector<LoadPiece> pieces;                             // one per checksum
    std::vector<std::pair<const QnTensor*, size_t>> sources;   // the tensor and record of each
  };
  Cargo& cargo_of(Device& device);
  const QnFile& file_;
  std::vector<Cargo> cargo_;
};

// Bytes that place() will be asked for; mtp: also for the layer that predicts; several: devices, for the last may need the embedding, too
LayerBytes placed_bytes(const QnFile& file, int layers, bool mtp, bool several);

}  // namespace qn
