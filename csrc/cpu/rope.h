// Rotary position embedding over the thread pool; parameters in params/rope.h, the algorithm in
// cpu/kernels/rope.h.
#pragma once
#include "params/rope.h"

namespace fastnn {

void rope(const RopeParams& p);

}  // namespace fastnn
