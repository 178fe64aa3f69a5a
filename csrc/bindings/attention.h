// What the bindings of attention share: tensors of heads, options.
#pragma once
#include <optional>

#include "bindings/tensor.h"
#include "params/attention.h"

namespace fastnn {

using OptionalTensor = std::optional<Tensor>;

struct AttentionOptions {
  double dropout, scale, softcap;
  int64_t window_left, window_right;
};

// (batch, heads, length, features); copied into `holder` where features do not lie next to each
// other.
inline Heads heads_of(const Tensor& t, Tensor& holder) {
  holder = t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
  return {holder.const_data_ptr(), holder.stride(0), holder.stride(1), holder.stride(2)};
}
inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

inline void check_attention_dtype(const Tensor& t, const char* op, const char* name, DType dtype) {
  FASTNN_CHECK(checked_dtype(t, op, name) == dtype, TypeError, "fastnn::", op, ": ", name,
               " must have query's type ", dtype_name(scalar_type(dtype)), ", got ",
               dtype_name(t.scalar_type()));
}

inline void check_heads(const Tensor& t, const char* op, const char* name, DType dtype) {
  check_attention_dtype(t, op, name, dtype);
  FASTNN_CHECK(t.dim() == 4, ValueError, "fastnn::", op, ": ", name,
               " must be (batch, heads, length, features), got shape ", shape_of(t));
}

inline void check_groups(const AttentionParams& p, const char* op) {
  FASTNN_CHECK(p.H_kv > 0 ? p.H % p.H_kv == 0 : p.H == 0, ValueError, "fastnn::", op,
               ": query's heads must be a multiple of key's, got ", p.H, " and ", p.H_kv);
}

inline void read_options(AttentionParams& p, const AttentionOptions& o, const OptionalTensor& seed,
                         const char* op) {
  FASTNN_CHECK(o.dropout >= 0.0 && o.dropout < 1.0, ValueError, "fastnn::", op,
               ": dropout must be in [0, 1), got ", o.dropout);
  FASTNN_CHECK(o.softcap >= 0.0, ValueError, "fastnn::", op, ": softcap must not be negative, got ",
               o.softcap);
  FASTNN_CHECK(o.window_left >= -1 && o.window_right >= -1, ValueError, "fastnn::", op,
               ": window must be counts of keys, or -1 for no limit; got ", o.window_left, ", ",
               o.window_right);
  p.scale = static_cast<float>(o.scale);
  p.softcap = static_cast<float>(o.softcap);
  p.window_left = o.window_left;
  p.window_right = o.window_right;
  p.dropout = static_cast<float>(o.dropout);
  if (o.dropout > 0.0) {
    FASTNN_CHECK(
        seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
        ValueError, "fastnn::", op, ": dropout needs a seed, one int64 on the CPU");
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  }
}

}  // namespace fastnn
