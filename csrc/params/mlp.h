// Arguments of feed-forward blocks: two linear layers with an activation between them, or three,
// the first of which gates the second. Strides in elements.
#pragma once
#include "params/linear.h"

namespace fastnn {

// z = x w_in^T + b_in; h = activation(z), times f = x w_factor^T where the block is gated;
// y = h w_out^T + b_out. All of one type.
struct MlpOperands {
  int64_t M, K, hidden, N;
  bool gated;
  Activation activation;
  Matrix x;          // M x K
  Matrix w_in;       // hidden x K
  Matrix w_factor;   // hidden x K; unused without a gate
  Matrix w_out;      // N x hidden
  const void* b_in;  // hidden elements, or null; null with a gate
  int64_t b_in_stride;
};

struct MlpParams : MlpOperands {
  const void* b_out;  // N elements, or null
  int64_t b_out_stride;
  bool is_packed;  // the weights are read from their packed copies (cpu/linear.h), ...
  const void *packed_in, *packed_factor, *packed_out;  // ... null also where they are empty
  void* y;                                             // M x N contiguous
  void* z;       // M x hidden contiguous: what backward may read, or null; none of a packed block
  void* factor;  // the same of f, where the block is gated
};

// An unwanted result is null; each is contiguous, of its operand's shape.
struct MlpBwdParams : MlpOperands {
  Matrix dy;      // M x N, any strides
  const void* z;  // as forward wrote them, or null: they are computed again
  const void* factor;
  void *dx, *dw_in, *db_in, *dw_factor, *dw_out, *db_out;
};

// Columns of a block's middle in backward. h becomes what the second product takes; where there is
// dh, its gradient, it becomes that of z, and df that of f. h may be z, and df may be f.
struct MlpMiddle {
  int64_t columns;
  const void *z, *f;  // f null without a gate
  int64_t z_stride;   // of rows of z and f
  void *h, *dh, *df;  // rows next to each other
  DType dtype;
  Activation activation;
};

}  // namespace fastnn
