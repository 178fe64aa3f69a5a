// Activations of a sum with a bias, and products with an activation (GLU), forward. Memory is what
// they take: a thread has one chunk of a row, 16 bytes of every operand.
#include "cuda/activation_chunks.cuh"

namespace fastnn::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kChunkThreads)
    activation_fwd_kernel(ActivationParams p, int64_t chunks) {
  constexpr int N = kChunk<T>;
  with_activation(p.activation, [&](auto tag) {
    each_chunk<T>(p.rows, p.columns, chunks, static_cast<T*>(p.y), p.columns,
                  [&](int64_t r, int64_t at) {
                    float x[N], other[N];
                    load_chunk(row_of<T>(p.x, r, p.x_row_stride), at, p.columns, x);
                    if (p.bias != nullptr) {
                      load_bias<T>(p.bias, p.bias_dtype, at, p.columns, other);
#pragma unroll
                      for (int i = 0; i < N; ++i) x[i] += other[i];
                    }
#pragma unroll
                    for (int i = 0; i < N; ++i) x[i] = activate<decltype(tag)::value, T>(x[i]);
                    if (p.factor != nullptr) {
                      load_chunk(row_of<T>(p.factor, r, p.factor_row_stride), at, p.columns, other);
#pragma unroll
                      for (int i = 0; i < N; ++i) x[i] *= other[i];
                    }
                    store_chunk(static_cast<T*>(p.y) + r * p.columns, at, p.columns, x);
                  });
  });
}

}  // namespace
}  // namespace fastnn::cuda

int64_t fastnn_cuda_activation_fwd_workspace(const fastnn::ActivationParams*) { return 0; }

int fastnn_cuda_activation_fwd(const fastnn::ActivationParams* given, void*, void* stream) {
  using namespace fastnn;
  ActivationParams p = *given;
  if (p.rows == 0 || p.columns == 0) return 0;
  if (p.bias == nullptr && p.x_row_stride == p.columns &&
      (p.factor == nullptr || p.factor_row_stride == p.columns)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  return with_type(p.dtype, [&](auto t) -> int {
    using T = decltype(t);
    return cuda::launch_chunks<T>(cuda::activation_fwd_kernel<T>, p, p.y, p.columns, stream);
  });
}
