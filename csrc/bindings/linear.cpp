// torch.ops.fastnn.linear_fwd / linear_bwd / linear_pack / linear_packed_fwd.
#include "cpu/linear.h"

#include "bindings/linear.h"
#include "cuda/linear.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_linear_fwd
#pragma weak fastnn_cuda_linear_fwd_workspace
#pragma weak fastnn_cuda_linear_bwd
#pragma weak fastnn_cuda_linear_bwd_workspace

namespace fastnn {
namespace {

// The launchers, told what torch allows (device.h).
const CudaKernel<LinearParams> cuda_fwd = {
    "linear_fwd", &fastnn_cuda_linear_fwd_workspace,
    [](const LinearParams* p, void* workspace, void* stream) {
      return fastnn_cuda_linear_fwd(p, allow_tf32() ? 1 : 0, workspace, stream);
    }};
const CudaKernel<LinearBwdParams> cuda_bwd = {
    "linear_bwd", &fastnn_cuda_linear_bwd_workspace,
    [](const LinearBwdParams* p, void* workspace, void* stream) {
      return fastnn_cuda_linear_bwd(p, allow_tf32() ? 1 : 0, workspace, stream);
    }};

Activation checked_activation(int64_t code, const char* op) {
  FASTNN_CHECK(code >= 0 && code < kLinearActivationCount, ValueError, "fastnn::", op,
               ": activation must be a code in [0, ", kLinearActivationCount - 1, "], got ", code);
  return static_cast<Activation>(code);
}

void set_bias(LinearParams& p, const OptionalTensor& bias, const char* op) {
  if (!bias) return;
  check_same_dtype(checked_dtype(*bias, op, "bias"), p.x.dtype, op, "bias");
  FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == p.N, ValueError, "fastnn::", op,
               ": bias must have shape (", p.N, ",), got ", shape_of(*bias));
  p.bias = bias->const_data_ptr();
  p.bias_stride = bias->stride(0);
}

void set_input(LinearParams& p, const Tensor& input, DType dtype, Tensor& holder) {
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.K = rows.columns;
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
}

std::tuple<Tensor, OptionalTensor> fwd(const Tensor& input, const Tensor& weight,
                                       const OptionalTensor& bias, int64_t activation,
                                       bool save_pre, bool grad_handled) {
  constexpr auto op = "linear_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  check_same_dtype(checked_dtype(weight, op, "weight"), dtype, op, "weight");
  check_weight(weight, op);
  check_input(input, weight.size(1), op);
  LinearParams p = {};
  p.N = weight.size(0);
  p.w = weight_matrix(weight, dtype);
  p.activation = checked_activation(activation, op);
  Tensor holder;
  set_input(p, input, dtype, holder);
  set_bias(p, bias, op);
  const auto sizes = output_sizes(sizes_of(input), p.N);
  Tensor output = new_output(sizes, dtype);
  OptionalTensor pre;
  if (save_pre) pre = new_output(sizes, dtype);
  p.y = output.mutable_data_ptr();
  p.pre = pre ? pre->mutable_data_ptr() : nullptr;
  scope.cuda() ? cuda_fwd(p) : linear_fwd(p);
  return {output, pre};
}

Tensor pack(const Tensor& weight, bool grad_handled) {
  check_grad_handled(grad_handled, "linear_pack");
  const DeviceScope scope(weight);
  const DType dtype = checked_dtype(weight, "linear_pack", "weight");
  check_weight(weight, "linear_pack");
  const int64_t N = weight.size(0), K = weight.size(1);
  Tensor packed = new_kept(linear_packed_bytes(N, K, dtype) / 4);
  linear_pack(weight_matrix(weight, dtype), N, K, packed.mutable_data_ptr());
  return packed;
}

Tensor packed_fwd(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
                  int64_t out_features, int64_t activation, bool grad_handled) {
  constexpr auto op = "linear_packed_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  FASTNN_CHECK(out_features >= 0, ValueError, "fastnn::", op,
               ": out_features must not be negative, got ", out_features);
  const int64_t in_features = input.size(input.dim() - 1);
  FASTNN_CHECK(checked_dtype(packed, op, "packed") == DType::kFloat32 && packed.is_contiguous() &&
                   packed.numel() * 4 == linear_packed_bytes(out_features, in_features, dtype),
               ValueError, "fastnn::", op, ": packed must be what linear_pack gives for a ",
               dtype_name(input.scalar_type()), " weight of shape (", out_features, ", ",
               in_features, ") on the instruction set in force, ",
               linear_packed_bytes(out_features, in_features, dtype) / 4,
               " contiguous float32 values; got shape ", shape_of(packed));
  LinearParams p = {};
  p.N = out_features;
  p.is_packed = true;
  p.packed = packed.const_data_ptr();
  p.activation = checked_activation(activation, op);
  Tensor holder;
  set_input(p, input, dtype, holder);
  set_bias(p, bias, op);
  Tensor output = new_output(output_sizes(sizes_of(input), p.N), dtype);
  p.y = output.mutable_data_ptr();
  linear_fwd(p);
  return output;
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bwd(
    const Tensor& grad, const OptionalTensor& input, const Tensor& weight,
    const OptionalTensor& slope, int64_t activation, std::vector<int64_t> input_shape,
    std::vector<bool> mask, bool grad_handled) {
  constexpr auto op = "linear_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(grad);
  FASTNN_CHECK(mask.size() == 3, ValueError, "fastnn::", op, ": mask must have 3 entries, got ",
               mask.size());
  const DType dtype = checked_dtype(grad, op, "grad");
  check_same_dtype(checked_dtype(weight, op, "weight"), dtype, op, "weight");
  check_weight(weight, op);
  LinearBwdParams p = {};
  p.N = weight.size(0);
  p.K = weight.size(1);
  FASTNN_CHECK(!input_shape.empty() && input_shape.back() == p.K, ValueError, "fastnn::", op,
               ": input_shape must end with in_features = ", p.K, ", got ",
               shape_text(input_shape));
  const auto grad_shape = output_sizes(input_shape, p.N);
  FASTNN_CHECK(sizes_of(grad) == grad_shape, ValueError, "fastnn::", op,
               ": grad must have the output's shape ", shape_text(grad_shape), ", got ",
               shape_of(grad));
  p.activation = checked_activation(activation, op);
  Tensor grad_holder, input_holder, slope_holder;
  const Rows dy = rows_of(grad, grad_holder);
  p.M = dy.rows;
  p.dy = {dy.data, dy.row_stride, dy.column_stride, dtype};
  p.w = weight_matrix(weight, dtype);
  if (p.activation != Activation::kNone) {
    FASTNN_CHECK(slope && sizes_of(*slope) == grad_shape, ValueError, "fastnn::", op,
                 ": slope must have the output's shape ", shape_text(grad_shape), ", got ",
                 slope ? shape_of(*slope) : "None");
    check_same_dtype(checked_dtype(*slope, op, "slope"), dtype, op, "slope");
    slope_holder = slope->is_contiguous() ? *slope : torch::stable::contiguous(*slope);
    p.slope = slope_holder.const_data_ptr();
  }
  OptionalTensor dx, dw, db;
  if (mask[1]) {
    FASTNN_CHECK(input && sizes_of(*input) == input_shape, ValueError, "fastnn::", op,
                 ": input must have input_shape ", shape_text(input_shape),
                 " for the gradient of the weight, got ", input ? shape_of(*input) : "None");
    check_same_dtype(checked_dtype(*input, op, "input"), dtype, op, "input");
    const Rows x = rows_of(*input, input_holder);
    p.x = {x.data, x.row_stride, x.column_stride, dtype};
    dw = new_output({p.N, p.K}, dtype);
    p.dw = dw->mutable_data_ptr();
  }
  if (mask[0]) {
    dx = new_output(input_shape, dtype);
    p.dx = dx->mutable_data_ptr();
  }
  if (mask[2]) {
    db = new_output({p.N}, dtype);
    p.db = db->mutable_data_ptr();
  }
  scope.cuda() ? cuda_bwd(p) : linear_bwd(p);
  return {dx, dw, db};
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("linear_fwd", TORCH_BOX(&fwd));
  m.impl("linear_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "linear_fwd(Tensor input, Tensor weight, Tensor? bias, int activation, bool save_pre, bool "
      "grad_handled=False) "
      "-> (Tensor, Tensor?)");
  m.def(
      "linear_bwd(Tensor grad, Tensor? input, Tensor weight, Tensor? slope, int activation, "
      "SymInt[] input_shape, "
      "bool[3] mask, bool grad_handled=False) -> (Tensor?, Tensor?, Tensor?)");
  m.def("linear_pack(Tensor weight, bool grad_handled=False) -> Tensor");
  m.def(
      "linear_packed_fwd(Tensor input, Tensor packed, Tensor? bias, SymInt out_features, int "
      "activation, "
      "bool grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) {
  fastnn::implement(m);
  m.impl("linear_pack", TORCH_BOX(&fastnn::pack));
  m.impl("linear_packed_fwd", TORCH_BOX(&fastnn::packed_fwd));
}
#if defined(FASTNN_CUDA_LINEAR) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
