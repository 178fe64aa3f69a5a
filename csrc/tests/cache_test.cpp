// Memory kept for the next result: what comes back, in which order it goes, and that threads do not
// share it.
#include "cpu/cache.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "tests/check.h"

using namespace fastnn;

namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(off_and_small_are_not_cached) {
  set_cache_limit(0);
  CHECK(cached_memory(64 * kMiB) == nullptr, "off");
  set_cache_limit(64 * kMiB);
  CHECK(cached_memory(kCachedFromBytes - 1) == nullptr, "small");
  CHECK(cached_memory(kCachedFromBytes) != nullptr, "the least");
  empty_cache();
}

TEST(blocks_are_aligned_whole_and_apart) {
  set_cache_limit(64 * kMiB);
  std::vector<std::pair<std::shared_ptr<void>, int64_t>> blocks;
  for (const int64_t bytes : {kMiB, kMiB + 1, 2 * kMiB, 3 * kMiB - 7, 40 * kMiB, kMiB, 2 * kMiB}) {
    blocks.emplace_back(cached_memory(bytes), bytes);
    auto* const p = static_cast<char*>(blocks.back().first.get());
    CHECK(reinterpret_cast<uintptr_t>(p) % 64 == 0, "%ld bytes", static_cast<long>(bytes));
    std::memset(p, static_cast<int>(blocks.size()), static_cast<size_t>(bytes));
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto* const p = static_cast<const char*>(blocks[i].first.get());
    CHECK(p[0] == static_cast<char>(i + 1) && p[blocks[i].second - 1] == static_cast<char>(i + 1),
          "block %zu was written by another", i);
  }
  CHECK(cache_stats().used_bytes >= 50 * kMiB, "in use");
  blocks.clear();
  CHECK(cache_stats().used_bytes == 0, "given back");
  CHECK(cache_stats().waiting_bytes <= 64 * kMiB, "limit");
  empty_cache();
  CHECK(cache_stats().waiting_bytes == 0, "emptied");
}

TEST(the_longest_unused_go_first) {
  set_cache_limit(4 * kMiB);
  std::vector<std::shared_ptr<void>> blocks;
  for (int i = 0; i < 3; ++i) blocks.push_back(cached_memory(2 * kMiB));
  const void* const last = blocks[2].get();
  for (auto& block : blocks) block.reset();
  CHECK(cache_stats().waiting_bytes == 4 * kMiB, "two of three");
  set_cache_limit(2 * kMiB);
  const int64_t reused = cache_stats().reused;
  CHECK(cached_memory(2 * kMiB).get() == last && cache_stats().reused == reused + 1, "the last");
  empty_cache();
}

TEST(large_scratch_comes_from_it) {
  set_cache_limit(64 * kMiB);
  const int64_t before = cache_stats().mapped;
  for (int i = 0; i < 3; ++i) {
    const Scratch scratch(kKeptScratchBytes + 1);
    std::memset(scratch.get(), i, static_cast<size_t>(kKeptScratchBytes) + 1);
  }
  CHECK(cache_stats().mapped == before + 1, "once from the system");
  empty_cache();
}

TEST(threads_take_and_give) {
  set_cache_limit(8 * kMiB);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &wrong] {
      for (int i = 0; i < 50; ++i) {
        const auto block = cached_memory(kMiB + (i % 3) * kMiB);
        auto* const p = static_cast<volatile char*>(block.get());
        for (int64_t j = 0; j < kMiB; j += 4096) p[j] = static_cast<char>(t);
        for (int64_t j = 0; j < kMiB; j += 4096) wrong += p[j] != static_cast<char>(t);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0, "%d pages were written by another thread", wrong.load());
  CHECK(cache_stats().used_bytes == 0 && cache_stats().waiting_bytes <= 8 * kMiB, "limit");
  set_cache_limit(0);
  CHECK(cache_stats().waiting_bytes == 0, "off");
}

TEST(malloc_keeps_what_is_freed) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__GLIBC__)
  CHECK(!keep_freed_memory(true), "another malloc does not obey");
#else
  CHECK(keep_freed_memory(true), "on");
  CHECK(keep_freed_memory(false), "off");
#endif
}

}  // namespace
