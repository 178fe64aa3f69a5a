// Attention over the thread pool; parameters in params/attention.h, the algorithm in
// cpu/kernels/attention.h.
#pragma once
#include "params/attention.h"

namespace fastnn {

// Sequences of one call, recorded as `op`: of one type and one number of features, each of lengths
// of its own.
void attention_fwd(const char* op, const AttentionFwdParams* sequences, int64_t count);
void attention_bwd(const char* op, const AttentionBwdParams* sequences, int64_t count);

inline void attention_fwd(const AttentionFwdParams& p) { attention_fwd("attention_fwd", &p, 1); }
inline void attention_bwd(const AttentionBwdParams& p) { attention_bwd("attention_bwd", &p, 1); }

// Copies key and value, (B, H_kv, length, features) by their strides, to rows from first[b] on of
// the caches.
struct AttentionAppendParams {
  int64_t B, H_kv, length, D, D_v, element_bytes;
  Heads k, v;
  void *k_cache, *v_cache;
  Strides k_cache_strides, v_cache_strides;
  const int64_t* first;
};
void attention_append(const AttentionAppendParams& p);

// The forward pass from caches whose sequence b has filled[b] rows, the last S_q of which are the
// queries' own: p has sizes and options without S_k and position, k and v are the caches.
void attention_cached(const char* op, const AttentionParams& p, const int64_t* filled, void* out,
                      Strides out_strides, float* lse);

}  // namespace fastnn
