// torch.ops.fastnn.softmax_fwd / softmax_bwd.
#include "cpu/softmax.h"

#include "bindings/tensor.h"
#include "cuda/softmax.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_softmax_fwd
#pragma weak fastnn_cuda_softmax_fwd_workspace
#pragma weak fastnn_cuda_softmax_bwd
#pragma weak fastnn_cuda_softmax_bwd_workspace

namespace fastnn {
namespace {

struct Extents {
  int64_t outer = 1, cols = 1, inner = 1;
};

Extents extents_of(const std::vector<int64_t>& sizes, int64_t dim, const char* op) {
  const auto rank = static_cast<int64_t>(sizes.size());
  const int64_t wrapped = rank == 0 ? 1 : rank;
  FASTNN_CHECK(dim >= -wrapped && dim < wrapped, IndexError, "fastnn::", op, ": dim must be in [",
               -wrapped, ", ", wrapped - 1, "], got ", dim);
  if (dim < 0) dim += wrapped;
  Extents e;
  for (int64_t d = 0; d < rank; ++d)
    (d < dim ? e.outer : d == dim ? e.cols : e.inner) *= sizes[static_cast<size_t>(d)];
  return e;
}

// The data and row stride of a tensor whose rows lie along its last dimension, copied only where no
// stride describes it.
struct Source {
  const void* data;
  int64_t row_stride;
};
Source source_of(const Tensor& t, const Extents& e, Tensor& holder) {
  if (e.inner == 1 && t.dim() > 0 && t.size(t.dim() - 1) == e.cols) {
    const Rows rows = rows_of(t, holder);
    if (rows.column_stride == 1) return {rows.data, rows.row_stride};
  }
  holder = torch::stable::contiguous(t);
  return {holder.const_data_ptr(), e.cols};
}

Tensor fwd(const Tensor& input, int64_t dim, bool log, std::optional<ScalarType> dtype,
           bool grad_handled) {
  check_grad_handled(grad_handled, "softmax_fwd");
  const DeviceScope scope(input);
  const DType x_dtype = checked_dtype(input, "softmax_fwd", "input");
  const auto y_dtype = dtype ? kernel_dtype(*dtype) : x_dtype;
  FASTNN_CHECK(y_dtype && (*y_dtype == x_dtype || *y_dtype == DType::kFloat32), TypeError,
               "fastnn::softmax_fwd: dtype must be the input's type or float32, got ",
               dtype_name(*dtype));
  const auto sizes = sizes_of(input);
  const Extents e = extents_of(sizes, dim, "softmax_fwd");
  Tensor output = new_output(sizes, *y_dtype);
  Tensor holder;
  const Source x = source_of(input, e, holder);
  const SoftmaxParams p = {
      x.data, output.mutable_data_ptr(), e.outer, e.cols, e.inner, x.row_stride, x_dtype, *y_dtype,
      log};
  scope.cuda() ? FASTNN_CUDA_KERNEL(softmax_fwd)(p) : softmax_fwd(p);
  return output;
}

Tensor bwd(const Tensor& grad, const Tensor& output, int64_t dim, bool log, ScalarType input_dtype,
           bool grad_handled) {
  check_grad_handled(grad_handled, "softmax_bwd");
  const DeviceScope scope(output);
  const DType y_dtype = checked_dtype(output, "softmax_bwd", "output");
  FASTNN_CHECK(checked_dtype(grad, "softmax_bwd", "grad") == y_dtype, TypeError,
               "fastnn::softmax_bwd: grad must be ", dtype_name(output.scalar_type()),
               " as output is, got ", dtype_name(grad.scalar_type()));
  const auto dx_dtype = kernel_dtype(input_dtype);
  FASTNN_CHECK(
      dx_dtype && (*dx_dtype == y_dtype || y_dtype == DType::kFloat32), TypeError,
      "fastnn::softmax_bwd: input_dtype must be the output's type, or the output float32; got ",
      dtype_name(input_dtype));
  const auto sizes = sizes_of(output);
  FASTNN_CHECK(sizes_of(grad) == sizes, ValueError,
               "fastnn::softmax_bwd: grad must have the output's shape ", shape_of(output),
               ", got ", shape_of(grad));
  const Extents e = extents_of(sizes, dim, "softmax_bwd");
  Tensor dx = new_output(sizes, *dx_dtype);
  Tensor grad_holder, output_holder;
  const Source dy = source_of(grad, e, grad_holder);
  const Tensor y = output.is_contiguous() ? output : torch::stable::contiguous(output);
  const SoftmaxBwdParams p = {dy.data,
                              y.const_data_ptr(),
                              dx.mutable_data_ptr(),
                              e.outer,
                              e.cols,
                              e.inner,
                              dy.row_stride,
                              y_dtype,
                              *dx_dtype,
                              log};
  scope.cuda() ? FASTNN_CUDA_KERNEL(softmax_bwd)(p) : softmax_bwd(p);
  return dx;
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("softmax_fwd", TORCH_BOX(&fwd));
  m.impl("softmax_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "softmax_fwd(Tensor input, int dim, bool log, ScalarType? dtype, bool grad_handled=False) -> "
      "Tensor");
  m.def(
      "softmax_bwd(Tensor grad, Tensor output, int dim, bool log, ScalarType input_dtype, bool "
      "grad_handled=False) "
      "-> Tensor");
}
FASTNN_KERNELS(m) { fastnn::implement(m); }
#if defined(FASTNN_CUDA_SOFTMAX) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
