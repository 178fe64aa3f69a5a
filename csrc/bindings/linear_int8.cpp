// torch.ops.fastnn.linear_int8_quantize / linear_int8_pack / linear_int8_fwd.
#include "cpu/linear_int8.h"

#include "bindings/tensor.h"

namespace fastnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

Matrix matrix_of(const Rows& rows, DType dtype) {
  return {rows.data, rows.row_stride, rows.column_stride, dtype};
}

void check_features(int64_t K, const char* op) {
  FASTNN_CHECK(K <= kInt8MaxFeatures, ValueError, "fastnn::", op, ": in_features must be at most ",
               kInt8MaxFeatures, ", where sums of codes still fit 32 bits; got ", K);
}

std::tuple<Tensor, Tensor> quantize(const Tensor& input, bool grad_handled) {
  constexpr auto op = "linear_int8_quantize";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(input);
  const DType dtype = checked_dtype(input, op, "input");
  FASTNN_CHECK(input.dim() >= 1, ValueError, "fastnn::", op,
               ": input must have at least one dimension");
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  auto sizes = sizes_of(input);
  Tensor codes = new_codes(sizes);
  sizes.pop_back();
  Tensor scale = new_output(sizes, DType::kFloat32);
  linear_int8_quantize(matrix_of(rows, dtype), rows.rows, rows.columns, codes.mutable_data_ptr(),
                       static_cast<float*>(scale.mutable_data_ptr()));
  return {codes, scale};
}

Tensor pack(const Tensor& codes, const Tensor& scale, bool grad_handled) {
  constexpr auto op = "linear_int8_pack";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(scale);
  FASTNN_CHECK(codes.scalar_type() == ScalarType::Char, TypeError, "fastnn::", op,
               ": codes must be int8, got ", dtype_name(codes.scalar_type()));
  check_dense(codes, op, "codes");
  FASTNN_CHECK(checked_dtype(scale, op, "scale") == DType::kFloat32, TypeError, "fastnn::", op,
               ": scale must be float32, got ", dtype_name(scale.scalar_type()));
  FASTNN_CHECK(codes.dim() == 2, ValueError, "fastnn::", op,
               ": codes must be (out_features, in_features), got shape ", shape_of(codes));
  const int64_t N = codes.size(0), K = codes.size(1);
  check_features(K, op);
  FASTNN_CHECK(scale.dim() == 1 && scale.size(0) == N, ValueError, "fastnn::", op,
               ": scale must have shape (", N, ",), got ", shape_of(scale));
  Tensor packed = new_kept(linear_int8_packed_bytes(N, K) / 4);
  const Matrix w = {codes.const_data_ptr(), codes.stride(0), K == 1 ? 1 : codes.stride(1),
                    DType::kFloat32};
  linear_int8_pack(w, static_cast<const float*>(scale.const_data_ptr()), scale.stride(0), N, K,
                   packed.mutable_data_ptr());
  return packed;
}

void set_bias(LinearInt8Params& p, const OptionalTensor& bias, const char* op) {
  if (!bias) return;
  p.bias_dtype = checked_dtype(*bias, op, "bias");
  FASTNN_CHECK(p.bias_dtype == p.x.dtype || p.bias_dtype == DType::kFloat32, TypeError,
               "fastnn::", op, ": bias must be float32 or of the input's type ",
               dtype_name(scalar_type(p.x.dtype)), ", got ", dtype_name(bias->scalar_type()));
  FASTNN_CHECK(bias->dim() == 1 && bias->size(0) == p.N, ValueError, "fastnn::", op,
               ": bias must have shape (", p.N, ",), got ", shape_of(*bias));
  p.bias = bias->const_data_ptr();
  p.bias_stride = bias->stride(0);
}

Tensor fwd(const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
           int64_t out_features, int64_t activation, bool grad_handled) {
  constexpr auto op = "linear_int8_fwd";
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
  const int64_t in_features = input.size(input.dim() - 1);
  check_features(in_features, op);
  FASTNN_CHECK(checked_dtype(packed, op, "packed") == DType::kFloat32 && packed.is_contiguous() &&
                   packed.numel() * 4 == linear_int8_packed_bytes(out_features, in_features),
               ValueError, "fastnn::", op,
               ": packed must be what linear_int8_pack gives for codes of shape (", out_features,
               ", ", in_features, "), ", linear_int8_packed_bytes(out_features, in_features) / 4,
               " contiguous float32 values; got shape ", shape_of(packed));
  LinearInt8Params p = {};
  Tensor holder;
  const Rows rows = rows_of(input, holder);
  p.M = rows.rows;
  p.N = out_features;
  p.K = rows.columns;
  p.x = matrix_of(rows, dtype);
  p.packed = packed.const_data_ptr();
  p.activation = static_cast<Activation>(activation);
  set_bias(p, bias, op);
  auto sizes = sizes_of(input);
  sizes.back() = p.N;
  Tensor output = new_output(sizes, dtype);
  p.y = output.mutable_data_ptr();
  linear_int8_fwd(p);
  return output;
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def("linear_int8_quantize(Tensor input, bool grad_handled=False) -> (Tensor, Tensor)");
  m.def("linear_int8_pack(Tensor codes, Tensor scale, bool grad_handled=False) -> Tensor");
  m.def(
      "linear_int8_fwd(Tensor input, Tensor packed, Tensor? bias, SymInt out_features, int "
      "activation, bool grad_handled=False) -> Tensor");
}
FASTNN_KERNELS(m) {
  m.impl("linear_int8_quantize", TORCH_BOX(&fastnn::quantize));
  m.impl("linear_int8_pack", TORCH_BOX(&fastnn::pack));
  m.impl("linear_int8_fwd", TORCH_BOX(&fastnn::fwd));
}
