// Cross-entropy. Forward reads the logits once (online logsumexp, a running maximum per lane), a
// second time only where every class has a share in the target (label smoothing, probabilities).
// Backward recomputes the softmax from the saved maximum and log-sum: that keeps 8 bytes a row from
// forward to backward where a saved gradient keeps rows x classes, is as fast or faster
// (docs/kernels.md has the measurement), and scaling by the incoming gradient is free.
#pragma once
#include <type_traits>

#include "cpu/kernels/rows.h"
#include "cpu/simd/math.h"
#include "params/cross_entropy.h"

namespace fastnn {
namespace {

// How the target of a row is spread over the classes.
enum class TargetKind { kIndex, kSmoothed, kProbabilities };

// One row of logits, softcapped as it is read; beyond its end -inf.
template <class T, bool kCap>
struct Logits {
  const T* x;
  float cap;
  struct Value {
    Vec logit;
    Vec slope;  // d logit / dx, only where capped
  };
  FASTNN_INLINE Value capped(Vec v) const {
    if constexpr (!kCap) return {v, v};
    const Vec h = tanh(v * (1.f / cap));
    return {h * cap, fma(-h, h, splat(1.f))};
  }
  FASTNN_INLINE Value value(int64_t i, int count) const { return capped(load_some(x + i, count)); }
  FASTNN_INLINE Value value_of_one(int64_t i) const { return capped(splat(to_float(x[i]))); }
  FASTNN_INLINE Vec at(int64_t i, int count) const {
    return fill_rest(value(i, count).logit, count, -__builtin_inff());
  }
};

struct RowStats {
  float max, log_sum;
};

// Maximum and log-sum in one pass. The running maximum starts at the lowest finite number, not at
// -inf: lanes that have seen nothing else then add e^(-inf) = 0 and not NaN. A row of -inf ends
// with log(0) = -inf and its loss is NaN.
template <class L>
FASTNN_INLINE RowStats row_stats(const L& logits, int64_t n) {
  constexpr int kChains = 4;
  Vec m = splat(-__FLT_MAX__);
  Vec total = zero();
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes) {
    Vec x[kChains];
    FASTNN_UNROLL for (int k = 0; k < kChains; ++k) x[k] = logits.at(i + k * kLanes, kLanes);
    const Vec top = max(max(max(x[0], x[1]), max(x[2], x[3])), m);
    if (any_differs(top, m)) {
      total = total * exp(m - top);
      m = top;
    }
    FASTNN_UNROLL for (int k = 0; k < kChains; ++k) x[k] = exp(x[k] - m);
    total += (x[0] + x[1]) + (x[2] + x[3]);
  }
  for (; i < n; i += kLanes) {
    const int count = n - i < kLanes ? (int)(n - i) : kLanes;
    const Vec x = logits.at(i, count);
    const Vec top = max(x, m);
    total = fma(total, exp(m - top), exp(x - top));
    m = top;
  }
  const float row_max = max_lanes(m);
  const float sum = sum_lanes(total * exp(m - row_max));
  return {row_max, log(splat(sum))[0]};
}

// The share of the target in classes [i, i + count): 0 beyond, weighted.
template <TargetKind kKind, class T>
FASTNN_INLINE Vec target_share(const CrossEntropyParams& p, const T* probabilities, int64_t i,
                               int count) {
  Vec share = splat(p.label_smoothing / (float)p.classes);
  if constexpr (kKind == TargetKind::kProbabilities) {
    const Vec q = load_some(probabilities + i, count);
    share = fma(q, splat(1.f - p.label_smoothing), share);
  }
  if (p.weight != nullptr) {
    share = share * load_some(p.weight + i, count);
  }
  return count == kLanes ? share : keep_first(share, count);
}

FASTNN_INLINE float class_weight(const CrossEntropyParams& p, int64_t t) {
  return p.weight == nullptr ? 1.f : p.weight[t];
}

template <class T, bool kCap, TargetKind kKind>
void cross_entropy_fwd_rows(const CrossEntropyFwdParams& f, int64_t begin, int64_t end) {
  const CrossEntropyParams& p = f.loss;
  for (int64_t r = begin; r < end; ++r) {
    const Logits<T, kCap> logits = {static_cast<const T*>(p.x) + r * p.x_row_stride, p.softcap};
    const int64_t t = kKind == TargetKind::kProbabilities ? 0 : p.target[r];
    if (kKind != TargetKind::kProbabilities && t == p.ignore_index) {
      f.row_loss[r] = 0.f;
      if (f.row_z != nullptr) f.row_z[r] = 0.f;
      f.stats[2 * r] = f.stats[2 * r + 1] = 0.f;
      continue;
    }
    const RowStats s = row_stats(logits, p.classes);
    float loss = 0.f;
    if constexpr (kKind != TargetKind::kProbabilities) {
      loss = (1.f - p.label_smoothing) * class_weight(p, t) *
             ((s.max - logits.value_of_one(t).logit[0]) + s.log_sum);
    }
    if constexpr (kKind != TargetKind::kIndex) {
      const T* const q = kKind == TargetKind::kProbabilities
                             ? static_cast<const T*>(p.probabilities) + r * p.classes
                             : nullptr;
      loss += row_sum(p.classes, [&](int64_t i, int count) __attribute__((always_inline)) {
        return target_share<kKind>(p, q, i, count) * ((s.max - logits.at(i, count)) + s.log_sum);
      });
    }
    f.row_loss[r] = loss;
    const float lse = s.max + s.log_sum;
    if (f.row_z != nullptr) f.row_z[r] = p.z_loss * lse * lse;
    f.stats[2 * r] = s.max;
    f.stats[2 * r + 1] = s.log_sum;
  }
}

// dx = slope of the cap * (softmax * scale_of_softmax - share of the target * scale), of row r and
// classes [first, last).
template <class T, bool kCap, TargetKind kKind, class D>
FASTNN_INLINE void cross_entropy_bwd_row(const CrossEntropyBwdParams& b, int64_t r, int64_t first,
                                         int64_t last, D* dx) {
  const CrossEntropyParams& p = b.loss;
  const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
  const int64_t t = kKind == TargetKind::kProbabilities ? 0 : p.target[r];
  if (kKind != TargetKind::kProbabilities && t == p.ignore_index) {
    for (int64_t i = first; i < last; i += kLanes) {
      store_some(dx + (i - first), zero(), last - i < kLanes ? (int)(last - i) : kLanes);
    }
    return;
  }
  const T* const q = kKind == TargetKind::kProbabilities
                         ? static_cast<const T*>(p.probabilities) + r * p.classes
                         : nullptr;
  const Logits<T, kCap> logits = {x, p.softcap};
  const float scale = b.scale[r * b.scale_stride];
  const float max = b.stats[2 * r], log_sum = b.stats[2 * r + 1];
  float share_sum = 0.f;  // of the target over all classes, weighted
  if constexpr (kKind == TargetKind::kIndex) {
    share_sum = (1.f - p.label_smoothing) * class_weight(p, t);
  } else if constexpr (kKind == TargetKind::kSmoothed) {
    share_sum = (1.f - p.label_smoothing) * class_weight(p, t) +
                p.label_smoothing / (float)p.classes * p.weight_sum;
  } else {
    share_sum = row_sum(p.classes, [&](int64_t i, int count) __attribute__((always_inline)) {
      return target_share<kKind>(p, q, i, count);
    });
  }
  const float z =
      p.z_loss != 0.f ? 2.f * p.z_loss * (max + log_sum) * b.z_scale[r * b.scale_stride] : 0.f;
  const float softmax_scale = scale * share_sum;
  // Products rounded alike and then subtracted: where softmax and target agree the gradient is
  // exactly z's.
  auto gradient = [&](const typename Logits<T, kCap>::Value& v, Vec share)
                      __attribute__((always_inline)) {
                        const Vec e = exp((v.logit - max) - log_sum);
                        const Vec g = fma(e, splat(z), e * softmax_scale - share * scale);
                        return kCap ? g * v.slope : g;
                      };
  for (int64_t i = first; i < last; i += kLanes) {
    const int count = last - i < kLanes ? (int)(last - i) : kLanes;
    Vec share = zero();
    if constexpr (kKind != TargetKind::kIndex) share = target_share<kKind>(p, q, i, count);
    store_some(dx + (i - first), gradient(logits.value(i, count), share), count);
  }
  if (kKind != TargetKind::kProbabilities && first <= t && t < last) {
    // The target's own class once more, from its unrounded parts.
    float own = (1.f - p.label_smoothing) * class_weight(p, t);
    if constexpr (kKind == TargetKind::kSmoothed) {
      own += p.label_smoothing / (float)p.classes * class_weight(p, t);
    }
    store_first(dx + (t - first), gradient(logits.value_of_one(t), splat(own)), 1);
  }
}

template <class T, bool kCap, TargetKind kKind>
void cross_entropy_bwd_rows(const CrossEntropyBwdParams& b, int64_t begin, int64_t end) {
  const int64_t classes = b.loss.classes;
  for (int64_t r = begin; r < end; ++r) {
    cross_entropy_bwd_row<T, kCap, kKind>(b, r, 0, classes, static_cast<T*>(b.dx) + r * classes);
  }
}

template <class F>
FASTNN_INLINE void with_kind_and_cap(const CrossEntropyParams& p, F f) {
  auto with_cap = [&](auto kind) {
    if (p.softcap != 0.f) {
      f(std::true_type{}, kind);
    } else {
      f(std::false_type{}, kind);
    }
  };
  if (p.probabilities != nullptr) {
    with_cap(std::integral_constant<TargetKind, TargetKind::kProbabilities>{});
  } else if (p.label_smoothing != 0.f) {
    with_cap(std::integral_constant<TargetKind, TargetKind::kSmoothed>{});
  } else {
    with_cap(std::integral_constant<TargetKind, TargetKind::kIndex>{});
  }
}
template <class F>
FASTNN_INLINE void with_loss_kind(const CrossEntropyParams& p, F f) {
  with_type(p.dtype, [&](auto type) {
    with_kind_and_cap(p, [&](auto cap, auto kind) { f(type, cap, kind); });
  });
}

inline void cross_entropy_fwd(const CrossEntropyFwdParams& p, int64_t begin, int64_t end) {
  with_loss_kind(p.loss, [&](auto type, auto cap, auto kind) {
    cross_entropy_fwd_rows<decltype(type), decltype(cap)::value, decltype(kind)::value>(p, begin,
                                                                                        end);
  });
}
inline void cross_entropy_bwd(const CrossEntropyBwdParams& p, int64_t begin, int64_t end) {
  with_loss_kind(p.loss, [&](auto type, auto cap, auto kind) {
    cross_entropy_bwd_rows<decltype(type), decltype(cap)::value, decltype(kind)::value>(p, begin,
                                                                                        end);
  });
}

}  // namespace
}  // namespace fastnn
