// Files: the only place that opens, maps, reads or writes one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

namespace qn {

class Arena;

// A whole file as memory: a read-only mapping, whose bytes are shared with the page cache (truncating the file under us is undefined), or memory
// of our own that was filled from it.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(Arena&& filled);
  Mapping(Mapping&&) noexcept;
  Mapping& operator=(Mapping&&) noexcept;
  ~Mapping();
  std::span<const uint8_t> bytes() const { return {data_, size_}; }
  // Tell the kernel that [offset, offset+size) is wanted soon.
  void will_need(uint64_t offset, uint64_t size) const;

 private:
  friend class File;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

class File {
 public:
  // Throws Error naming the path and the reason. Refuses directories, pipes and devices (size must be known).
  static File open_read(const std::string& path);
  File(File&&) noexcept;
  File& operator=(File&&) noexcept;
  ~File();
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  // Fills all of `to` from `offset`; throws Error when the file ends earlier.
  void read(uint64_t offset, std::span<uint8_t> to) const;
  // Drop the pages of a range from the page cache (a converter that streams 160 GB should not evict everything else).
  void drop_cache(uint64_t offset, uint64_t size) const;
  Mapping map() const;

 private:
  File() = default;
  int fd_ = -1;
  uint64_t size_ = 0;
  std::string path_;
};

// A file under construction: written to "<path>.tmp-<pid>" beside its target, renamed over it by commit() once its bytes are
// on the disk. Until then the target, if any, is untouched; a writer destroyed without commit() removes its temporary file (also
// on a signal, see remove_unfinished_files). write() may be called from several threads at once.
class OutFile {
 public:
  explicit OutFile(const std::string& path);  // throws Error: no such folder, no permission, target is a directory or write-protected
  OutFile(OutFile&&) noexcept;
  ~OutFile();
  void write(uint64_t offset, std::span<const uint8_t> bytes);  // throws Error, e.g. "No space left on device"
  void commit();

 private:
  int fd_ = -1, slot_ = -1;  // slot_: in the list of unfinished files
  std::string path_, temp_;
};

// Async-signal-safe: unlink the temporary files of all living OutFiles. Mains call it from their handler of SIGINT, SIGTERM and SIGHUP.
void remove_unfinished_files();

// Whole small text, whatever kind of file it comes from (a prompt from a pipe); throws Error above `max_bytes`.
std::string read_text(const std::string& path, uint64_t max_bytes);
// Whole small file of a folder that somebody else made (config.json). Refuses what File refuses: a pipe there would never end.
std::string read_small_file(const std::string& path, uint64_t max_bytes);
// Whole of standard input, at most max_bytes.
std::string read_stdin(uint64_t max_bytes);
bool file_exists(const std::string& path);
bool is_directory(const std::string& path);
// Free bytes of the file system that holds `path` (its folder need exist, the file not).
uint64_t free_disk(const std::string& path);

// Bytes per second of pieces read from the disk by several threads, from places all over a file, past the page cache where the file system
// can; takes half a second. 0: not measured.
double disk_bandwidth(const std::string& path);

// Large zeroed anonymous memory; pages are taken from the system when first touched, huge pages where possible.
class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes);  // throws Error when the address space cannot be had
  Arena(Arena&&) noexcept;
  Arena& operator=(Arena&&) noexcept;
  ~Arena();
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  friend class Mapping;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// RAM this process may use, in bytes: the least of cgroup limit minus usage, MemAvailable.
uint64_t available_ram();
// Peak resident set of this process so far, in bytes.
uint64_t peak_rss();

}  // namespace qn
