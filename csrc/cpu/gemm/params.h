// Arguments of the matrix product that everything which multiplies matrices shares.
#pragma once
#include "params/linear.h"
#include "params/linear_groupwise.h"

namespace fastnn {

// What happens to a finished tile of float32 sums while it is in L1, in this order. Values, not
// template parameters: instruction sets x types x options must not multiply into the build.
struct Epilogue {
  const float* bias;  // added, by column; readable up to N rounded up to a strip; or null
  void* pre;          // takes the sum with the bias, in the type of c; or null
  int64_t pre_stride;
  const void* gate;  // the sum becomes activation(gate) times it, not its activation: type of c,
                     // and may be c itself; or null
  int64_t gate_stride;
  Activation activation;
  const float* addend;  // added last: row stride that of c, and may be c itself; or null
};

// Of a product of int8 codes: sum - offset[n] is that of the codes, times row[m] column[n] that of
// the values. column and offset are readable up to N rounded up to a strip.
struct Int8Scales {
  const float* row;
  const float* column;
  const int32_t* offset;
};

// Of a product with a weight in groups (gemm/groups.h): a holds digits, b_packed its strips.
struct GroupedProduct {
  GroupLayout layout;
  int digits;            // of an activation: 1 to 3
  const BlockOfRow* of;  // M x blocks
};

// c (M x N) = epilogue(a (M x K) b (K x N)). Strides are of rows, in elements.
struct GemmParams {
  int64_t M, N, K;
  Matrix a, b;
  const float* b_packed;  // b's packed copy (gemm/pack.h), or null
  void* c;
  int64_t c_stride;
  DType c_dtype;
  const float* tile_bias;  // or null: what tiles of codes and of blocks add, in place of the
                           // epilogue; readable up to N rounded up to a strip
  Epilogue epilogue;
  bool is_int8;  // a holds bytes: codes plus 128, K of them with padding, a multiple of 4;
  Int8Scales
      int8;  // ... b_packed holds strips of codes, and sums become float32 before the epilogue
  const GroupedProduct* groups;  // or null; a's row_stride is in bytes then
};

constexpr int64_t kStrip = 16;  // columns in a strip of packed b, whatever the vector width
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace fastnn
