// torch.ops.fastnn.linear_block_sparse_fwd / linear_block_sparse_bwd.
#include "cpu/block_sparse.h"

#include "bindings/linear.h"

namespace fastnn {
namespace {

constexpr int64_t kOutputs = 16;  // of a strip

Activation checked_activation(int64_t code, const char* op) {
  FASTNN_CHECK(code >= 0 && code < kLinearActivationCount, ValueError, "fastnn::", op,
               ": activation must be a code in [0, ", kLinearActivationCount - 1, "], got ", code);
  return static_cast<Activation>(code);
}

const int32_t* checked_indices(const Tensor& t, int64_t count, const char* op,
                               const char* argument) {
  FASTNN_CHECK(t.scalar_type() == ScalarType::Int, TypeError, "fastnn::", op, ": ", argument,
               " must be int32, got ", dtype_name(t.scalar_type()));
  check_dense(t, op, argument);
  FASTNN_CHECK(t.dim() == 1 && t.size(0) == count && t.is_contiguous(), ValueError, "fastnn::", op,
               ": ", argument, " must be contiguous and have shape (", count, ",), got shape ",
               shape_of(t));
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Every index is looked at on each call, since one that is out of range would be read out of
// bounds: a small part of the time of a row.
BlockSparseWeight checked_weight(const Tensor& values, const Tensor& columns, const Tensor& starts,
                                 int64_t N, int64_t K, DType dtype, const char* op) {
  FASTNN_CHECK(N >= 0, ValueError, "fastnn::", op, ": out_features must not be negative, got ", N);
  check_same_dtype(checked_dtype(values, op, "values"), dtype, op, "values");
  const auto sizes = sizes_of(values);
  FASTNN_CHECK(sizes.size() == 3 && sizes[2] == kOutputs &&
                   (sizes[1] == 2 || sizes[1] == 4 || sizes[1] == 8 || sizes[1] == 16) &&
                   values.is_contiguous(),
               ValueError, "fastnn::", op,
               ": values must be contiguous and have shape (blocks, 2, 4, 8 or 16, 16), got shape ",
               shape_of(values));
  const int64_t blocks = sizes[0], depth = sizes[1], strips = (N + kOutputs - 1) / kOutputs;
  BlockSparseWeight w = {};
  w.values = values.const_data_ptr();
  w.columns = checked_indices(columns, blocks, op, "columns");
  w.starts = checked_indices(starts, strips + 1, op, "starts");
  w.depth = depth;
  w.dtype = dtype;
  FASTNN_CHECK(w.starts[0] == 0 && w.starts[strips] == blocks, ValueError, "fastnn::", op,
               ": starts must go from 0 to the number of blocks, ", blocks, "; got ", w.starts[0],
               " to ", w.starts[strips]);
  const int64_t limit = (K + depth - 1) / depth;
  for (int64_t s = 0; s < strips; ++s) {
    const int32_t first = w.starts[s], last = w.starts[s + 1];
    FASTNN_CHECK(first <= last && last <= blocks, ValueError, "fastnn::", op,
                 ": starts must not fall, got ", first, " and ", last, " at ", s);
    bool rises = true;
    for (int32_t b = first + 1; b < last; ++b) rises &= w.columns[b - 1] < w.columns[b];
    FASTNN_CHECK(rises, ValueError, "fastnn::", op,
                 ": columns must rise within a strip of outputs; those of strip ", s, " do not");
    FASTNN_CHECK(first == last || (w.columns[first] >= 0 && w.columns[last - 1] < limit),
                 IndexError, "fastnn::", op, ": columns of strip ", s, " must be in [0, ", limit,
                 "), the blocks of ", K, " input features; got ", w.columns[first], " to ",
                 w.columns[last - 1]);
  }
  return w;
}

std::tuple<Tensor, OptionalTensor> fwd(const Tensor& input, const Tensor& values,
                                       const Tensor& columns, const Tensor& starts,
                                       const OptionalTensor& bias, int64_t out_features,
                                       int64_t activation, bool save_pre, bool grad_handled) {
  constexpr auto op = "linear_block_sparse_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  BlockSparseParams p = {};
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.N = out_features;
  p.K = rows.columns;
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
  p.w = checked_weight(values, columns, starts, p.N, p.K, dtype, op);
  p.activation = checked_activation(activation, op);
  if (bias) {
    check_same_dtype(checked_dtype(*bias, op, "bias"), dtype, op, "bias");
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == p.N, ValueError, "fastnn::", op,
                 ": bias must have shape (", p.N, ",), got ", shape_of(*bias));
    p.bias = bias->const_data_ptr();
    p.bias_stride = bias->stride(0);
  }
  const auto sizes = output_sizes(sizes_of(input), p.N);
  Tensor output = new_output(sizes, dtype);
  OptionalTensor pre;
  if (save_pre) pre = new_output(sizes, dtype);
  p.y = output.mutable_data_ptr();
  p.pre = pre ? pre->mutable_data_ptr() : nullptr;
  block_sparse_fwd(p);
  return {output, pre};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bwd(
    const Tensor& grad, const OptionalTensor& input, const Tensor& values, const Tensor& columns,
    const Tensor& starts, const OptionalTensor& slope, int64_t activation,
    std::vector<int64_t> input_shape, std::vector<bool> mask, bool grad_handled) {
  constexpr auto op = "linear_block_sparse_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(grad);
  FASTNN_CHECK(mask.size() == 3, ValueError, "fastnn::", op, ": mask must have 3 entries, got ",
               mask.size());
  const DType dtype = checked_dtype(grad, op, "grad");
  FASTNN_CHECK(!input_shape.empty() && grad.dim() >= 1, ValueError, "fastnn::", op,
               ": grad and input_shape must have at least one dimension");
  BlockSparseBwdParams p = {};
  LinearBwdParams& l = p.linear;
  l.N = grad.size(grad.dim() - 1);
  l.K = input_shape.back();
  const auto grad_shape = output_sizes(input_shape, l.N);
  FASTNN_CHECK(sizes_of(grad) == grad_shape, ValueError, "fastnn::", op,
               ": grad must have the output's shape ", shape_text(grad_shape), ", got ",
               shape_of(grad));
  p.w = checked_weight(values, columns, starts, l.N, l.K, dtype, op);
  l.activation = checked_activation(activation, op);
  Tensor grad_holder, input_holder, slope_holder;
  const Rows dy = rows_of(grad, grad_holder);
  l.M = dy.rows;
  l.dy = {dy.data, dy.row_stride, dy.column_stride, dtype};
  if (l.activation != Activation::kNone) {
    FASTNN_CHECK(slope && sizes_of(*slope) == grad_shape, ValueError, "fastnn::", op,
                 ": slope must have the output's shape ", shape_text(grad_shape), ", got ",
                 slope ? shape_of(*slope) : "None");
    check_same_dtype(checked_dtype(*slope, op, "slope"), dtype, op, "slope");
    slope_holder = slope->is_contiguous() ? *slope : torch::stable::contiguous(*slope);
    l.slope = slope_holder.const_data_ptr();
  }
  OptionalTensor dx, dvalues, db;
  if (mask[1]) {
    FASTNN_CHECK(input && sizes_of(*input) == input_shape, ValueError, "fastnn::", op,
                 ": input must have input_shape ", shape_text(input_shape),
                 " for the gradient of the values, got ", input ? shape_of(*input) : "None");
    check_same_dtype(checked_dtype(*input, op, "input"), dtype, op, "input");
    const Rows x = rows_of(*input, input_holder);
    l.x = {x.data, x.row_stride, x.column_stride, dtype};
    dvalues = new_output(sizes_of(values), dtype);
    l.dw = dvalues->mutable_data_ptr();
  }
  if (mask[0]) {
    dx = new_output(input_shape, dtype);
    l.dx = dx->mutable_data_ptr();
  }
  if (mask[2]) {
    db = new_output({l.N}, dtype);
    l.db = db->mutable_data_ptr();
  }
  block_sparse_bwd(p);
  return {dx, dvalues, db};
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "linear_block_sparse_fwd(Tensor input, Tensor values, Tensor columns, Tensor starts, Tensor? "
      "bias, "
      "SymInt out_features, int activation, bool save_pre, bool grad_handled=False) -> (Tensor, "
      "Tensor?)");
  m.def(
      "linear_block_sparse_bwd(Tensor grad, Tensor? input, Tensor values, Tensor columns, Tensor "
      "starts, "
      "Tensor? slope, int activation, SymInt[] input_shape, bool[3] mask, bool "
      "grad_handled=False) -> (Tensor?, Tensor?, Tensor?)");
}
FASTNN_KERNELS(m) {
  m.impl("linear_block_sparse_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("linear_block_sparse_bwd", TORCH_BOX(&fastnn::bwd));
}
