// Arguments of layer norm and RMS norm. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// y = (x - mean) * rstd * weight + bias per row, where 1 / rstd^2 = variance + eps; of RMS norm the
// mean is 0 and there is no bias. With a residual, x is x + residual rounded to the type, which
// goes to `total` as well.
struct NormParams {
  int64_t rows, columns;  // columns are next to each other
  const void* x;
  int64_t x_row_stride;
  const void* residual;  // or null
  int64_t residual_row_stride;
  const void* weight;  // columns elements, or null for ones
  const void* bias;    // columns elements, or null for zeros
  int64_t weight_stride, bias_stride;
  void* y;       // contiguous
  void* total;   // contiguous; null without a residual
  float* stats;  // what backward needs of a row: mean, rstd; or null
  DType dtype;   // of x, residual, y, total
  DType parameter_dtype;
  float eps;
  bool rms;
  bool stream = false;  // y and total are written past the caches: rows of whole aligned lines
};

// With g = dy weight and h = (x - mean) rstd: dx = rstd (g - mean(g) - h mean(g h)) + d_total, of
// RMS norm without the mean; dw = sum of dy h and db = sum of dy over rows. An unwanted result is
// null.
struct NormBwdParams {
  int64_t rows, columns;
  const void* dy;
  int64_t dy_row_stride;  // 0 where the gradient was expanded
  const void* d_total;    // the gradient of what was added up, or null
  int64_t d_total_row_stride;
  const void* x;
  int64_t x_row_stride;
  const void* weight;  // or null for ones
  int64_t weight_stride;
  const float* stats;
  void* dx;  // contiguous
  void* dw;
  void* db;
  DType dtype;  // of dy, d_total, x, dx
  DType parameter_dtype;
  bool rms;
  bool stream = false;  // dx is
};

}  // namespace fastnn
