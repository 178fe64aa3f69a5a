#include "cpu/memory.h"

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>

#include "cpu/cache.h"

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace fastnn {
namespace {

std::atomic<bool> g_poison{false};

void* allocate(int64_t bytes) {
  const int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
  const int64_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(static_cast<size_t>(alignment), static_cast<size_t>(rounded));
  if (p == nullptr) throw std::bad_alloc();
  if (bytes >= kHugePage) advise_huge(p, rounded);
  return p;
}

// Whole huge pages, mapped for this alone: memory that malloc hands out again may already lie on
// small ones.
struct Slab {
  static constexpr int64_t kLeastBytes = 4 * kHugePage;

  explicit Slab(int64_t least)
      : bytes((std::max(least, kLeastBytes) + kHugePage - 1) / kHugePage * kHugePage),
        mapped(mmap(nullptr, static_cast<size_t>(bytes + kHugePage), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<uintptr_t>(mapped);
    data = static_cast<char*>(mapped) + (kHugePage - start % kHugePage) % kHugePage;
    advise_huge(data, bytes);
  }
  ~Slab() { munmap(mapped, static_cast<size_t>(bytes + kHugePage)); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  int64_t bytes;
  void* mapped;
  char* data = nullptr;
  int64_t used = 0;
};

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(data); }
};
thread_local Kept t_kept;

}  // namespace

void set_poison(bool on) { g_poison.store(on, std::memory_order_relaxed); }
bool poison() { return g_poison.load(std::memory_order_relaxed); }

void advise_huge(void* p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto first = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const auto last =
      (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

void prepare_output(void* p, int64_t bytes) {
  if (bytes >= kHugeOutputBytes) advise_huge(p, bytes);
  if (poison()) std::memset(p, 0xff, static_cast<size_t>(bytes));
}

#ifdef __GLIBC__
namespace {

// Page faults of writing to a fresh block of 64 MiB that another one of its size was freed before.
int64_t faults_of_a_second_block() {
  constexpr size_t kBytes = size_t{64} << 20, kTouched = size_t{1} << 20, kPage = 4096;
  rusage before{}, after{};
  for (int round = 0; round < 2; ++round) {
    auto* const block = static_cast<volatile char*>(std::malloc(kBytes));
    if (block == nullptr) throw std::bad_alloc();
    getrusage(RUSAGE_THREAD, &before);
    for (size_t i = 0; i < kTouched; i += kPage) block[i] = 1;
    getrusage(RUSAGE_THREAD, &after);
    std::free(const_cast<char*>(block));
  }
  return after.ru_minflt - before.ru_minflt;
}

}  // namespace
#endif

bool keep_freed_memory(bool on) {
#ifdef __GLIBC__
  constexpr int kAll = std::numeric_limits<int>::max(), kUsual = 32 << 20;
  const bool said = mallopt(M_MMAP_THRESHOLD, on ? kAll : kUsual) == 1 &&
                    mallopt(M_TRIM_THRESHOLD, on ? kAll : 2 * kUsual) == 1;
  if (!on) malloc_trim(0);
  return said && (!on || faults_of_a_second_block() < 128);  // of 256
#else
  return !on;
#endif
}

std::shared_ptr<void> keep_memory(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Slab> open_slab;  // the last one, which may have room left
  const int64_t lines = (bytes + 63) / 64 * 64;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Slab> slab = open_slab.lock();
  if (slab == nullptr || slab->bytes - slab->used < lines) {
    slab = std::make_shared<Slab>(lines);
    open_slab = slab;
  }
  void* const p = slab->data + slab->used;
  slab->used += lines;
  if (poison()) std::memset(p, 0xff, static_cast<size_t>(bytes));
  return {std::move(slab), p};
}

bool streams(const void* out, int64_t rows, int64_t row_bytes, int64_t tensors) {
  return rows * row_bytes * tensors >= kStreamFromBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_(bytes > 0 ? bytes : 1) {
  if (t_kept.data != nullptr && t_kept.bytes >= bytes_) {
    data_ = t_kept.data;
    bytes_ = t_kept.bytes;
    t_kept = Kept{};
  } else {
    if (bytes_ > kKeptScratchBytes) cached_ = cached_memory(bytes_);
    data_ = cached_ != nullptr ? cached_.get() : allocate(bytes_);
  }
  if (poison()) std::memset(data_, 0xff, static_cast<size_t>(bytes_));
}

Scratch::~Scratch() {
  if (cached_ != nullptr) return;
  if (bytes_ <= kKeptScratchBytes && bytes_ > t_kept.bytes) {
    std::free(t_kept.data);
    t_kept.data = data_;
    t_kept.bytes = bytes_;
  } else {
    std::free(data_);
  }
}

}  // namespace fastnn
