// torch.ops.fastnn.linear_groupwise_pack / linear_groupwise_fwd / linear_groupwise_rows.
#include "cpu/linear_groupwise.h"

#include "bindings/tensor.h"

namespace fastnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

GroupLayout checked_layout(int64_t in_features, int64_t group_size, int64_t bits, bool offsets,
                           const char* op) {
  FASTNN_CHECK(in_features >= 0, ValueError, "fastnn::", op,
               ": in_features must not be negative, got ", in_features);
  FASTNN_CHECK(group_size >= 1, ValueError, "fastnn::", op, ": group_size must be positive, got ",
               group_size);
  FASTNN_CHECK(bits == 4 || (bits == 8 && !offsets), ValueError, "fastnn::", op,
               ": bits must be 4, or 8 without offsets, got ", bits);
  return GroupLayout(in_features, group_size, static_cast<int>(bits), offsets);
}

// Half-width scales and offsets, (rows, groups), contiguous.
const void* checked_groups(const Tensor& t, int64_t N, const GroupLayout& layout, const char* op,
                           const char* argument) {
  FASTNN_CHECK(t.scalar_type() == ScalarType::Half, TypeError, "fastnn::", op, ": ", argument,
               " must be float16, got ", dtype_name(t.scalar_type()));
  check_dense(t, op, argument);
  FASTNN_CHECK(t.dim() == 2 && t.size(0) == N && t.size(1) == layout.groups && t.is_contiguous(),
               ValueError, "fastnn::", op, ": ", argument, " must be contiguous and have shape (",
               N, ", ", layout.groups, "), got shape ", shape_of(t));
  return t.const_data_ptr();
}

GroupwiseWeight checked_weight(const Tensor& codes, const Tensor& scale,
                               const OptionalTensor& offset, const GroupLayout& layout,
                               const char* op) {
  const ScalarType wanted = layout.bits == 4 ? ScalarType::Byte : ScalarType::Char;
  FASTNN_CHECK(codes.scalar_type() == wanted, TypeError, "fastnn::", op, ": codes must be ",
               dtype_name(wanted), ", got ", dtype_name(codes.scalar_type()));
  check_dense(codes, op, "codes");
  const int64_t bytes = layout.bits == 4 ? (layout.K + 1) / 2 : layout.K;
  FASTNN_CHECK(codes.dim() == 2 && codes.size(1) == bytes && codes.is_contiguous(), ValueError,
               "fastnn::", op, ": codes must be contiguous and have shape (out_features, ", bytes,
               "), got shape ", shape_of(codes));
  GroupwiseWeight w = {};
  w.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  w.row_stride = bytes;
  w.scale = checked_groups(scale, codes.size(0), layout, op, "scale");
  if (offset) w.offset = checked_groups(*offset, codes.size(0), layout, op, "offset");
  return w;
}

Tensor pack(const Tensor& codes, const Tensor& scale, const OptionalTensor& offset,
            int64_t in_features, int64_t group_size, int64_t bits, bool grad_handled) {
  constexpr auto op = "linear_groupwise_pack";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(scale);
  const GroupLayout layout = checked_layout(in_features, group_size, bits, offset.has_value(), op);
  const GroupwiseWeight w = checked_weight(codes, scale, offset, layout, op);
  Tensor packed = new_kept(linear_groupwise_packed_bytes(codes.size(0), layout) / 4);
  linear_groupwise_pack(w, layout, codes.size(0), packed.mutable_data_ptr());
  return packed;
}

Tensor fwd(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
           int64_t out_features, int64_t group_size, int64_t bits, bool offsets, bool int8_input,
           int64_t activation, bool grad_handled) {
  constexpr auto op = "linear_groupwise_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  FASTNN_CHECK(out_features >= 0, ValueError, "fastnn::", op,
               ": out_features must not be negative, got ", out_features);
  FASTNN_CHECK(activation >= 0 && activation < kLinearActivationCount, ValueError, "fastnn::", op,
               ": activation must be a code in [0, ", kLinearActivationCount - 1, "], got ",
               activation);
  FASTNN_CHECK(!int8_input || bits == 4, ValueError, "fastnn::", op,
               ": int8 inputs need codes of 4 bits, got ", bits);
  const int64_t in_features = input.size(input.dim() - 1);
  const GroupLayout layout = checked_layout(in_features, group_size, bits, offsets, op);
  const int64_t floats = linear_groupwise_packed_bytes(out_features, layout) / 4;
  FASTNN_CHECK(checked_dtype(packed, op, "packed") == DType::kFloat32 && packed.is_contiguous() &&
                   packed.numel() == floats,
               ValueError, "fastnn::", op,
               ": packed must be what linear_groupwise_pack gives for a weight of shape (",
               out_features, ", ", in_features, "), ", floats,
               " contiguous float32 values; got shape ", shape_of(packed));
  LinearGroupwiseParams p = {};
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.N = out_features;
  p.K = rows.columns;
  p.x = {rows.data, rows.row_stride, rows.column_stride, dtype};
  p.group = group_size;
  p.bits = layout.bits;
  p.offsets = offsets;
  p.int8_input = int8_input;
  p.packed = packed.const_data_ptr();
  p.activation = static_cast<Activation>(activation);
  if (bias) {
    p.bias_dtype = checked_dtype(*bias, op, "bias");
    FASTNN_CHECK(p.bias_dtype == dtype || p.bias_dtype == DType::kFloat32, TypeError,
                 "fastnn::", op, ": bias must be float32 or of the input's type ",
                 dtype_name(scalar_type(dtype)), ", got ", dtype_name(bias->scalar_type()));
    FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == p.N, ValueError, "fastnn::", op,
                 ": bias must have shape (", p.N, ",), got ", shape_of(*bias));
    p.bias = bias->const_data_ptr();
    p.bias_stride = bias->stride(0);
  }
  auto sizes = sizes_of(input);
  sizes.back() = p.N;
  Tensor output = new_output(sizes, dtype);
  p.y = output.mutable_data_ptr();
  linear_groupwise_fwd(p);
  return output;
}

Tensor rows(const Tensor& index, const Tensor& codes, const Tensor& scale,
            const OptionalTensor& offset, int64_t in_features, int64_t group_size, int64_t bits,
            int64_t dtype, bool grad_handled) {
  constexpr auto op = "linear_groupwise_rows";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(scale);
  const GroupLayout layout = checked_layout(in_features, group_size, bits, offset.has_value(), op);
  const GroupwiseWeight w = checked_weight(codes, scale, offset, layout, op);
  FASTNN_CHECK(index.scalar_type() == ScalarType::Long, TypeError, "fastnn::", op,
               ": index must be int64, got ", dtype_name(index.scalar_type()));
  check_dense(index, op, "index");
  FASTNN_CHECK(index.is_contiguous(), ValueError, "fastnn::", op, ": index must be contiguous");
  FASTNN_CHECK(dtype >= 0 && dtype < 3, ValueError, "fastnn::", op,
               ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", dtype);
  const auto* const wanted = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t N = codes.size(0);
  for (int64_t i = 0; i < index.numel(); ++i) {
    FASTNN_CHECK(wanted[i] >= 0 && wanted[i] < N, IndexError, "fastnn::", op, ": index ", wanted[i],
                 " at position ", i, " is out of range for ", N, " rows");
  }
  auto sizes = sizes_of(index);
  sizes.push_back(in_features);
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  Tensor output = new_output(sizes, kTypes[dtype]);
  linear_groupwise_rows(w, layout, wanted, index.numel(), kTypes[dtype], output.mutable_data_ptr());
  return output;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "linear_groupwise_pack(Tensor codes, Tensor scale, Tensor? offset, SymInt in_features, int "
      "group_size, int bits, bool grad_handled=False) -> Tensor");
  m.def(
      "linear_groupwise_fwd(Tensor input, Tensor packed, Tensor? bias, SymInt out_features, int "
      "group_size, int bits, bool offsets, bool int8_input, int activation, bool "
      "grad_handled=False) -> Tensor");
  m.def(
      "linear_groupwise_rows(Tensor index, Tensor codes, Tensor scale, Tensor? offset, SymInt "
      "in_features, int group_size, int bits, int dtype, bool grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) {
  m.impl("linear_groupwise_pack", TORCH_BOX(&fastnn::pack));
  m.impl("linear_groupwise_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("linear_groupwise_rows", TORCH_BOX(&fastnn::rows));
}
