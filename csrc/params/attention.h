// Arguments of scaled dot-product attention. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// (B, heads, length, features); features are next to each other.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// The same of what is written, beside its pointer.
struct Strides {
  int64_t batch, head, row;
};

// softmax(cap(q k^T scale) + mask) v per batch entry and head. Query head h reads key head h / (H /
// H_kv). A query that may attend to no key has output 0, as in torch.
struct AttentionParams {
  int64_t B, H, H_kv, S_q, S_k, D, D_v;
  Heads q, k, v;
  DType dtype;
  float scale;
  float softcap;  // cap(s) = softcap tanh(s / softcap); 0: none
  // Query i stands at key n = position + i and sees keys n - left .. n + right; -1: no limit.
  // Causal: right = 0. position 0 aligns at the top left, S_k - S_q (of either sign) at the bottom
  // right.
  int64_t window_left, window_right;
  int64_t position;  // 0 on CUDA
  MaskKind mask_kind;
  DType mask_dtype;
  const void* mask;         // bool: 1 where a key may be seen
  int64_t mask_strides[4];  // of (B, H, S_q, S_k), 0 where broadcast
  float dropout;            // probability of dropping; 0: none
  uint64_t seed;
  uint64_t first_draw;  // counter of query 0's first keys; 0 on CUDA
  int64_t
      lse_head_stride;  // of the logsumexp: S_q, or more where sequences share rows; S_q on CUDA
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
  void* dq;                                    // (B, H, S_q, D)
  void* dk;                                    // (B, H_kv, S_k, D)
  void* dv;                                    // (B, H_kv, S_k, D_v)
  Strides dq_strides, dk_strides, dv_strides;  // as of contiguous tensors on CUDA
};

}  // namespace fastnn
