// The gradient of the pre-activation, dz = dy act'(z), and the bias gradient, its column sums.
#pragma once
#include "cuda/column_sums.cuh"

namespace fastnn::cuda {

template <class T>
__global__ void __launch_bounds__(kSlopeThreads)
    slope_kernel(LinearBwdParams p, T* dz, float* partial, int64_t column_blocks) {
  FASTNN_DYN_SHARED(float, sums);
  const SlopeTile tile(p.M, column_blocks);
  const int64_t n = tile.column;
  float total[8] = {};
  auto read_gradient = [&](int64_t m, float (&x)[8]) {
    const T* const row = static_cast<const T*>(p.dy.data) + m * p.dy.row_stride;
    if (p.dy.col_stride == 1) {
      load_chunk(row, n, p.N, x);
    } else {  // an expanded gradient has stride 0
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[i] = n + i < p.N ? to_float(load_element(row + (n + i) * p.dy.col_stride)) : 0.f;
    }
  };
  with_linear_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    tile.each_row([&](int64_t m) {
      float x[8], s[8];
      read_gradient(m, x);
      if constexpr (kActivation != Activation::kNone) {
        load_chunk(static_cast<const T*>(p.slope) + m * p.N, n, p.N, s);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = activate_bwd<kActivation, T>(x[i], s[i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += x[i];
      if (dz != nullptr) store_chunk(dz + m * p.N, n, p.N, x);
    });
  });
  if (partial != nullptr) tile.keep(total, sums, partial, p.N);
}

}  // namespace fastnn::cuda
