// csrc/cuda/device.h and the settings of the emulated library, for Python's ctypes.
#include "cuda/device.h"

#include <cstring>

#include "cuda_emu.h"

int fastnn_cuda_fill(void* p, int byte, int64_t bytes, void*) {
  std::memset(p, byte, static_cast<size_t>(bytes));
  return 0;
}
const char* fastnn_cuda_error_text(int code) { return code == 0 ? "no error" : "an error"; }
const char* fastnn_cuda_problem() { return ""; }

extern "C" {
// 0 where `order` is none (forward, reverse, random[:seed]).
int fastnn_emu_set(const char* order, int copies_early, int multiprocessors) {
  emu::copies_early = copies_early != 0;
  emu::multiprocessors = multiprocessors;
  return emu::set_order(order) ? 1 : 0;
}
void fastnn_emu_trace(int on) { emu::tracing = on != 0; }
// Copies the counters, in the order of emu::Counters, and starts them again.
int fastnn_emu_counters(uint64_t* out, int capacity) {
  constexpr int kCount = sizeof(emu::Counters) / sizeof(uint64_t);
  if (capacity < kCount) return kCount;
  std::memcpy(out, &emu::counters, sizeof(emu::Counters));
  emu::counters = {};
  return kCount;
}
}
