#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>
#include <exception>

namespace fastnn {
namespace {

ThreadPool g_pool = {nullptr, nullptr};
std::atomic<bool> g_forked_child{false};

struct Guarded {
  RangeBody body;
  void* context;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
};

void guarded_body(void* context, int64_t begin, int64_t end) {
  auto& guarded = *static_cast<Guarded*>(context);
  try {
    guarded.body(guarded.context, begin, end);
  } catch (...) {
    if (!guarded.taken.test_and_set()) guarded.error = std::current_exception();
  }
}

bool serial() { return g_pool.run == nullptr || g_forked_child.load(std::memory_order_relaxed); }

}  // namespace

void set_thread_pool(const ThreadPool& pool) {
  static const int registered = pthread_atfork(
      nullptr, nullptr, [] { g_forked_child.store(true, std::memory_order_relaxed); });
  (void)registered;
  g_pool = pool;
}

int64_t thread_count() { return serial() ? 1 : g_pool.threads(); }

void parallel_for_erased(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n <= 0) return;
  if (n <= grain || serial()) {
    body(context, 0, n);
    return;
  }
  Guarded guarded{body, context, ATOMIC_FLAG_INIT, nullptr};
  g_pool.run(n, grain, guarded_body, &guarded);
  if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace fastnn
