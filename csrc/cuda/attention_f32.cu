// Attention of float32 on CUDA devices: which kernels run.
#include "cuda/attention_f32.cuh"

#include "cuda/attention_f32.h"

namespace fastnn::cuda {
namespace {

template <int kFeatures>
cudaError_t forward(const AttentionFwdParams& f, void* stream) {
  return launch(attention_fwd_f32_kernel<kFeatures>,
                f.a.B * f.a.H * div_up(f.a.S_q, attention_f32_rows(kFeatures, true)), kFloatThreads,
                attention_f32_shared(kFeatures, true), stream, f);
}
template <int kFeatures>
cudaError_t backward(const AttentionBwdParams& f, const float* delta, void* stream) {
  const int rows = attention_f32_rows(kFeatures, false);
  const int shared = attention_f32_shared(kFeatures, false);
  const cudaError_t error =
      launch(attention_dkv_f32_kernel<kFeatures>, f.a.B * f.a.H_kv * div_up(f.a.S_k, rows),
             kFloatThreads, shared, stream, f, delta);
  if (error != cudaSuccess) return error;
  return launch(attention_dq_f32_kernel<kFeatures>, f.a.B * f.a.H * div_up(f.a.S_q, rows),
                kFloatThreads, shared, stream, f, delta);
}

}  // namespace

int attention_fwd_f32(const AttentionFwdParams& f, void* stream) {
  switch (attention_features(f.a.D, f.a.D_v)) {
    case 64:
      return forward<64>(f, stream);
    case 128:
      return forward<128>(f, stream);
    default:
      return forward<256>(f, stream);
  }
}

int attention_bwd_f32(const AttentionBwdParams& f, float* delta, void* stream) {
  switch (attention_features(f.a.D, f.a.D_v)) {
    case 64:
      return backward<64>(f, delta, stream);
    case 128:
      return backward<128>(f, delta, stream);
    default:
      return backward<256>(f, delta, stream);
  }
}

}  // namespace fastnn::cuda
