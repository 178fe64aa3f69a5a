// Softmax and log-softmax over the thread pool; parameters in params/softmax.h, the algorithm in
// cpu/kernels/softmax.h.
#pragma once
#include "params/softmax.h"

namespace fastnn {

void softmax_fwd(const SoftmaxParams& p);
void softmax_bwd(const SoftmaxBwdParams& p, const char* name = "softmax_bwd");

}  // namespace fastnn
