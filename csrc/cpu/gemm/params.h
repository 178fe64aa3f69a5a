// Arguments of the matrix product that everything which multiplies matrices shares.
#pragma once
#include "params/linear.h"

namespace fastnn {

// One step of the small program that runs on a finished tile of float32 sums while it is in L1. A
// program, not template parameters: instruction sets x types x activations must not multiply into
// the build.
enum class StepKind : int32_t {
  kBias,      // add bias[n]
  kActivate,  // apply the activation
  kStore,     // write the tile, as it is at this point, to a second output
};
struct Step {
  StepKind kind;
  Activation activation;
  const float* bias;  // readable up to N rounded up to a strip
  void* out;          // row stride N, type of c
};
constexpr int kMaxSteps = 4;
struct Epilogue {
  int32_t count;
  Step steps[kMaxSteps];
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
