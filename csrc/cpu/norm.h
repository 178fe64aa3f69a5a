// Layer norm and RMS norm over the thread pool; parameters in params/norm.h, the algorithm in
// cpu/kernels/norm.h.
#pragma once
#include "params/norm.h"

namespace fastnn {

void norm_fwd(const NormParams& p);
void norm_bwd(const NormBwdParams& p);

}  // namespace fastnn
