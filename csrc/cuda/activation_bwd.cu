// Activations of a sum with a bias, and products with an activation (GLU), backward: dx = dy
// act'(x + bias) [factor], d_factor = dy act(x), and the bias gradient, the sums of dx over rows
// before it is rounded.
#include "cuda/activation_chunks.cuh"
#include "cuda/column_sums.cuh"

namespace fastnn::cuda {
namespace {

// One thread's chunk; without a factor that is all.
template <class T, Activation A, int N>
__device__ __forceinline__ void slopes(const ActivationBwdParams& p, int64_t r, int64_t at,
                                       float (&dy)[N]) {
  float x[N], bias[N];
  load_chunk(row_of<T>(p.dy, r, p.dy_row_stride), at, p.columns, dy);
  load_chunk(row_of<T>(p.x, r, p.x_row_stride), at, p.columns, x);
  if (p.bias != nullptr) {
    load_bias<T>(p.bias, p.bias_dtype, at, p.columns, bias);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += bias[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) dy[i] = slope_times<A, T>(dy[i], x[i]);
  if (p.dx != nullptr) {
    store_chunk(static_cast<T*>(p.dx) + r * p.d_row_stride, at, p.columns, dy);
  }
}

template <class T>
__global__ void __launch_bounds__(kChunkThreads)
    activation_bwd_kernel(ActivationBwdParams p, int64_t chunks) {
  constexpr int N = kChunk<T>;
  with_activation(p.activation, [&](auto tag) {
    each_chunk<T>(p.rows, p.columns, chunks, static_cast<const T*>(p.dx), p.d_row_stride,
                  [&](int64_t r, int64_t at) {
                    float dy[N];
                    slopes<T, decltype(tag)::value>(p, r, at, dy);
                  });
  });
}

template <class T>
__global__ void __launch_bounds__(kChunkThreads)
    activation_product_bwd(ActivationBwdParams p, int64_t chunks) {
  constexpr int N = kChunk<T>;
  const T* const like = static_cast<const T*>(p.dx != nullptr ? p.dx : p.d_factor);
  with_activation(p.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    each_chunk<T>(p.rows, p.columns, chunks, like, p.d_row_stride, [&](int64_t r, int64_t at) {
      float dy[N], x[N], d[N];
      load_chunk(row_of<T>(p.dy, r, p.dy_row_stride), at, p.columns, dy);
      load_chunk(row_of<T>(p.x, r, p.x_row_stride), at, p.columns, x);
      if (p.dx != nullptr) {
        load_chunk(row_of<T>(p.factor, r, p.factor_row_stride), at, p.columns, d);
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = slope_times<A, T>(dy[i] * d[i], x[i]);
        store_chunk(static_cast<T*>(p.dx) + r * p.d_row_stride, at, p.columns, d);
      }
      if (p.d_factor != nullptr) {
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] = dy[i] * activate<A, T>(x[i]);
        store_chunk(static_cast<T*>(p.d_factor) + r * p.d_row_stride, at, p.columns, d);
      }
    });
  });
}

// With the sums of a tile's rows.
template <class T>
__global__ void __launch_bounds__(kSlopeThreads)
    activation_bias_bwd(ActivationBwdParams p, float* partial, int64_t column_blocks) {
  FASTNN_DYN_SHARED(float, sums);
  const SlopeTile tile(p.rows, column_blocks);
  float total[8] = {};
  with_activation(p.activation, [&](auto tag) {
    tile.each_row([&](int64_t r) {
      float dx[8];
      slopes<T, decltype(tag)::value>(p, r, tile.column, dx);
#pragma unroll
      for (int i = 0; i < 8; ++i) total[i] += dx[i];
    });
  });
  tile.keep(total, sums, partial, p.columns);
}

template <class T>
int run(const ActivationBwdParams& p, float* partial, void* stream) {
  if (p.db != nullptr) {
    const int64_t chunks = div_up(p.rows, kSlopeRows), across = div_up(p.columns, kSlopeColumns);
    const cudaError_t error = launch(activation_bias_bwd<T>, chunks * across, kSlopeThreads,
                                     kSlopeShared, stream, p, partial, across);
    if (error != cudaSuccess) return error;
    return p.bias_dtype == DType::kFloat32
               ? sum_partial(partial, chunks, p.columns, static_cast<float*>(p.db), stream)
               : sum_partial(partial, chunks, p.columns, static_cast<T*>(p.db), stream);
  }
  const void* const like = p.dx != nullptr ? p.dx : p.d_factor;
  if (like == nullptr) return 0;
  const auto kernel = p.factor == nullptr ? activation_bwd_kernel<T> : activation_product_bwd<T>;
  return launch_chunks<T>(kernel, p, like, p.d_row_stride, stream);
}

}  // namespace
}  // namespace fastnn::cuda

int64_t fastnn_cuda_activation_bwd_workspace(const fastnn::ActivationBwdParams* p) {
  using namespace fastnn::cuda;
  return p->db != nullptr ? div_up(p->rows, kSlopeRows) * p->columns * 4 : 0;
}

int fastnn_cuda_activation_bwd(const fastnn::ActivationBwdParams* given, void* workspace,
                               void* stream) {
  using namespace fastnn;
  ActivationBwdParams p = *given;
  const int64_t n = p.columns;
  if (n == 0 || (p.rows == 0 && p.db == nullptr)) return 0;
  if (p.bias == nullptr && p.dy_row_stride == n && p.x_row_stride == n && p.d_row_stride == n &&
      (p.factor == nullptr || p.factor_row_stride == n)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  return with_type(p.dtype, [&](auto t) {
    return cuda::run<decltype(t)>(p, static_cast<float*>(workspace), stream);
  });
}
