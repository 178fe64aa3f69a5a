// The activations and their slopes in double.
#pragma once
#include <algorithm>
#include <cmath>

#include "params/linear.h"

namespace fastnn::test {

inline constexpr Activation kLinearActivations[] = {
    Activation::kNone, Activation::kRelu,    Activation::kGelu, Activation::kGeluTanh,
    Activation::kSilu, Activation::kSigmoid, Activation::kTanh};
inline const char* activation_name(Activation a) {
  const char* const names[] = {"none",    "relu", "gelu",  "gelu_tanh", "silu",
                               "sigmoid", "tanh", "relu2", "hardswish"};
  return names[static_cast<int>(a)];
}

inline double logistic(double x) { return 1 / (1 + std::exp(-x)); }
constexpr double kGeluTwice = 1.5957691216057308;  // 2 sqrt(2 / pi)

inline double activation_of(Activation a, double z) {
  switch (a) {
    case Activation::kNone:
      return z;
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kGelu:
      return z * std::erfc(-z * std::sqrt(0.5)) / 2;
    case Activation::kGeluTanh:
      return z * logistic(kGeluTwice * (z + 0.044715 * z * z * z));
    case Activation::kSilu:
      return z * logistic(z);
    case Activation::kSigmoid:
      return logistic(z);
    case Activation::kTanh:
      return std::tanh(z);
    case Activation::kRelu2:
      return z > 0 ? z * z : 0;
    case Activation::kHardswish:
      return z * std::min(std::max(z + 3, 0.0), 6.0) / 6;
  }
  return NAN;
}

// From what backward is given: the output of relu, sigmoid and tanh, the pre-activation of the
// others.
inline double slope_of(Activation a, double s) {
  switch (a) {
    case Activation::kNone:
      return 1;
    case Activation::kRelu:
      return s > 0 ? 1 : 0;
    case Activation::kGelu:
      return std::erfc(-s * std::sqrt(0.5)) / 2 + s * std::exp(-s * s / 2) * 0.3989422804014327;
    case Activation::kGeluTanh: {
      const double p = logistic(kGeluTwice * (s + 0.044715 * s * s * s));
      return p + s * p * (1 - p) * kGeluTwice * (1 + 3 * 0.044715 * s * s);
    }
    case Activation::kSilu: {
      const double p = logistic(s);
      return p + s * p * (1 - p);
    }
    case Activation::kSigmoid:
      return s * (1 - s);
    case Activation::kTanh:
      return 1 - s * s;
    case Activation::kRelu2:
      return s > 0 ? 2 * s : 0;
    case Activation::kHardswish:
      return s <= -3 ? 0 : s >= 3 ? 1 : s / 3 + 0.5;
  }
  return NAN;
}
// From the pre-activation.
inline double slope_at(Activation a, double z) {
  if (a == Activation::kSigmoid) return logistic(z) * logistic(-z);
  if (a == Activation::kTanh) return 4 * logistic(2 * z) * logistic(-2 * z);
  return slope_of(a, z);
}

}  // namespace fastnn::test
