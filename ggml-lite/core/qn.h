// The .qn file: reader, writer, and the only description of the format.
//
//   offset 0       header page, 4096 B         see below; the rest of the page is zero
//   4096 ...       data                        every tensor at a multiple of 4096: readers demand this and no more
//                    section 0, from 4096      tables (tokenizer) and dense tensors in layer order
//                    section 1 + i             routed experts of layer i: E records of equal stride, whole pages each; written at
//                                              a multiple of 2 MiB, so that large pages can hold it, but readers must not rely on it
//   dir_offset     directory                   at the end, so that a writer streams; 64-byte aligned
//
//   header   bytes 0..7 "QNMODEL\x1a", u32 version (1), u32 header bytes (4096), u64 file bytes, u64 dir_offset, u64 dir_bytes,
//            u32 crc32c of the directory, u32 crc32c of the header page with this field zero, 4048 B zero
//   directory   u32 number of meta entries, u32 number of tensors, then the entries:
//     meta     string key, u8 type, value     type 0: i64, 1: f64, 2: string, 3: u32 count + i64 each
//     tensor   string name, u8 dtype, u8 kind (0 dense, 1 experts), u16 group, u8 ndim, u8[3] zero, u64 shape[ndim],
//              u64 offset, u64 bytes, u32 ncrc, u32 crc[ncrc]        dense: one crc32c; experts (E, D, F): one per record,
//                                                                    its padding included
//     string   u32 bytes, bytes (UTF-8, no NUL)
//   All numbers little-endian. Nothing is aligned inside the directory.
//
// A flip in header or directory is refused at open by their checksums; flips in data are found by verify(). Non-goals: editing
// in place, other byte orders, compression.
#pragma once
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "ggml-lite/base/file.h"
#include "ggml-lite/core/tensor.h"

namespace qn {

using Meta = std::variant<int64_t, double, std::string, std::vector<int64_t>>;

struct QnTensor {
  std::string name{};
  DType dtype = DType::F32;
  bool experts = false;        // shape (E, D, F) then
  uint16_t group = 0;
  std::vector<int64_t> shape{};  // dense: 1 to 4 dims; T16 formats exactly 2
  uint64_t offset = 0, bytes = 0;  // experts: bytes = E * stride
  std::vector<uint32_t> crc{};
};

// Bytes a tensor of this description takes; throws Error for impossible ones (T16 with a group that does not divide, ...).
uint64_t stored_bytes(const QnTensor& t);

class QnFile {
 public:
  // Maps the file. Everything read from it is bounded here: sizes, offsets, overlaps, counts, alignment. Throws Error.
  static QnFile open(const std::string& path);

  // In place of the mapping, all of the file in memory of this process, in huge pages where the system has them: a CPU reads it faster, by a
  // third and more. What pointed into the mapping is void. progress is called by the caller's thread only. Returns the seconds it took; 0: the
  // system refuses so much memory, and the mapping stays (must: then Error).
  double hold(int threads, bool must, const std::function<void(uint64_t done, uint64_t total)>& progress = {});

  const std::string& path() const { return path_; }
  uint64_t size() const { return map_.bytes().size(); }
  const std::vector<QnTensor>& tensors() const { return tensors_; }
  const QnTensor* find(std::string_view name) const;
  std::span<const uint8_t> data(const QnTensor& t) const { return map_.bytes().subspan(t.offset, t.bytes); }
  const Mapping& mapping() const { return map_; }
  const File& file() const { return file_; }

  // Dense tensor as a view on the mapping; throws Error "model.qn: tensor X: expected bf16 (64, 2048), got ..." .
  Tensor dense(const std::string& name, std::span<const DType> dtypes, std::initializer_list<int64_t> shape) const;
  Experts experts(const std::string& name, int64_t e, int64_t d, int64_t f) const;

  const std::map<std::string, Meta, std::less<>>& meta() const { return meta_; }
  bool has(std::string_view key) const { return meta_.find(key) != meta_.end(); }
  // Bounded getters: throw Error naming key, file, expected range, got.
  int64_t integer(std::string_view key, int64_t min, int64_t max) const;
  double real(std::string_view key, double min, double max) const;
  std::string text(std::string_view key) const;
  std::vector<int64_t> integers(std::string_view key, size_t max_count, int64_t min, int64_t max) const;

  // Checks a dense tensor (record 0) or one expert's record against its checksum; throws the Error of verify(). For loaders that
  // copy the data to a device and so read all of it anyway; they call it from as many threads as they copy with.
  void check(const QnTensor& t, size_t record) const;
  // Checks the data of every tensor, or of those that `which` picks, against its checksums with `threads` threads (0: physical cores);
  // throws Error naming the first bad one in file order. progress is called by the caller's thread only.
  void verify(int threads, const std::function<void(uint64_t done, uint64_t total)>& progress = {},
              const std::function<bool(const QnTensor&)>& which = {}) const;

  // Throws the Error of check() for a record that somebody else found damaged.
  [[noreturn]] void damaged(const QnTensor& t, size_t record) const;

 private:
  // progress(n) after every few MiB
  bool intact(const QnTensor& t, size_t record, const std::function<void(uint64_t)>& progress = {}) const;

  explicit QnFile(File file) : file_(std::move(file)) {}
  std::string path_;
  File file_;
  Mapping map_;
  std::map<std::string, Meta, std::less<>> meta_;
  std::vector<QnTensor> tensors_;
  std::map<std::string, size_t, std::less<>> index_;
};

// The layout is fixed when all tensors are declared; data may then arrive in any order and from several threads.
class QnWriter {
 public:
  explicit QnWriter(const std::string& path);
  ~QnWriter();
  void set(const std::string& key, Meta value);  // any time before finish(); replaces
  // Declare in file order; `section` starts a new 2 MiB-aligned section. Returns the index. shape etc. as in QnTensor.
  size_t declare(QnTensor t, bool section = false);
  void layout();                               // assigns offsets; no declare() after
  const QnTensor& tensor(size_t i) const;
  uint64_t total_bytes() const;                // size of the file, known after layout()
  // Dense: any byte ranges, but ranges of one tensor must come in rising order and without gaps, from one thread at a time
  // (the checksum runs along). Different tensors may be written at once.
  void write(size_t i, std::span<const uint8_t> bytes);
  void write_expert(size_t i, int64_t e, std::span<const uint8_t> record);  // record: layout().bytes or stride bytes
  void finish();                               // directory, header, rename; throws Error when something was not written

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace qn
