// Arguments of the matrix product that everything which multiplies matrices shares.
#pragma once
#include "params/linear.h"

namespace fastnn {

// One step of the small program that runs on a finished tile of float32 sums while it is in L1. A
// program, not template parameters: instruction sets x types x activations must not multiply into
// the build.
enum class StepKind : int32_t {
  kDequantise,  // int32 sums of codes become float32 (GemmParams.int8)
  kBias,        // add bias[n]
  kActivate,    // apply the activation
  kStore,       // write the tile, as it is at this point, to a second output
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

// Of a product of int8 codes: sum - offset[n] is that of the codes, times row[m] column[n] that of
// the values. column and offset are readable up to N rounded up to a strip.
struct Int8Scales {
  const float* row;
  const float* column;
  const int32_t* offset;
};

// c (M x N, contiguous) = epilogue(a (M x K) b (K x N)).
struct GemmParams {
  int64_t M, N, K;
  Matrix a, b;
  const float* b_packed;  // b's packed copy (gemm/pack.h), or null
  void* c;
  DType c_dtype;
  Epilogue epilogue;
  bool is_int8;     // a holds bytes: codes plus 128, K of them with padding, a multiple of 4;
  Int8Scales int8;  // ... b_packed holds strips of codes, and the program starts with kDequantise
};

constexpr int64_t kStrip = 16;  // columns in a strip of packed b, whatever the vector width
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fastnn
