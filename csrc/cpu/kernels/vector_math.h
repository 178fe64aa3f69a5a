// Arrays: conversions, and the vector functions, which the accuracy tests call.
#pragma once
#include "cpu/kernel_table.h"
#include "cpu/simd/math.h"

namespace fastnn {
namespace {

template <class F>
FASTNN_INLINE void map_array(const float* x, float* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i < n) store_first(y + i, f(load_first(x + i, (int)(n - i), 0.f)), (int)(n - i));
}

void vector_math(MathFunction function, const float* x, float* y, int64_t n) {
  switch (function) {
    case MathFunction::kExp:
      return map_array(x, y, n, [](Vec v) { return exp(v); });
    case MathFunction::kLog:
      return map_array(x, y, n, [](Vec v) { return log(v); });
    case MathFunction::kTanh:
      return map_array(x, y, n, [](Vec v) { return tanh(v); });
    case MathFunction::kErf:
      return map_array(x, y, n, [](Vec v) { return erf(v); });
    case MathFunction::kSigmoid:
      return map_array(x, y, n, [](Vec v) { return sigmoid(v); });
  }
}

void to_float32(const void* x, int64_t stride, DType dtype, int64_t n, float* y) {
  with_type(dtype, [&](auto type) {
    const auto* const from = static_cast<const decltype(type)*>(x);
    int64_t i = 0;
    for (; stride == 1 && i + kLanes <= n; i += kLanes) store(y + i, load(from + i));
    for (; i < n; ++i) y[i] = to_float(from[i * stride]);
  });
}

void from_float32(const float* x, int64_t n, DType dtype, void* y) {
  with_type(dtype, [&](auto type) {
    auto* const to = static_cast<decltype(type)*>(y);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + i));
    if (i < n) store_first(to + i, load_first(x + i, (int)(n - i), 0.f), (int)(n - i));
  });
}

}  // namespace
}  // namespace fastnn
