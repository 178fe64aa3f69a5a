// The gradient of the pre-activation, dz = dy act'(z), and the bias gradient, its column sums.
#pragma once
#include "cuda/gemm_epilogue.cuh"

namespace fastnn::cuda {

// A block takes kSlopeRows rows and kSlopeColumns columns: 8 columns a thread, 8 rows at a time.
// Sums of its rows go to partial[block's row of blocks][N]; they are added in order by sum_partial.
template <class T>
__global__ void __launch_bounds__(kSlopeThreads)
    slope_kernel(LinearBwdParams p, T* dz, float* partial, int64_t column_blocks) {
  constexpr int kAcross = kSlopeColumns / 8, kDown = kSlopeThreads / kAcross;
  FASTNN_DYN_SHARED(float, sums);  // [kDown][kSlopeColumns]
  const int64_t chunk = blockIdx.x / column_blocks;
  const int tx = threadIdx.x % kAcross, ty = threadIdx.x / kAcross;
  const int64_t n = blockIdx.x % column_blocks * kSlopeColumns + tx * 8;
  const int64_t first = chunk * kSlopeRows;
  const int64_t last = first + kSlopeRows < p.M ? first + kSlopeRows : p.M;
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
  with_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    for (int64_t m = first + ty; m < last; m += kDown) {
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
    }
  });
  if (partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[ty * kSlopeColumns + tx * 8 + i] = total[i];
  __syncthreads();
  const int64_t column = blockIdx.x % column_blocks * kSlopeColumns + threadIdx.x;
  if (column >= p.N) return;
  float sum = 0.f;
#pragma unroll
  for (int r = 0; r < kDown; ++r) sum += sums[r * kSlopeColumns + threadIdx.x];
  store_global(partial + chunk * p.N + column, sum);
}
static_assert(kSlopeColumns == kSlopeThreads);

// db = sums of the chunks. 32 columns a block; eight threads per column add every eighth chunk, and
// their sums are added in order.
template <class T>
__global__ void __launch_bounds__(256)
    sum_partial_kernel(const float* partial, int64_t chunks, int64_t N, T* db) {
  FASTNN_DYN_SHARED(float, sums);  // [8][32]
  const int64_t n = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  float sum = 0.f;
  if (n < N) {
    for (int64_t c = threadIdx.x / 32; c < chunks; c += 8) sum += load_global(partial + c * N + n);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || n >= N) return;
  float total = 0.f;
#pragma unroll
  for (int r = 0; r < 8; ++r) total += sums[r * 32 + threadIdx.x];
  store_element(db + n, total);
}

}  // namespace fastnn::cuda
