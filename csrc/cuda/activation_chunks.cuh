// What forward and backward of the elementwise operations share: who has which chunk.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/activation.h"
#include "cuda/rows.cuh"

namespace fastnn::cuda {

template <class T>
__device__ __forceinline__ const T* row_of(const void* data, int64_t r, int64_t stride) {
  return static_cast<const T*>(data) + r * stride;
}

// f(row, first column) for the thread's chunks, of at most `chunks` of a row; those of `like`,
// whose rows are `stride` apart, lie on 16-byte boundaries.
template <class T, class F>
__device__ __forceinline__ void each_chunk(int64_t rows, int64_t columns, int64_t chunks,
                                           const T* like, int64_t stride, F f) {
  constexpr int N = kChunk<T>;
  const int64_t all = rows * chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kChunkThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kChunkThreads + threadIdx.x; i < all;
       i += step) {
    const int64_t r = i / chunks, k = i % chunks;
    const Span<N> span(like + r * stride, columns);
    if (k < span.count) f(r, span.begin(k));
  }
}

// The bias of a chunk, of type T or float32.
template <class T, int N>
__device__ __forceinline__ void load_bias(const void* bias, DType dtype, int64_t at, int64_t n,
                                          float (&v)[N]) {
  if (sizeof(T) == 2 && dtype != DType::kFloat32) {
    load_chunk<N, true>(static_cast<const T*>(bias), at, n, v);
  } else {
    load_chunk<N, true>(static_cast<const float*>(bias), at, n, v);
  }
}

// Launches kernel(p, chunks) with a thread for every chunk of rows like those of `like`.
template <class T, class Params>
cudaError_t launch_chunks(void (*kernel)(Params, int64_t), const Params& p, const void* like,
                          int64_t stride, void* stream) {
  const bool on = rows_on_boundaries(like, p.rows == 1 ? 0 : stride, p.dtype);
  const ChunkPlan plan = chunk_plan(p.rows, planned_columns(p.columns, kChunk<T>, on), kChunk<T>);
  return launch(kernel, plan.grid, kChunkThreads, 0, stream, p, plan.chunks);
}

}  // namespace fastnn::cuda
