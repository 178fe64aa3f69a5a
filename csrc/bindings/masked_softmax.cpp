// torch.ops.fastnn.masked_softmax_fwd / masked_softmax_bwd.
#include "cpu/masked_softmax.h"

#include "bindings/rows.h"
#include "cpu/softmax.h"

namespace fastnn {
namespace {

// The mask's strides along the input's rows, dimensions that are walked alike merged.
void read_mask(MaskedSoftmaxParams& p, const OptionalTensor& mask,
               const std::vector<int64_t>& sizes, Tensor& holder) {
  constexpr auto op = "masked_softmax_fwd";
  if (!mask) return;
  check_device(*mask, op, "mask");
  const bool is_bool = mask->scalar_type() == ScalarType::Bool;
  p.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kAdditive;
  if (!is_bool) p.mask_dtype = checked_dtype(*mask, op, "mask");
  const auto rank = static_cast<int64_t>(sizes.size()), own = mask->dim();
  bool fits = own <= rank;
  for (int64_t d = 0; d < own && fits; ++d) {
    fits = mask->size(d) == 1 || mask->size(d) == sizes[static_cast<size_t>(rank - own + d)];
  }
  FASTNN_CHECK(fits, ValueError, "fastnn::", op, ": mask must broadcast to the input's shape ",
               shape_text(sizes), ", got ", shape_of(*mask));
  const bool by_row = own == 0 || mask->size(own - 1) == 1;
  holder = by_row || mask->stride(own - 1) == 1 ? *mask : torch::stable::contiguous(*mask);
  p.mask = holder.const_data_ptr();
  p.mask_column_stride = by_row ? 0 : 1;
  for (int64_t d = 0; d + 1 < rank; ++d) {
    const int64_t at = own - rank + d, size = sizes[static_cast<size_t>(d)];
    const int64_t stride = at < 0 || holder.size(at) == 1 ? 0 : holder.stride(at);
    if (size == 1) continue;
    int64_t* const last = p.dims > 0 ? &p.mask_strides[p.dims - 1] : nullptr;
    if (last != nullptr && *last == size * stride) {
      p.sizes[p.dims - 1] *= size;
      *last = stride;
      continue;
    }
    FASTNN_CHECK(p.dims < kMaskDims, NotImplemented, "fastnn::", op, ": mask must be walked in ",
                 kMaskDims, " dimensions or less; got shape ", shape_of(*mask));
    p.sizes[p.dims] = size;
    p.mask_strides[p.dims++] = stride;
  }
}

Tensor fwd(const Tensor& input, const OptionalTensor& mask, double scale, bool causal,
           bool grad_handled) {
  constexpr auto op = "masked_softmax_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  MaskedSoftmaxParams p = {};
  p.dtype = checked_dtype(input, op, "input");
  const auto sizes = sizes_of(input);
  FASTNN_CHECK(
      sizes.size() >= (causal ? 2 : 1), ValueError, "fastnn::", op, ": input must have at least ",
      causal ? "two dimensions to be causal" : "one dimension", ", got shape ", shape_of(input));
  const RowExtents e = extents_of_last(sizes, 1);
  Tensor input_holder, mask_holder;
  const RowSource x = row_source(input, e, input_holder);
  p.rows = e.rows;
  p.columns = e.columns;
  p.x = x.data;
  p.x_row_stride = x.row_stride;
  p.scale = static_cast<float>(scale);
  p.queries = causal ? sizes[sizes.size() - 2] : 0;
  read_mask(p, mask, sizes, mask_holder);
  Tensor output = new_output(sizes, p.dtype);
  p.y = output.mutable_data_ptr();
  masked_softmax_fwd(p);
  return output;
}

Tensor bwd(const Tensor& grad, const Tensor& output, double scale, bool grad_handled) {
  constexpr auto op = "masked_softmax_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(output);
  const DType dtype = checked_dtype(output, op, "output");
  const auto sizes = sizes_of(output);
  FASTNN_CHECK(!sizes.empty(), ValueError, "fastnn::", op,
               ": output must have at least one dimension");
  const RowExtents e = extents_of_last(sizes, 1);
  Tensor grad_holder;
  const RowSource dy = row_source_like(grad, "grad", output, sizes, e, op, grad_holder);
  const Tensor y = output.is_contiguous() ? output : torch::stable::contiguous(output);
  Tensor dx = new_output(sizes, dtype);
  SoftmaxBwdParams p = {dy.data,
                        y.const_data_ptr(),
                        dx.mutable_data_ptr(),
                        e.rows,
                        e.columns,
                        1,
                        dy.row_stride,
                        dtype,
                        dtype,
                        false};
  p.scale = static_cast<float>(scale);
  softmax_bwd(p, op);
  return dx;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "masked_softmax_fwd(Tensor input, Tensor? mask, float scale, bool causal, bool "
      "grad_handled=False) -> Tensor");
  m.def(
      "masked_softmax_bwd(Tensor grad, Tensor output, float scale, bool grad_handled=False) -> "
      "Tensor");
}
FASTNN_KERNELS(m) {
  m.impl("masked_softmax_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("masked_softmax_bwd", TORCH_BOX(&fastnn::bwd));
}
