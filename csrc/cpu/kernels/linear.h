// What linear + activation needs beside the matrix product (gemm/gemm.h): the activation's slope in
// backward, the bias gradient.
#pragma once
#include "cpu/simd/activation.h"
#include "cpu/simd/lanes.h"
#include "params/linear.h"

namespace fastnn {
namespace {

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

}  // namespace
}  // namespace fastnn
