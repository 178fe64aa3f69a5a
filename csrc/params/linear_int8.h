// Arguments of linear with a weight of int8 codes and activations that become codes on the way.
#pragma once
#include "params/linear.h"

namespace fastnn {

// The longest sum of products of two codes, each in [-127, 127], that an int32 holds, rounded down
// to a power of two.
constexpr int64_t kInt8MaxFeatures = int64_t{1} << 17;

// y (M x N) = activation(x (M x K) w^T (K x N) + bias), w = codes times a scale for each of its
// rows, each row of x rounded to codes times a scale of its own. y of x's type, contiguous.
struct LinearInt8Params {
  int64_t M, N, K;
  Matrix x;            // M x K
  const void* packed;  // the weight (cpu/linear_int8.h)
  const void* bias;    // N elements, or null
  int64_t bias_stride;
  DType bias_dtype;
  Activation activation;
  void* y;
};

}  // namespace fastnn
