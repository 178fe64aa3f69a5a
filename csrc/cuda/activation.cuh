// The activations and their derivatives, as cpu/simd/activation.h has them.
#pragma once
#include "cuda/ptx.cuh"
#include "params/activation.h"

namespace fastnn::cuda {

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// Standard normal distribution function. For 16-bit results by 7.1.26 of Abramowitz & Stegun:
// erfc(z) is a polynomial in 1 / (1 + p z) times e^(-z^2), error below 1.5e-7.
template <class T>
__device__ __forceinline__ float normal_cdf(float x) {
  if constexpr (sizeof(T) == 4) return 0.5f * erfcf(x * -0.707106781f);
  const float z = fabsf(x) * 0.707106781f;
  const float t = __fdividef(1.f, fmaf(0.3275911f, z, 1.f));
  float p = fmaf(t, 1.061405429f, -1.453152027f);
  p = fmaf(t, p, 1.421413741f);
  p = fmaf(t, p, -0.284496736f);
  p = fmaf(t, p, 0.254829592f);
  const float half = 0.5f * p * t * __expf(-z * z);
  return x >= 0.f ? 1.f - half : half;
}
constexpr float kGeluTwice = 1.59576912f;  // 2 sqrt(2 / pi): (1 + tanh(u)) / 2 = sigmoid(2 u)
constexpr float kGeluCubic = 0.044715f;
__device__ __forceinline__ float gelu_tanh_argument(float x) {
  return x * fmaf(x * x, kGeluTwice * kGeluCubic, kGeluTwice);
}

// Of a result that is rounded to T.
template <Activation A, class T>
__device__ __forceinline__ float activate(float x) {
  if constexpr (A == Activation::kRelu) {
    return x <= 0.f ? 0.f : x;  // NaN comes through
  } else if constexpr (A == Activation::kGelu) {
    return x * normal_cdf<T>(x);
  } else if constexpr (A == Activation::kGeluTanh) {
    return x * sigmoid(gelu_tanh_argument(x));
  } else if constexpr (A == Activation::kSilu) {
    return x * sigmoid(x);
  } else if constexpr (A == Activation::kSigmoid) {
    return sigmoid(x);
  } else if constexpr (A == Activation::kTanh) {
    return tanhf(x);
  } else if constexpr (A == Activation::kRelu2) {
    return x <= 0.f ? 0.f : x * x;
  } else if constexpr (A == Activation::kHardswish) {
    return x * (fminf(fmaxf(x + 3.f, 0.f), 6.f) * (1.f / 6.f));
  } else {
    return x;
  }
}

// activation'(z) dy. `s` is the output for relu, sigmoid and tanh, z itself for the others.
template <Activation A, class T>
__device__ __forceinline__ float activate_bwd(float dy, float s) {
  if constexpr (A == Activation::kRelu) {
    return s <= 0.f ? 0.f : dy;
  } else if constexpr (A == Activation::kGelu) {
    const float density = __expf(s * s * -0.5f) * 0.398942280f;
    return dy * fmaf(s, density, normal_cdf<T>(s));
  } else if constexpr (A == Activation::kGeluTanh) {
    const float p = sigmoid(gelu_tanh_argument(s)), q = sigmoid(-gelu_tanh_argument(s));
    const float slope = fmaf(s * s, 3.f * kGeluTwice * kGeluCubic, kGeluTwice);
    return dy * fmaf(s * slope * p, q, p);
  } else if constexpr (A == Activation::kSilu) {
    return dy * fmaf(s * sigmoid(s), sigmoid(-s), sigmoid(s));
  } else if constexpr (A == Activation::kSigmoid) {
    return dy * (s * (1.f - s));
  } else if constexpr (A == Activation::kTanh) {
    return dy * fmaf(-s, s, 1.f);
  } else if constexpr (A == Activation::kRelu2) {
    return s <= 0.f ? 0.f : dy * (2.f * s);
  } else if constexpr (A == Activation::kHardswish) {
    return s <= -3.f ? 0.f : s >= 3.f ? dy : dy * fmaf(s, 1.f / 3.f, 0.5f);
  } else {
    return dy;
  }
}

template <Activation A>
struct ActivationTag {
  static constexpr Activation value = A;
};
// Calls f with the activation as a compile-time tag.
template <class F>
__device__ __forceinline__ void with_activation(Activation a, F f) {
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

}  // namespace fastnn::cuda
