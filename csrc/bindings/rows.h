// Tensors seen as rows, and the parameters that go with each of them: what bindings of row
// operations share.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "bindings/tensor.h"

namespace fastnn {

using OptionalTensor = std::optional<Tensor>;

// The last dimensions of a tensor, over which a row of it runs, and the rows.
struct RowExtents {
  std::vector<int64_t> row_shape;
  int64_t rows = 1, columns = 1;
};

inline RowExtents extents_of_last(const std::vector<int64_t>& sizes, int64_t dims) {
  const auto rank = static_cast<int64_t>(sizes.size());
  RowExtents e;
  e.row_shape.assign(sizes.end() - dims, sizes.end());
  for (int64_t d = 0; d < rank; ++d)
    (d < rank - dims ? e.rows : e.columns) *= sizes[static_cast<size_t>(d)];
  return e;
}

// The data and row stride of a tensor's rows, copied only where no stride describes them.
struct RowSource {
  const void* data;
  int64_t row_stride;
};
inline RowSource row_source(const Tensor& t, const RowExtents& e, Tensor& holder) {
  if (e.row_shape.size() == 1) {
    const Rows rows = rows_of(t, holder);
    if (rows.column_stride == 1) return {rows.data, rows.row_stride};
  }
  holder = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return {holder.const_data_ptr(), e.columns};
}

// A tensor that must have the type of `main`, which the message calls "the input's", and that
// shape.
inline RowSource row_source_like(const Tensor& t, const char* argument, const Tensor& main,
                                 const std::vector<int64_t>& sizes, const RowExtents& e,
                                 const char* op, Tensor& holder) {
  FASTNN_CHECK(checked_dtype(t, op, argument) == checked_dtype(main, op, "input"), TypeError,
               "fastnn::", op, ": ", argument, " must have the input's type ",
               dtype_name(main.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  FASTNN_CHECK(sizes_of(t) == sizes, ValueError, "fastnn::", op, ": ", argument,
               " must have the input's shape ", shape_text(sizes), ", got ", shape_of(t));
  return row_source(t, e, holder);
}

// A parameter's type: the input's, or float32.
inline DType parameter_dtype(ScalarType given, DType input, const char* op, const char* argument) {
  const auto dtype = kernel_dtype(given);
  FASTNN_CHECK(dtype && (*dtype == input || *dtype == DType::kFloat32), TypeError, "fastnn::", op,
               ": ", argument, " must have the input's type ", dtype_name(scalar_type(input)),
               " or be float32, got ", dtype_name(given));
  return *dtype;
}

// A parameter of a row's shape, which the message calls that of `dimensions`.
struct Elements {
  const void* data = nullptr;
  int64_t stride = 1;
};
inline Elements elements_of(const OptionalTensor& t, const char* argument, const RowExtents& e,
                            const char* dimensions, const char* op, Tensor& holder) {
  if (!t) return {};
  checked_dtype(*t, op, argument);
  FASTNN_CHECK(sizes_of(*t) == e.row_shape, ValueError, "fastnn::", op, ": ", argument,
               " must have the shape of ", dimensions, " ", shape_text(e.row_shape), ", got ",
               shape_of(*t));
  const bool in_place = !DeviceScope::current().cuda() || t->is_contiguous();
  if (t->dim() == 1 && in_place) return {t->const_data_ptr(), t->stride(0)};
  holder = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
  return {holder.const_data_ptr(), 1};
}

}  // namespace fastnn
