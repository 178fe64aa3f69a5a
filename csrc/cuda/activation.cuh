// The activations and their derivatives, as cpu/simd/activation.h has them. Of results that are
// rounded to T: the quick instructions, whose errors 16 bits do not show, are for 16-bit types.
#pragma once
#include "cuda/ptx.cuh"
#include "params/activation.h"

namespace fastnn::cuda {

template <class T>
__device__ __forceinline__ float exp_for(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}
template <class T>
__device__ __forceinline__ float reciprocal_for(float x) {
  return sizeof(T) == 4 ? 1.f / x : __fdividef(1.f, x);
}

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

// 1 / (1 + e^-x) = p and 1 - p = q, both with all their digits.
struct Logistic {
  float p, q;
};
template <class T>
__device__ __forceinline__ Logistic logistic(float x) {
  const float z = exp_for<T>(-fabsf(x)), near_one = reciprocal_for<T>(1.f + z),
              small = z * near_one;
  return x >= 0.f ? Logistic{near_one, small} : Logistic{small, near_one};
}

// The activation and its slope at one place, which counts where the activation is not cut off;
// whoever takes one of them pays for one. x (p q) comes before large factors: p q is 0
// where they overflow.
struct Activated {
  float value, slope;
};
template <Activation A, class T>
__device__ __forceinline__ Activated activated(float x) {
  if constexpr (A == Activation::kRelu) {
    return {x <= 0.f ? 0.f : x, 1.f};  // NaN comes through
  } else if constexpr (A == Activation::kGelu) {
    const float p = normal_cdf<T>(x);
    return {x * p, fmaf(x, exp_for<T>(x * x * -0.5f) * 0.398942280f, p)};
  } else if constexpr (A == Activation::kGeluTanh) {
    // Twice the tanh's argument: (1 + tanh(u)) / 2 = sigmoid(2u).
    constexpr float kTwice = 1.59576912f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    const float s = x * x;
    const auto [p, q] = logistic<T>(x * fmaf(s, kTwice * kCubic, kTwice));
    return {x * p, fmaf(x * (p * q), fmaf(s, 3.f * kTwice * kCubic, kTwice), p)};
  } else if constexpr (A == Activation::kSilu) {
    const auto [p, q] = logistic<T>(x);
    return {x * p, fmaf(x, p * q, p)};
  } else if constexpr (A == Activation::kSigmoid) {
    const auto [p, q] = logistic<T>(x);
    return {p, p * q};
  } else if constexpr (A == Activation::kTanh) {
    const auto [p, q] = logistic<T>(2.f * x);
    return {tanhf(x), 4.f * (p * q)};
  } else if constexpr (A == Activation::kRelu2) {
    const float y = x <= 0.f ? 0.f : x;
    return {y * y, 2.f * y};
  } else if constexpr (A == Activation::kHardswish) {
    const float t = x + 3.f, gate = (t <= 0.f ? 0.f : t >= 6.f ? 6.f : t) * (1.f / 6.f);
    return {x * gate, x >= 3.f ? 1.f : fmaf(x, 1.f / 3.f, 0.5f)};
  } else {
    return {x, 1.f};
  }
}

template <Activation A, class T>
__device__ __forceinline__ float activate(float x) {
  return activated<A, T>(x).value;
}

// activation'(x) dy. Where the activation is cut off nothing comes through, infinities neither.
template <Activation A, class T>
__device__ __forceinline__ float slope_times(float dy, float x) {
  if constexpr (A == Activation::kRelu || A == Activation::kRelu2) {
    if (x <= 0.f) return 0.f;
  } else if constexpr (A == Activation::kHardswish) {
    if (x <= -3.f) return 0.f;
  }
  return dy * activated<A, T>(x).slope;
}

// activation'(z) dy of what linear saved: its output for relu, sigmoid and tanh, z itself for the
// others.
template <Activation A, class T>
__device__ __forceinline__ float activate_bwd(float dy, float s) {
  if constexpr (A == Activation::kNone) {
    return dy;
  } else if constexpr (A == Activation::kSigmoid) {
    return dy * (s * (1.f - s));
  } else if constexpr (A == Activation::kTanh) {
    return dy * fmaf(-s, s, 1.f);
  } else {
    return slope_times<A, T>(dy, s);
  }
}

// Calls f with the activation as a compile-time tag.
template <class F>
__device__ __forceinline__ void with_activation(Activation a, F f) {
  switch (a) { FASTNN_ACTIVATIONS(FASTNN_ACTIVATION_CASE) }
}
// The same where linear's are all there are: its kernels carry code for no others.
template <class F>
__device__ __forceinline__ void with_linear_activation(Activation a, F f) {
  switch (a) {
    FASTNN_LINEAR_ACTIVATIONS(FASTNN_ACTIVATION_CASE)
    default:
      return;
  }
}

}  // namespace fastnn::cuda
