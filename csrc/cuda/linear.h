// The launchers of linear on CUDA devices: a C interface, no torch and no CUDA header.
#pragma once
#include <cstdint>

#include "params/linear.h"

extern "C" {

// Bytes of workspace, aligned to 256, that a call on the current device needs; 0: none.
int64_t fastnn_cuda_linear_fwd_workspace(const fastnn::LinearParams* p);
int64_t fastnn_cuda_linear_bwd_workspace(const fastnn::LinearBwdParams* p);

// As cpu/linear.h on device memory, in the order of `stream` (a cudaStream_t) on the current
// device; packed weights are not taken. allow_tf32: float32 operands may be rounded to tf32 (10
// bits of mantissa) for the tensor cores; sums are float32 in any case. Returns a cudaError_t.
// Results do not depend on the order in which blocks run.
int fastnn_cuda_linear_fwd(const fastnn::LinearParams* p, int allow_tf32, void* workspace,
                           void* stream);
int fastnn_cuda_linear_bwd(const fastnn::LinearBwdParams* p, int allow_tf32, void* workspace,
                           void* stream);
}
