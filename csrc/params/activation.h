// The activations, and the arguments of the elementwise operations on them. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// The order is that of fastnn.ops.activation.ACTIVATIONS; linear applies those up to tanh.
#define FASTNN_LINEAR_ACTIVATIONS(X) \
  X(kNone) X(kRelu) X(kGelu) X(kGeluTanh) X(kSilu) X(kSigmoid) X(kTanh)
#define FASTNN_ACTIVATIONS(X) FASTNN_LINEAR_ACTIVATIONS(X) X(kRelu2) X(kHardswish)

#define FASTNN_NAME(name) name,
enum class Activation : int32_t { FASTNN_ACTIVATIONS(FASTNN_NAME) };
#undef FASTNN_NAME
#define FASTNN_ONE(name) +1
constexpr int32_t kActivationCount = FASTNN_ACTIVATIONS(FASTNN_ONE);
constexpr int32_t kLinearActivationCount = FASTNN_LINEAR_ACTIVATIONS(FASTNN_ONE);
#undef FASTNN_ONE

// An activation as a compile-time tag, and the cases of a switch that calls f with it.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
#define FASTNN_ACTIVATION_CASE(name) \
  case Activation::name:             \
    return f(ActivationTag<Activation::name>{});

// A part of a matrix.
struct Block {
  int64_t row_begin, row_end, column_begin, column_end;
};

// y = activation(x + bias), or activation(x) factor.
struct ActivationParams {
  int64_t rows, columns;  // columns are next to each other
  const void* x;
  int64_t x_row_stride;
  const void* factor;  // or null
  int64_t factor_row_stride;
  const void* bias;  // columns elements, or null; null with a factor
  int64_t bias_stride;
  void* y;      // contiguous
  DType dtype;  // of x, factor, y
  DType bias_dtype;
  Activation activation;
  bool stream = false;  // y is written past the caches: rows of whole aligned lines
};

// dx = dy activation'(x + bias) [factor], d_factor = dy activation(x), db = sum of dx over rows
// before it is rounded. An unwanted result is null; dx and d_factor are none or both halves of the
// rows of one packed gradient, else contiguous.
struct ActivationBwdParams {
  int64_t rows, columns;
  const void* dy;
  int64_t dy_row_stride;  // 0 where the gradient was expanded
  const void* x;
  int64_t x_row_stride;
  const void* factor;  // or null
  int64_t factor_row_stride;
  const void* bias;  // or null; null with a factor
  int64_t bias_stride;
  void* dx;
  void* d_factor;
  int64_t d_row_stride;  // of dx and d_factor: columns, or 2 columns where they are packed
  void* db;              // columns elements
  DType dtype;           // of dy, x, factor, dx, d_factor
  DType bias_dtype;      // of bias, db
  Activation activation;
  bool stream = false;  // dx and d_factor are
};

}  // namespace fastnn
