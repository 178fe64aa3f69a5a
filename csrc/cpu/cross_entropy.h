// Cross-entropy over the thread pool; parameters in params/cross_entropy.h, the algorithm in
// cpu/kernels/cross_entropy.h.
#pragma once
#include "params/cross_entropy.h"

namespace fastnn {

// The first row whose class index is neither a class nor ignore_index, or -1. The kernels read no
// other rows' targets.
int64_t first_bad_target(const CrossEntropyParams& p);

// Per-row results; all indices must be good.
void cross_entropy_fwd(const CrossEntropyFwdParams& p);
void cross_entropy_bwd(const CrossEntropyBwdParams& p);

}  // namespace fastnn
