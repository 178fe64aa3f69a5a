// Feed-forward blocks over the thread pool; parameters in params/mlp.h.
#pragma once
#include "params/mlp.h"

namespace fastnn {

void mlp_fwd(const MlpParams& p);
void mlp_bwd(const MlpBwdParams& p);

}  // namespace fastnn
