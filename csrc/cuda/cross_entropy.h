// Cross-entropy on CUDA devices: on the current device, in `stream`. Returns a cudaError_t.
//
// Everything lies on the device and nothing waits for it: a class index that is neither in range
// nor ignore_index makes its row's loss and gradient NaN.
#pragma once
#include "params/cross_entropy.h"

namespace fastnn {

enum class LossReduction : int32_t { kNone, kMean, kSum };  // torch's codes

// loss.weight and loss.weight_sum are not looked at.
struct CudaLossFwdParams {
  CrossEntropyParams loss;
  const void* weight;  // classes of x's type, contiguous, or null
  LossReduction reduction;
  void* result;     // of x's type: one for each row, or one
  float* stats;     // rows x 2: maximum, log-sum
  float* divisors;  // what the mean divides the loss and the z term by
};
struct CudaLossBwdParams {
  CrossEntropyParams loss;
  const void* weight;
  const void* grad;     // of x's type
  int64_t grad_stride;  // 0: one for all rows
  const float* stats;
  const float* divisors;
  void* dx;  // contiguous
};

}  // namespace fastnn

extern "C" {
int64_t fastnn_cuda_cross_entropy_fwd_workspace(const fastnn::CudaLossFwdParams* p);  // bytes
int fastnn_cuda_cross_entropy_fwd(const fastnn::CudaLossFwdParams* p, void* workspace,
                                  void* stream);
int64_t fastnn_cuda_cross_entropy_bwd_workspace(const fastnn::CudaLossBwdParams* p);
int fastnn_cuda_cross_entropy_bwd(const fastnn::CudaLossBwdParams* p, void* workspace,
                                  void* stream);
}
