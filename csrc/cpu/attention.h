// Attention over the thread pool; parameters in params/attention.h, the algorithm in
// cpu/kernels/attention.h.
#pragma once
#include "params/attention.h"

namespace fastnn {

void attention_fwd(const AttentionFwdParams& p);
void attention_bwd(const AttentionBwdParams& p);

}  // namespace fastnn
