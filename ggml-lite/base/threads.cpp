#include "ggml-lite/base/threads.h"

#include <sched.h>
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/file.h"

namespace qn {
namespace {

using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Processors of the affinity mask; empty when the system does not say.
std::vector<int> allowed_processors() {
  std::vector<int> cpus;
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int i = 0; i < CPU_SETSIZE; i++)
      if (CPU_ISSET(i, &set)) cpus.push_back(i);
  return cpus;
}

// A small file of /proc or /sys; empty where there is none
std::istringstream small_file(const std::string& path) {
  try {
    return std::istringstream(read_text(path, 1 << 16));
  } catch (const Error&) {
    return {};
  }
}

// Processors' worth of time the cgroups above us grant (v2 cpu.max "quota period", v1 cfs_quota_us); huge when unlimited.
double cgroup_processors() {
  double least = 1e9, quota = 0, period = 0;
  std::istringstream groups = small_file("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    for (std::string path = line.substr(3);;) {  // a parent may be tighter than its children
      std::istringstream max = small_file("/sys/fs/cgroup" + path + "/cpu.max");  // "max 100000" is no number: no limit
      if (max >> quota >> period && quota > 0 && period > 0) least = std::min(least, quota / period);
      const size_t slash = path.rfind('/');
      if (slash == std::string::npos) break;
      path.resize(slash);
    }
  }
  const std::string v1 = "/sys/fs/cgroup/cpu/cpu.cfs_";
  if (small_file(v1 + "quota_us") >> quota && small_file(v1 + "period_us") >> period && quota > 0 && period > 0)
    least = std::min(least, quota / period);
  return least;
}

// Takes threads out of a barrier that one of them will never reach
struct Abandoned {};

}  // namespace

int usable_processors() {
  const double by_mask = std::max<double>(1, allowed_processors().size());
  return static_cast<int>(std::max(1.0, std::min(by_mask, std::ceil(cgroup_processors()))));
}

int default_threads() {
  // Two hardware threads of a core share its load ports and its cache: the second adds nothing to a stream of weights.
  std::set<std::string> cores;
  for (int cpu : allowed_processors()) {
    std::string siblings;  // "0,64" for both of a pair
    const std::string of = std::to_string(cpu), path = "/sys/devices/system/cpu/cpu" + of + "/topology/thread_siblings_list";
    if (!(small_file(path) >> siblings)) siblings = of;
    cores.insert(siblings);
  }
  return std::max(1, std::min(static_cast<int>(cores.size()), usable_processors()));
}

bool allow_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads; the state component of tile data
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

// Every waiting is for a counter to move on: the epoch (a new job), or how far a thread is.
// A waiter polls its counter for a while, then sleeps in the kernel on that address (std::atomic::wait; the waking side makes
// no system call while nobody sleeps: wake()). Counters that different threads write lie on lines of their own.
//
// How far thread i is: reached[i] = kJob * jobs it has ended + barriers of this job it has come to. A barrier is one store, and loads of all
// others' counters, which are under way together; a common counter would go from core to core (15 threads on a virtual machine: two
// barriers and the job around them 5 us). A thread that fails ends the job at once: those who wait for it go on, and find `poisoned`.
struct Threads::Impl {
  static constexpr uint32_t kJob = 1 << 20;  // more barriers than a job has; differences hold when numbers begin anew
  struct alignas(64) Reached {
    std::atomic<uint32_t> at{0};
  };
  struct alignas(64) Claims {
    std::atomic<int64_t> taken[kLists] = {};
  };
  int n = 1;
  std::chrono::microseconds spin{0};
  alignas(64) std::atomic<int> epoch{0};
  void (*call)(void*, int) = nullptr;
  void* arg = nullptr;
  bool stop = false, running = false;
  std::vector<Reached> reached;       // by that thread
  std::vector<Claims> claims;         // by that thread and those who help it
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> poisoned{false};  // a thread of this job has failed: no barrier will be complete
  alignas(64) std::atomic<int64_t> task{0};
  alignas(64) std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<std::thread> workers;

  template <class T>
  void await_change(const std::atomic<T>& a, T old) {
    if (spin.count() > 0) {
      const auto end = Clock::now() + spin;
      do {
        for (int i = 0; i < 64; i++) {
          if (a.load(std::memory_order_acquire) != old) return;
          relax();
        }
      } while (Clock::now() < end);
    }
    sleepers.fetch_add(1);
    a.wait(old);
    sleepers.fetch_sub(1);
  }

  // Behind a change of what others may be waiting for. Sleepers count themselves before they look at the counter for the last time, we change it
  // before we look at their number, and all of that is sequentially consistent: one of us sees the other. (Without the number it would be
  // the library's, of one entry for all counters of all pools.)
  template <class T>
  void wake(std::atomic<T>& a) {
    if (sleepers.load() > 0) a.notify_all();
  }

  void await(uint32_t at) {  // all threads, this one included
    for (const Reached& r : reached)
      for (uint32_t now; static_cast<int32_t>((now = r.at.load(std::memory_order_acquire)) - at) < 0;) await_change(r.at, now);
  }

  void reach(int thread, uint32_t at) {
    std::atomic<uint32_t>& mine = reached[static_cast<size_t>(thread)].at;
    mine.store(at);
    wake(mine);
  }

  uint32_t end_of_job(int thread) const { return (reached[static_cast<size_t>(thread)].at.load(std::memory_order_relaxed) / kJob + 1) * kJob; }

  void work(int thread) {
    try {
      call(arg, thread);
    } catch (const Abandoned&) {  // the reason is in `error`
    } catch (...) {
      {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
      poisoned.store(true);  // before the end: who sees that sees this
    }
    reach(thread, end_of_job(thread));
  }

  void worker(int thread) {
    for (int seen = 0;;) {
      int now = epoch.load(std::memory_order_acquire);
      while (now == seen) {
        await_change(epoch, seen);
        now = epoch.load(std::memory_order_acquire);
      }
      seen = now;
      if (stop) return;
      work(thread);
    }
  }

  void shut_down() {
    stop = true;
    epoch.fetch_add(1);
    epoch.notify_all();
    for (std::thread& t : workers) t.join();
  }
};

Threads::Threads(int n, int spin_microseconds) : impl_(std::make_unique<Impl>()) {
  impl_->n = n > 0 ? n : default_threads();
  impl_->reached = std::vector<Impl::Reached>(static_cast<size_t>(impl_->n));
  impl_->claims = std::vector<Impl::Claims>(static_cast<size_t>(impl_->n));
  if (impl_->n <= usable_processors()) impl_->spin = std::chrono::microseconds(spin_microseconds);
  impl_->workers.reserve(static_cast<size_t>(impl_->n - 1));  // a failure later would destroy running threads
  try {
    for (int i = 1; i < impl_->n; i++) impl_->workers.emplace_back([impl = impl_.get(), i] { impl->worker(i); });
  } catch (const std::system_error&) {
    const size_t started = impl_->workers.size() + 1;
    impl_->shut_down();
    fail("threads: the system refused thread %zu of %d; try fewer threads", started + 1, impl_->n);
  }
}

Threads::~Threads() { impl_->shut_down(); }

int Threads::size() const { return impl_->n; }

void Threads::run_raw(void (*call)(void*, int), void* arg) {
  Impl& s = *impl_;
  QN_CHECK(!s.running, "run() called inside run() of %d threads", s.n);
  s.running = true;
  s.call = call, s.arg = arg;
  s.task.store(0, std::memory_order_relaxed);
  for (Impl::Claims& c : s.claims)
    for (std::atomic<int64_t>& t : c.taken) t.store(0, std::memory_order_relaxed);
  s.poisoned.store(false, std::memory_order_relaxed);
  if (s.n > 1) {
    s.epoch.fetch_add(1);
    s.wake(s.epoch);
  }
  const uint32_t end = s.end_of_job(0);
  s.work(0);
  s.await(end);
  s.running = false;
  if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
}

void Threads::barrier(int thread) {
  Impl& s = *impl_;
  if (s.n == 1) return;
  const uint32_t at = s.reached[static_cast<size_t>(thread)].at.load(std::memory_order_relaxed) + 1;
  s.reach(thread, at);
  s.await(at);
  if (s.poisoned.load(std::memory_order_acquire)) throw Abandoned();
}

int64_t Threads::claim(int owner, int list) {
  return impl_->claims[static_cast<size_t>(owner)].taken[list].fetch_add(1, std::memory_order_relaxed);
}
int64_t Threads::claimed(int owner, int list) const {
  return impl_->claims[static_cast<size_t>(owner)].taken[list].load(std::memory_order_relaxed);
}

int64_t Threads::next_task() { return impl_->task.fetch_add(1, std::memory_order_relaxed); }

void Threads::reset_tasks() { impl_->task.store(0, std::memory_order_relaxed); }

}  // namespace qn
