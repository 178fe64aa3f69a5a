#include "bindings/loss.h"

#include "cpu/cross_entropy.h"
#include "cpu/dispatch.h"

namespace fastnn {
namespace {

// Weights of the targets, or ones where the target is a distribution.
double weight_of_row(const CrossEntropyParams& p, int64_t r) {
  if (p.target == nullptr) return 1.0;
  if (p.target[r] == p.ignore_index) return 0.0;
  return p.weight == nullptr ? 1.0 : p.weight[p.target[r]];
}

struct Divisors {
  double weights = 0.0, count = 0.0;
};
Divisors divisors_of(const CrossEntropyParams& p) {
  Divisors found;
  for (int64_t r = 0; r < p.rows; ++r) {
    found.weights += weight_of_row(p, r);
    found.count += p.target == nullptr || p.target[r] != p.ignore_index ? 1.0 : 0.0;
  }
  return found;
}

}  // namespace

void read_loss_options(LossCall& call, const char* op, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, double z_loss, double softcap) {
  FASTNN_CHECK(reduction >= kNone && reduction <= kSum, ValueError, "fastnn::", op,
               ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  FASTNN_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, ValueError, "fastnn::", op,
               ": label_smoothing must be in [0, 1], got ", label_smoothing);
  FASTNN_CHECK(softcap >= 0.0, ValueError, "fastnn::", op, ": softcap must not be negative, got ",
               softcap);
  call.reduction = reduction;
  call.p.ignore_index = ignore_index;
  call.p.label_smoothing = static_cast<float>(label_smoothing);
  call.p.z_loss = static_cast<float>(z_loss);
  call.p.softcap = static_cast<float>(softcap);
}

void read_class_indices(LossCall& call, const char* op, const Tensor& target) {
  check_device(target, op, "target");
  FASTNN_CHECK(target.scalar_type() == ScalarType::Long, TypeError, "fastnn::", op,
               ": target must hold class indices (int64), got ", dtype_name(target.scalar_type()));
  FASTNN_CHECK(target.dim() == 1 && target.size(0) == call.p.rows, ValueError, "fastnn::", op,
               ": class indices must have shape (", call.p.rows, ",), got ", shape_of(target));
  call.target_holder = target.is_contiguous() ? target : torch::stable::contiguous(target);
  call.p.target = static_cast<const int64_t*>(call.target_holder.const_data_ptr());
}

void read_class_weight(LossCall& call, const char* op, const OptionalTensor& weight,
                       const WeightTypes& types) {
  CrossEntropyParams& p = call.p;
  DType dtype = types.input;
  if (weight) {
    dtype = checked_dtype(*weight, op, "weight");
    FASTNN_CHECK((dtype == types.input || dtype == types.other) && weight->dim() == 1 &&
                     weight->size(0) == p.classes,
                 ValueError, "fastnn::", op, ": weight must have shape (", p.classes,
                 ",) and the input's type", types.other == types.input ? "" : " or float32",
                 ", got ", shape_of(*weight), " ", dtype_name(weight->scalar_type()));
  }
  if (DeviceScope::current().cuda()) {  // weights and targets are looked at there
    if (weight) call.weight_holder = torch::stable::contiguous(*weight);
    return;
  }
  if (weight) {
    call.weight.resize(static_cast<size_t>(p.classes));
    kernels().to_float32(weight->const_data_ptr(), weight->stride(0), dtype, p.classes,
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
               " is neither in [0, ", p.classes, ") nor ignore_index = ", p.ignore_index);
}

void set_divisors(const LossCall& call, float* divisors) {
  const bool mean = call.reduction == kMean;
  const Divisors found = divisors_of(call.p);
  divisors[0] = mean ? static_cast<float>(found.weights) : 1.f;
  divisors[1] = mean ? static_cast<float>(found.count) : 1.f;
}

Tensor reduced_loss(const LossCall& call, const std::vector<float>& row_loss,
                    const std::vector<float>& row_z, DType dtype) {
  const int64_t rows = call.p.rows;
  if (call.reduction == kNone) {
    std::vector<float> sum = row_loss;
    for (size_t r = 0; r < row_z.size(); ++r) sum[r] += row_z[r];
    Tensor loss = new_output({rows}, dtype);
    kernels().from_float32(sum.data(), rows, dtype, loss.mutable_data_ptr());
    return loss;
  }
  double loss_sum = 0.0, z_sum = 0.0;
  for (const float one : row_loss) loss_sum += one;
  for (const float one : row_z) z_sum += one;
  if (call.reduction == kMean) {
    const Divisors found = divisors_of(call.p);
    loss_sum /= found.weights;
    z_sum /= found.count;
  }
  const auto total = static_cast<float>(row_z.empty() ? loss_sum : loss_sum + z_sum);
  Tensor loss = new_output({}, dtype);
  kernels().from_float32(&total, 1, dtype, loss.mutable_data_ptr());
  return loss;
}

RowScales::RowScales(const LossCall& call, const Tensor& grad, DType grad_dtype,
                     const float* divisors)
    : stride(call.reduction == kNone ? 1 : 0) {
  const int64_t count = stride == 1 ? call.p.rows : 1;
  loss.resize(static_cast<size_t>(count));
  kernels().to_float32(grad.const_data_ptr(), stride == 1 ? grad.stride(0) : 1, grad_dtype, count,
                       loss.data());
  z = loss;
  for (float& s : loss) s /= divisors[0];
  for (float& s : z) s /= divisors[1];
}

RowScales::RowScales(const float* divisors)
    : loss{1.f / divisors[0]}, z{1.f / divisors[1]}, stride(0) {}

}  // namespace fastnn
