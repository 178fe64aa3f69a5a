// Walking along a row: what the row operations share.
#pragma once
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

template <class T>
FASTNN_INLINE Vec load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load_first(p, count, 0.f);
}

// Sum over a row of f(i, count), the terms of elements [i, i + count) in the first lanes. Four
// chains hide the latency; each block starts from zero, so that rounding errors grow with the
// block's length and not with the row's.
template <class F>
FASTNN_INLINE float row_sum(int64_t n, F f) {
  constexpr int64_t kBlock = 64 * kLanes;
  Vec total = zero();
  int64_t i = 0;
  while (i + 4 * kLanes <= n) {
    const int64_t stop = i + kBlock < n ? i + kBlock : n;
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

template <class T>
FASTNN_INLINE void store_some(T* p, Vec v, int count) {
  if (count == kLanes) {
    store(p, v);
  } else {
    store_first(p, v, count);
  }
}

}  // namespace
}  // namespace fastnn
