// The activations and their derivatives, once, for every kernel that applies one.
#pragma once
#include "cpu/simd/math.h"
#include "params/activation.h"

namespace fastnn {
namespace {

constexpr float kSqrtHalf = 0.707106781f;
constexpr float kGeluScale = 0.797884561f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
constexpr float kInverseSqrtTwoPi = 0.398942280f;

// Standard normal distribution function, the factor of x in GELU.
FASTNN_INLINE Vec normal_cdf(Vec x) {
  const Vec half = erfc_absolute(abs(x) * kSqrtHalf) * 0.5f;
  return select(x >= zero(), 1.f - half, half);
}

// 1 / (1 + e^-x) = p and 1 - p = q, both with all their digits: 1 - p has none left of q where p is
// near 1.
struct Logistic {
  Vec p, q;
};
FASTNN_INLINE Logistic logistic(Vec x) {
  const Vec z = exp(-abs(x)), near_one = reciprocal(z + 1.f), small = z * near_one;
  const IVec positive = x >= zero();
  return {select(positive, near_one, small), select(positive, small, near_one)};
}

// The activation and its slope at one place, which counts where the activation is not cut off
// (through). Whoever takes one of them pays for one. x (p q) comes before large factors: p q is 0
// where they overflow.
struct Activated {
  Vec value, slope;
};

template <Activation A>
FASTNN_INLINE Activated activated(Vec x) {
  if constexpr (A == Activation::kRelu) {
    return {max(zero(), x), splat(1.f)};  // in this order NaN comes through
  } else if constexpr (A == Activation::kGelu) {
    const Vec p = normal_cdf(x);
    return {x * p, fma(x, exp(x * x * -0.5f) * kInverseSqrtTwoPi, p)};
  } else if constexpr (A == Activation::kGeluTanh) {
    // Twice the tanh's argument: (1 + tanh(u)) / 2 = sigmoid(2u).
    const Vec s = x * x;
    const auto [p, q] = logistic(x * fma(s, 2.f * kGeluScale * kGeluCubic, 2.f * kGeluScale));
    const Vec slope = fma(s, 6.f * kGeluScale * kGeluCubic, 2.f * kGeluScale);
    return {x * p, fma(x * (p * q), slope, p)};
  } else if constexpr (A == Activation::kSilu) {
    const auto [p, q] = logistic(x);
    return {x * p, fma(x, p * q, p)};
  } else if constexpr (A == Activation::kSigmoid) {
    const auto [p, q] = logistic(x);
    return {p, p * q};
  } else if constexpr (A == Activation::kTanh) {
    const auto [p, q] = logistic(x * 2.f);
    return {tanh(x), p * q * 4.f};
  } else if constexpr (A == Activation::kRelu2) {
    const Vec y = max(zero(), x);
    return {y * y, y * 2.f};
  } else if constexpr (A == Activation::kHardswish) {
    const Vec gate = min(splat(6.f), max(zero(), x + 3.f)) * (1.f / 6.f);
    const Vec slope = fma(x, 1.f / 3.f, 0.5f);
    return {x * gate, select(x >= splat(3.f), splat(1.f), slope)};
  } else {
    return {x, splat(1.f)};
  }
}

template <Activation A>
FASTNN_INLINE Vec activate(Vec x) {
  return activated<A>(x).value;
}

// g times the slope at x. Where an activation is cut off nothing comes through, infinities neither.
template <Activation A>
FASTNN_INLINE Vec through(Vec g, Vec x, Vec slope) {
  if constexpr (A == Activation::kRelu) {
    return select(x <= zero(), zero(), g);
  } else if constexpr (A == Activation::kRelu2) {
    return select(x <= zero(), zero(), g * slope);
  } else if constexpr (A == Activation::kHardswish) {
    return select(x <= splat(-3.f), zero(), g * slope);
  } else {
    return g * slope;
  }
}

// activation'(z) dy of what a layer saved: its output for relu, sigmoid and tanh, z itself for the
// others.
template <Activation A>
FASTNN_INLINE Vec activate_bwd(Vec dy, Vec s) {
  if constexpr (A == Activation::kNone) {
    return dy;
  } else if constexpr (A == Activation::kSigmoid) {
    return dy * (s * (1.f - s));
  } else if constexpr (A == Activation::kTanh) {
    return dy * fma(-s, s, splat(1.f));
  } else {
    return through<A>(dy, s, activated<A>(s).slope);
  }
}

// Calls f with the activation as a compile-time tag.
template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
template <class F>
FASTNN_INLINE void with_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::kNone:
      return f(ActivationTag<Activation::kNone>{});
    case Activation::kRelu:
      return f(ActivationTag<Activation::kRelu>{});
    case Activation::kGelu:
      return f(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(ActivationTag<Activation::kSilu>{});
    case Activation::kSigmoid:
      return f(ActivationTag<Activation::kSigmoid>{});
    case Activation::kTanh:
      return f(ActivationTag<Activation::kTanh>{});
    case Activation::kRelu2:
      return f(ActivationTag<Activation::kRelu2>{});
    case Activation::kHardswish:
      return f(ActivationTag<Activation::kHardswish>{});
  }
}

}  // namespace
}  // namespace fastnn
