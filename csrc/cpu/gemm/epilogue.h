// What happens to finished sums: scales, bias, activation, gate, addend and the rounding, in one
// pass.
#pragma once
#include "cpu/gemm/params.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/codes.h"
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

// kLanes sums of codes as float32 sums.
FASTNN_INLINE Vec dequantised(const Int8Scales& s, float row, int64_t n, const float* t) {
  const IVec sum = (IVec)((UVec)load(t) - (UVec)load_ints(s.offset + n));
  return __builtin_convertvector(sum, Vec) * (splat(row) * load(s.column + n));
}

// The epilogue of rows x columns of t, in one pass.
template <Activation A, class T>
void finish_typed(const GemmParams& p, const float* t, int64_t ldt, int64_t m0, int64_t rows,
                  int64_t n0, int64_t columns) {
  constexpr bool kRough = sizeof(T) == 2;
  const Epilogue& e = p.epilogue;
  const float* const bias = e.bias;
  const bool codes = p.is_int8;
  const Int8Scales int8 = p.int8;
  for (int64_t i = 0; i < rows; ++i, t += ldt) {
    const int64_t m = m0 + i;
    T* const c = static_cast<T*>(p.c) + m * p.c_stride + n0;
    T* const pre = e.pre ? static_cast<T*>(e.pre) + m * e.pre_stride + n0 : nullptr;
    const T* const gate = e.gate ? static_cast<const T*>(e.gate) + m * e.gate_stride + n0 : nullptr;
    const float* const addend = e.addend ? e.addend + m * p.c_stride + n0 : nullptr;
    const float scale = codes ? int8.row[m] : 1.f;
    auto finished = [&](int64_t n, auto read, auto write) __attribute__((always_inline)) {
      Vec v = codes ? dequantised(int8, scale, n0 + n, t + n) : load(t + n);
      if (bias != nullptr) v += load(bias + n0 + n);
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
