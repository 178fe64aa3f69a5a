// Arguments of linear with a block-sparse weight. Strides in elements.
#pragma once
#include "params/linear.h"

namespace fastnn {

// The blocks that are kept of a weight (N x K): 16 outputs times `depth` neighbouring columns each,
// stored as depth rows of 16 values, one for each output. Those of strip s (outputs [16 s, 16 s +
// 16)) are [starts[s], starts[s + 1]), by rising columns: block b begins at column columns[b] *
// depth. What lies beyond N or K counts as zero.
struct BlockSparseWeight {
  const void* values;
  const int32_t* columns;
  const int32_t* starts;
  int64_t depth;  // 2, 4, 8 or 16
  DType dtype;
};

// y (M x N) = activation(x (M x K) w^T (K x N) + bias). All of one type; y and pre contiguous.
struct BlockSparseParams {
  int64_t M, N, K;
  Matrix x;
  BlockSparseWeight w;
  const void* bias;  // N elements, or null
  int64_t bias_stride;
  Activation activation;
  void* y;
  void* pre;  // where the pre-activation goes that backward needs, or null
};

// As of linear, w aside; dw are the gradients of the values.
struct BlockSparseBwdParams {
  LinearBwdParams linear;
  BlockSparseWeight w;
};

// The products of the backward pass. The blocks of a column: cells [column_starts[c],
// column_starts[c + 1]), by rising strips.
struct SparseCell {
  int32_t block, strip;
};
struct SparseGradients {
  int64_t M, N, K;
  const float* dz;  // M rows of whole strips, zero past N
  int64_t dz_stride;
  BlockSparseWeight w;
  const int64_t* column_starts;
  const SparseCell* cells;
  void* dx;            // M x K contiguous
  const float* panel;  // x in tiles of kSparseDwRows rows, panel_floats of them each
  int64_t panel_floats;
  void* dw;
};
constexpr int64_t kSparseDwRows = 64;

}  // namespace fastnn
