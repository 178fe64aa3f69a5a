// The launchers of attention on CUDA devices: a C interface, no torch and no CUDA header.
#pragma once
#include <cstdint>

#include "params/attention.h"

extern "C" {

// Bytes of workspace, aligned to 256, that a call on the current device needs; 0: none.
int64_t fastnn_cuda_attention_fwd_workspace(const fastnn::AttentionFwdParams* p);
int64_t fastnn_cuda_attention_bwd_workspace(const fastnn::AttentionBwdParams* p);

// As cpu/attention.h on device memory, in the order of `stream` (a cudaStream_t) on the current
// device; the mask lies on the device too. Heads of up to 256 features. Returns a cudaError_t.
// Results do not depend on the order in which blocks run.
int fastnn_cuda_attention_fwd(const fastnn::AttentionFwdParams* p, void* workspace, void* stream);
int fastnn_cuda_attention_bwd(const fastnn::AttentionBwdParams* p, void* workspace, void* stream);
}
