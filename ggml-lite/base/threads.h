// The thread pool: n workers, of which the caller is number 0. One job at a time; jobs are parallel regions that end together.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace qn {

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

  // Inside run(): shared counter for work stealing. Set to 0 by run() before it starts, and by reset_tasks().
  int64_t next_task();
  // Call between two barriers (by one thread) to start a second list of tasks in the same run().
  void reset_tasks();

 private:
  void run_raw(void (*call)(void*, int), void* arg);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Physical cores this process may run on (affinity mask, cgroup quota), at least 1.
int default_threads();
int usable_processors();  // hardware threads, likewise

// Whether the system lets this process use the tile registers of AMX. It must be asked before the first use; asking again is free.
bool allow_tiles();

// Contiguous share [begin, end) of n items for one of `parts`; shares differ by at most one item.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t n, int part, int parts) {
  return {n * part / parts, n * (part + 1) / parts};
}

}  // namespace qn
