// torch.ops.fastnn.attention_fwd / attention_bwd.
#include "bindings/attention.h"

#include "cpu/attention.h"
#include "cuda/attention.h"

// Absent where the build has no CUDA kernels.
#pragma weak fastnn_cuda_attention_fwd
#pragma weak fastnn_cuda_attention_fwd_workspace
#pragma weak fastnn_cuda_attention_bwd
#pragma weak fastnn_cuda_attention_bwd_workspace

namespace fastnn {
namespace {

// The tensors a call's parameters point into.
struct Call {
  AttentionParams p = {};
  Tensor holders[5];
};

void read_mask(Call& call, const OptionalTensor& mask, const char* op) {
  AttentionParams& p = call.p;
  if (!mask) return;
  check_device(*mask, op, "attn_mask");
  const bool is_bool = mask->scalar_type() == ScalarType::Bool;
  p.mask_kind = is_bool ? MaskKind::kBool : MaskKind::kAdditive;
  if (!is_bool) p.mask_dtype = checked_dtype(*mask, op, "attn_mask");
  const int64_t full[4] = {p.B, p.H, p.S_q, p.S_k};
  const int64_t rank = mask->dim();
  bool fits = rank <= 4;
  for (int64_t d = 0; d < rank && fits; ++d) {
    const int64_t size = mask->size(rank - 1 - d);
    fits = size == 1 || size == full[3 - d];
    if (fits) p.mask_strides[3 - d] = size == 1 ? 0 : mask->stride(rank - 1 - d);
  }
  FASTNN_CHECK(fits, ValueError, "fastnn::", op, ": attn_mask must broadcast to (", p.B, ", ", p.H,
               ", ", p.S_q, ", ", p.S_k, "), got shape ", shape_of(*mask));
  call.holders[3] = *mask;
  p.mask = mask->const_data_ptr();
}

void read_call(Call& call, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               const OptionalTensor& mask, const OptionalTensor& seed, const AttentionOptions& o) {
  AttentionParams& p = call.p;
  p.dtype = checked_dtype(q, op, "query");
  check_heads(q, op, "query", p.dtype);
  check_heads(k, op, "key", p.dtype);
  check_heads(v, op, "value", p.dtype);
  p.B = q.size(0);
  p.H = q.size(1);
  p.S_q = q.size(2);
  p.D = q.size(3);
  p.H_kv = k.size(1);
  p.S_k = k.size(2);
  p.D_v = v.size(3);
  FASTNN_CHECK(k.size(0) == p.B && v.size(0) == p.B && k.size(3) == p.D && v.size(1) == p.H_kv &&
                   v.size(2) == p.S_k,
               ValueError, "fastnn::", op, ": key must be (", p.B, ", heads, length, ", p.D,
               ") and value (", p.B,
               ", heads, length, features) of the same heads and length; got ", shape_of(k),
               " and ", shape_of(v));
  check_groups(p, op);
  constexpr int64_t kMostCudaFeatures = 256;
  FASTNN_CHECK(
      !DeviceScope::current().cuda() || (p.D <= kMostCudaFeatures && p.D_v <= kMostCudaFeatures),
      NotImplemented, "fastnn::", op, ": heads on CUDA have up to ", kMostCudaFeatures,
      " features, got ", p.D, " and ", p.D_v);
  p.q = heads_of(q, call.holders[0]);
  p.k = heads_of(k, call.holders[1]);
  p.v = heads_of(v, call.holders[2]);
  read_options(p, o, seed, op);
  p.lse_head_stride = p.S_q;
  read_mask(call, mask, op);
}

// (out (B, H, S_q, D_v), laid out (B, S_q, H, D_v) where query is; logsumexp (B, H, S_q)).
std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& mask, const OptionalTensor& seed,
                               double dropout, double scale, double softcap, int64_t window_left,
                               int64_t window_right, bool grad_handled) {
  constexpr auto op = "attention_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(q);
  Call call;
  read_call(call, op, q, k, v, mask, seed, {dropout, scale, softcap, window_left, window_right});
  const AttentionParams& p = call.p;
  const bool by_rows = q.stride(1) < q.stride(2);
  const int64_t head_stride = by_rows ? p.D_v : p.S_q * p.D_v,
                row_stride = by_rows ? p.H * p.D_v : p.D_v;
  const int64_t batch_stride = p.H * p.S_q * p.D_v;
  Tensor out = new_strided_output({p.B, p.H, p.S_q, p.D_v},
                                  {batch_stride, head_stride, row_stride, 1}, p.dtype);
  Tensor lse = new_output({p.B, p.H, p.S_q}, DType::kFloat32);
  const AttentionFwdParams f = {p,
                                out.mutable_data_ptr(),
                                batch_stride,
                                head_stride,
                                row_stride,
                                static_cast<float*>(lse.mutable_data_ptr())};
  scope.cuda() ? FASTNN_CUDA_KERNEL(attention_fwd)(f) : attention_fwd(f);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const OptionalTensor& mask,
                                       const OptionalTensor& seed, const Tensor& out,
                                       const Tensor& lse, double dropout, double scale,
                                       double softcap, int64_t window_left, int64_t window_right,
                                       bool grad_handled) {
  constexpr auto op = "attention_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(q);
  Call call;
  read_call(call, op, q, k, v, mask, seed, {dropout, scale, softcap, window_left, window_right});
  const AttentionParams& p = call.p;
  const std::vector<int64_t> out_shape = {p.B, p.H, p.S_q, p.D_v};
  for (const auto& [tensor, name] : {std::pair{&grad, "grad"}, std::pair{&out, "out"}}) {
    check_heads(*tensor, op, name, p.dtype);
    FASTNN_CHECK(sizes_of(*tensor) == out_shape, ValueError, "fastnn::", op, ": ", name,
                 " must have shape ", shape_text(out_shape), ", got ", shape_of(*tensor));
  }
  FASTNN_CHECK(checked_dtype(lse, op, "lse") == DType::kFloat32 && lse.is_contiguous() &&
                   lse.numel() == p.B * p.H * p.S_q,
               ValueError, "fastnn::", op, ": lse must be what attention_fwd gave; got shape ",
               shape_of(lse));
  Tensor grad_holder, out_holder;
  Tensor dq = new_output(sizes_of(q), p.dtype), dk = new_output(sizes_of(k), p.dtype),
         dv = new_output(sizes_of(v), p.dtype);
  const AttentionBwdParams b = {p,
                                heads_of(out, out_holder),
                                heads_of(grad, grad_holder),
                                static_cast<const float*>(lse.const_data_ptr()),
                                dq.mutable_data_ptr(),
                                dk.mutable_data_ptr(),
                                dv.mutable_data_ptr(),
                                strides_of(dq),
                                strides_of(dk),
                                strides_of(dv)};
  scope.cuda() ? FASTNN_CUDA_KERNEL(attention_bwd)(b) : attention_bwd(b);
  return {dq, dk, dv};
}

// On every device.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_fwd", TORCH_BOX(&fwd));
  m.impl("attention_bwd", TORCH_BOX(&bwd));
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "attention_fwd(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, "
      "float dropout, float scale, "
      "float softcap, int window_left, int window_right, bool grad_handled=False) -> (Tensor, "
      "Tensor)");
  m.def(
      "attention_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
      "Tensor? seed, Tensor out, "
      "Tensor lse, float dropout, float scale, float softcap, int window_left, int window_right, "
      "bool grad_handled=False) -> (Tensor, Tensor, Tensor)");
}
FASTNN_KERNELS(m) { fastnn::implement(m); }
#if defined(FASTNN_CUDA_ATTENTION) && defined(FASTNN_CUDA_KERNELS)
FASTNN_CUDA_KERNELS(m) { fastnn::implement(m); }
#endif
