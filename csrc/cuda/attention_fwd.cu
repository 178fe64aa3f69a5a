// Attention forward on CUDA devices: which kernel runs.
#include "cuda/attention_fwd.cuh"

#include "cuda/attention.h"
#include "cuda/attention_f32.h"

namespace fastnn::cuda {
namespace {

template <class T, int kFeatures>
cudaError_t run(const AttentionFwdParams& f, void* stream) {
  const bool general = !is_plain(f.a, kFeatures);
  const auto kernel = general ? attention_fwd_kernel<T, kFeatures, true>
                              : attention_fwd_kernel<T, kFeatures, false>;
  const int queries = attention_fwd_shape(kFeatures, general).queries;
  return launch(kernel, f.a.B * f.a.H * div_up(f.a.S_q, queries), kAttentionThreads,
                attention_fwd_shared(kFeatures, general), stream, f);
}
template <class T>
cudaError_t run_half(const AttentionFwdParams& f, void* stream) {
  switch (attention_features(f.a.D, f.a.D_v)) {
    case 64:
      return run<T, 64>(f, stream);
    case 128:
      return run<T, 128>(f, stream);
    default:
      return run<T, 256>(f, stream);
  }
}

}  // namespace
}  // namespace fastnn::cuda

int64_t fastnn_cuda_attention_fwd_workspace(const fastnn::AttentionFwdParams*) { return 0; }

int fastnn_cuda_attention_fwd(const fastnn::AttentionFwdParams* p, void*, void* stream) {
  using namespace fastnn;
  if (const int error = cuda::check(p->a)) return error;
  AttentionFwdParams f = *p;
  f.a = cuda::normal_window(f.a);
  switch (f.a.dtype) {
    case DType::kBFloat16:
      return cuda::run_half<BFloat16>(f, stream);
    case DType::kFloat16:
      return cuda::run_half<Half>(f, stream);
    default:
      return cuda::attention_fwd_f32(f, stream);
  }
}
