// Sums down the columns of a matrix whose rows are shared out among blocks: gradients of a bias.
// Partial sums are added in a fixed order: no atomics, equal bits in every run.
#pragma once
#include "cuda/gemm_epilogue.cuh"

namespace fastnn::cuda {

// A block takes kSlopeRows rows and kSlopeColumns columns: 8 columns a thread, 8 rows at a time.
constexpr int kSlopeAcross = kSlopeColumns / 8, kSlopeDown = kSlopeThreads / kSlopeAcross;
static_assert(kSlopeColumns == kSlopeThreads);
constexpr int kSlopeShared = kSlopeDown * kSlopeColumns * 4;

struct SlopeTile {
  int64_t chunk, first, last, column;  // rows [first, last); the thread's first column
  __device__ __forceinline__ SlopeTile(int64_t rows, int64_t column_blocks)
      : chunk(blockIdx.x / column_blocks),
        first(chunk * kSlopeRows),
        last(first + kSlopeRows < rows ? first + kSlopeRows : rows),
        column(blockIdx.x % column_blocks * kSlopeColumns + threadIdx.x % kSlopeAcross * 8) {}
  // f(row) for the thread's rows.
  template <class F>
  __device__ __forceinline__ void each_row(F f) const {
    for (int64_t m = first + threadIdx.x / kSlopeAcross; m < last; m += kSlopeDown) f(m);
  }
  // Adds up what the block's threads have of the tile's rows, to partial[chunk][columns]; `sums` is
  // kSlopeShared bytes of shared memory.
  __device__ __forceinline__ void keep(const float (&total)[8], float* sums, float* partial,
                                       int64_t columns) const {
    const int tx = threadIdx.x % kSlopeAcross, ty = threadIdx.x / kSlopeAcross;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[ty * kSlopeColumns + tx * 8 + i] = total[i];
    __syncthreads();
    const int64_t mine = column - tx * 8 + threadIdx.x;
    if (mine >= columns) return;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < kSlopeDown; ++r) sum += sums[r * kSlopeColumns + threadIdx.x];
    store_global(partial + chunk * columns + mine, sum);
  }
};

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
template <class T>
cudaError_t sum_partial(const float* partial, int64_t chunks, int64_t N, T* db, void* stream) {
  return launch(sum_partial_kernel<T>, div_up(N, 32), 256, 256 * 4, stream, partial, chunks, N, db);
}

}  // namespace fastnn::cuda
