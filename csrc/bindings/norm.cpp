// torch.ops.fastnn.norm_fwd / norm_bwd.
#include "cpu/norm.h"

#include "bindings/rows.h"
#include "cuda/norm.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_norm_fwd
#pragma weak fastnn_cuda_norm_fwd_workspace
#pragma weak fastnn_cuda_norm_bwd
#pragma weak fastnn_cuda_norm_bwd_workspace

namespace fastnn {
namespace {

RowExtents extents_of(const std::vector<int64_t>& sizes, int64_t dims, const char* op) {
  const auto rank = static_cast<int64_t>(sizes.size());
  FASTNN_CHECK(dims >= 1 && dims <= rank, ValueError, "fastnn::", op,
               ": dims, how many of the last dimensions are normalized, must be in [1, ", rank,
               "], got ", dims);
  return extents_of_last(sizes, dims);
}

constexpr auto kNormalized = "the normalized dimensions";

// (output, input + residual, (rows, 2) mean and rstd)
std::tuple<Tensor, OptionalTensor, OptionalTensor> fwd(const Tensor& input,
                                                       const OptionalTensor& residual,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias, int64_t dims,
                                                       double eps, bool rms, bool save_stats,
                                                       bool grad_handled) {
  constexpr auto op = "norm_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  NormParams p = {};
  p.dtype = p.parameter_dtype = checked_dtype(input, op, "input");
  const auto sizes = sizes_of(input);
  const RowExtents e = extents_of(sizes, dims, op);
  FASTNN_CHECK(!(rms && bias), ValueError, "fastnn::", op, ": RMS norm has no bias");
  if (weight) p.parameter_dtype = parameter_dtype(weight->scalar_type(), p.dtype, op, "weight");
  if (bias) {
    const DType of_bias = parameter_dtype(bias->scalar_type(), p.dtype, op, "bias");
    FASTNN_CHECK(!weight || of_bias == p.parameter_dtype, TypeError, "fastnn::", op,
                 ": bias must have the weight's type ", dtype_name(scalar_type(p.parameter_dtype)),
                 ", got ", dtype_name(bias->scalar_type()));
    p.parameter_dtype = of_bias;
  }
  Tensor input_holder, residual_holder, weight_holder, bias_holder;
  const Elements w = elements_of(weight, "weight", e, kNormalized, op, weight_holder);
  const Elements b = elements_of(bias, "bias", e, kNormalized, op, bias_holder);
  const RowSource x = row_source(input, e, input_holder);
  p.rows = e.rows;
  p.columns = e.columns;
  p.x = x.data;
  p.x_row_stride = x.row_stride;
  p.weight = w.data;
  p.weight_stride = w.stride;
  p.bias = b.data;
  p.bias_stride = b.stride;
  p.eps = static_cast<float>(eps);
  p.rms = rms;
  OptionalTensor total, stats;
  if (residual) {
    const RowSource r =
        row_source_like(*residual, "residual", input, sizes, e, op, residual_holder);
    p.residual = r.data;
    p.residual_row_stride = r.row_stride;
    total = new_output(sizes, p.dtype);
    p.total = total->mutable_data_ptr();
  }
  if (save_stats) {
    stats = new_output({e.rows, 2}, DType::kFloat32);
    p.stats = static_cast<float*>(stats->mutable_data_ptr());
  }
  Tensor output = new_output(sizes, p.dtype);
  p.y = output.mutable_data_ptr();
  scope.cuda() ? FASTNN_CUDA_KERNEL(norm_fwd)(p) : norm_fwd(p);
  return {output, total, stats};
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bwd(
    const Tensor& grad, const OptionalTensor& grad_total, const Tensor& input,
    const OptionalTensor& weight, const Tensor& stats, int64_t dims, bool rms,
    ScalarType weight_dtype, std::vector<bool> mask, bool grad_handled) {
  constexpr auto op = "norm_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  FASTNN_CHECK(mask.size() == 3, ValueError, "fastnn::", op, ": mask must have 3 entries, got ",
               mask.size());
  NormBwdParams p = {};
  p.dtype = checked_dtype(input, op, "input");
  p.parameter_dtype = parameter_dtype(weight_dtype, p.dtype, op, "weight_dtype");
  const auto sizes = sizes_of(input);
  const RowExtents e = extents_of(sizes, dims, op);
  FASTNN_CHECK(!weight || weight->scalar_type() == weight_dtype, TypeError, "fastnn::", op,
               ": weight must have weight_dtype ", dtype_name(weight_dtype), ", got ",
               weight ? dtype_name(weight->scalar_type()) : "");
  FASTNN_CHECK(checked_dtype(stats, op, "stats") == DType::kFloat32 && stats.is_contiguous() &&
                   sizes_of(stats) == std::vector<int64_t>({e.rows, 2}),
               ValueError, "fastnn::", op,
               ": stats must be what norm_fwd gave, contiguous float32 (", e.rows, ", 2); got ",
               dtype_name(stats.scalar_type()), " ", shape_of(stats));
  Tensor grad_holder, total_holder, input_holder, weight_holder;
  const RowSource dy = row_source_like(grad, "grad", input, sizes, e, op, grad_holder);
  const RowSource x = row_source(input, e, input_holder);
  const Elements w = elements_of(weight, "weight", e, kNormalized, op, weight_holder);
  p.rows = e.rows;
  p.columns = e.columns;
  p.dy = dy.data;
  p.dy_row_stride = dy.row_stride;
  p.x = x.data;
  p.x_row_stride = x.row_stride;
  p.weight = w.data;
  p.weight_stride = w.stride;
  p.stats = static_cast<const float*>(stats.const_data_ptr());
  p.rms = rms;
  if (grad_total) {
    const RowSource d_total =
        row_source_like(*grad_total, "grad_total", input, sizes, e, op, total_holder);
    p.d_total = d_total.data;
    p.d_total_row_stride = d_total.row_stride;
  }
  OptionalTensor dx, dw, db;
  if (mask[0]) p.dx = (dx = new_output(sizes, p.dtype))->mutable_data_ptr();
  if (mask[1]) p.dw = (dw = new_output(e.row_shape, p.parameter_dtype))->mutable_data_ptr();
  if (mask[2]) p.db = (db = new_output(e.row_shape, p.parameter_dtype))->mutable_data_ptr();
  scope.cuda() ? FASTNN_CUDA_KERNEL(norm_bwd)(p) : norm_bwd(p);
  return {dx, dw, db};
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("norm_fwd", TORCH_BOX(&fwd));
  m.impl("norm_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "norm_fwd(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps, "
      "bool rms, bool save_stats, bool grad_handled=False) -> (Tensor, Tensor?, Tensor?)");
  m.def(
      "norm_bwd(Tensor grad, Tensor? grad_total, Tensor input, Tensor? weight, Tensor stats, int "
      "dims, bool rms, ScalarType weight_dtype, bool[3] mask, bool grad_handled=False) -> "
      "(Tensor?, "
      "Tensor?, Tensor?)");
}
FASTNN_KERNELS(m) { fastnn::implement(m); }
#if defined(FASTNN_CUDA_NORM) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
