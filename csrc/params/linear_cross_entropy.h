// Arguments of linear + cross-entropy. Strides in elements.
#pragma once
#include "params/cross_entropy.h"
#include "params/linear.h"

namespace fastnn {

// The loss of logits x (rows x K) w^T (K x classes) + bias, and its gradients. Logits are float32
// and are never all in memory. Rows whose class index is ignore_index are not read.
struct LinearCrossEntropyParams {
  int64_t K;
  Matrix x;          // rows x K
  Matrix w;          // classes x K, of x's type
  const void* bias;  // classes elements of x's type, or null
  int64_t bias_stride;
  CrossEntropyParams loss;  // of class indices; x, x_row_stride and dtype are not used
  bool forward;             // row_loss, row_z (or null) and stats are results; else stats are given
  float* row_loss;
  float* row_z;
  float* stats;  // two floats a row (CrossEntropyFwdParams)
  // d(loss[r]) counts scale[r] times, d(z[r]) z_scale[r] times; stride 0: one for all rows.
  const float* scale;
  const float* z_scale;
  int64_t scale_stride;
  void* dx;  // rows x K, of x's type as all gradients, contiguous; an unwanted one is null
  void* dw;  // classes x K
  void* db;  // classes
};

// The gradient of a chunk's logits for some of its classes.
struct LogitGradientParams {
  CrossEntropyBwdParams loss;  // of float32 logits; dx takes column `first` first, of type dtype
  int64_t first;
  int64_t dx_row_stride;
  DType dtype;
  float* sums;  // classes: the gradient's columns are added to it; or null
};

}  // namespace fastnn
