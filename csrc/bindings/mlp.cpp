// torch.ops.fastnn.mlp_fwd / mlp_bwd / mlp_packed_fwd.
#include "cpu/mlp.h"

#include "bindings/linear.h"
#include "cpu/linear.h"

namespace fastnn {
namespace {

Activation checked_activation(int64_t code, const char* op) {
  FASTNN_CHECK(code >= 1 && code < kActivationCount, ValueError, "fastnn::", op,
               ": activation must be a code in [1, ", kActivationCount - 1, "], got ", code);
  return static_cast<Activation>(code);
}

struct Bias {
  const void* data = nullptr;
  int64_t stride = 0;
};
Bias bias_of(const OptionalTensor& bias, int64_t n, DType dtype, const char* op,
             const char* argument) {
  if (!bias) return {};
  check_same_dtype(checked_dtype(*bias, op, argument), dtype, op, argument);
  FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == n, ValueError, "fastnn::", op, ": ", argument,
               " must have shape (", n, ",), got ", shape_of(*bias));
  return {bias->const_data_ptr(), bias->stride(0)};
}

Matrix weight_of(const Tensor& weight, int64_t rows, int64_t columns, DType dtype, const char* op,
                 const char* argument) {
  check_same_dtype(checked_dtype(weight, op, argument), dtype, op, argument);
  FASTNN_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, ValueError,
               "fastnn::", op, ": ", argument, " must have shape (", rows, ", ", columns, "), got ",
               shape_of(weight));
  return weight_matrix(weight, dtype);
}

// What forward and backward are given alike.
struct Given {
  const Tensor &input, &w_in;
  const OptionalTensor &b_in, &w_factor;
  const Tensor& w_out;
};
void set_operands(MlpOperands& p, const Given& given, int64_t activation, const char* op,
                  Tensor& holder) {
  const DType dtype = checked_dtype(given.input, op, "input");
  for (const auto& [weight, argument] :
       {std::pair(&given.w_in, "w_in"), std::pair(&given.w_out, "w_out")}) {
    FASTNN_CHECK(weight->dim() == 2, ValueError, "fastnn::", op, ": ", argument,
                 " must be (out_features, in_features), got shape ", shape_of(*weight));
  }
  p.activation = checked_activation(activation, op);
  p.hidden = given.w_in.size(0);
  p.K = given.w_in.size(1);
  p.N = given.w_out.size(0);
  check_input(given.input, p.K, op);
  p.w_in = weight_of(given.w_in, p.hidden, p.K, dtype, op, "w_in");
  p.w_out = weight_of(given.w_out, p.N, p.hidden, dtype, op, "w_out");
  p.gated = given.w_factor.has_value();
  if (p.gated) p.w_factor = weight_of(*given.w_factor, p.hidden, p.K, dtype, op, "w_factor");
  FASTNN_CHECK(!(p.gated && given.b_in), ValueError, "fastnn::", op, ": a gate has no b_in");
  const Bias b_in = bias_of(given.b_in, p.hidden, dtype, op, "b_in");
  p.b_in = b_in.data;
  p.b_in_stride = b_in.stride;
  const Rows rows = rows_of(given.input, holder);
  p.M = rows.rows;
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
}

std::tuple<Tensor, OptionalTensor, OptionalTensor> fwd(
    const Tensor& input, const Tensor& w_in, const OptionalTensor& b_in,
    const OptionalTensor& w_factor, const Tensor& w_out, const OptionalTensor& b_out,
    int64_t activation, bool save, bool grad_handled) {
  constexpr auto op = "mlp_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  MlpParams p = {};
  Tensor holder;
  set_operands(p, {input, w_in, b_in, w_factor, w_out}, activation, op, holder);
  const Bias out = bias_of(b_out, p.N, p.x.dtype, op, "b_out");
  p.b_out = out.data;
  p.b_out_stride = out.stride;
  const auto sizes = sizes_of(input);
  Tensor output = new_output(output_sizes(sizes, p.N), p.x.dtype);
  p.y = output.mutable_data_ptr();
  OptionalTensor z, factor;
  if (save) p.z = (z = new_output(output_sizes(sizes, p.hidden), p.x.dtype))->mutable_data_ptr();
  if (save && p.gated)
    p.factor = (factor = new_output(output_sizes(sizes, p.hidden), p.x.dtype))->mutable_data_ptr();
  mlp_fwd(p);
  return {output, z, factor};
}

// A tensor of the middle that forward saved.
const void* saved_of(const OptionalTensor& saved, const Tensor& input, int64_t hidden,
                     const char* op, const char* argument, Tensor& holder) {
  if (!saved) return nullptr;
  check_same_dtype(checked_dtype(*saved, op, argument), checked_dtype(input, op, "input"), op,
                   argument);
  const auto sizes = output_sizes(sizes_of(input), hidden);
  FASTNN_CHECK(sizes_of(*saved) == sizes, ValueError, "fastnn::", op, ": ", argument,
               " must have shape ", shape_text(sizes), ", got ", shape_of(*saved));
  holder = saved->is_contiguous() ? *saved : torch::stable::contiguous(*saved);
  return holder.const_data_ptr();
}

using Gradients = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor>;

// (gradient of input, w_in, b_in, w_factor, w_out, b_out).
Gradients bwd(const Tensor& grad, const Tensor& input, const Tensor& w_in,
              const OptionalTensor& b_in, const OptionalTensor& w_factor, const Tensor& w_out,
              const OptionalTensor& z, const OptionalTensor& factor, int64_t activation,
              std::vector<bool> mask, bool grad_handled) {
  constexpr auto op = "mlp_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  FASTNN_CHECK(mask.size() == 6, ValueError, "fastnn::", op, ": mask must have 6 entries, got ",
               mask.size());
  MlpBwdParams p = {};
  Tensor holder, grad_holder, z_holder, factor_holder;
  set_operands(p, {input, w_in, b_in, w_factor, w_out}, activation, op, holder);
  const DType dtype = p.x.dtype;
  const auto sizes = output_sizes(sizes_of(input), p.N);
  check_same_dtype(checked_dtype(grad, op, "grad"), dtype, op, "grad");
  FASTNN_CHECK(sizes_of(grad) == sizes, ValueError, "fastnn::", op,
               ": grad must have the output's shape ", shape_text(sizes), ", got ", shape_of(grad));
  FASTNN_CHECK(!mask[3] || p.gated, ValueError, "fastnn::", op,
               ": a gradient of w_factor is wanted and there is none");
  FASTNN_CHECK(!z || !p.gated || factor, ValueError, "fastnn::", op,
               ": z was saved and factor was not");
  const Rows dy = rows_of(grad, grad_holder);
  p.dy = {dy.data, dy.row_stride, dy.column_stride, dtype};
  p.z = saved_of(z, input, p.hidden, op, "z", z_holder);
  p.factor = p.gated ? saved_of(factor, input, p.hidden, op, "factor", factor_holder) : nullptr;
  OptionalTensor dx, dw_in, db_in, dw_factor, dw_out, db_out;
  auto wanted = [&](size_t i, OptionalTensor& gradient, std::vector<int64_t> shape) -> void* {
    if (!mask[i]) return nullptr;
    return (gradient = new_output(shape, dtype))->mutable_data_ptr();
  };
  p.dx = wanted(0, dx, sizes_of(input));
  p.dw_in = wanted(1, dw_in, {p.hidden, p.K});
  p.db_in = wanted(2, db_in, {p.hidden});
  p.dw_factor = wanted(3, dw_factor, {p.hidden, p.K});
  p.dw_out = wanted(4, dw_out, {p.N, p.hidden});
  p.db_out = wanted(5, db_out, {p.N});
  mlp_bwd(p);
  return {dx, dw_in, db_in, dw_factor, dw_out, db_out};
}

const void* packed_of(const Tensor& packed, int64_t rows, int64_t columns, DType dtype,
                      const char* op, const char* argument) {
  FASTNN_CHECK(checked_dtype(packed, op, argument) == DType::kFloat32 && packed.is_contiguous() &&
                   packed.numel() * 4 == linear_packed_bytes(rows, columns, dtype),
               ValueError, "fastnn::", op, ": ", argument,
               " must be what linear_pack gives for a weight of the input's type and shape (", rows,
               ", ", columns, "), got shape ", shape_of(packed));
  return packed.const_data_ptr();
}

Tensor packed_fwd(const Tensor& input, const Tensor& packed_in, const OptionalTensor& b_in,
                  const OptionalTensor& packed_factor, const Tensor& packed_out,
                  const OptionalTensor& b_out, int64_t hidden, int64_t out_features,
                  int64_t activation, bool grad_handled) {
  constexpr auto op = "mlp_packed_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  FASTNN_CHECK(hidden >= 0 && out_features >= 0, ValueError, "fastnn::", op,
               ": hidden and out_features must not be negative, got ", hidden, ", ", out_features);
  FASTNN_CHECK(!(packed_factor && b_in), ValueError, "fastnn::", op, ": a gate has no b_in");
  MlpParams p = {};
  p.is_packed = true;
  p.activation = checked_activation(activation, op);
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.K = rows.columns;
  p.hidden = hidden;
  p.N = out_features;
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
  p.gated = packed_factor.has_value();
  p.packed_in = packed_of(packed_in, hidden, p.K, dtype, op, "packed_in");
  if (p.gated) p.packed_factor = packed_of(*packed_factor, hidden, p.K, dtype, op, "packed_factor");
  p.packed_out = packed_of(packed_out, p.N, hidden, dtype, op, "packed_out");
  const Bias in = bias_of(b_in, hidden, dtype, op, "b_in");
  const Bias out = bias_of(b_out, p.N, dtype, op, "b_out");
  p.b_in = in.data;
  p.b_in_stride = in.stride;
  p.b_out = out.data;
  p.b_out_stride = out.stride;
  Tensor output = new_output(output_sizes(sizes_of(input), p.N), dtype);
  p.y = output.mutable_data_ptr();
  mlp_fwd(p);
  return output;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "mlp_fwd(Tensor input, Tensor w_in, Tensor? b_in, Tensor? w_factor, Tensor w_out, Tensor? "
      "b_out, int activation, bool save, bool grad_handled=False) -> (Tensor, Tensor?, Tensor?)");
  m.def(
      "mlp_bwd(Tensor grad, Tensor input, Tensor w_in, Tensor? b_in, Tensor? w_factor, Tensor "
      "w_out, Tensor? z, Tensor? factor, int activation, bool[6] mask, bool grad_handled=False) -> "
      "(Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "mlp_packed_fwd(Tensor input, Tensor packed_in, Tensor? b_in, Tensor? packed_factor, Tensor "
      "packed_out, Tensor? b_out, SymInt hidden, SymInt out_features, int activation, bool "
      "grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) {
  m.impl("mlp_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("mlp_bwd", TORCH_BOX(&fastnn::bwd));
  m.impl("mlp_packed_fwd", TORCH_BOX(&fastnn::packed_fwd));
}
