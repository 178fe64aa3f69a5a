// Arguments of linear with a block-sparse weight. Strides in elements.
#pragma once
#include "params/linear.h"

namespace fastnn {

// What goes into 4 bytes along K of the operands: elements of their type, one or two as the
// instruction set multiplies them; one element, made float32; four codes.
enum class SparseUnits : int32_t { kTyped, kWidened, kCodes };

// The blocks that are kept of a weight (N x K): 16 outputs times `depth` neighbouring columns each,
// stored as depth rows of 16 values, one for each output. Those of strip s (outputs [16 s, 16 s +
// 16)) are [starts[s], starts[s + 1]), by rising columns: block b begins at column columns[b] *
// depth. What lies beyond N or K counts as zero. Of codes, signed bytes, a block is depth / 4 units
// of 16 times 4 neighbouring columns.
struct BlockSparseWeight {
  const void* values;
  const int32_t* columns;
  const int32_t* starts;
  int64_t depth;  // 2, 4, 8 or 16; of codes not 2
  DType dtype;    // of typed values
  SparseUnits units;
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

// The same with codes for a weight: times a scale for each output; each row of x is rounded to
// codes times a scale of its own. y of x's type.
struct BlockSparseInt8Params {
  int64_t M, N, K;
  Matrix x;
  BlockSparseWeight w;
  const void* packed;  // what goes with the codes (cpu/block_sparse.h)
  const void* bias;    // N elements, or null
  int64_t bias_stride;
  DType bias_dtype;
  Activation activation;
  void* y;
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
