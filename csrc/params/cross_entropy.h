// Arguments of cross-entropy. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// Per row of logits x (after softcap: cap tanh(x / cap)), with lse = logsumexp(x) and smoothing s
// over C classes:
//   class index t:     loss = (1 - s) w[t] (lse - x[t]) + s/C sum_c w[c] (lse - x[c]) + z lse^2
//   probabilities p:   loss = sum_c w[c] ((1 - s) p[c] + s/C) (lse - x[c]) + z lse^2
// A row whose index is ignore_index has loss 0 and gradient 0.
struct CrossEntropyParams {
  int64_t rows, classes;
  const void* x;
  int64_t x_row_stride;  // columns are next to each other
  DType dtype;
  const int64_t* target;      // rows, or null
  const void* probabilities;  // rows x classes contiguous, type of x, or null
  const float* weight;        // classes, or null for ones
  float weight_sum;           // of all classes
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;  // 0: none
};

// loss[r] without the z term, z[r] = z lse^2 where wanted, and what backward needs of a row:
// stats[2 r] = maximum, stats[2 r + 1] = log of the sum of e^(x - maximum). Kept apart: their sum
// would lose the digits of large logits.
struct CrossEntropyFwdParams {
  CrossEntropyParams loss;
  float* row_loss;
  float* row_z;
  float* stats;
};

// dx[r] = d(loss[r]) / dx * scale[r] + d(z[r]) / dx * z_scale[r].
struct CrossEntropyBwdParams {
  CrossEntropyParams loss;
  const float* stats;
  const float* scale;    // per row, stride scale_stride (0: one for all)
  const float* z_scale;  // the same
  int64_t scale_stride;
  void* dx;  // contiguous
};

}  // namespace fastnn
