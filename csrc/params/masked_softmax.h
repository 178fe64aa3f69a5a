// Arguments of the softmax of scaled, masked rows. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

constexpr int32_t kMaskDims = 8;

// y = softmax(scale x + mask) per row; of a row in which nothing takes part, zeros. Backward is
// that of softmax, times the scale.
struct MaskedSoftmaxParams {
  int64_t rows, columns;  // columns are next to each other
  const void* x;
  int64_t x_row_stride;
  void* y;      // contiguous
  DType dtype;  // of x, y
  float scale;
  MaskKind mask_kind;
  DType mask_dtype;
  const void* mask;
  int64_t mask_column_stride;  // 1, or 0 where one element counts for a row
  // The rows as an index of `dims` dimensions, the last one quickest, and the mask's stride in
  // each.
  int32_t dims;
  int64_t sizes[kMaskDims], mask_strides[kMaskDims];
  int64_t queries;      // row r sees columns 0 .. r % queries; 0: all
  bool stream = false;  // y is written past the caches: rows of whole aligned lines

  // A row's scores are kept as float32: in y itself where that can hold them.
  constexpr bool keeps_in_place() const { return dtype == DType::kFloat32 && !stream; }
};

}  // namespace fastnn
