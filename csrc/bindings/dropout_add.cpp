// torch.ops.fastnn.dropout_add_fwd / dropout_add_bwd.
#include "cpu/dropout_add.h"

#include "bindings/rows.h"

namespace fastnn {
namespace {

// Everything but the residual and the result.
DropoutAddParams read_call(const Tensor& x, const char* name, const RowExtents& e,
                           const OptionalTensor& seed, double p, const char* op, Tensor& holder) {
  FASTNN_CHECK(p >= 0.0 && p <= 1.0, ValueError, "fastnn::", op, ": p must be in [0, 1], got ", p);
  FASTNN_CHECK(p == 0.0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 &&
                            seed->is_cpu()),
               ValueError, "fastnn::", op, ": dropout needs a seed, one int64 on the CPU");
  DropoutAddParams found = {};
  found.dtype = checked_dtype(x, op, name);
  const RowSource rows = row_source(x, e, holder);
  found.rows = e.rows;
  found.columns = e.columns;
  found.x = rows.data;
  found.x_row_stride = rows.row_stride;
  found.p = static_cast<float>(p);
  if (p != 0.0) {
    found.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
  return found;
}

RowExtents extents_of(const Tensor& t) {
  const auto sizes = sizes_of(t);
  return extents_of_last(sizes, sizes.empty() ? 0 : 1);
}

Tensor fwd(const Tensor& input, const Tensor& residual, const OptionalTensor& seed, double p,
           bool grad_handled) {
  constexpr auto op = "dropout_add_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const RowExtents e = extents_of(input);
  Tensor input_holder, residual_holder;
  DropoutAddParams call = read_call(input, "input", e, seed, p, op, input_holder);
  const auto sizes = sizes_of(input);
  const RowSource added =
      row_source_like(residual, "residual", input, sizes, e, op, residual_holder);
  call.residual = added.data;
  call.residual_row_stride = added.row_stride;
  Tensor output = new_output(sizes, call.dtype);
  call.y = output.mutable_data_ptr();
  dropout_add(call, op);
  return output;
}

Tensor bwd(const Tensor& grad, const OptionalTensor& seed, double p, bool grad_handled) {
  constexpr auto op = "dropout_add_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(grad);
  Tensor holder;
  DropoutAddParams call = read_call(grad, "grad", extents_of(grad), seed, p, op, holder);
  Tensor dx = new_output(sizes_of(grad), call.dtype);
  call.y = dx.mutable_data_ptr();
  dropout_add(call, op);
  return dx;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "dropout_add_fwd(Tensor input, Tensor residual, Tensor? seed, float p, bool "
      "grad_handled=False) -> Tensor");
  m.def("dropout_add_bwd(Tensor grad, Tensor? seed, float p, bool grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) {
  m.impl("dropout_add_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("dropout_add_bwd", TORCH_BOX(&fastnn::bwd));
}
