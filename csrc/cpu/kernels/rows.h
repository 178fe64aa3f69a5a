// Walking along a row: what the row operations share.
#pragma once
#include "cpu/simd/lanes.h"
#include "cpu/simd/stream.h"

namespace fastnn {
namespace {

// Sum over a row of f(i, count), the terms of elements [i, i + count) in the first lanes. Four
// chains hide the latency; each block starts from zero, and long rows have 64 blocks, so that
// rounding errors grow with a block's length and the number of blocks and not with the row's
// length.
template <class F>
FASTNN_INLINE float row_sum(int64_t n, F f) {
  constexpr int64_t kLeast = 64 * kLanes, kStep = 4 * kLanes;
  const int64_t block = n <= 64 * kLeast ? kLeast : n / 64 / kStep * kStep;
  Vec total = zero();
  int64_t i = 0;
  while (i + 4 * kLanes <= n) {
    const int64_t stop = i + block < n ? i + block : n;
    Vec s[4] = {zero(), zero(), zero(), zero()};
    for (; i + 4 * kLanes <= stop; i += 4 * kLanes) {
      FASTNN_UNROLL for (int k = 0; k < 4; ++k) s[k] += f(i + k * kLanes, kLanes);
    }
    total += (s[0] + s[1]) + (s[2] + s[3]);
  }
  for (; i < n; i += kLanes) {
    const int count = n - i < kLanes ? (int)(n - i) : kLanes;
    total += keep_first(f(i, count), count);
  }
  return sum_lanes(total);
}

template <bool kStream, class T>
FASTNN_INLINE void put_some(T* p, Vec v, int count) {
  if (count == kLanes) {
    put<kStream>(p, v);
  } else {
    store_first(p, v, count);
  }
}

// Over a row, y[i ...] = f(i, count), the values of elements [i, i + count) in the first lanes.
template <bool kStream, class T, class F>
FASTNN_INLINE void row_map(T* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec a = f(i, kLanes), b = f(i + kLanes, kLanes);
    put<kStream>(y + i, a);
    put<kStream>(y + i + kLanes, b);
  }
  for (; i + kLanes <= n; i += kLanes) put<kStream>(y + i, f(i, kLanes));
  if (i < n) store_first(y + i, f(i, (int)(n - i)), (int)(n - i));
}

}  // namespace
}  // namespace fastnn
