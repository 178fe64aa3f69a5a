// The threading seam. The core knows no thread pool: whoever embeds it plugs one in (the bindings
// plug in torch's).
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

namespace fastnn {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

struct ThreadPool {
  // Calls body on disjoint ranges that cover [0, n), each at least `grain` long but the last, and
  // returns when all are done. Must not let an exception cross a foreign boundary.
  void (*run)(int64_t n, int64_t grain, RangeBody body, void* context);
  int64_t (*threads)();
};

// Without a pool everything runs on the calling thread.
void set_thread_pool(const ThreadPool& pool);
int64_t thread_count();
void parallel_for_erased(int64_t n, int64_t grain, RangeBody body, void* context);

// body(begin, end) over [0, n) on the plugged-in pool. The first exception a body throws is
// rethrown here, with its type; the other ranges still run. In a forked child everything runs on
// the calling thread: the parent's workers do not exist there, and waiting for them would hang.
template <class Body>
void parallel_for(int64_t n, int64_t grain, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  parallel_for_erased(
      n, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<Plain*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastnn
