// The thread pool: n workers, of which the caller is number 0. One job at a time; jobs are parallel regions that end together.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace qn {

// Contiguous share [begin, end) of n items for one of `parts`; shares differ by at most one item.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int part, int parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

class Threads {
 public:
  static constexpr int kSpin = 40;  // longer than any gap between two operations of a layer
  // n <= 0: default_threads(). Workers spin for some tens of microseconds after a job, then sleep, so that a chat waiting for
  // its user costs nothing. When n exceeds the processors we may run on, they never spin.
  explicit Threads(int n, int spin_microseconds = kSpin);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  int size() const;

  // Calls f(thread) on every thread 0..size()-1, the caller being 0, and returns when all have returned. An exception of any
  // of them is rethrown here (the first). Not reentrant.
  template <class F>
  void run(F&& f) {
    using Fn = std::remove_reference_t<F>;
    run_raw([](void* p, int thread) { (*static_cast<Fn*>(p))(thread); }, const_cast<void*>(static_cast<const void*>(&f)));
  }

  // Inside run(): every thread waits here until all have arrived; what was written before is visible after.
  // When a thread has left run() by an exception, the others leave it here by one of the pool's own, which run() swallows.
  void barrier(int thread);

  // Inside run(), on every thread: f(i) for each i of 0 ... n-1 once, on some thread. A thread first takes its own share(n, thread, size()) in
  // order, then what others have not begun. Lists of one run() have different numbers below kLists.
  template <class F>
  void spread(int thread, int list, int64_t n, F&& f) {
    const int threads = size();
    for (int i = 0; i < threads; i++) {
      const int owner = thread + i < threads ? thread + i : thread + i - threads;
      const Range r = share(n, owner, threads);
      if (i > 0 && claimed(owner, list) >= r.end - r.begin) continue;
      for (int64_t at; (at = claim(owner, list)) < r.end - r.begin;) f(r.begin + at);
    }
  }
  static constexpr int kLists = 4;

  // Inside run(): shared counter for work stealing. Set to 0 by run() before it starts, and by reset_tasks(). Of many threads that ask often it
  // costs each a fraction of a microsecond: the counter's line of memory goes from core to core.
  int64_t next_task();
  // Call between two barriers (by one thread) to start a second list of tasks in the same run().
  void reset_tasks();

 private:
  void run_raw(void (*call)(void*, int), void* arg);
  int64_t claim(int owner, int list);          // how many of the owner's tasks were taken before; the next one is the caller's
  int64_t claimed(int owner, int list) const;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Physical cores this process may run on (affinity mask, cgroup quota), at least 1.
int default_threads();
int usable_processors();  // hardware threads, likewise

// Whether the system lets this process use the tile registers of AMX. It must be asked before the first use; asking again is free.
bool allow_tiles();

}  // namespace qn
