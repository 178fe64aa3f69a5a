// The activations and their derivatives, once, for every kernel that applies one.
#pragma once
#include "cpu/simd/math.h"
#include "params/activation.h"

namespace fastnn {
namespace {

constexpr float kGeluScale = 0.797884561f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
constexpr float kInverseSqrtTwoPi = 0.398942280f;

// With kRough, results are within 2^-12 of their size: enough for what is rounded to 16 bits, and
// half the work.

// Standard normal distribution function, the factor of x in GELU: on the negative side 2^p(|x|),
// within 5e-8 absolute. Rough: p fitted within 1.4e-4 on [0, 4.5]. Both fall on beyond.
template <bool kRough>
FASTNN_INLINE Vec normal_cdf(Vec x) {
  const Vec t = abs(x);
  Vec q, p;
  if constexpr (kRough) {
    q = fma(splat(-0.000312083401f), t, splat(0.00574346818f));
    q = fma(q, t, splat(-0.0479494818f));
    q = fma(q, t, splat(-0.464517206f));
    q = fma(q, t, splat(-1.14898908f));
    p = fma(q, t, splat(-1.00013447f));
  } else {
    q = fma(splat(-2.83491227e-06f), t, splat(3.93776609e-05f));
    q = fma(q, t, splat(-0.000186179997f));
    q = fma(q, t, splat(-0.000136937117f));
    q = fma(q, t, splat(0.00706342189f));
    q = fma(q, t, splat(-0.0524961799f));
    q = fma(q, t, splat(-0.45920822f));
    q = fma(q, t, splat(-1.15110528f));
    p = fma(q, t, splat(-1.f));
  }
  const Vec half = exp2<kRough>(p);
  return select(x >= zero(), 1.f - half, half);
}

// The normal density.
template <bool kRough>
FASTNN_INLINE Vec normal_density(Vec x) {
  constexpr float kHalfLog2E = 0.721347520f;
  if constexpr (kRough) return exp2<true>(x * x * -kHalfLog2E) * kInverseSqrtTwoPi;
  return exp(x * x * -0.5f) * kInverseSqrtTwoPi;
}

// 1 / (1 + e^-x) = p and 1 - p = q, both with all their digits: 1 - p has none left of q where p is
// near 1.
struct Logistic {
  Vec p, q;
};
template <bool kRough>
FASTNN_INLINE Logistic logistic(Vec x) {
  constexpr float kLog2E = 1.44269504f;
  const Vec z = kRough ? exp2<true>(abs(x) * -kLog2E) : exp(-abs(x));
  const Vec near_one = kRough ? rough_reciprocal(z + 1.f) : reciprocal(z + 1.f);
  const Vec small = z * near_one;
  const IVec positive = x >= zero();
  return {select(positive, near_one, small), select(positive, small, near_one)};
}

// The activation and its slope at one place, which counts where the activation is not cut off
// (through). Whoever takes one of them pays for one. x (p q) comes before large factors: p q is 0
// where they overflow.
struct Activated {
  Vec value, slope;
};

template <Activation A, bool kRough = false>
FASTNN_INLINE Activated activated(Vec x) {
  if constexpr (A == Activation::kRelu) {
    return {max(zero(), x), splat(1.f)};  // in this order NaN comes through
  } else if constexpr (A == Activation::kGelu) {
    const Vec p = normal_cdf<kRough>(x);
    return {x * p, fma(x, normal_density<kRough>(x), p)};
  } else if constexpr (A == Activation::kGeluTanh) {
    // Twice the tanh's argument: (1 + tanh(u)) / 2 = sigmoid(2u).
    const Vec s = x * x;
    const auto [p, q] =
        logistic<kRough>(x * fma(s, 2.f * kGeluScale * kGeluCubic, 2.f * kGeluScale));
    const Vec slope = fma(s, 6.f * kGeluScale * kGeluCubic, 2.f * kGeluScale);
    return {x * p, fma(x * (p * q), slope, p)};
  } else if constexpr (A == Activation::kSilu) {
    const auto [p, q] = logistic<kRough>(x);
    return {x * p, fma(x, p * q, p)};
  } else if constexpr (A == Activation::kSigmoid) {
    const auto [p, q] = logistic<kRough>(x);
    return {p, p * q};
  } else if constexpr (A == Activation::kTanh) {
    const auto [p, q] = logistic<kRough>(x * 2.f);
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

template <Activation A, bool kRough = false>
FASTNN_INLINE Vec activate(Vec x) {
  return activated<A, kRough>(x).value;
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
template <class F>
FASTNN_INLINE void with_activation(Activation a, F&& f) {
  switch (a) { FASTNN_ACTIVATIONS(FASTNN_ACTIVATION_CASE) }
}

}  // namespace
}  // namespace fastnn
