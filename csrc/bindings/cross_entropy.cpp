// torch.ops.fastnn.cross_entropy_fwd / cross_entropy_bwd.
#include "cpu/cross_entropy.h"

#include "bindings/loss.h"
#include "cuda/cross_entropy.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_cross_entropy_fwd
#pragma weak fastnn_cuda_cross_entropy_fwd_workspace
#pragma weak fastnn_cuda_cross_entropy_bwd
#pragma weak fastnn_cuda_cross_entropy_bwd_workspace

namespace fastnn {
namespace {

// The parameters of a call, and the memory they point into.
struct Call : LossCall {
  Tensor x_holder;
};

void read_call(Call& call, const char* op, const Tensor& input, const Tensor& target,
               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
               double label_smoothing, double z_loss, double softcap) {
  CrossEntropyParams& p = call.p;
  p.dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() == 2, ValueError, "fastnn::", op,
               ": input must be (rows, classes), got shape ", shape_of(input));
  read_loss_options(call, op, reduction, ignore_index, label_smoothing, z_loss, softcap);
  p.rows = input.size(0);
  p.classes = input.size(1);
  const Rows rows = rows_of(input, call.x_holder);
  p.x = rows.data;
  p.x_row_stride = rows.row_stride;
  if (rows.column_stride != 1) {
    call.x_holder = torch::stable::contiguous(input);
    p.x = call.x_holder.const_data_ptr();
    p.x_row_stride = p.classes;
  }
  if (target.scalar_type() == ScalarType::Long) {
    read_class_indices(call, op, target);
  } else {
    check_device(target, op, "target");
    call.target_holder = target.is_contiguous() ? target : torch::stable::contiguous(target);
    FASTNN_CHECK(
        checked_dtype(target, op, "target") == p.dtype, TypeError, "fastnn::", op,
        ": target must hold class indices (int64) or probabilities of the input's type, got ",
        dtype_name(target.scalar_type()));
    FASTNN_CHECK(sizes_of(target) == sizes_of(input), ValueError, "fastnn::", op,
                 ": probabilities must have the input's shape ", shape_of(input), ", got ",
                 shape_of(target));
    p.probabilities = call.target_holder.const_data_ptr();
  }
  read_class_weight(call, op, weight, {p.dtype, p.dtype});
}

// (loss, stats (rows, 2), divisors (2)): the mean divides the loss by the first and the z term by
// the second.
std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& input, const Tensor& target,
                                       const OptionalTensor& weight, int64_t reduction,
                                       int64_t ignore_index, double label_smoothing, double z_loss,
                                       double softcap, bool grad_handled) {
  constexpr auto op = "cross_entropy_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  Call call;
  read_call(call, op, input, target, weight, reduction, ignore_index, label_smoothing, z_loss,
            softcap);
  const int64_t rows = call.p.rows;
  Tensor stats = new_output({rows, 2}, DType::kFloat32);
  Tensor divisors = new_output({2}, DType::kFloat32);
  if (scope.cuda()) {
    Tensor loss = new_output(
        reduction == kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{}, call.p.dtype);
    const CudaLossFwdParams f = {call.p,
                                 call.class_weight(),
                                 static_cast<LossReduction>(reduction),
                                 loss.mutable_data_ptr(),
                                 static_cast<float*>(stats.mutable_data_ptr()),
                                 static_cast<float*>(divisors.mutable_data_ptr())};
    FASTNN_CUDA_KERNEL(cross_entropy_fwd)(f);
    return {loss, stats, divisors};
  }
  std::vector<float> row_loss(static_cast<size_t>(rows)),
      row_z(static_cast<size_t>(z_loss != 0.0 ? rows : 0));
  cross_entropy_fwd({call.p, row_loss.data(), z_loss != 0.0 ? row_z.data() : nullptr,
                     static_cast<float*>(stats.mutable_data_ptr())});
  auto* const divisor = static_cast<float*>(divisors.mutable_data_ptr());
  set_divisors(call, divisor);
  return {reduced_loss(call, row_loss, row_z, call.p.dtype), stats, divisors};
}

Tensor bwd(const Tensor& grad, const Tensor& input, const Tensor& target,
           const OptionalTensor& weight, const Tensor& stats, const Tensor& divisors,
           int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
           double softcap, bool grad_handled) {
  constexpr auto op = "cross_entropy_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  Call call;
  read_call(call, op, input, target, weight, reduction, ignore_index, label_smoothing, z_loss,
            softcap);
  const int64_t rows = call.p.rows;
  FASTNN_CHECK(checked_dtype(stats, op, "stats") == DType::kFloat32 && stats.is_contiguous() &&
                   stats.numel() == 2 * rows,
               ValueError, "fastnn::", op, ": stats must be what cross_entropy_fwd gave, (", rows,
               ", 2) float32; got ", shape_of(stats));
  FASTNN_CHECK(checked_dtype(divisors, op, "divisors") == DType::kFloat32 &&
                   divisors.is_contiguous() && divisors.numel() == 2,
               ValueError, "fastnn::", op,
               ": divisors must be what cross_entropy_fwd gave, (2,) float32; got ",
               shape_of(divisors));
  const DType grad_dtype = checked_dtype(grad, op, "grad");
  FASTNN_CHECK(grad_dtype == call.p.dtype, TypeError, "fastnn::", op,
               ": grad must have the input's type, got ", dtype_name(grad.scalar_type()));
  const bool per_row = reduction == kNone;
  FASTNN_CHECK(per_row ? grad.dim() == 1 && grad.size(0) == rows : grad.numel() == 1, ValueError,
               "fastnn::", op, ": grad must have the loss's shape, got ", shape_of(grad));
  Tensor dx = new_output(sizes_of(input), call.p.dtype);
  const auto* const row_stats = static_cast<const float*>(stats.const_data_ptr());
  const auto* const divisor = static_cast<const float*>(divisors.const_data_ptr());
  if (scope.cuda()) {
    const CudaLossBwdParams b = {call.p,
                                 call.class_weight(),
                                 grad.const_data_ptr(),
                                 per_row ? grad.stride(0) : 0,
                                 row_stats,
                                 divisor,
                                 dx.mutable_data_ptr()};
    FASTNN_CUDA_KERNEL(cross_entropy_bwd)(b);
    return dx;
  }
  const RowScales scales(call, grad, grad_dtype, divisor);
  cross_entropy_bwd({call.p, row_stats, scales.loss.data(), scales.z.data(), scales.stride,
                     dx.mutable_data_ptr()});
  return dx;
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int reduction, SymInt "
      "ignore_index, "
      "float label_smoothing, float z_loss, float softcap, bool grad_handled=False) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "cross_entropy_bwd(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
      "Tensor divisors, "
      "int reduction, SymInt ignore_index, float label_smoothing, float z_loss, float softcap, "
      "bool grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) { fastnn::implement(m); }
#if defined(FASTNN_CUDA_CROSS_ENTROPY) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
