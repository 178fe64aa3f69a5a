// Softmax on CUDA devices: on the current device, in `stream`. Returns a cudaError_t.
#pragma once
#include "params/softmax.h"

extern "C" {
int64_t fastnn_cuda_softmax_fwd_workspace(const fastnn::SoftmaxParams* p);  // bytes
int fastnn_cuda_softmax_fwd(const fastnn::SoftmaxParams* p, void* workspace, void* stream);
int64_t fastnn_cuda_softmax_bwd_workspace(const fastnn::SoftmaxBwdParams* p);
int fastnn_cuda_softmax_bwd(const fastnn::SoftmaxBwdParams* p, void* workspace, void* stream);
}
