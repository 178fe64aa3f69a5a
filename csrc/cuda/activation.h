// Activations and products with them on CUDA devices: on the current device, in `stream`. Returns a
// cudaError_t. The bias is contiguous: its stride is not looked at.
#pragma once
#include "params/activation.h"

extern "C" {
int64_t fastnn_cuda_activation_fwd_workspace(const fastnn::ActivationParams* p);  // bytes
int fastnn_cuda_activation_fwd(const fastnn::ActivationParams* p, void* workspace, void* stream);
int64_t fastnn_cuda_activation_bwd_workspace(const fastnn::ActivationBwdParams* p);
int fastnn_cuda_activation_bwd(const fastnn::ActivationBwdParams* p, void* workspace, void* stream);
}
