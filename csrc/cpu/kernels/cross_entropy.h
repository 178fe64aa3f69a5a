// Cross-entropy. Forward reads the logits once (online logsumexp, a running maximum per lane), a
// second time only where every class has a share in the target (label smoothing, probabilities).
// Backward recomputes the softmax from the saved maximum and log-sum: that keeps 8 bytes a row from
// forward to backward where a saved gradient keeps rows x classes, is as fast or faster
// (docs/kernels.md has the measurement), and scaling by the incoming gradient is free.
#pragma once
#include <type_traits>

#include "cpu/kernels/rows.h"
#include "cpu/simd/math.h"
#include "cpu/simd/pair.h"
#include "params/cross_entropy.h"

namespace fastnn {
namespace {

// How the target of a row is spread over the classes.
enum class TargetKind { kIndex, kSmoothed, kProbabilities };

// e^(x - s) as 2^(x log2(e) - s log2(e)), which takes three quarters of the instructions: what the
// rounding of s log2(e) changes is put back. For s below this limit, where that rounding is far
// from 1, and where fma() rounds once.
constexpr float kLog2E = 1.44269504f, kFusedLimit = 0x1p20f;
FASTNN_INLINE bool may_fuse(float s) {
  return kFusedMultiplyAdd && __builtin_fabsf(s) < kFusedLimit;  // not where s is NaN
}

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
  template <class Part, int V>
  FASTNN_INLINE void get(int64_t i, Part part, Value (&v)[V]) const {
    Vec raw[V];
    part.get(x + i, raw);
    FASTNN_UNROLL for (int k = 0; k < V; ++k) v[k] = capped(raw[k]);
  }
  FASTNN_INLINE Value value_of_one(int64_t i) const { return capped(splat(to_float(x[i]))); }
  FASTNN_INLINE Vec at(int64_t i, int count) const {
    return fill_rest(capped(load_some(x + i, count)).logit, count, -__builtin_inff());
  }
};

struct RowStats {
  float max, log_sum;
};

// What e^(x - s) takes of s: itself, or s log2(e) and what its rounding lost. power(s) is 1.
template <bool kFused>
struct Exponent {
  Vec top, lost;
  explicit FASTNN_INLINE Exponent(Vec s) {
    top = kFused ? s * kLog2E : s;
    lost = kFused ? fma(s, splat(kLog2E), -top) : zero();
  }
  template <bool kRough = false>
  FASTNN_INLINE Vec power(Vec x) const {
    if constexpr (kFused) return exp2<kRough>(fma(x, splat(kLog2E), -top) - lost);
    return exp(x - top);
  }
};

// Maximum and log-sum in one pass. The running maximum starts at a number and not at -inf: lanes
// that have seen nothing else then add e^(-inf) = 0 and not NaN. A row of -inf ends with
// log(0) = -inf and its loss is NaN.
template <bool kFused, class L>
FASTNN_INLINE RowStats row_stats_of(const L& logits, int64_t n) {
  Vec m = splat(kFused ? -kFusedLimit : -__FLT_MAX__), total = zero();
  Exponent<kFused> above(m);
  const auto add = [&](auto&... x) __attribute__((always_inline)) {
    Vec highest = m;
    ((highest = max(x, highest)), ...);
    if (any_differs(highest, m)) {
      above = Exponent<kFused>(highest);
      total = total * above.power(m);
      m = highest;
    }
    total += (above.power(x) + ...);
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    typename L::Value a[2], b[2];
    logits.get(i, Pair<false>{}, a);
    logits.get(i + 2 * kLanes, Pair<false>{}, b);
    add(a[0].logit, a[1].logit, b[0].logit, b[1].logit);
  }
  for (; i < n; i += kLanes) {
    const Vec x = logits.at(i, n - i < kLanes ? (int)(n - i) : kLanes);
    add(x);
  }
  const float row_max = max_lanes(m);
  const float sum = sum_lanes(total * Exponent<kFused>(splat(row_max)).power(m));
  return {row_max, log(splat(sum))[0]};
}
template <class L>
FASTNN_INLINE RowStats row_stats(const L& logits, int64_t n) {
  if constexpr (kFusedMultiplyAdd) {
    const RowStats found = row_stats_of<true>(logits, n);
    if (may_fuse(found.max)) return found;
  }
  return row_stats_of<false>(logits, n);
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
  using Value = typename Logits<T, kCap>::Value;
  const auto write = [&](auto softmax) __attribute__((always_inline)) {
    // Products rounded alike and then subtracted: where softmax and target agree the gradient is
    // exactly z's.
    const auto gradient = [&](const Value& v, Vec share) __attribute__((always_inline)) {
      const Vec e = softmax(v.logit);
      const Vec g = fma(e, splat(z), e * softmax_scale - share * scale);
      return kCap ? g * v.slope : g;
    };
    // Weights and probabilities come in memory's order.
    constexpr bool kOrdered = kKind != TargetKind::kIndex || !__is_same(T, D);
    each_part<kOrdered>(first, last, [&](int64_t i, auto part) __attribute__((always_inline)) {
      Value v[part.kVectors];
      Vec g[part.kVectors];
      logits.get(i, part, v);
      FASTNN_UNROLL for (int k = 0; k < part.kVectors; ++k) {
        if constexpr (kKind == TargetKind::kIndex) {  // no share but the target's own, below
          g[k] = softmax(v[k].logit) * (softmax_scale + z);
          if constexpr (kCap) g[k] *= v[k].slope;
        } else {
          g[k] = gradient(v[k], target_share<kKind>(p, q, i + k * kLanes, part.lanes()));
        }
      }
      part.template put<false>(dx + (i - first), g);
    });
    if (kKind != TargetKind::kProbabilities && first <= t && t < last) {
      // The target's own class once more, from its unrounded parts.
      float own = (1.f - p.label_smoothing) * class_weight(p, t);
      if constexpr (kKind == TargetKind::kSmoothed) {
        own += p.label_smoothing / (float)p.classes * class_weight(p, t);
      }
      store_first(dx + (t - first), gradient(logits.value_of_one(t), splat(own)), 1);
    }
  };
  const float lse = max + log_sum;
  if constexpr (kFusedMultiplyAdd) {
    if (may_fuse(lse)) {
      Exponent<true> above(splat(lse));
      // Of max + log_sum too.
      above.lost += splat(((max - (lse - (lse - max))) + (log_sum - (lse - max))) * kLog2E);
      return write([=](Vec x) __attribute__((always_inline)) {
        return above.template power<sizeof(D) == 2>(x);
      });
    }
  }
  write([=](Vec x) __attribute__((always_inline)) { return exp((x - max) - log_sum); });
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
