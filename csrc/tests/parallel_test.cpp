// The threading seam: serial without a pool, a plugged-in pool, exceptions, a forked child.
#include "cpu/parallel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/check.h"
#include "tests/pool.h"

using namespace fastnn;
using fastnn::test::PoolGuard;

namespace {

constexpr int64_t kThreads = 3;

void check_covers(int64_t n, int64_t grain) {
  std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
  parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  for (int64_t i = 0; i < n; ++i) {
    CHECK(visits[static_cast<size_t>(i)] == 1, "index %ld of %ld ran %d times",
          static_cast<long>(i), static_cast<long>(n), visits[static_cast<size_t>(i)].load());
  }
}

template <class Throw>
std::string caught_message(Throw throw_at) {
  try {
    parallel_for(64, 1, throw_at);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing of the type that was thrown";
}

void throw_from_every_range(int64_t begin, int64_t) {
  throw std::invalid_argument("thrown at " + std::to_string(begin));
}

TEST(serial_without_a_pool) {
  CHECK(thread_count() == 1, "%ld threads without a pool", static_cast<long>(thread_count()));
  const auto caller = std::this_thread::get_id();
  int calls = 0;
  parallel_for(1000, 1, [&](int64_t begin, int64_t end) {
    ++calls;
    CHECK(begin == 0 && end == 1000, "one whole range");
    CHECK(std::this_thread::get_id() == caller, "on the calling thread");
  });
  CHECK(calls == 1, "%d calls", calls);
  CHECK(caught_message(throw_from_every_range) == "thrown at 0", "an exception passes unchanged");
}

TEST(forked_child_is_serial) {
  const PoolGuard pool(kThreads);
  const pid_t child = fork();
  if (child == 0) {
    const int before = pool.runs();
    int calls = 0;
    parallel_for(64, 1, [&](int64_t begin, int64_t end) { calls += begin == 0 && end == 64; });
    _exit(calls == 1 && pool.runs() == before && thread_count() == 1 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0,
        "the child ran on a pool it does not have, status %d", status);
  check_covers(100, 1);
  CHECK(thread_count() == kThreads, "the parent keeps its pool");
}

TEST(exceptions_cross_with_their_type) {
  const PoolGuard pool(kThreads);
  CHECK(caught_message(throw_from_every_range).starts_with("thrown at "), "from every range");
  std::atomic<int64_t> done{0};
  const auto throw_once = [&](int64_t begin, int64_t end) {
    if (begin == 0) throw std::invalid_argument("first range");
    done += end - begin;
  };
  CHECK(caught_message(throw_once) == "first range", "from one range");
  CHECK(done == 64 - 64 / kThreads, "the other ranges still ran: %ld indices",
        static_cast<long>(done));
  check_covers(100, 1);
}

TEST(pool_covers_every_index_once) {
  const PoolGuard pool(kThreads);
  for (const int64_t n : {0, 1, 2, 3, 4, 7, 64, 1000}) {
    for (const int64_t grain : {1, 2, 3, 64, 5000}) check_covers(n, grain);
  }
}

TEST(small_loops_stay_on_the_calling_thread) {
  const PoolGuard pool(kThreads);
  const int before = pool.runs();
  check_covers(64, 64);
  parallel_for(0, 1, [](int64_t, int64_t) { CHECK(false, "an empty range calls nothing"); });
  CHECK(pool.runs() == before, "the pool ran");
}

}  // namespace
