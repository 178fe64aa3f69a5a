#include "cpu/cache.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/memory.h"

namespace fastnn {
namespace {

constexpr int64_t kSmallUnit = int64_t{128} << 10;
// Starts are odd multiples of a line apart: results that all began on a page would share the sets
// of the first cache, and loads would wait for stores to the same offset of another page.
constexpr int64_t kLine = 64;
constexpr int64_t kOffsets = 31;

struct Block {
  char* mapped;
  int64_t mapped_bytes;
  char* data;
  int64_t bytes;  // from data on
};

// What a request is rounded up to, so that results of nearly one size share blocks.
int64_t rounded(int64_t bytes) {
  const int64_t unit = bytes >= kHugePage ? kHugePage : kSmallUnit;
  return (bytes + unit - 1) / unit * unit;
}

void unmap(const Block& block) { munmap(block.mapped, static_cast<size_t>(block.mapped_bytes)); }

class Cache {
 public:
  // Never destroyed: tensors give blocks back while the process ends.
  static Cache& get() {
    static Cache* const cache = new Cache;
    return *cache;
  }

  std::atomic<int64_t> limit{0};

  Block take(int64_t bytes) {
    const int64_t wanted = rounded(bytes);
    {
      const std::lock_guard lock(mutex_);
      auto best = waiting_.end();
      for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
        const bool fits = it->bytes >= wanted && it->bytes <= wanted + wanted / 8;
        if (fits && (best == waiting_.end() || it->bytes <= best->bytes)) best = it;
      }
      if (best != waiting_.end()) {
        const Block block = *best;
        waiting_.erase(best);
        ++stats_.reused;
        stats_.waiting_bytes -= block.bytes;
        stats_.used_bytes += block.bytes;
        return block;
      }
    }
    const Block block = map(wanted);
    const std::lock_guard lock(mutex_);
    ++stats_.mapped;
    stats_.used_bytes += block.bytes;
    stats_.peak_bytes = std::max(stats_.peak_bytes, stats_.used_bytes + stats_.waiting_bytes);
    return block;
  }

  void give(const Block& block) {
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(mutex_);
      stats_.used_bytes -= block.bytes;
      stats_.waiting_bytes += block.bytes;
      waiting_.push_back(block);
      drop_above(limit.load(), dropped);
    }
    for (const Block& one : dropped) unmap(one);
  }

  void trim(int64_t bytes) {
    std::vector<Block> dropped;
    {
      const std::lock_guard lock(mutex_);
      drop_above(bytes, dropped);
    }
    for (const Block& one : dropped) unmap(one);
  }

  CacheStats stats() {
    const std::lock_guard lock(mutex_);
    return stats_;
  }

 private:
  Cache() {
    // A child must not inherit a mutex that another thread of its parent holds.
    pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },
                   [] { get().mutex_.unlock(); });
  }

  // The longest unused go first.
  void drop_above(int64_t bytes, std::vector<Block>& dropped) {
    auto it = waiting_.begin();
    for (; it != waiting_.end() && stats_.waiting_bytes > bytes; ++it) {
      stats_.waiting_bytes -= it->bytes;
      dropped.push_back(*it);
    }
    waiting_.erase(waiting_.begin(), it);
  }

  Block map(int64_t bytes) {
    const int64_t alignment = bytes >= kHugePage ? kHugePage : 4096;
    const int64_t mapped_bytes = bytes + alignment + kLine * 2 * kOffsets;
    void* const mapped = mmap(nullptr, static_cast<size_t>(mapped_bytes), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const start = static_cast<char*>(mapped);
    char* const aligned =
        start + (alignment - static_cast<int64_t>(reinterpret_cast<uintptr_t>(start) % alignment)) %
                    alignment;
    if (alignment == kHugePage) advise_huge(aligned, start + mapped_bytes - aligned);
    const int64_t n = mapped_++ % kOffsets;
    return {start, mapped_bytes, aligned + kLine * (2 * n + 1), bytes};
  }

  std::mutex mutex_;
  std::vector<Block> waiting_;  // the longest unused first
  CacheStats stats_{};
  std::atomic<int64_t> mapped_{0};
};

}  // namespace

void set_cache_limit(int64_t bytes) {
  Cache::get().limit.store(bytes);
  Cache::get().trim(bytes);
}

int64_t cache_limit() { return Cache::get().limit.load(std::memory_order_relaxed); }

std::shared_ptr<void> cached_memory(int64_t bytes) {
  if (bytes < kCachedFromBytes || cache_limit() == 0) return nullptr;
  const Block block = Cache::get().take(bytes);
  return {block.data, [block](void*) { Cache::get().give(block); }};
}

void empty_cache() { Cache::get().trim(0); }

CacheStats cache_stats() { return Cache::get().stats(); }

}  // namespace fastnn
