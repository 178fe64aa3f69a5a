// Arguments of softmax and log-softmax. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// A tensor seen as [outer][cols][inner] with the softmax along cols. The output is contiguous in
// that order; an input with inner == 1 may have any row stride, with inner > 1 it is contiguous.
struct SoftmaxParams {
  const void* x;
  void* y;
  int64_t outer, cols, inner;
  int64_t x_row_stride;    // between rows of the input, used with inner == 1
  DType x_dtype, y_dtype;  // equal, or y is float32
  bool log;
  bool stream = false;  // y is written past the caches: inner == 1, rows of whole aligned lines
};

// dx = scale y (dy - sum(dy y)), of the logarithm dx = dy - exp(y) sum(dy).
struct SoftmaxBwdParams {
  const void* dy;
  const void* y;
  void* dx;
  int64_t outer, cols, inner;
  int64_t dy_row_stride;    // used with inner == 1; 0 where the gradient was expanded
  DType y_dtype, dx_dtype;  // dy has y's type; dx has it too, or y is float32
  bool log;
  bool stream = false;  // dx is
  float scale = 1.f;    // inner == 1
};

}  // namespace fastnn
