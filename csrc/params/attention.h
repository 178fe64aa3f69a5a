// Arguments of scaled dot-product attention. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// (B, heads, length, features); features are next to each other.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// softmax(cap(q k^T scale) + mask) v per batch entry and head. Query head h reads key head h / (H /
// H_kv). A query that may attend to no key has output 0, as in torch.
struct AttentionParams {
  int64_t B, H, H_kv, S_q, S_k, D, D_v;
  Heads q, k, v;
  DType dtype;
  float scale;
  float softcap;  // cap(s) = softcap tanh(s / softcap); 0: none
  int64_t window_left,
      window_right;  // query i sees keys i - left .. i + right; -1: no limit. Causal: right = 0
  MaskKind mask_kind;
  DType mask_dtype;
  const void* mask;         // bool: 1 where a key may be seen
  int64_t mask_strides[4];  // of (B, H, S_q, S_k), 0 where broadcast
  float dropout;            // probability of dropping; 0: none
  uint64_t seed;
};

struct AttentionFwdParams {
  AttentionParams a;
  void* out;  // (B, H, S_q, D_v) by these strides, features next to each other
  int64_t out_batch_stride, out_head_stride, out_row_stride;
  float* lse;  // (B, H, S_q): logsumexp of a query's scores, +inf where it sees no key; or null
};

struct AttentionBwdParams {
  AttentionParams a;
  Heads out, d_out;
  const float* lse;
  void* dq;  // (B, H, S_q, D) contiguous
  void* dk;  // (B, H_kv, S_k, D) contiguous
  void* dv;  // (B, H_kv, S_k, D_v) contiguous
};

}  // namespace fastnn
