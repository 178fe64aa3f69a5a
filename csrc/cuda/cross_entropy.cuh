// What forward and backward of cross-entropy share: how a row's target is spread over the classes,
// and the logits. The formulas stand in params/cross_entropy.h.
#pragma once
#include "cuda/cross_entropy.h"
#include "cuda/rows.cuh"

namespace fastnn {

enum class TargetKind { kIndex, kSmoothed, kProbabilities };

inline TargetKind kind_of(const CrossEntropyParams& p) {
  return p.probabilities != nullptr ? TargetKind::kProbabilities
         : p.label_smoothing != 0.f ? TargetKind::kSmoothed
                                    : TargetKind::kIndex;
}

// Calls f(T{}, kind) with the kind as a constant.
template <TargetKind kKind>
struct KindIs {
  static constexpr TargetKind kind = kKind;
};
template <class F>
int with_loss_kind(const CrossEntropyParams& p, F f) {
  return with_type(p.dtype, [&](auto t) {
    switch (kind_of(p)) {
      case TargetKind::kProbabilities:
        return f(t, KindIs<TargetKind::kProbabilities>{});
      case TargetKind::kSmoothed:
        return f(t, KindIs<TargetKind::kSmoothed>{});
      case TargetKind::kIndex:
        break;
    }
    return f(t, KindIs<TargetKind::kIndex>{});
  });
}

// One row: its logits, softcapped as they are read, and the share of its target in each class.
template <class T, TargetKind kKind>
struct LossRow {
  const T *x, *probabilities, *weight;
  int64_t classes, target;
  float cap, even, rest;  // even: share of smoothing in a class; rest: what is left for the target
  bool ignored, bad;

  FASTNN_DEVICE LossRow(const CrossEntropyParams& p, const void* class_weight, int64_t r)
      : x(static_cast<const T*>(p.x) + r * p.x_row_stride),
        probabilities(static_cast<const T*>(p.probabilities)),
        weight(static_cast<const T*>(class_weight)),
        classes(p.classes),
        target(0),
        cap(p.softcap),
        even(p.label_smoothing / static_cast<float>(p.classes)),
        rest(1.f - p.label_smoothing),
        ignored(false),
        bad(false) {
    if constexpr (kKind == TargetKind::kProbabilities) {
      probabilities += r * p.classes;
    } else {
      target = load_cached(p.target + r);
      ignored = target == p.ignore_index;
      bad = !ignored && (target < 0 || target >= p.classes);
    }
  }
  FASTNN_DEVICE float weight_of_target() const {
    if (weight == nullptr) return 1.f;
    float w[1];
    load_chunk<1, true>(weight, target, classes, w);
    return w[0];
  }
  template <int N>
  FASTNN_DEVICE void logits(int64_t at, int64_t n, float (&v)[N]) const {
    load_chunk(x, at, n, v, -INFINITY);
    if (cap == 0.f) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (at + i >= 0 && at + i < n) v[i] = cap * tanhf(v[i] / cap);
    }
  }
  FASTNN_DEVICE float logit_of_target() const {
    float v[1];
    load_chunk<1, true>(x, target, classes, v);
    return cap == 0.f ? v[0] : cap * tanhf(v[0] / cap);
  }
  // Without the target's own class where it is an index; 0 outside of the row.
  template <int N>
  FASTNN_DEVICE void shares(int64_t at, int64_t n, float (&share)[N]) const {
    float q[N], w[N];
    if constexpr (kKind == TargetKind::kProbabilities) load_chunk(probabilities, at, n, q);
    if (weight != nullptr) load_chunk<N, true>(weight, at, n, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool inside = at + i >= 0 && at + i < n;
      float s = inside ? even : 0.f;
      if constexpr (kKind == TargetKind::kProbabilities) s = fmaf(q[i], rest, s);
      share[i] = weight != nullptr ? s * w[i] : s;
    }
  }
};

template <class T, TargetKind kKind>
RowPlan loss_plan(const CrossEntropyParams& p, const void* aligned, int64_t stride) {
  const bool on = rows_on_boundaries(aligned, stride, p.dtype);
  return row_plan(p.rows, planned_columns(p.classes, kChunk<T>, on), 0, multiprocessors());
}

}  // namespace fastnn
