// Attention backward on CUDA devices: which kernels run.
#include "cuda/attention_bwd.cuh"

#include "cuda/attention.h"
#include "cuda/attention_f32.h"

namespace fastnn::cuda {
namespace {

template <class T, int kFeatures>
cudaError_t run(const AttentionBwdParams& f, float* delta, void* stream) {
  const AttentionParams& p = f.a;
  const bool general = !is_plain(p, kFeatures) || !is_aligned(f.d_out);
  const auto dkv = general ? attention_dkv_kernel<T, kFeatures, true>
                           : attention_dkv_kernel<T, kFeatures, false>;
  const auto dq =
      general ? attention_dq_kernel<T, kFeatures, true> : attention_dq_kernel<T, kFeatures, false>;
  constexpr int kParts = kFeatures > 128 ? kFeatures / 128 : 1;
  const cudaError_t error = launch(
      dkv, p.B * p.H_kv * div_up(p.S_k, attention_dkv_shape(kFeatures, general).keys) * kParts,
      kAttentionThreads, attention_dkv_shared(kFeatures, general), stream, f,
      static_cast<const float*>(delta));
  if (error != cudaSuccess) return error;
  return launch(dq, p.B * p.H * div_up(p.S_q, attention_dq_shape(kFeatures, general).queries),
                kAttentionThreads, attention_dq_shared(kFeatures, general), stream, f,
                static_cast<const float*>(delta));
}
template <class T>
cudaError_t run_delta(const AttentionBwdParams& f, float* delta, void* stream) {
  return launch(attention_delta_kernel<T>, div_up(f.a.B * f.a.H * f.a.S_q, 8), 256, 0, stream, f,
                delta);
}
template <class T>
cudaError_t run_half(const AttentionBwdParams& f, float* delta, void* stream) {
  const cudaError_t error = run_delta<T>(f, delta, stream);
  if (error != cudaSuccess) return error;
  switch (attention_features(f.a.D, f.a.D_v)) {
    case 64:
      return run<T, 64>(f, delta, stream);
    case 128:
      return run<T, 128>(f, delta, stream);
    default:
      return run<T, 256>(f, delta, stream);
  }
}

}  // namespace
}  // namespace fastnn::cuda

int64_t fastnn_cuda_attention_bwd_workspace(const fastnn::AttentionBwdParams* p) {
  return p->a.B * p->a.H * p->a.S_q * 4;  // delta
}

int fastnn_cuda_attention_bwd(const fastnn::AttentionBwdParams* p, void* workspace, void* stream) {
  using namespace fastnn;
  if (const int error = cuda::check(p->a)) return error;
  AttentionBwdParams f = *p;
  f.a = cuda::normal_window(f.a);
  float* const delta = static_cast<float*>(workspace);
  switch (f.a.dtype) {
    case DType::kBFloat16:
      return cuda::run_half<BFloat16>(f, delta, stream);
    case DType::kFloat16:
      return cuda::run_half<Half>(f, delta, stream);
    default:
      if (const int error = cuda::run_delta<float>(f, delta, stream)) return error;
      return cuda::attention_bwd_f32(f, delta, stream);
  }
}
