// linear + cross-entropy over the thread pool; parameters in params/linear_cross_entropy.h, the
// algorithm in linear_cross_entropy.cpp.
#pragma once
#include "params/linear_cross_entropy.h"

namespace fastnn {

// All class indices must be good (cpu/cross_entropy.h). Throws std::bad_alloc.
void linear_cross_entropy(const LinearCrossEntropyParams& p);

}  // namespace fastnn
