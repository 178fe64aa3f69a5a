// torch.ops.fastnn.linear_block_sparse_fwd / _bwd, linear_block_sparse_int8_pack / _fwd.
#include "cpu/block_sparse.h"

#include <algorithm>
#include <limits>

#include "bindings/linear.h"
#include "params/linear_int8.h"

namespace fastnn {
namespace {

constexpr int64_t kOutputs = 16;  // of a strip
constexpr int64_t kUnitCodes = 4;

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

void check_starts(const BlockSparseWeight& w, int64_t blocks, int64_t strips, const char* op) {
  FASTNN_CHECK(w.starts[0] == 0 && w.starts[strips] == blocks, ValueError, "fastnn::", op,
               ": starts must go from 0 to the number of blocks, ", blocks, "; got ", w.starts[0],
               " to ", w.starts[strips]);
  bool falls = false;
  for (int64_t s = 0; s < strips; ++s) falls |= w.starts[s] > w.starts[s + 1];
  for (int64_t s = 0; falls && s < strips; ++s) {
    FASTNN_CHECK(w.starts[s] <= w.starts[s + 1], ValueError, "fastnn::", op,
                 ": starts must not fall, got ", w.starts[s], " and ", w.starts[s + 1], " at ", s);
  }
}

// Whether columns rise within a strip and lie in [0, limit). In passes without a branch: a tenth of
// the time of a row went into looking at one strip after the other.
bool in_order(const BlockSparseWeight& w, int64_t blocks, int64_t strips, int64_t limit) {
  const auto last = (uint32_t)std::min<int64_t>(limit - 1, std::numeric_limits<int32_t>::max());
  uint32_t outside = 0;  // its sign
  for (int64_t b = 0; b < blocks; ++b) {
    outside |= (uint32_t)w.columns[b] | (last - (uint32_t)w.columns[b]);
  }
  int32_t falls = 0;
  for (int64_t b = 1; b < blocks; ++b) falls += w.columns[b - 1] >= w.columns[b];
  for (int64_t s = 1; s < strips; ++s) {
    const int32_t b = w.starts[s];
    if (w.starts[s - 1] < b && b < blocks) falls -= w.columns[b - 1] >= w.columns[b];
  }
  return falls == 0 && (int32_t)outside >= 0;
}

// Every index is looked at on each call, since one that is out of range would be read out of
// bounds: a small part of the time of a row.
void set_places(BlockSparseWeight& w, const Tensor& columns, const Tensor& starts, int64_t blocks,
                int64_t N, int64_t K, const char* op) {
  FASTNN_CHECK(N >= 0, ValueError, "fastnn::", op, ": out_features must not be negative, got ", N);
  const int64_t strips = (N + kOutputs - 1) / kOutputs;
  w.columns = checked_indices(columns, blocks, op, "columns");
  w.starts = checked_indices(starts, strips + 1, op, "starts");
  check_starts(w, blocks, strips, op);
  const int64_t limit = (K + w.depth - 1) / w.depth;
  if (in_order(w, blocks, strips, limit)) return;
  for (int64_t s = 0; s < strips; ++s) {
    const int32_t first = w.starts[s], last = w.starts[s + 1];
    bool rises = true;
    for (int32_t b = first + 1; b < last; ++b) rises &= w.columns[b - 1] < w.columns[b];
    FASTNN_CHECK(rises, ValueError, "fastnn::", op,
                 ": columns must rise within a strip of outputs; those of strip ", s, " do not");
    FASTNN_CHECK(first == last || (w.columns[first] >= 0 && w.columns[last - 1] < limit),
                 IndexError, "fastnn::", op, ": columns of strip ", s, " must be in [0, ", limit,
                 "), the blocks of ", K, " input features; got ", w.columns[first], " to ",
                 w.columns[last - 1]);
  }
}

BlockSparseWeight checked_weight(const Tensor& values, const Tensor& columns, const Tensor& starts,
                                 int64_t N, int64_t K, DType dtype, const char* op) {
  check_same_dtype(checked_dtype(values, op, "values"), dtype, op, "values");
  const auto sizes = sizes_of(values);
  FASTNN_CHECK(sizes.size() == 3 && sizes[2] == kOutputs &&
                   (sizes[1] == 2 || sizes[1] == 4 || sizes[1] == 8 || sizes[1] == 16) &&
                   values.is_contiguous(),
               ValueError, "fastnn::", op,
               ": values must be contiguous and have shape (blocks, 2, 4, 8 or 16, 16), got shape ",
               shape_of(values));
  BlockSparseWeight w = {};
  w.values = values.const_data_ptr();
  w.depth = sizes[1];
  w.dtype = dtype;
  set_places(w, columns, starts, sizes[0], N, K, op);
  return w;
}

// Without the places of the blocks.
BlockSparseWeight checked_codes(const Tensor& codes, const char* op) {
  FASTNN_CHECK(codes.scalar_type() == ScalarType::Char, TypeError, "fastnn::", op,
               ": codes must be int8, got ", dtype_name(codes.scalar_type()));
  check_dense(codes, op, "codes");
  const auto sizes = sizes_of(codes);
  FASTNN_CHECK(
      sizes.size() == 4 && sizes[2] == kOutputs && sizes[3] == kUnitCodes &&
          (sizes[1] == 1 || sizes[1] == 2 || sizes[1] == 4) && codes.is_contiguous(),
      ValueError, "fastnn::", op,
      ": codes must be contiguous and have shape (blocks, depth / 4, 16, 4), depth 4, 8 or "
      "16, got shape ",
      shape_of(codes));
  BlockSparseWeight w = {};
  w.values = codes.const_data_ptr();
  w.depth = sizes[1] * kUnitCodes;
  w.units = SparseUnits::kCodes;
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

Tensor int8_pack(const Tensor& codes, const Tensor& starts, const Tensor& scale,
                 bool grad_handled) {
  constexpr auto op = "linear_block_sparse_int8_pack";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(scale);
  BlockSparseWeight w = checked_codes(codes, op);
  FASTNN_CHECK(checked_dtype(scale, op, "scale") == DType::kFloat32, TypeError, "fastnn::", op,
               ": scale must be float32, got ", dtype_name(scale.scalar_type()));
  FASTNN_CHECK(scale.dim() == 1, ValueError, "fastnn::", op,
               ": scale must have shape (out_features,), got ", shape_of(scale));
  const int64_t N = scale.size(0), strips = (N + kOutputs - 1) / kOutputs;
  w.starts = checked_indices(starts, strips + 1, op, "starts");
  check_starts(w, codes.size(0), strips, op);
  Tensor packed = new_kept(block_sparse_int8_packed_bytes(N) / 4);
  block_sparse_int8_pack(w, static_cast<const float*>(scale.const_data_ptr()), scale.stride(0), N,
                         packed.mutable_data_ptr());
  return packed;
}

Tensor int8_fwd(const Tensor& input, const Tensor& codes, const Tensor& columns,
                const Tensor& starts, const Tensor& packed, const OptionalTensor& bias,
                int64_t out_features, int64_t activation, bool grad_handled) {
  constexpr auto op = "linear_block_sparse_int8_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  BlockSparseInt8Params p = {};
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.N = out_features;
  p.K = rows.columns;
  FASTNN_CHECK(p.K <= kInt8MaxFeatures, ValueError, "fastnn::", op,
               ": in_features must be at most ", kInt8MaxFeatures,
               ", where sums of codes still fit 32 bits; got ", p.K);
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
  p.w = checked_codes(codes, op);
  set_places(p.w, columns, starts, codes.size(0), p.N, p.K, op);
  FASTNN_CHECK(checked_dtype(packed, op, "packed") == DType::kFloat32 && packed.is_contiguous() &&
                   packed.numel() * 4 == block_sparse_int8_packed_bytes(p.N),
               ValueError, "fastnn::", op,
               ": packed must be what linear_block_sparse_int8_pack gives for these codes, ",
               block_sparse_int8_packed_bytes(p.N) / 4, " contiguous float32 values; got shape ",
               shape_of(packed));
  p.packed = packed.const_data_ptr();
  p.activation = checked_activation(activation, op);
  if (bias) {
    p.bias_dtype = checked_dtype(*bias, op, "bias");
    FASTNN_CHECK(p.bias_dtype == dtype || p.bias_dtype == DType::kFloat32, TypeError,
                 "fastnn::", op, ": bias must be float32 or of the input's type ",
                 dtype_name(scalar_type(dtype)), ", got ", dtype_name(bias->scalar_type()));
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == p.N, ValueError, "fastnn::", op,
                 ": bias must have shape (", p.N, ",), got ", shape_of(*bias));
    p.bias = bias->const_data_ptr();
    p.bias_stride = bias->stride(0);
  }
  Tensor output = new_output(output_sizes(sizes_of(input), p.N), dtype);
  p.y = output.mutable_data_ptr();
  block_sparse_int8_fwd(p);
  return output;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "linear_block_sparse_int8_pack(Tensor codes, Tensor starts, Tensor scale, bool "
      "grad_handled=False) -> Tensor");
  m.def(
      "linear_block_sparse_int8_fwd(Tensor input, Tensor codes, Tensor columns, Tensor starts, "
      "Tensor packed, Tensor? bias, SymInt out_features, int activation, bool "
      "grad_handled=False) -> Tensor");
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
  m.impl("linear_block_sparse_int8_pack", TORCH_BOX(&fastnn::int8_pack));
  m.impl("linear_block_sparse_int8_fwd", TORCH_BOX(&fastnn::int8_fwd));
  m.impl("linear_block_sparse_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("linear_block_sparse_bwd", TORCH_BOX(&fastnn::bwd));
}
