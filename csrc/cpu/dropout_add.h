// Dropout and the sum after it over the thread pool; parameters in params/dropout_add.h, the
// algorithm in cpu/kernels/dropout_add.h.
#pragma once
#include "params/dropout_add.h"

namespace fastnn {

// Recorded under that name: forward and backward are the same.
void dropout_add(const DropoutAddParams& p, const char* name);

}  // namespace fastnn
