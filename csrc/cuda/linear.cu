// Linear + activation on CUDA devices: which product kernel runs, and in what order.
#include "cuda/linear.h"

#include "cuda/gemm.cuh"
#include "cuda/gemm_f32.cuh"
#include "cuda/linear_slope.cuh"

namespace fastnn::cuda {
namespace {

// An operand of a product: element (line, k) at data[line * line_stride + k * step].
struct Operand {
  const void* data;
  int64_t line, step;
  Lies lies(int64_t lines, int64_t depth) const {
    if (!is_aligned(data)) return Lies::kAnyhow;
    if ((step == 1 || depth <= 1) && (line % 8 == 0 || lines <= 1)) return Lies::kAlongDepth;
    if ((line == 1 || lines <= 1) && (step % 8 == 0 || depth <= 1)) return Lies::kAcross;
    return Lies::kAnyhow;
  }
  static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
};

struct Product {
  int64_t M, N, K;
  Operand a, b;
  DType dtype;
  const void* bias;
  int64_t bias_stride;
  Activation activation;
  void *y, *pre;

  // Combinations of layouts that have kernels: forward, its gradients by x and by w.
  bool aligned() const {
    const Lies la = a.lies(M, K), lb = b.lies(N, K);
    if (la == Lies::kAnyhow || lb == Lies::kAnyhow) return false;
    return la == Lies::kAlongDepth || lb == Lies::kAcross;
  }
  GemmPlan plan(const Device& d) const {
    return plan_gemm(M, N, K, dtype == DType::kFloat32, aligned(), d);
  }
};

using Kernel = void (*)(GemmArgs);

// Tiles as types: a kernel's name must not hang on an object of this file.
struct Large {
  static constexpr TileShape kShape = kLargeTile;
};
struct Medium {
  static constexpr TileShape kShape = kMediumTile;
};
struct Small {
  static constexpr TileShape kShape = kSmallTile;
};

template <class T, class Config>
Kernel aligned_kernel(Lies a, Lies b) {
  if (a == Lies::kAcross) return gemm_kernel<T, Config, Lies::kAcross, Lies::kAcross>;
  if (b == Lies::kAcross) return gemm_kernel<T, Config, Lies::kAlongDepth, Lies::kAcross>;
  return gemm_kernel<T, Config, Lies::kAlongDepth, Lies::kAlongDepth>;
}
template <class T>
Kernel half_kernel(const GemmPlan& plan, Lies a, Lies b) {
  switch (plan.tile) {
    case GemmTile::kLarge:
      return aligned_kernel<T, Large>(a, b);
    case GemmTile::kMedium:
      return aligned_kernel<T, Medium>(a, b);
    case GemmTile::kSmall:
      return aligned_kernel<T, Small>(a, b);
    default:
      return gemm_kernel<T, Small, Lies::kAnyhow, Lies::kAnyhow>;
  }
}

template <class T>
cudaError_t run(const Product& p, const Device& d, bool tf32, float* partial, void* stream) {
  if (p.M == 0 || p.N == 0) return cudaSuccess;
  const GemmPlan plan = p.plan(d);
  GemmArgs g = {p.M,      p.N,      p.K,      p.a.data,         p.a.line,      p.a.step,
                p.b.data, p.b.line, p.b.step, p.bias,           p.bias_stride, p.activation,
                p.y,      p.pre,    nullptr,  plan.split_depth, plan.tiles_m,  plan.tiles_n};
  if (plan.splits > 1) g.partial = partial;
  Kernel kernel;
  if constexpr (sizeof(T) == 4) {
    if (plan.tile == GemmTile::kFloatLarge) {
      kernel = tf32 ? gemm_f32_kernel<128, true> : gemm_f32_kernel<128, false>;
    } else {
      kernel = tf32 ? gemm_f32_kernel<64, true> : gemm_f32_kernel<64, false>;
    }
  } else {
    kernel = half_kernel<T>(plan, p.a.lies(p.M, p.K), p.b.lies(p.N, p.K));
  }
  const cudaError_t error = launch(kernel, plan.blocks(), plan.threads, plan.shared, stream, g);
  if (error != cudaSuccess || plan.splits == 1) return error;
  return launch(reduce_splits<T>, div_up(p.M * div_up(p.N, 8), 256), 256, 0, stream, g,
                plan.splits);
}

Product forward_product(const LinearParams& p) {
  return {p.M,
          p.N,
          p.K,
          {p.x.data, p.x.row_stride, p.x.col_stride},
          {p.w.data, p.w.row_stride, p.w.col_stride},
          p.x.dtype,
          p.bias,
          p.bias_stride,
          p.activation,
          p.y,
          p.pre};
}

constexpr int64_t round256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// What backward runs and where its parts of the workspace begin.
struct Backward {
  const LinearBwdParams& p;
  Device device;
  bool own_dz;  // dz is not dy itself
  int64_t chunks, sums_at, partial_at, bytes;

  Backward(const LinearBwdParams& params, const Device& d) : p(params), device(d) {
    const bool products = p.dx != nullptr || p.dw != nullptr;
    own_dz = products && (p.activation != Activation::kNone || p.dy.col_stride != 1);
    chunks = div_up(p.M, kSlopeRows) > 1 ? div_up(p.M, kSlopeRows) : 1;
    sums_at = own_dz ? round256(p.M * p.N * element_bytes(p.dy.dtype)) : 0;
    partial_at = sums_at + (p.db != nullptr ? round256(chunks * p.N * 4) : 0);
    int64_t partial = 0;
    // A null dz is as good as an aligned one here: the workspace is aligned.
    const Product products_of[2] = {by_input(nullptr), by_weight(nullptr)};
    for (const Product& product : products_of) {
      if (product.y == nullptr || product.M == 0 || product.N == 0) continue;
      const int64_t need = gemm_workspace(product.plan(device), product.M, product.N);
      partial = need > partial ? need : partial;
    }
    bytes = partial_at + partial;
  }
  Matrix gradient(void* workspace) const {
    return own_dz ? Matrix{workspace, p.N, 1, p.dy.dtype} : p.dy;
  }
  Product by_input(void* workspace) const {  // dx (M x K) = dz w over N
    const Matrix z = gradient(workspace);
    return {p.M,
            p.K,
            p.N,
            {z.data, z.row_stride, z.col_stride},
            {p.w.data, p.w.col_stride, p.w.row_stride},
            p.dy.dtype,
            nullptr,
            0,
            Activation::kNone,
            p.dx,
            nullptr};
  }
  Product by_weight(void* workspace) const {  // dw (N x K) = dz^T x over M
    const Matrix z = gradient(workspace);
    return {p.N,
            p.K,
            p.M,
            {z.data, z.col_stride, z.row_stride},
            {p.x.data, p.x.col_stride, p.x.row_stride},
            p.dy.dtype,
            nullptr,
            0,
            Activation::kNone,
            p.dw,
            nullptr};
  }
};

template <class T>
cudaError_t backward(const LinearBwdParams& p, const Device& d, bool tf32, char* workspace,
                     void* stream) {
  const Backward b(p, d);
  cudaError_t error = cudaSuccess;
  if ((b.own_dz || p.db != nullptr) && p.N > 0) {
    float* const sums = p.db != nullptr ? reinterpret_cast<float*>(workspace + b.sums_at) : nullptr;
    T* const dz = b.own_dz ? reinterpret_cast<T*>(workspace) : nullptr;
    const int64_t column_blocks = div_up(p.N, kSlopeColumns);
    error = launch(slope_kernel<T>, b.chunks * column_blocks, kSlopeThreads, kSlopeShared, stream,
                   p, dz, sums, column_blocks);
    if (error == cudaSuccess && p.db != nullptr) {
      error = sum_partial(sums, b.chunks, p.N, static_cast<T*>(p.db), stream);
    }
  }
  float* const partial = reinterpret_cast<float*>(workspace + b.partial_at);
  if (error == cudaSuccess && p.dx != nullptr)
    error = run<T>(b.by_input(workspace), d, tf32, partial, stream);
  if (error == cudaSuccess && p.dw != nullptr)
    error = run<T>(b.by_weight(workspace), d, tf32, partial, stream);
  return error;
}

}  // namespace
}  // namespace fastnn::cuda

using fastnn::BFloat16;
using fastnn::DType;
using fastnn::Half;

int64_t fastnn_cuda_linear_fwd_workspace(const fastnn::LinearParams* p) {
  fastnn::cuda::Device d = {};
  if (p->M == 0 || p->N == 0 || fastnn::cuda::current_device(d) != cudaSuccess) return 0;
  return gemm_workspace(fastnn::cuda::forward_product(*p).plan(d), p->M, p->N);
}

int fastnn_cuda_linear_fwd(const fastnn::LinearParams* p, int allow_tf32, void* workspace,
                           void* stream) {
  using namespace fastnn::cuda;
  Device d = {};
  cudaError_t error = current_device(d);
  if (error != cudaSuccess) return error;
  const Product product = forward_product(*p);
  float* const partial = static_cast<float*>(workspace);
  switch (p->x.dtype) {
    case DType::kBFloat16:
      return run<BFloat16>(product, d, allow_tf32 != 0, partial, stream);
    case DType::kFloat16:
      return run<Half>(product, d, allow_tf32 != 0, partial, stream);
    default:
      return run<float>(product, d, allow_tf32 != 0, partial, stream);
  }
}

int64_t fastnn_cuda_linear_bwd_workspace(const fastnn::LinearBwdParams* p) {
  fastnn::cuda::Device d = {};
  if (fastnn::cuda::current_device(d) != cudaSuccess) return 0;
  return fastnn::cuda::Backward(*p, d).bytes;
}

int fastnn_cuda_linear_bwd(const fastnn::LinearBwdParams* p, int allow_tf32, void* workspace,
                           void* stream) {
  using namespace fastnn::cuda;
  Device d = {};
  cudaError_t error = current_device(d);
  if (error != cudaSuccess) return error;
  char* const at = static_cast<char*>(workspace);
  switch (p->dy.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(*p, d, allow_tf32 != 0, at, stream);
    case DType::kFloat16:
      return backward<Half>(*p, d, allow_tf32 != 0, at, stream);
    default:
      return backward<float>(*p, d, allow_tf32 != 0, at, stream);
  }
}
