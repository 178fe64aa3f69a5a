// Scratch memory, huge pages, and the NaN poison that tests fill fresh memory with.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastnn {

// Fill every fresh output and scratch buffer with NaN (bytes 0xff), so that reading what was never written shows.
void set_poison(bool on);
bool poison();

// Asks for huge pages under the whole pages of [p, p + bytes) if that is more than kHugeAdviceBytes, before the first
// touch: above that size malloc maps fresh 4 KiB pages on every call and faulting them in is 80 % of a row operation.
constexpr int64_t kHugeAdviceBytes = int64_t{32} << 20;
void prepare_output(void* p, int64_t bytes);

// A per-thread buffer that lives for one kernel call, 64-byte aligned, on huge pages from 2 MiB on. Buffers up to
// kKeptScratchBytes stay with the thread for the next call; they nest (a second one alive at the same time is its own).
class Scratch {
 public:
  explicit Scratch(int64_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
};
constexpr int64_t kKeptScratchBytes = int64_t{16} << 20;

}  // namespace fastnn
