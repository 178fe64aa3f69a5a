// The activations of linear and their derivatives, once, for every kernel that applies one.
#pragma once
#include "cpu/simd/math.h"
#include "params/linear.h"

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
FASTNN_INLINE Vec
gelu_tanh_argument(Vec x) {  // twice the tanh argument: (1 + tanh(u)) / 2 = sigmoid(2u)
  return x * fma(x * x, 2.f * kGeluScale * kGeluCubic, 2.f * kGeluScale);
}

template <Activation A>
FASTNN_INLINE Vec activate(Vec x) {
  if constexpr (A == Activation::kRelu) {
    return max(zero(), x);  // in this order NaN comes through
  } else if constexpr (A == Activation::kGelu) {
    return x * normal_cdf(x);
  } else if constexpr (A == Activation::kGeluTanh) {
    return x * sigmoid(gelu_tanh_argument(x));
  } else if constexpr (A == Activation::kSilu) {
    return x * sigmoid(x);
  } else if constexpr (A == Activation::kSigmoid) {
    return sigmoid(x);
  } else if constexpr (A == Activation::kTanh) {
    return tanh(x);
  } else {
    return x;
  }
}

// activation'(z) dy. `s` is the output for relu, sigmoid and tanh, z itself for the others.
template <Activation A>
FASTNN_INLINE Vec activate_bwd(Vec dy, Vec s) {
  if constexpr (A == Activation::kRelu) {
    return select(s <= zero(), zero(), dy);
  } else if constexpr (A == Activation::kGelu) {
    const Vec density = exp(s * s * -0.5f) * kInverseSqrtTwoPi;
    return dy * fma(s, density, normal_cdf(s));
  } else if constexpr (A == Activation::kGeluTanh) {
    const Vec p = sigmoid(gelu_tanh_argument(s));
    const Vec slope = fma(s * s, 6.f * kGeluScale * kGeluCubic, 2.f * kGeluScale);
    return dy * fma(s * slope * p, 1.f - p, p);
  } else if constexpr (A == Activation::kSilu) {
    const Vec p = sigmoid(s);
    return dy * fma(s * p, 1.f - p, p);
  } else if constexpr (A == Activation::kSigmoid) {
    return dy * (s * (1.f - s));
  } else if constexpr (A == Activation::kTanh) {
    return dy * fma(-s, s, splat(1.f));
  } else {
    return dy;
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
  }
}

}  // namespace
}  // namespace fastnn
