// What linear + activation needs beside the matrix product (gemm/gemm.h): the activation's slope in
// backward, the bias gradient, and conversions of vectors.
#pragma once
#include "cpu/simd/activation.h"

namespace fastnn {
namespace {

// Element columns [n, n + count) of one row as float32; columns may be apart (an expanded gradient
// has stride 0).
template <class T>
FASTNN_INLINE Vec load_strided(const T* row, int64_t n, int count, int64_t stride) {
  if (stride == 1) return load_some(row + n, count);
  Vec v = zero();
  for (int i = 0; i < count; ++i) v[i] = to_float(row[(n + i) * stride]);
  return v;
}

// Column by column of vectors, so that the sums stay in registers over the rows of a chunk.
template <Activation A, class T>
void linear_slope_typed(const LinearBwdParams& p, int64_t begin, int64_t end, T* dz, float* sums) {
  constexpr int kWide = 4;
  const T* const dy = static_cast<const T*>(p.dy.data);
  const T* const slope = static_cast<const T*>(p.slope);
  for (int64_t n0 = 0; n0 < p.N; n0 += kWide * kLanes) {
    Vec total[kWide] = {zero(), zero(), zero(), zero()};
    for (int64_t m = begin; m < end; ++m) {
      FASTNN_UNROLL for (int v = 0; v < kWide; ++v) {
        const int64_t n = n0 + v * kLanes;
        if (n >= p.N) continue;
        const int count = p.N - n < kLanes ? (int)(p.N - n) : kLanes;
        Vec g = load_strided(dy + m * p.dy.row_stride, n, count, p.dy.col_stride);
        if constexpr (A != Activation::kNone)
          g = activate_bwd<A>(g, load_strided(slope + m * p.N, n, count, 1));
        total[v] += g;
        if (dz != nullptr) {
          if (count == kLanes) {
            store(dz + m * p.N + n, g);
          } else {
            store_first(dz + m * p.N + n, g, count);
          }
        }
      }
    }
    if (sums == nullptr) continue;
    for (int v = 0; v < kWide; ++v) {
      const int64_t n = n0 + v * kLanes;
      if (n < p.N) store_first(sums + n, total[v], p.N - n < kLanes ? (int)(p.N - n) : kLanes);
    }
  }
}

void linear_slope(const LinearBwdParams& p, int64_t begin, int64_t end, void* dz, float* sums) {
  with_type(p.dy.dtype, [&](auto type) {
    using T = decltype(type);
    with_activation(p.activation, [&](auto tag) {
      linear_slope_typed<decltype(tag)::value, T>(p, begin, end, static_cast<T*>(dz), sums);
    });
  });
}

void to_float32(const void* x, int64_t stride, DType dtype, int64_t n, float* y) {
  with_type(dtype, [&](auto type) {
    const auto* const from = static_cast<const decltype(type)*>(x);
    int64_t i = 0;
    for (; stride == 1 && i + kLanes <= n; i += kLanes) store(y + i, load(from + i));
    for (; i < n; ++i) y[i] = to_float(from[i * stride]);
  });
}

void from_float32(const float* x, int64_t n, DType dtype, void* y) {
  with_type(dtype, [&](auto type) {
    auto* const to = static_cast<decltype(type)*>(y);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + i));
    if (i < n) store_first(to + i, load_first(x + i, (int)(n - i), 0.f), (int)(n - i));
  });
}

}  // namespace
}  // namespace fastnn
