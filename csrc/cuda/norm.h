// Layer norm and RMS norm on CUDA devices: on the current device, in `stream`. Returns a
// cudaError_t. Weight and bias are contiguous: their strides are not looked at.
#pragma once
#include "params/norm.h"

extern "C" {
int64_t fastnn_cuda_norm_fwd_workspace(const fastnn::NormParams* p);  // bytes
int fastnn_cuda_norm_fwd(const fastnn::NormParams* p, void* workspace, void* stream);
int64_t fastnn_cuda_norm_bwd_workspace(const fastnn::NormBwdParams* p);
int fastnn_cuda_norm_bwd(const fastnn::NormBwdParams* p, void* workspace, void* stream);
}
