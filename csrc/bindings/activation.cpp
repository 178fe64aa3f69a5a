// torch.ops.fastnn.activation_fwd / activation_bwd.
#include "cpu/activation.h"

#include "bindings/rows.h"
#include "cuda/activation.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_activation_fwd
#pragma weak fastnn_cuda_activation_fwd_workspace
#pragma weak fastnn_cuda_activation_bwd
#pragma weak fastnn_cuda_activation_bwd_workspace

namespace fastnn {
namespace {

constexpr auto kLast = "the input's last dimension";

Activation checked_activation(int64_t code, const char* op) {
  FASTNN_CHECK(code >= 1 && code < kActivationCount, ValueError, "fastnn::", op,
               ": activation must be a code in [1, ", kActivationCount - 1, "], got ", code);
  return static_cast<Activation>(code);
}

// Input and factor, apart or as the halves of one tensor's rows, and what they make.
struct Operands {
  std::vector<int64_t> sizes;  // of the result
  RowExtents extents;
  RowSource x, factor = {nullptr, 0};
};
Operands operands_of(const Tensor& input, const OptionalTensor& factor, bool has_bias, bool packed,
                     const char* op, Tensor& input_holder, Tensor& factor_holder) {
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(!(packed && factor), ValueError, "fastnn::", op,
               ": packed means that input holds the factor: there must be no other");
  FASTNN_CHECK(!(has_bias && (packed || factor)), ValueError, "fastnn::", op,
               ": a product has no bias");
  Operands found;
  found.sizes = sizes_of(input);
  found.extents = extents_of_last(found.sizes, found.sizes.empty() ? 0 : 1);
  found.x = row_source(input, found.extents, input_holder);
  if (factor) {
    found.factor =
        row_source_like(*factor, "factor", input, found.sizes, found.extents, op, factor_holder);
  }
  if (packed) {
    FASTNN_CHECK(!found.sizes.empty() && found.extents.columns % 2 == 0, ValueError, "fastnn::", op,
                 ": the last dimension of a packed input holds two halves, so its size must be "
                 "even; got shape ",
                 shape_of(input));
    found.sizes.back() /= 2;
    found.extents = extents_of_last(found.sizes, 1);
    found.factor = {
        static_cast<const char*>(found.x.data) + found.extents.columns * element_bytes(dtype),
        found.x.row_stride};
  }
  return found;
}

Tensor fwd(const Tensor& input, const OptionalTensor& factor, const OptionalTensor& bias,
           int64_t activation, bool packed, bool grad_handled) {
  constexpr auto op = "activation_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  Tensor input_holder, factor_holder, bias_holder;
  const Operands given =
      operands_of(input, factor, bias.has_value(), packed, op, input_holder, factor_holder);
  ActivationParams p = {};
  p.activation = checked_activation(activation, op);
  p.dtype = p.bias_dtype = *kernel_dtype(input.scalar_type());
  if (bias) p.bias_dtype = parameter_dtype(bias->scalar_type(), p.dtype, op, "bias");
  const Elements b = elements_of(bias, "bias", given.extents, kLast, op, bias_holder);
  p.rows = given.extents.rows;
  p.columns = given.extents.columns;
  p.x = given.x.data;
  p.x_row_stride = given.x.row_stride;
  p.factor = given.factor.data;
  p.factor_row_stride = given.factor.row_stride;
  p.bias = b.data;
  p.bias_stride = b.stride;
  Tensor output = new_output(given.sizes, p.dtype);
  p.y = output.mutable_data_ptr();
  scope.cuda() ? FASTNN_CUDA_KERNEL(activation_fwd)(p) : activation_fwd(p);
  return output;
}

// (gradient of input, of factor, of bias); of a packed input, one gradient of both halves.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bwd(
    const Tensor& grad, const Tensor& input, const OptionalTensor& factor,
    const OptionalTensor& bias, int64_t activation, bool packed, std::vector<bool> mask,
    bool grad_handled) {
  constexpr auto op = "activation_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  FASTNN_CHECK(mask.size() == 3, ValueError, "fastnn::", op, ": mask must have 3 entries, got ",
               mask.size());
  Tensor grad_holder, input_holder, factor_holder, bias_holder;
  const Operands given =
      operands_of(input, factor, bias.has_value(), packed, op, input_holder, factor_holder);
  FASTNN_CHECK(factor || !mask[1], ValueError, "fastnn::", op,
               ": a gradient of factor is wanted and there is none");
  FASTNN_CHECK(bias || !mask[2], ValueError, "fastnn::", op,
               ": a gradient of bias is wanted and there is none");
  ActivationBwdParams p = {};
  p.activation = checked_activation(activation, op);
  p.dtype = p.bias_dtype = *kernel_dtype(input.scalar_type());
  if (bias) p.bias_dtype = parameter_dtype(bias->scalar_type(), p.dtype, op, "bias");
  const Elements b = elements_of(bias, "bias", given.extents, kLast, op, bias_holder);
  const RowSource dy =
      row_source_like(grad, "grad", input, given.sizes, given.extents, op, grad_holder);
  p.rows = given.extents.rows;
  p.columns = given.extents.columns;
  p.dy = dy.data;
  p.dy_row_stride = dy.row_stride;
  p.x = given.x.data;
  p.x_row_stride = given.x.row_stride;
  p.factor = given.factor.data;
  p.factor_row_stride = given.factor.row_stride;
  p.bias = b.data;
  p.bias_stride = b.stride;
  p.d_row_stride = packed ? 2 * p.columns : p.columns;
  OptionalTensor dx, d_factor, db;
  if (mask[0]) {
    p.dx = (dx = new_output(sizes_of(input), p.dtype))->mutable_data_ptr();
    if (packed) p.d_factor = static_cast<char*>(p.dx) + p.columns * element_bytes(p.dtype);
  }
  if (mask[1]) p.d_factor = (d_factor = new_output(given.sizes, p.dtype))->mutable_data_ptr();
  if (mask[2]) p.db = (db = new_output(given.extents.row_shape, p.bias_dtype))->mutable_data_ptr();
  scope.cuda() ? FASTNN_CUDA_KERNEL(activation_bwd)(p) : activation_bwd(p);
  return {dx, d_factor, db};
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("activation_fwd", TORCH_BOX(&fwd));
  m.impl("activation_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "activation_fwd(Tensor input, Tensor? factor, Tensor? bias, int activation, bool packed, "
      "bool grad_handled=False) -> Tensor");
  m.def(
      "activation_bwd(Tensor grad, Tensor input, Tensor? factor, Tensor? bias, int activation, "
      "bool packed, bool[3] mask, bool grad_handled=False) -> (Tensor?, Tensor?, Tensor?)");
}
FASTNN_KERNELS(m) { fastnn::implement(m); }
#if defined(FASTNN_CUDA_ACTIVATION) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
