// Activations and products with them over the thread pool; parameters in params/activation.h, the
// algorithm in cpu/kernels/activation.h.
#pragma once
#include "params/activation.h"

namespace fastnn {

void activation_fwd(const ActivationParams& p);
void activation_bwd(const ActivationBwdParams& p);

}  // namespace fastnn
