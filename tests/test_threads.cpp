// Thread pool: every thread runs once per job, barriers order memory, tasks are handed out once, failures come back.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <doctest/doctest.h>
#include <future>
#include <stdexcept>
#include <thread>
#include <vector>

#include "ggml-lite/base/check.h"
#include "ggml-lite/base/threads.h"

using qn::Threads;

TEST_CASE("threads: shares cover everything once") {
  for (int64_t n : {0, 1, 2, 7, 16, 1000})
    for (int parts = 1; parts <= 9; parts++) {
      int64_t at = 0;
      for (int i = 0; i < parts; i++) {
        const qn::Range r = qn::share(n, i, parts);
        CHECK(r.begin == at);
        CHECK(r.end - r.begin >= n / parts);
        CHECK(r.end - r.begin <= n / parts + 1);
        at = r.end;
      }
      CHECK(at == n);
    }
}

TEST_CASE("threads: default is at least one; sizes") {
  CHECK(qn::default_threads() >= 1);
  CHECK(Threads(0).size() == qn::default_threads());
  CHECK(Threads(-3).size() == qn::default_threads());
  CHECK(Threads(5).size() == 5);
}

TEST_CASE("threads: each thread runs each job exactly once, the caller being 0") {
  for (int n : {1, 2, 3, 8}) {
    Threads pool(n);
    const auto caller = std::this_thread::get_id();
    std::vector<int> count(n);
    std::atomic<int> wrong{0};
    const int jobs = 300;
    for (int j = 0; j < jobs; j++)
      pool.run([&](int t) {
        count[t]++;
        if ((t == 0) != (std::this_thread::get_id() == caller)) wrong++;
      });
    for (int t = 0; t < n; t++) CHECK(count[t] == jobs);
    CHECK(wrong == 0);
  }
}

TEST_CASE("threads: jobs after a pause long enough to fall asleep") {
  Threads pool(2);
  for (int j = 0; j < 20; j++) {
    std::atomic<int> ran{0};
    pool.run([&](int) { ran++; });
    CHECK(ran == 2);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

TEST_CASE("threads: barrier makes earlier writes visible and lets nobody run ahead") {
  for (int n : {1, 2, 4, 7}) {
    Threads pool(n);
    const int rounds = 200;
    std::vector<int> value(n);  // plain memory on purpose
    std::atomic<int> wrong{0};
    pool.run([&](int t) {
      for (int r = 1; r <= rounds; r++) {
        value[t] = r;
        pool.barrier(t);
        for (int i = 0; i < n; i++)
          if (value[i] != r) wrong++;
        pool.barrier(t);
      }
    });
    CHECK(wrong == 0);
  }
}

TEST_CASE("threads: tasks are handed out once, in every list") {
  for (int n : {1, 2, 5}) {
    Threads pool(n);
    for (int job = 0; job < 10; job++) {
      std::vector<std::atomic<int>> first(100), second(50);
      pool.run([&](int t) {
        for (int64_t i; (i = pool.next_task()) < 100;) first[i]++;
        pool.barrier(t);
        if (t == n - 1) pool.reset_tasks();
        pool.barrier(t);
        for (int64_t i; (i = pool.next_task()) < 50;) second[i]++;
      });
      int bad = 0;
      for (auto& c : first) bad += c != 1;
      for (auto& c : second) bad += c != 1;
      CHECK(bad == 0);
    }
  }
}

TEST_CASE("threads: spread gives every task once, one's own first and in order, in every list") {
  for (int n : {1, 2, 5})
    for (int64_t tasks : {0, 1, 3, 5, 64}) {
      Threads pool(n);
      for (int job = 0; job < 10; job++) {
        std::vector<std::atomic<int>> done[2] = {std::vector<std::atomic<int>>(64), std::vector<std::atomic<int>>(64)};
        std::atomic<int> wrong{0};
        pool.run([&](int t) {
          const qn::Range own = qn::share(tasks, t, n);
          for (int list : {0, Threads::kLists - 1}) {
            int64_t last = -1;
            bool others = false;
            pool.spread(t, list, tasks, [&](int64_t i) {
              const bool mine = i >= own.begin && i < own.end;
              wrong += mine && (others || i <= last);
              others |= !mine, last = i;
              done[list > 0][static_cast<size_t>(i)]++;
            });
            if (list == 0) pool.barrier(t);
          }
        });
        for (auto& list : done)
          for (int64_t i = 0; i < 64; i++) wrong += list[static_cast<size_t>(i)] != (i < tasks);
        CHECK(wrong == 0);
      }
    }
}

TEST_CASE("threads: one that is late is helped out") {
  Threads pool(2);
  std::atomic<int> by_first{0};
  pool.run([&](int t) {
    if (t == 1)
      for (const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5); by_first < 8 && std::chrono::steady_clock::now() < end;) std::this_thread::yield();
    pool.spread(t, 0, 8, [&](int64_t) { by_first += t == 0; });
  });
  CHECK(by_first == 8);
}

TEST_CASE("threads: an exception of any thread is rethrown and the pool lives on") {
  for (int n : {1, 4}) {
    Threads pool(n);
    for (int thrower = 0; thrower < n; thrower++) {
      std::atomic<int> ran{0};
      auto job = [&](int t) {
        ran++;
        if (t == thrower) throw std::runtime_error("thrown by " + std::to_string(t));
      };
      CHECK_THROWS_WITH_AS(pool.run(job), ("thrown by " + std::to_string(thrower)).c_str(), std::runtime_error);
      CHECK(ran == n);  // run() waited for the others
      CHECK_NOTHROW(pool.run([](int) {}));
    }
    CHECK_THROWS_AS(pool.run([](int) { throw 7; }), int);  // all throw: one arrives
  }
}

TEST_CASE("threads: an exception while others wait at a barrier ends the job, whoever throws and when") {
  for (int n : {2, 4, 7})
    for (int round = 0; round < 60; round++) {
      std::packaged_task<void()> job([n, round] {
        Threads pool(n);
        for (int i = 0; i < 3; i++) {  // the pool lives on, barriers and all
          std::atomic<int> after{0};
          auto body = [&](int t) {
            for (int b = 0; b < 3; b++) {
              if (t == round % n && b == round % 3) throw std::runtime_error("thrown");
              pool.barrier(t);
              if (b == round % 3) after++;
            }
          };
          CHECK_THROWS_WITH_AS(pool.run(body), "thrown", std::runtime_error);
          CHECK(after == 0);  // nobody passes the barrier that one has not reached
          pool.run([&](int t) {
            after++;
            pool.barrier(t);
            if (after != n) throw std::runtime_error("a barrier let a thread run ahead");
          });
        }
      });
      std::future<void> done = job.get_future();
      std::thread(std::move(job)).detach();
      REQUIRE(done.wait_for(std::chrono::seconds(20)) == std::future_status::ready);
      CHECK_NOTHROW(done.get());
    }
}

TEST_CASE("threads: run inside run is refused") {
  Threads pool(1);
  CHECK_THROWS_AS(pool.run([&](int) { pool.run([](int) {}); }), qn::Bug);
  CHECK_NOTHROW(pool.run([](int) {}));
}

TEST_CASE("threads: an idle pool uses no processor time") {
  Threads pool(4);
  pool.run([](int) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  double least = 1;  // of several windows: the clock is that of the whole process, whatever else runs in it
  for (int window = 0; window < 5 && least >= 0.01; window++) {
    const std::clock_t before = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    least = std::min(least, static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC);
  }
  CHECK(least < 0.01);
}
