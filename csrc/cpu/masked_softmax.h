// Softmax of scaled, masked rows over the thread pool; parameters in params/masked_softmax.h, the
// algorithm in cpu/kernels/masked_softmax.h. Backward: softmax_bwd with the scale.
#pragma once
#include "params/masked_softmax.h"

namespace fastnn {

void masked_softmax_fwd(const MaskedSoftmaxParams& p);

}  // namespace fastnn
