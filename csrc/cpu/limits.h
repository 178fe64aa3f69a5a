// Measures the machine: the rates that no kernel can beat. Own threads, one per allowed processor,
// started together; the fastest of short trials, since what disturbs a trial only makes it slower.
#pragma once
#include <cstdint>

#include "params/limits.h"

namespace fastnn {

enum class Pages : int32_t { kSmall, kHuge };  // 4 KiB; 2 MiB where the system grants them

// Operations per second of the instruction set in force, all threads together, a multiply-add
// counting as two; 0 where it has no such instruction.
double measure_peak(PeakKind kind, int64_t threads, double seconds);

// Bytes read and written per second, all threads together, with a working set of so many bytes for
// each thread. Throws std::bad_alloc where the memory cannot be had.
double measure_stream(StreamKind kind, int64_t bytes, Pages pages, bool streaming, int64_t threads,
                      double seconds);

}  // namespace fastnn
