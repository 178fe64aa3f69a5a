// torch.ops.fastnn.cross_entropy_fwd / cross_entropy_bwd.
#include "cpu/cross_entropy.h"

#include "bindings/tensor.h"
#include "cpu/dispatch.h"
#include "cuda/cross_entropy.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_cross_entropy_fwd
#pragma weak fastnn_cuda_cross_entropy_fwd_workspace
#pragma weak fastnn_cuda_cross_entropy_bwd
#pragma weak fastnn_cuda_cross_entropy_bwd_workspace

namespace fastnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kMean, kSum };  // torch's codes

// The parameters of a call, and the memory they point into.
struct Call {
  CrossEntropyParams p = {};
  int64_t reduction = kMean;
  Tensor x_holder, target_holder;
  OptionalTensor weight_holder;  // on CUDA
  std::vector<float> weight;

  const void* class_weight() const {
    return weight_holder ? weight_holder->const_data_ptr() : nullptr;
  }
  // Denominator of the mean: weights of the targets, or rows where the target is a distribution.
  double weight_of_row(int64_t r) const {
    if (p.target == nullptr) return 1.0;
    if (p.target[r] == p.ignore_index) return 0.0;
    return p.weight == nullptr ? 1.0 : p.weight[p.target[r]];
  }
  bool counts(int64_t r) const { return p.target == nullptr || p.target[r] != p.ignore_index; }
};

void read_call(Call& call, const char* op, const Tensor& input, const Tensor& target,
               const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
               double label_smoothing, double z_loss, double softcap) {
  CrossEntropyParams& p = call.p;
  p.dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() == 2, ValueError, "fastnn::", op,
               ": input must be (rows, classes), got shape ", shape_of(input));
  FASTNN_CHECK(reduction >= kNone && reduction <= kSum, ValueError, "fastnn::", op,
               ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  FASTNN_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, ValueError, "fastnn::", op,
               ": label_smoothing must be in [0, 1], got ", label_smoothing);
  FASTNN_CHECK(softcap >= 0.0, ValueError, "fastnn::", op, ": softcap must not be negative, got ",
               softcap);
  call.reduction = reduction;
  p.rows = input.size(0);
  p.classes = input.size(1);
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
  const Rows rows = rows_of(input, call.x_holder);
  p.x = rows.data;
  p.x_row_stride = rows.row_stride;
  if (rows.column_stride != 1) {
    call.x_holder = torch::stable::contiguous(input);
    p.x = call.x_holder.const_data_ptr();
    p.x_row_stride = p.classes;
  }
  check_device(target, op, "target");
  call.target_holder = target.is_contiguous() ? target : torch::stable::contiguous(target);
  if (target.scalar_type() == ScalarType::Long) {
    FASTNN_CHECK(target.dim() == 1 && target.size(0) == p.rows, ValueError, "fastnn::", op,
                 ": class indices must have shape (", p.rows, ",), got ", shape_of(target));
    p.target = static_cast<const int64_t*>(call.target_holder.const_data_ptr());
  } else {
    FASTNN_CHECK(
        checked_dtype(target, op, "target") == p.dtype, TypeError, "fastnn::", op,
        ": target must hold class indices (int64) or probabilities of the input's type, got ",
        dtype_name(target.scalar_type()));
    FASTNN_CHECK(sizes_of(target) == sizes_of(input), ValueError, "fastnn::", op,
                 ": probabilities must have the input's shape ", shape_of(input), ", got ",
                 shape_of(target));
    p.probabilities = call.target_holder.const_data_ptr();
  }
  if (weight) {
    FASTNN_CHECK(checked_dtype(*weight, op, "weight") == p.dtype && weight->dim() == 1 &&
                     weight->size(0) == p.classes,
                 ValueError, "fastnn::", op, ": weight must have shape (", p.classes,
                 ",) and the input's type, got ", shape_of(*weight), " ",
                 dtype_name(weight->scalar_type()));
  }
  if (DeviceScope::current().cuda()) {  // weights and targets are looked at there
    if (weight) call.weight_holder = torch::stable::contiguous(*weight);
    return;
  }
  if (weight) {
    call.weight.resize(static_cast<size_t>(p.classes));
    kernels().to_float32(weight->const_data_ptr(), weight->stride(0), p.dtype, p.classes,
                         call.weight.data());
    p.weight = call.weight.data();
    double sum = 0.0;
    for (const float w : call.weight) sum += w;
    p.weight_sum = static_cast<float>(sum);
  } else {
    p.weight_sum = static_cast<float>(p.classes);
  }
  const int64_t bad = first_bad_target(p);
  FASTNN_CHECK(bad < 0, IndexError, "fastnn::", op, ": target ", p.target[bad], " of row ", bad,
               " is neither in [0, ", p.classes, ") nor ignore_index = ", ignore_index);
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
  // In index order and in double: the same bits for any number of threads.
  double loss_sum = 0.0, z_sum = 0.0, weights = 0.0, count = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const auto i = static_cast<size_t>(r);
    if (reduction == kNone) {
      if (!row_z.empty()) row_loss[i] += row_z[i];
      continue;
    }
    loss_sum += row_loss[i];
    if (!row_z.empty()) z_sum += row_z[i];
    weights += call.weight_of_row(r);
    count += call.counts(r) ? 1.0 : 0.0;
  }
  auto* const divisor = static_cast<float*>(divisors.mutable_data_ptr());
  divisor[0] = reduction == kMean ? static_cast<float>(weights) : 1.f;
  divisor[1] = reduction == kMean ? static_cast<float>(count) : 1.f;
  if (reduction == kNone) {
    Tensor loss = new_output({rows}, call.p.dtype);
    kernels().from_float32(row_loss.data(), rows, call.p.dtype, loss.mutable_data_ptr());
    return {loss, stats, divisors};
  }
  if (reduction == kMean) {
    loss_sum /= weights;
    z_sum /= count;
  }
  const auto total = static_cast<float>(row_z.empty() ? loss_sum : loss_sum + z_sum);
  Tensor loss = new_output({}, call.p.dtype);
  kernels().from_float32(&total, 1, call.p.dtype, loss.mutable_data_ptr());
  return {loss, stats, divisors};
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
  const int64_t count = per_row ? rows : 1;
  std::vector<float> scale(static_cast<size_t>(count)), z_scale;
  kernels().to_float32(grad.const_data_ptr(), per_row ? grad.stride(0) : 1, grad_dtype, count,
                       scale.data());
  z_scale = scale;
  for (float& s : scale) s /= divisor[0];
  for (float& s : z_scale) s /= divisor[1];
  cross_entropy_bwd(
      {call.p, row_stats, scale.data(), z_scale.data(), per_row ? 1 : 0, dx.mutable_data_ptr()});
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
