// torch.ops.fastnn.linear_cross_entropy_fwd / linear_cross_entropy_bwd.
#include "cpu/linear_cross_entropy.h"

#include "bindings/loss.h"

namespace fastnn {
namespace {

// The parameters of a call, and the memory they point into.
struct Call : LossCall {
  LinearCrossEntropyParams linear = {};
  DType dtype = DType::kFloat32;
  Tensor x_holder;
};

// The three operands that gradients are taken of.
struct Operands {
  const Tensor& input;
  const Tensor& weight;
  const OptionalTensor& bias;
};

void check_like_input(const Tensor& t, DType dtype, const char* op, const char* argument) {
  const DType got = checked_dtype(t, op, argument);
  FASTNN_CHECK(got == dtype, TypeError, "fastnn::", op, ": ", argument,
               " must have the input's type ", dtype_name(scalar_type(dtype)), ", got ",
               dtype_name(scalar_type(got)));
}

void read_operands(Call& call, const char* op, const Operands& o) {
  LinearCrossEntropyParams& p = call.linear;
  call.dtype = checked_dtype(o.input, op, "input");
  check_like_input(o.weight, call.dtype, op, "linear_weight");
  FASTNN_CHECK(o.weight.dim() == 2, ValueError, "fastnn::", op,
               ": linear_weight must be (classes, in_features), got shape ", shape_of(o.weight));
  p.K = o.weight.size(1);
  FASTNN_CHECK(o.input.dim() == 2 && o.input.size(1) == p.K, ValueError, "fastnn::", op,
               ": input must be (rows, in_features = ", p.K, "), got shape ", shape_of(o.input));
  call.p.rows = o.input.size(0);
  call.p.classes = o.weight.size(0);
  const Rows x = rows_of(o.input, call.x_holder);
  p.x = {x.data, x.row_stride, x.column_stride, call.dtype};
  p.w = {o.weight.const_data_ptr(), o.weight.size(0) == 1 ? p.K : o.weight.stride(0),
         p.K == 1 ? 1 : o.weight.stride(1), call.dtype};
  if (!o.bias) return;
  check_like_input(*o.bias, call.dtype, op, "linear_bias");
  FASTNN_CHECK(o.bias->dim() == 1 && o.bias->size(0) == call.p.classes, ValueError, "fastnn::", op,
               ": linear_bias must have shape (", call.p.classes, ",), got ", shape_of(*o.bias));
  p.bias = o.bias->const_data_ptr();
  p.bias_stride = o.bias->stride(0);
}

void read_call(Call& call, const char* op, const Operands& o, const Tensor& target,
               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
               double label_smoothing, double z_loss, double softcap) {
  read_operands(call, op, o);
  read_loss_options(call, op, reduction, ignore_index, label_smoothing, z_loss, softcap);
  read_class_indices(call, op, target);
  read_class_weight(call, op, weight, {call.dtype, DType::kFloat32});
}

struct Gradients {
  OptionalTensor input, weight, bias;
};

Gradients new_gradients(Call& call, const char* op, const Operands& o,
                        const std::vector<bool>& mask) {
  FASTNN_CHECK(mask.size() == 3, ValueError, "fastnn::", op, ": mask must have 3 entries, got ",
               mask.size());
  FASTNN_CHECK(o.bias || !mask[2], ValueError, "fastnn::", op,
               ": there is no linear_bias whose gradient could be taken");
  Gradients g;
  LinearCrossEntropyParams& p = call.linear;
  if (mask[0]) {
    g.input = new_output(sizes_of(o.input), call.dtype);
    p.dx = g.input->mutable_data_ptr();
  }
  if (mask[1]) {
    g.weight = new_output(sizes_of(o.weight), call.dtype);
    p.dw = g.weight->mutable_data_ptr();
  }
  if (mask[2]) {
    g.bias = new_output({call.p.classes}, call.dtype);
    p.db = g.bias->mutable_data_ptr();
  }
  return g;
}

void set_scales(LinearCrossEntropyParams& p, const RowScales& scales) {
  p.scale = scales.loss.data();
  p.z_scale = scales.z.data();
  p.scale_stride = scales.stride;
}

// (loss (float32), stats (rows, 2), and the gradients of the loss that `mask` asks for).
std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor> fwd(
    const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
    const Tensor& target, const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, std::vector<bool> mask,
    bool grad_handled) {
  constexpr auto op = "linear_cross_entropy_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const Operands operands = {input, linear_weight, linear_bias};
  Call call;
  read_call(call, op, operands, target, weight, reduction, ignore_index, label_smoothing, z_loss,
            softcap);
  const Gradients g = new_gradients(call, op, operands, mask);
  FASTNN_CHECK(reduction != kNone || !(mask[0] || mask[1] || mask[2]), ValueError, "fastnn::", op,
               ": the gradients of unreduced losses are linear_cross_entropy_bwd's");
  Tensor stats = new_output({call.p.rows, 2}, DType::kFloat32);
  std::vector<float> row_loss(static_cast<size_t>(call.p.rows)),
      row_z(static_cast<size_t>(z_loss != 0.0 ? call.p.rows : 0));
  float divisors[2];
  set_divisors(call, divisors);
  const RowScales scales(divisors);
  LinearCrossEntropyParams& p = call.linear;
  p.loss = call.p;
  p.forward = true;
  p.row_loss = row_loss.data();
  p.row_z = row_z.empty() ? nullptr : row_z.data();
  p.stats = static_cast<float*>(stats.mutable_data_ptr());
  set_scales(p, scales);
  linear_cross_entropy(p);
  return {reduced_loss(call, row_loss, row_z, DType::kFloat32), stats, g.input, g.weight, g.bias};
}

// The gradients that `mask` asks for, from the logits computed again.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bwd(
    const Tensor& grad, const Tensor& input, const Tensor& linear_weight,
    const OptionalTensor& linear_bias, const Tensor& target, const OptionalTensor& weight,
    const Tensor& stats, int64_t reduction, int64_t ignore_index, double label_smoothing,
    double z_loss, double softcap, std::vector<bool> mask, bool grad_handled) {
  constexpr auto op = "linear_cross_entropy_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const Operands operands = {input, linear_weight, linear_bias};
  Call call;
  read_call(call, op, operands, target, weight, reduction, ignore_index, label_smoothing, z_loss,
            softcap);
  const int64_t rows = call.p.rows;
  FASTNN_CHECK(checked_dtype(stats, op, "stats") == DType::kFloat32 && stats.is_contiguous() &&
                   stats.numel() == 2 * rows,
               ValueError, "fastnn::", op, ": stats must be what linear_cross_entropy_fwd gave, (",
               rows, ", 2) float32; got ", shape_of(stats));
  const bool per_row = reduction == kNone;
  FASTNN_CHECK(checked_dtype(grad, op, "grad") == DType::kFloat32, TypeError, "fastnn::", op,
               ": grad must be float32 as the loss, got ", dtype_name(grad.scalar_type()));
  FASTNN_CHECK(per_row ? grad.dim() == 1 && grad.size(0) == rows : grad.numel() == 1, ValueError,
               "fastnn::", op, ": grad must have the loss's shape, got ", shape_of(grad));
  const Gradients g = new_gradients(call, op, operands, mask);
  float divisors[2];
  set_divisors(call, divisors);
  const RowScales scales(call, grad, DType::kFloat32, divisors);
  LinearCrossEntropyParams& p = call.linear;
  p.loss = call.p;
  // Backward reads them only.
  p.stats = const_cast<float*>(static_cast<const float*>(stats.const_data_ptr()));
  set_scales(p, scales);
  linear_cross_entropy(p);
  return {g.input, g.weight, g.bias};
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor "
      "target, Tensor? weight, int reduction, SymInt ignore_index, float label_smoothing, float "
      "z_loss, float softcap, bool[3] mask, bool grad_handled=False) -> (Tensor, Tensor, Tensor?, "
      "Tensor?, Tensor?)");
  m.def(
      "linear_cross_entropy_bwd(Tensor grad, Tensor input, Tensor linear_weight, Tensor? "
      "linear_bias, Tensor target, Tensor? weight, Tensor stats, int reduction, SymInt "
      "ignore_index, float label_smoothing, float z_loss, float softcap, bool[3] mask, bool "
      "grad_handled=False) -> (Tensor?, Tensor?, Tensor?)");
}
FASTNN_KERNELS(m) {
  m.impl("linear_cross_entropy_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("linear_cross_entropy_bwd", TORCH_BOX(&fastnn::bwd));
}
