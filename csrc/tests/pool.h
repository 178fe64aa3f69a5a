// A thread pool for tests: real threads, even ranges, nothing caught; plugged in for as long as the
// guard lives.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace fastnn::test {

class PoolGuard {
 public:
  explicit PoolGuard(int64_t threads) {
    s_threads = threads;
    s_runs = 0;
    set_thread_pool({&run, [] { return s_threads; }});
  }
  ~PoolGuard() { set_thread_pool({nullptr, nullptr}); }
  PoolGuard(const PoolGuard&) = delete;
  PoolGuard& operator=(const PoolGuard&) = delete;

  static int runs() { return s_runs; }

 private:
  static void run(int64_t n, int64_t grain, RangeBody body, void* context) {
    ++s_runs;
    const int64_t most = (n + grain - 1) / grain;
    const int64_t ranges = most < s_threads ? most : s_threads;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < ranges; ++i) {
      threads.emplace_back([=] { body(context, n * i / ranges, n * (i + 1) / ranges); });
    }
    for (auto& thread : threads) thread.join();
  }

  static inline int64_t s_threads = 1;
  static inline std::atomic<int> s_runs{0};
};

}  // namespace fastnn::test
