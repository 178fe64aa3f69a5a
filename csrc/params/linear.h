// Arguments of linear + activation. Strides in elements.
#pragma once
#include "params/activation.h"

namespace fastnn {

// Element (i, j) of a matrix lies at data[i * row_stride + j * col_stride].
struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;
  DType dtype;
};

// y (M x N) = activation(x (M x K) w^T (K x N) + bias). All of one type; y and pre contiguous.
struct LinearParams {
  int64_t M, N, K;
  Matrix x;            // M x K
  Matrix w;            // N x K; unused where is_packed
  bool is_packed;      // the weight is read from its packed copy
  const void* packed;  // that copy (cpu/linear.h); null also where it is empty
  const void* bias;    // N elements, or null
  int64_t bias_stride;
  Activation activation;
  void* y;
  void* pre;  // where the pre-activation goes that backward needs, or null
};

// dz = dy activation'(z); dx = dz w, dw = dz^T x, db = column sums of dz. An unwanted result is
// null.
struct LinearBwdParams {
  int64_t M, N, K;
  Matrix dy;          // M x N, any strides
  Matrix x;           // M x K; data may be null without dw
  Matrix w;           // N x K
  const void* slope;  // M x N contiguous: y for relu, sigmoid, tanh; z for gelu, gelu_tanh, silu;
                      // null without activation
  Activation activation;
  void* dx;  // M x K contiguous
  void* dw;  // N x K contiguous
  void* db;  // N
};

}  // namespace fastnn
