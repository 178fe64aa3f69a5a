// Memory that is kept for the next result instead of given back: off unless asked for, bounded.
// Faulting in fresh pages is up to 80 % of a row operation on a large tensor.
#pragma once
#include <cstdint>
#include <memory>

namespace fastnn {

// Smaller results come from the allocator of torch, which reuses such memory by itself.
constexpr int64_t kCachedFromBytes = int64_t{1} << 20;

// How much memory may wait for its next use; 0 turns the cache off. What is above goes at once.
void set_cache_limit(int64_t bytes);
int64_t cache_limit();

// A block of at least `bytes`, 64-byte aligned, on huge pages from 2 MiB on. It comes back to the
// cache with its last owner, from any thread. Null where the cache is off or the block would be
// small. Throws std::bad_alloc.
std::shared_ptr<void> cached_memory(int64_t bytes);

// Gives what waits back to the system. Blocks in use stay.
void empty_cache();

struct CacheStats {
  int64_t waiting_bytes;  // kept for the next result
  int64_t used_bytes;     // in tensors and scratch
  int64_t peak_bytes;     // the most that both together were
  int64_t reused;         // blocks that came from the cache
  int64_t mapped;         // blocks that the system had to be asked for
};
CacheStats cache_stats();

}  // namespace fastnn
