#include "ggml-lite/base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "ggml-lite/base/check.h"

namespace qn {

using ull = unsigned long long;

static std::string reason() { return std::strerror(errno); }

static std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
}

static void close_fd(int& fd) {
  if (fd >= 0) ::close(fd);
  fd = -1;
}

// ---- Mapping --------------------------------------------------------------------------------------------------------

Mapping::Mapping(Arena&& filled) : data_(std::exchange(filled.data_, nullptr)), size_(std::exchange(filled.size_, 0)) {}
Mapping::Mapping(Mapping&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
Mapping& Mapping::operator=(Mapping&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  return *this;
}
Mapping::~Mapping() {
  if (data_) ::munmap(const_cast<uint8_t*>(data_), size_);
}

void Mapping::will_need(uint64_t offset, uint64_t size) const {
  if (offset >= size_) return;
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)), begin = offset / page * page;
  const uint64_t end = offset + std::min<uint64_t>(size, size_ - offset);
  if (end > begin) ::madvise(const_cast<uint8_t*>(data_) + begin, end - begin, MADV_WILLNEED);  // a hint: failure means nothing
}

// ---- File -----------------------------------------------------------------------------------------------------------

File File::open_read(const std::string& path) {
  File f;
  f.path_ = path;
  f.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // without O_NONBLOCK a pipe would wait for its writer
  if (f.fd_ < 0) fail("%s: cannot open: %s", path.c_str(), reason().c_str());
  struct stat st;
  if (::fstat(f.fd_, &st) != 0) fail("%s: cannot stat: %s", path.c_str(), reason().c_str());
  if (S_ISDIR(st.st_mode)) fail("%s: is a folder, expected a file", path.c_str());
  if (!S_ISREG(st.st_mode)) fail("%s: is not a regular file (pipes and devices cannot be read here)", path.c_str());
  f.size_ = static_cast<uint64_t>(st.st_size);
  return f;
}

File::File(File&& o) noexcept : fd_(std::exchange(o.fd_, -1)), size_(o.size_), path_(std::move(o.path_)) {}
File& File::operator=(File&& o) noexcept {
  std::swap(fd_, o.fd_);
  std::swap(size_, o.size_);
  std::swap(path_, o.path_);
  return *this;
}
File::~File() { close_fd(fd_); }

void File::read(uint64_t offset, std::span<uint8_t> to) const {
  if (offset > size_ || to.size() > size_ - offset)
    fail("%s: wanted %zu bytes at offset %llu, the file ends at %llu", path_.c_str(), to.size(),
         static_cast<ull>(offset), static_cast<ull>(size_));
  for (size_t done = 0; done < to.size();) {
    const ssize_t n = ::pread(fd_, to.data() + done, to.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("%s: cannot read at offset %llu: %s", path_.c_str(), static_cast<ull>(offset + done), reason().c_str());
    if (n == 0) fail("%s: became shorter while it was read (ends at %llu)", path_.c_str(), static_cast<ull>(offset + done));
    done += static_cast<size_t>(n);
  }
}

void File::drop_cache(uint64_t offset, uint64_t size) const {
  if (offset >= size_) return;
  size = std::min(size, size_ - offset);
  ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
}

Mapping File::map() const {
  Mapping m;
  if (size_ == 0) return m;  // nothing to map, and the kernel refuses to
  void* p = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_, 0);
  if (p == MAP_FAILED) fail("%s: cannot map %llu bytes: %s", path_.c_str(), static_cast<ull>(size_), reason().c_str());
  m.data_ = static_cast<const uint8_t*>(p);
  m.size_ = size_;
  return m;
}

// ---- OutFile --------------------------------------------------------------------------------------------------------

// Names of living temporary files. Whoever exchanges a pointer out of its slot owns the string, so that a signal handler and
// an OutFile in another thread never touch the same one.
static std::atomic<char*> unfinished[64];
static_assert(std::atomic<char*>::is_always_lock_free);

static int remember(const std::string& temp) {
  char* copy = ::strdup(temp.c_str());
  for (size_t i = 0; copy && i < std::size(unfinished); i++) {
    char* empty = nullptr;
    if (unfinished[i].compare_exchange_strong(empty, copy)) return static_cast<int>(i);
  }
  std::free(copy);
  return -1;
}

// A new file and its place in the list; no signal to this thread comes between, or the file would stay. Returns errno, 0 when it is there.
static int create_remembered(const std::string& temp, int& fd, int& slot) {
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_BLOCK, &all, &before);
  fd = ::open(temp.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  const int error = fd < 0 ? errno : 0;
  if (fd >= 0) slot = remember(temp);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return error;
}

void remove_unfinished_files() {
  for (auto& slot : unfinished) {
    char* p = slot.exchange(nullptr);
    if (!p) continue;
    ::unlink(p);
    char* empty = nullptr;
    slot.compare_exchange_strong(empty, p);  // back to its owner, who may free it: a signal handler may not
  }
}

OutFile::OutFile(const std::string& path) : path_(path) {
  struct stat st;
  if (::lstat(path.c_str(), &st) == 0 && S_ISLNK(st.st_mode)) {  // replace what the link names, not the link
    char* real = ::realpath(path.c_str(), nullptr);
    if (!real) fail("%s: cannot follow this link: %s", path.c_str(), reason().c_str());
    path_ = real;
    std::free(real);
  }
  if (path_.empty()) fail("no name given for the output file");
  if (::stat(path_.c_str(), &st) == 0 && !S_ISREG(st.st_mode))
    fail("%s: cannot write: is %s, expected the name of a file", path.c_str(),
         S_ISDIR(st.st_mode) ? "a folder" : "not a regular file");
  if (file_exists(path_) && ::access(path_.c_str(), W_OK) != 0) fail("%s: cannot write: %s", path_.c_str(), reason().c_str());
  std::signal(SIGXFSZ, SIG_IGN);  // beyond a limit of file sizes write() fails, and says so
  const std::string first = path_ + format(".tmp-%d", static_cast<int>(::getpid()));
  temp_ = first;
  for (int i = 1;; i++) {  // a leftover of a killed process that had our number is not ours to remove
    const int error = create_remembered(temp_, fd_, slot_);
    if (!error && slot_ >= 0) return;
    if (!error) {
      ::close(fd_);
      ::unlink(temp_.c_str());
      fail("%s: cannot write: too many files under construction", path.c_str());
    }
    if (error != EEXIST || i == 100) {
      const std::string folder = folder_of(path_);
      if (!is_directory(folder)) fail("%s: cannot write: no folder %s", path.c_str(), folder.c_str());
      fail("%s: cannot create: %s", temp_.c_str(), std::strerror(error));
    }
    temp_ = first + "-" + std::to_string(i);
  }
}

OutFile::OutFile(OutFile&& o) noexcept
    : fd_(std::exchange(o.fd_, -1)), slot_(std::exchange(o.slot_, -1)), path_(std::move(o.path_)), temp_(std::move(o.temp_)) {}

OutFile::~OutFile() {
  if (fd_ >= 0) ::close(fd_);
  if (slot_ < 0) return;
  ::unlink(temp_.c_str());
  std::free(unfinished[slot_].exchange(nullptr));
}

void OutFile::write(uint64_t offset, std::span<const uint8_t> bytes) {
  QN_CHECK(fd_ >= 0, "%s: written after commit", path_.c_str());
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::pwrite(fd_, bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0)
      fail("%s: cannot write at offset %llu: %s", temp_.c_str(), static_cast<ull>(offset + done),
           n < 0 ? reason().c_str() : "nothing written");
    done += static_cast<size_t>(n);
  }
}

void OutFile::commit() {
  QN_CHECK(fd_ >= 0, "%s: committed twice", path_.c_str());
  if (::fsync(fd_) != 0) fail("%s: cannot write: %s", temp_.c_str(), reason().c_str());
  const int closed = ::close(std::exchange(fd_, -1));
  if (closed != 0) fail("%s: cannot write: %s", temp_.c_str(), reason().c_str());
  if (::rename(temp_.c_str(), path_.c_str()) != 0)
    fail("%s: cannot rename to %s: %s", temp_.c_str(), path_.c_str(), reason().c_str());
  std::free(unfinished[std::exchange(slot_, -1)].exchange(nullptr));
  const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;  // the name is durable only after this, but no file system needs it to be correct
  ::fsync(folder);
  ::close(folder);
}

// ---- small files and questions --------------------------------------------------------------------------------------

// Everything from fd to its end, whatever kind of file it is: its size is not known beforehand.
static std::string read_all(int fd, const std::string& where, uint64_t max_bytes) {
  std::string s;
  for (;;) {
    const size_t have = s.size(), room = static_cast<size_t>(std::min<uint64_t>(max_bytes - have + 1, 65536));
    s.resize(have + room);
    const ssize_t n = ::read(fd, s.data() + have, room);
    s.resize(have + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("%s: cannot read: %s", where.c_str(), reason().c_str());
    if (n == 0) return s;
    if (s.size() > max_bytes) fail("%s: too large: expected at most %llu bytes", where.c_str(), static_cast<ull>(max_bytes));
  }
}

std::string read_text(const std::string& path, uint64_t max_bytes) {
  if (path.empty()) fail("expected the name of a file, got an empty one");
  struct Closer {
    int fd;
    ~Closer() { close_fd(fd); }
  } file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) fail("%s: cannot open: %s", path.c_str(), reason().c_str());
  return read_all(file.fd, path, max_bytes);
}

std::string read_small_file(const std::string& path, uint64_t max_bytes) {
  const File f = File::open_read(path);
  if (f.size() > max_bytes) fail("%s: too large: expected at most %llu bytes", path.c_str(), static_cast<ull>(max_bytes));
  std::string s(f.size(), '\0');
  f.read(0, {reinterpret_cast<uint8_t*>(s.data()), s.size()});
  return s;
}

std::string read_stdin(uint64_t max_bytes) { return read_all(STDIN_FILENO, "standard input", max_bytes); }

bool file_exists(const std::string& path) {
  struct stat st;
  return ::stat(path.c_str(), &st) == 0;
}

bool is_directory(const std::string& path) {
  struct stat st;
  return ::stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode);
}

double disk_bandwidth(const std::string& path) {
  constexpr size_t kPiece = 2 << 20;
  constexpr int kThreads = 8;
  using Clock = std::chrono::steady_clock;
  const uint64_t pieces = File::open_read(path).size() / kPiece;
  const Arena to(kThreads * kPiece);
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (fd < 0) fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);  // tmpfs before Linux 6.6
  if (fd < 0) return 0;
  std::atomic<uint64_t> next{0}, bytes{0};
  const auto start = Clock::now();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; t++)
    threads.emplace_back([&, t] {
      while (pieces && Clock::now() - start < std::chrono::milliseconds(500)) {
        const uint64_t piece = next++ * 0x9e3779b97f4a7c15ull % pieces;  // no order that a disk could read ahead
        const ssize_t n = ::pread(fd, to.data() + static_cast<size_t>(t) * kPiece, kPiece, static_cast<off_t>(piece * kPiece));
        if (n <= 0) return;
        bytes += static_cast<uint64_t>(n);
      }
    });
  for (std::thread& t : threads) t.join();
  ::close(fd);
  return static_cast<double>(bytes) / std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t free_disk(const std::string& path) {
  struct statvfs st;
  if (::statvfs(path.c_str(), &st) != 0 && ::statvfs(folder_of(path).c_str(), &st) != 0)
    fail("%s: cannot ask for free disk space: %s", path.c_str(), reason().c_str());
  return static_cast<uint64_t>(st.f_bavail) * st.f_frsize;
}

// ---- Arena ----------------------------------------------------------------------------------------------------------

Arena::Arena(size_t bytes) {
  if (bytes == 0) return;
  const size_t huge = size_t{2} << 20, slack = bytes >= huge ? huge : 0;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = bytes > SIZE_MAX - slack ? MAP_FAILED : ::mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) fail("cannot have %zu bytes of memory: %s", bytes, std::strerror(ENOMEM));
  data_ = static_cast<uint8_t*>(p);
  size_ = bytes;
  if (!slack) return;
  // Start on a boundary of huge pages; give back what lies before it and what is left after the end.
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE)), used = (bytes + page - 1) / page * page;
  const size_t before = (huge - reinterpret_cast<uintptr_t>(data_) % huge) % huge;
  const size_t mapped = (bytes + slack + page - 1) / page * page, after = mapped - before - used;
  if (before) ::munmap(data_, before);
  data_ += before;
  if (after) ::munmap(data_ + used, after);
  ::madvise(data_, used, MADV_HUGEPAGE);
}
Arena::Arena(Arena&& o) noexcept : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
Arena& Arena::operator=(Arena&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  return *this;
}
Arena::~Arena() {
  if (data_) ::munmap(data_, size_);
}

// ---- memory of the machine ------------------------------------------------------------------------------------------

static std::string try_read(const std::string& path) {
  try {
    return read_text(path, 1 << 20);
  } catch (const Error&) {
    return {};
  }
}

// The number after "key" at the start of a line; `none` when there is no such line or no number ("max").
static uint64_t field(const std::string& text, std::string_view key, uint64_t none) {
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (text.compare(at, key.size(), key) == 0) {
      size_t i = at + key.size();
      while (i < end && (text[i] == ' ' || text[i] == '\t')) i++;
      if (i < end && text[i] >= '0' && text[i] <= '9') return std::strtoull(text.c_str() + i, nullptr, 10);
    }
    at = end + 1;
  }
  return none;
}

// Least room of a memory cgroup and its ancestors. The page cache counts as usage there, but the kernel gives it back when
// asked for memory, as it does in MemAvailable. In a container the path of the group may lie outside of what is mounted:
// missing files are skipped, the walk ends at the root of the mount, which is then the container's own group.
static uint64_t cgroup_room(const std::string& mount, std::string group, const char* limit, const char* usage,
                            const char* stat_prefix) {
  uint64_t least = UINT64_MAX;
  for (;;) {
    const std::string folder = mount + (group == "/" ? "" : group) + "/";
    const uint64_t max = field(try_read(folder + limit), "", UINT64_MAX), used = field(try_read(folder + usage), "", 0);
    if (max < (uint64_t{1} << 60)) {  // v1 says "no limit" with a huge number
      const std::string stat = try_read(folder + "memory.stat"), prefix = stat_prefix;
      const uint64_t cache = field(stat, prefix + "inactive_file ", 0) + field(stat, prefix + "active_file ", 0);
      const uint64_t kept = used - std::min(used, cache);
      least = std::min(least, max - std::min(max, kept));
    }
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos || group == "/") return least;
    group.resize(std::max<size_t>(slash, 1));
  }
}

uint64_t available_ram() {
  uint64_t least = UINT64_MAX;
  const uint64_t kib = field(try_read("/proc/meminfo"), "MemAvailable:", UINT64_MAX);
  if (kib != UINT64_MAX) least = kib * 1024;
  const std::string groups = try_read("/proc/self/cgroup");  // lines "number:controllers:/path"; version 2 is "0::/path"
  for (size_t at = 0; at < groups.size();) {
    const size_t end = std::min(groups.find('\n', at), groups.size());
    const size_t a = groups.find(':', at), b = a == std::string::npos ? a : groups.find(':', a + 1);
    if (b != std::string::npos && b < end) {
      const std::string names = "," + groups.substr(a + 1, b - a - 1) + ",", path = groups.substr(b + 1, end - b - 1);
      if (names == ",,") least = std::min(least, cgroup_room("/sys/fs/cgroup", path, "memory.max", "memory.current", ""));
      if (names.find(",memory,") != std::string::npos)
        least = std::min(least, cgroup_room("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                                            "total_"));
    }
    at = end + 1;
  }
  if (least != UINT64_MAX) return least;
  return static_cast<uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
}

uint64_t peak_rss() {
  const uint64_t kib = field(try_read("/proc/self/status"), "VmHWM:", 0);  // getrusage() would include the process before exec
  if (kib) return kib * 1024;
  struct rusage usage;
  return ::getrusage(RUSAGE_SELF, &usage) == 0 ? static_cast<uint64_t>(usage.ru_maxrss) * 1024 : 0;
}

}  // namespace qn
