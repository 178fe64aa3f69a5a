// torch.ops.fastnn.attention_cache_append / attention_cache_fwd: keys and values kept.
#include "bindings/attention.h"
#include "cpu/attention.h"

namespace fastnn {
namespace {

// A cache that is written in place: (batch, heads, capacity, features).
void check_cache(const Tensor& t, const char* op, const char* name, DType dtype) {
  check_heads(t, op, name, dtype);
  FASTNN_CHECK(t.size(3) <= 1 || t.stride(3) == 1, ValueError, "fastnn::", op, ": ", name,
               " must have features next to each other: it is used in place");
}

struct Caches {
  Heads k, v;
  int64_t B, H_kv, capacity, D, D_v;
};
Caches read_caches(const Tensor& k, const Tensor& v, const char* op, DType dtype) {
  check_cache(k, op, "key_cache", dtype);
  check_cache(v, op, "value_cache", dtype);
  const auto heads = [](const Tensor& t) {
    return Heads{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  };
  const Caches c = {heads(k), heads(v), k.size(0), k.size(1), k.size(2), k.size(3), v.size(3)};
  FASTNN_CHECK(v.size(0) == c.B && v.size(1) == c.H_kv && v.size(2) == c.capacity, ValueError,
               "fastnn::", op, ": value_cache must be (", c.B, ", ", c.H_kv, ", ", c.capacity,
               ", features) as key_cache is, got shape ", shape_of(v));
  return c;
}

// The filled rows of each sequence; ValueError unless there is room for `more`.
const int64_t* read_lengths(const Tensor& t, const char* op, int64_t batch, int64_t capacity,
                            int64_t more) {
  FASTNN_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long, TypeError, "fastnn::", op,
               ": lengths must be int64 on the CPU, got ", dtype_name(t.scalar_type()));
  check_dense(t, op, "lengths");
  FASTNN_CHECK(t.dim() == 1 && t.size(0) == batch && t.is_contiguous(), ValueError, "fastnn::", op,
               ": lengths must be (", batch, ",), contiguous, got shape ", shape_of(t));
  const auto* const lengths = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    FASTNN_CHECK(lengths[b] >= 0 && lengths[b] <= capacity - more, ValueError, "fastnn::", op,
                 ": the cache has room for ", capacity, " rows; sequence ", b, " has ", lengths[b],
                 " and ", more, " more are given");
  }
  return lengths;
}

bool written_twice(const Tensor& t) {
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) > 1 && t.stride(d) == 0) return true;
  }
  return false;
}

// Copies key and value behind each sequence.
void append(const Tensor& key, const Tensor& value, const Tensor& key_cache,
            const Tensor& value_cache, const Tensor& lengths, bool grad_handled) {
  constexpr auto op = "attention_cache_append";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(key);
  const DType dtype = checked_dtype(key, op, "key");
  check_heads(key, op, "key", dtype);
  check_heads(value, op, "value", dtype);
  const Caches c = read_caches(key_cache, value_cache, op, dtype);
  FASTNN_CHECK(!written_twice(key_cache) && !written_twice(value_cache), ValueError, "fastnn::", op,
               ": a cache must not be expanded: rows of it are written");
  const int64_t length = key.size(2);
  FASTNN_CHECK(sizes_of(key) == (std::vector<int64_t>{c.B, c.H_kv, length, c.D}) &&
                   sizes_of(value) == (std::vector<int64_t>{c.B, c.H_kv, length, c.D_v}),
               ValueError, "fastnn::", op, ": key and value must be (", c.B, ", ", c.H_kv,
               ", length, ", c.D, " and ", c.D_v, "), as the caches are; got ", shape_of(key),
               " and ", shape_of(value));
  const int64_t* const first = read_lengths(lengths, op, c.B, c.capacity, length);
  Tensor holders[2];
  attention_append({c.B, c.H_kv, length, c.D, c.D_v, element_bytes(dtype),
                    heads_of(key, holders[0]), heads_of(value, holders[1]),
                    key_cache.mutable_data_ptr(), value_cache.mutable_data_ptr(),
                    strides_of(key_cache), strides_of(value_cache), first});
}

// (out (B, H, S_q, D_v), laid out as query is; logsumexp (B, H, S_q)): the last S_q of each
// sequence's `lengths` rows are the queries' own.
std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache,
                               const Tensor& lengths, double scale, double softcap,
                               int64_t window_left, int64_t window_right, bool grad_handled) {
  constexpr auto op = "attention_cache_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(q);
  AttentionParams p = {};
  p.dtype = checked_dtype(q, op, "query");
  check_heads(q, op, "query", p.dtype);
  const Caches c = read_caches(key_cache, value_cache, op, p.dtype);
  p.H = q.size(1);
  p.S_q = q.size(2);
  p.D = q.size(3);
  p.B = c.B;
  p.H_kv = c.H_kv;
  p.D_v = c.D_v;
  FASTNN_CHECK(q.size(0) == c.B && p.D == c.D, ValueError, "fastnn::", op, ": query must be (", c.B,
               ", heads, length, ", c.D, "), as the caches are; got shape ", shape_of(q));
  check_groups(p, op);
  const int64_t* const filled = read_lengths(lengths, op, c.B, c.capacity, 0);
  read_options(p, {0.0, scale, softcap, window_left, window_right}, std::nullopt, op);
  Tensor holder;
  p.q = heads_of(q, holder);
  p.k = c.k;
  p.v = c.v;
  p.lse_head_stride = p.S_q;
  const bool by_rows = q.stride(1) < q.stride(2);
  const int64_t head_stride = by_rows ? p.D_v : p.S_q * p.D_v,
                row_stride = by_rows ? p.H * p.D_v : p.D_v, batch_stride = p.H * p.S_q * p.D_v;
  Tensor out = new_strided_output({c.B, p.H, p.S_q, p.D_v},
                                  {batch_stride, head_stride, row_stride, 1}, p.dtype);
  Tensor lse = new_output({c.B, p.H, p.S_q}, DType::kFloat32);
  attention_cached(op, p, filled, out.mutable_data_ptr(), {batch_stride, head_stride, row_stride},
                   static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "attention_cache_append(Tensor key, Tensor value, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor lengths, bool grad_handled=False) -> ()");
  m.def(
      "attention_cache_fwd(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, "
      "float scale, float softcap, int window_left, int window_right, bool grad_handled=False) -> "
      "(Tensor, Tensor)");
}
FASTNN_KERNELS(m) {
  m.impl("attention_cache_append", TORCH_BOX(&fastnn::append));
  m.impl("attention_cache_fwd", TORCH_BOX(&fastnn::fwd));
}
