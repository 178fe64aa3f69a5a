// Attention of float32 (attention_f32.cu); checked and with a normal window. cudaError_t.
#pragma once
#include "params/attention.h"

namespace fastnn::cuda {

int attention_fwd_f32(const AttentionFwdParams& f, void* stream);
int attention_bwd_f32(const AttentionBwdParams& f, float* delta, void* stream);

}  // namespace fastnn::cuda
