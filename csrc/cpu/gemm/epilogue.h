// What happens to finished sums: bias, activation, gate, addend and the rounding, in one
// pass.
#pragma once
#include "cpu/gemm/params.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

// The epilogue of rows x columns of t, in one pass.
template <Activation A, class T>
void finish_typed(const GemmParams& p, const float* t, int64_t ldt, int64_t m0, int64_t rows,
                  int64_t n0, int64_t columns) {
  constexpr bool kRough = sizeof(T) == 2;
  const Epilogue& e = p.epilogue;
  for (int64_t i = 0; i < rows; ++i, t += ldt) {
    const int64_t m = m0 + i;
    T* const c = static_cast<T*>(p.c) + m * p.c_stride + n0;
    T* const pre = e.pre ? static_cast<T*>(e.pre) + m * e.pre_stride + n0 : nullptr;
    const T* const gate = e.gate ? static_cast<const T*>(e.gate) + m * e.gate_stride + n0 : nullptr;
    const float* const addend = e.addend ? e.addend + m * p.c_stride + n0 : nullptr;
    auto finished = [&](int64_t n, auto read, auto write) __attribute__((always_inline)) {
      Vec v = load(t + n);
      if (e.bias != nullptr) v += load(e.bias + n0 + n);
      if (pre != nullptr) write(pre + n, v);
      Vec y = activate<A, kRough>(gate != nullptr ? read(gate + n) : v);
      if (gate != nullptr) y *= v;
      if (addend != nullptr) y += read(addend + n);
      write(c + n, y);
    };
    int64_t n = 0;
    for (; n + kLanes <= columns; n += kLanes) {
      finished(
          n, [](auto* from) __attribute__((always_inline)) { return load(from); },
          [](T* to, Vec v) __attribute__((always_inline)) { store(to, v); });
    }
    if (n < columns) {
      const int left = (int)(columns - n);
      finished(
          n, [=](auto* from) __attribute__((always_inline)) { return load_some(from, left); },
          [=](T* to, Vec v) __attribute__((always_inline)) { store_first(to, v, left); });
    }
  }
}

// Whether tiles are the result already, which they are added to where it is the addend.
inline bool is_done(const GemmParams& p, int64_t columns) {
  const Epilogue& e = p.epilogue;
  return p.c_dtype == DType::kFloat32 && e.activation == Activation::kNone && e.bias == nullptr &&
         e.pre == nullptr && e.gate == nullptr && (e.addend == nullptr || e.addend == p.c) &&
         columns % kStrip == 0;
}

inline void finish(const GemmParams& p, const float* t, int64_t ldt, int64_t m0, int64_t rows,
                   int64_t n0, int64_t columns) {
  with_type(p.c_dtype, [&](auto type) {
    with_activation(p.epilogue.activation, [&](auto tag) {
      finish_typed<decltype(tag)::value, decltype(type)>(p, t, ldt, m0, rows, n0, columns);
    });
  });
}

}  // namespace
}  // namespace fastnn
