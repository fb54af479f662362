// safetensors: an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
// Also reads an index of shards (model.safetensors.index.json). Nothing is mapped: data is read with positioned reads.
#pragma once
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "ggml-lite/base/file.h"

namespace qn {

struct SafeTensor {
  std::string dtype;           // "BF16", "F32", "F16", "F8_E4M3", "I32", "I64", "U8", ...
  std::vector<int64_t> shape;  // [] is a scalar
  int file = 0;                // which of SafeTensors::files()
  uint64_t offset = 0;         // absolute, in that file
  uint64_t bytes = 0;          // == product of shape times the size of dtype: checked
};

class SafeTensors {
 public:
  // One file. Throws Error: header length, JSON, unknown dtype, offsets out of range, shape and bytes at odds, data not covered
  // without overlap or gap (the format demands it).
  static SafeTensors open_file(const std::string& path);
  // A folder: model.safetensors.index.json and its shards, else model.safetensors, else the only *.safetensors in it.
  // Every tensor of the index must be in its shard; tensors of a shard that the index lacks are an error, too.
  static SafeTensors open_folder(const std::string& folder);

  const std::map<std::string, SafeTensor>& tensors() const { return tensors_; }
  const SafeTensor* find(const std::string& name) const;
  const std::vector<File>& files() const { return files_; }
  // bytes [begin, begin + to.size()) of the tensor's data
  void read(const SafeTensor& t, uint64_t begin, std::span<uint8_t> to) const;
  // Whole tensor as float; accepts F32, BF16, F16. For the small reference files.
  std::vector<float> read_f32(const std::string& name) const;
  std::vector<int32_t> read_i32(const std::string& name) const;  // I32 or I64 in range

 private:
  void add(const std::string& path);
  std::vector<File> files_;
  std::map<std::string, SafeTensor> tensors_;
};

}  // namespace qn
