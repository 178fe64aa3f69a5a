// Arguments of the matrix product that everything which multiplies matrices shares.
#pragma once
#include "params/linear.h"

namespace fastnn {

// What happens to a finished tile of float32 sums while it is in L1, in this order. Values, not
// template parameters: instruction sets x types x options must not multiply into the build.
struct Epilogue {
  const float* bias;  // added, by column; readable up to N rounded up to a strip; or null
  void* pre;          // takes what the activation is applied to: row stride N, type of c; or null
  Activation activation;
};

// c (M x N, contiguous) = epilogue(a (M x K) b (K x N)).
struct GemmParams {
  int64_t M, N, K;
  Matrix a, b;
  const float* b_packed;  // b's packed copy (gemm/pack.h), or null
  void* c;
  DType c_dtype;
  Epilogue epilogue;
};

constexpr int64_t kStrip = 16;  // columns in a strip of packed b, whatever the vector width
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fastnn
