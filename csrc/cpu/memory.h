// Scratch memory, huge pages, and the NaN poison that tests fill fresh memory with.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastnn {

// Fill every fresh output and scratch buffer with NaN (bytes 0xff), so that reading what was never
// written shows.
void set_poison(bool on);
bool poison();

constexpr int64_t kHugePage = int64_t{2} << 20;
// Asks for huge pages under the whole ones of [p, p + bytes).
void advise_huge(void* p, int64_t bytes);

// Makes a call's result ready before its first touch: asks for huge pages under the whole 2 MiB
// pages of [p, p + bytes) if they are large, and poisons.
void prepare_output(void* p, int64_t bytes);
// Above this malloc maps fresh 4 KiB pages on every call, and faulting them in is 80 % of a row
// operation; below it the same memory comes round again and huge pages gain nothing.
constexpr int64_t kHugeOutputBytes = int64_t{32} << 20;

// Has malloc, and so all of torch in this process, keep what is freed for the next block instead of
// giving it back; off: back to giving back what is above 32 MiB, and what is free now goes. Returns
// whether malloc obeyed: another allocator than glibc's does not.
bool keep_freed_memory(bool on);

// Memory for what is kept and streamed again and again (packed weights), 64-byte aligned, on huge
// pages: those give 1.5 times the read bandwidth, and 5 % of a product with 128 rows whose weight
// is not in the caches. Weights share slabs, so that small ones get huge pages too and no page is
// wasted; a slab goes when nobody keeps a part of it. Throws std::bad_alloc.
std::shared_ptr<void> keep_memory(int64_t bytes);

// A call that touches this much writes its result past the caches, which saves fetching the lines
// that it overwrites. Measured with a last-level cache of 32 MiB, a reader of the result after the
// call included: 1.1 to 2 times as fast from 8 MB on, slower at 6 MB. (What the system says of the
// cache's size is the whole host's on many virtual machines.)
constexpr int64_t kStreamFromBytes = 8'000'000;
// Whether rows of a result are better written past the caches, when `tensors` of its size are read
// and written: enough of them, and rows of whole lines.
bool streams(const void* out, int64_t rows, int64_t row_bytes, int64_t tensors);

// A per-thread buffer that lives for one kernel call, 64-byte aligned, on huge pages from 2 MiB on.
// Buffers up to kKeptScratchBytes stay with the thread for the next call; they nest (a second one
// alive at the same time is its own). Larger ones come from the cache (cpu/cache.h), if it is on.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  std::shared_ptr<void> cached_;
  void* data_;
  int64_t bytes_;
};
constexpr int64_t kKeptScratchBytes = int64_t{16} << 20;

}  // namespace fastnn
