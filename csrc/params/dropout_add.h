// Arguments of dropout and the sum after it. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// y = residual + x / (1 - p) where an element is kept, residual where it is dropped: which, is a
// function of the seed and the position in rows of four neighbours (cpu/simd/philox.h). Without a
// residual that is the gradient of x.
struct DropoutAddParams {
  int64_t rows, columns;  // columns are next to each other
  const void* x;
  int64_t x_row_stride;  // 0 where a gradient was expanded
  const void* residual;  // or null: 0
  int64_t residual_row_stride;
  void* y;  // contiguous
  DType dtype;
  float p;  // probability of dropping; 0: the seed is not looked at
  uint64_t seed;
  bool stream = false;  // y is written past the caches: rows of whole aligned lines
};

}  // namespace fastnn
