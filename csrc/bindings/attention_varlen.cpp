// torch.ops.fastnn.attention_varlen_fwd / attention_varlen_bwd: sequences of any lengths end to
// end.
#include "bindings/attention.h"
#include "cpu/attention.h"

namespace fastnn {
namespace {

// Where each sequence begins and, at last, where the last one ends.
std::vector<int64_t> read_bounds(const Tensor& t, const char* op, const char* name, int64_t total,
                                 const char* what) {
  FASTNN_CHECK(
      t.is_cpu() && (t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long),
      TypeError, "fastnn::", op, ": ", name, " must be int32 or int64 on the CPU, got ",
      dtype_name(t.scalar_type()));
  check_dense(t, op, name);
  FASTNN_CHECK(t.dim() == 1 && t.size(0) >= 1, ValueError, "fastnn::", op, ": ", name,
               " must be (sequences + 1,), got shape ", shape_of(t));
  std::vector<int64_t> bounds(static_cast<size_t>(t.size(0)));
  const bool wide = t.scalar_type() == ScalarType::Long;
  const int64_t stride = t.stride(0);
  for (size_t i = 0; i < bounds.size(); ++i) {
    const auto at = static_cast<int64_t>(i) * stride;
    bounds[i] = wide ? static_cast<const int64_t*>(t.const_data_ptr())[at]
                     : static_cast<const int32_t*>(t.const_data_ptr())[at];
    FASTNN_CHECK(i > 0 ? bounds[i] >= bounds[i - 1] : bounds[i] == 0, ValueError, "fastnn::", op,
                 ": ", name, " must begin with 0 and never fall; got ", bounds[i], " at ", i,
                 i > 0 ? " after " : "", i > 0 ? std::to_string(bounds[i - 1]) : "");
  }
  FASTNN_CHECK(bounds.back() == total, ValueError, "fastnn::", op, ": ", name,
               " must end with the ", total, " rows of ", what, ", got ", bounds.back());
  return bounds;
}

// (rows, heads, features) as one batch entry of heads.
Heads packed_heads(const Tensor& t, Tensor& holder) {
  holder = t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t);
  return {holder.const_data_ptr(), 0, holder.stride(1), holder.stride(0)};
}
Heads from_row(const Heads& h, int64_t row, int64_t element) {
  return {static_cast<const char*>(h.data) + row * h.row_stride * element, 0, h.head_stride,
          h.row_stride};
}
Strides packed_strides(int64_t heads, int64_t features) { return {0, features, heads * features}; }
void* row_of(const Tensor& t, int64_t row, int64_t element) {
  return static_cast<char*>(t.mutable_data_ptr()) + row * t.stride(0) * element;
}

void check_packed(const Tensor& t, const char* op, const char* name, DType dtype) {
  check_attention_dtype(t, op, name, dtype);
  FASTNN_CHECK(t.dim() == 3, ValueError, "fastnn::", op, ": ", name,
               " must be (rows, heads, features), got shape ", shape_of(t));
}

struct Call {
  AttentionParams p = {};  // of each sequence but for its rows
  std::vector<int64_t> q, k;
  int64_t rows_q = 0, rows_k = 0, element = 0;
  Tensor holders[3];

  int64_t sequences() const { return static_cast<int64_t>(q.size()) - 1; }
};

void read_call(Call& call, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               const Tensor& bounds_q, const Tensor& bounds_k, const OptionalTensor& seed,
               const AttentionOptions& o) {
  AttentionParams& p = call.p;
  p.dtype = checked_dtype(q, op, "query");
  check_packed(q, op, "query", p.dtype);
  check_packed(k, op, "key", p.dtype);
  check_packed(v, op, "value", p.dtype);
  p.B = 1;
  p.H = q.size(1);
  p.D = q.size(2);
  p.H_kv = k.size(1);
  p.D_v = v.size(2);
  call.rows_q = q.size(0);
  call.rows_k = k.size(0);
  call.element = element_bytes(p.dtype);
  FASTNN_CHECK(k.size(2) == p.D && v.size(0) == call.rows_k && v.size(1) == p.H_kv, ValueError,
               "fastnn::", op, ": key must be (rows, heads, ", p.D,
               ") and value (rows, heads, features) of the same rows and heads; got ", shape_of(k),
               " and ", shape_of(v));
  check_groups(p, op);
  call.q = read_bounds(bounds_q, op, "cu_seqlens_q", call.rows_q, "query");
  call.k = read_bounds(bounds_k, op, "cu_seqlens_k", call.rows_k, "key");
  FASTNN_CHECK(call.q.size() == call.k.size(), ValueError, "fastnn::", op,
               ": cu_seqlens_q and cu_seqlens_k must be of as many sequences, got shapes ",
               shape_of(bounds_q), " and ", shape_of(bounds_k));
  p.q = packed_heads(q, call.holders[0]);
  p.k = packed_heads(k, call.holders[1]);
  p.v = packed_heads(v, call.holders[2]);
  p.lse_head_stride = call.rows_q;
  read_options(p, o, seed, op);
}

// take(sequence's parameters, its first query, its first key)
template <class Take>
void each_sequence(const Call& call, Take take) {
  uint64_t draw = 0;
  for (size_t s = 0; s + 1 < call.q.size(); ++s) {
    AttentionParams p = call.p;
    const int64_t first_q = call.q[s], first_k = call.k[s];
    p.S_q = call.q[s + 1] - first_q;
    p.S_k = call.k[s + 1] - first_k;
    p.position = p.S_k - p.S_q;
    p.first_draw = draw;
    draw += static_cast<uint64_t>(p.H * p.S_q * ((p.S_k + 3) / 4));
    p.q = from_row(p.q, first_q, call.element);
    p.k = from_row(p.k, first_k, call.element);
    p.v = from_row(p.v, first_k, call.element);
    take(p, first_q, first_k);
  }
}

// (out (rows, H, D_v), logsumexp (H, rows)).
std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& bounds_q, const Tensor& bounds_k,
                               const OptionalTensor& seed, double dropout, double scale,
                               double softcap, int64_t window_left, int64_t window_right,
                               bool grad_handled) {
  constexpr auto op = "attention_varlen_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(q);
  Call call;
  read_call(call, op, q, k, v, bounds_q, bounds_k, seed,
            {dropout, scale, softcap, window_left, window_right});
  Tensor out = new_output({call.rows_q, call.p.H, call.p.D_v}, call.p.dtype);
  Tensor lse = new_output({call.p.H, call.rows_q}, DType::kFloat32);
  auto* const sums = static_cast<float*>(lse.mutable_data_ptr());
  const Strides strides = packed_strides(call.p.H, call.p.D_v);
  std::vector<AttentionFwdParams> sequences;
  sequences.reserve(call.q.size());
  each_sequence(call, [&](const AttentionParams& p, int64_t first_q, int64_t) {
    sequences.push_back({p, row_of(out, first_q, call.element), strides.batch, strides.head,
                         strides.row, sums + first_q});
  });
  attention_fwd(op, sequences.data(), call.sequences());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& grad, const Tensor& q, const Tensor& k,
                                       const Tensor& v, const Tensor& bounds_q,
                                       const Tensor& bounds_k, const OptionalTensor& seed,
                                       const Tensor& out, const Tensor& lse, double dropout,
                                       double scale, double softcap, int64_t window_left,
                                       int64_t window_right, bool grad_handled) {
  constexpr auto op = "attention_varlen_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(q);
  Call call;
  read_call(call, op, q, k, v, bounds_q, bounds_k, seed,
            {dropout, scale, softcap, window_left, window_right});
  const AttentionParams& a = call.p;
  const std::vector<int64_t> out_shape = {call.rows_q, a.H, a.D_v};
  for (const auto& [tensor, name] : {std::pair{&grad, "grad"}, std::pair{&out, "out"}}) {
    check_packed(*tensor, op, name, a.dtype);
    FASTNN_CHECK(sizes_of(*tensor) == out_shape, ValueError, "fastnn::", op, ": ", name,
                 " must have shape ", shape_text(out_shape), ", got ", shape_of(*tensor));
  }
  FASTNN_CHECK(checked_dtype(lse, op, "lse") == DType::kFloat32 && lse.is_contiguous() &&
                   sizes_of(lse) == (std::vector<int64_t>{a.H, call.rows_q}),
               ValueError, "fastnn::", op,
               ": lse must be what attention_varlen_fwd gave; got shape ", shape_of(lse));
  Tensor grad_holder, out_holder;
  const Heads out_heads = packed_heads(out, out_holder), grads = packed_heads(grad, grad_holder);
  Tensor dq = new_output(sizes_of(q), a.dtype), dk = new_output(sizes_of(k), a.dtype),
         dv = new_output(sizes_of(v), a.dtype);
  const auto* const sums = static_cast<const float*>(lse.const_data_ptr());
  std::vector<AttentionBwdParams> sequences;
  sequences.reserve(call.q.size());
  each_sequence(call, [&](const AttentionParams& p, int64_t first_q, int64_t first_k) {
    sequences.push_back({p, from_row(out_heads, first_q, call.element),
                         from_row(grads, first_q, call.element), sums + first_q,
                         row_of(dq, first_q, call.element), row_of(dk, first_k, call.element),
                         row_of(dv, first_k, call.element), packed_strides(a.H, a.D),
                         packed_strides(a.H_kv, a.D), packed_strides(a.H_kv, a.D_v)});
  });
  attention_bwd(op, sequences.data(), call.sequences());
  return {dq, dk, dv};
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "attention_varlen_fwd(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, Tensor? seed, float dropout, float scale, float softcap, "
      "int window_left, int window_right, bool grad_handled=False) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_bwd(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, Tensor out, Tensor lse, "
      "float dropout, float scale, float softcap, int window_left, int window_right, "
      "bool grad_handled=False) -> (Tensor, Tensor, Tensor)");
}
FASTNN_KERNELS(m) {
  m.impl("attention_varlen_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("attention_varlen_bwd", TORCH_BOX(&fastnn::bwd));
}
