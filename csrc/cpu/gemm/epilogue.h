// What happens to finished sums: bias, activation, gate, addend and the rounding, in one
// pass.
#pragma once
#include "cpu/gemm/params.h"
#include "cpu/gemm/tile.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

constexpr int64_t kLineBytes = 64;

// The lines of c that rows [m, m + rows) x columns [n, n + columns) lie in arrive while the tile
// computes.
FASTNN_INLINE void prefetch_output(const GemmParams& p, int64_t m, int64_t rows, int64_t n,
                                   int64_t columns) {
  const int64_t size = element_bytes(p.c_dtype), row_bytes = p.c_stride * size;
  const char* const c = static_cast<const char*>(p.c) + m * row_bytes + n * size;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t at = 0; at < columns * size; at += kLineBytes)
      __builtin_prefetch(c + i * row_bytes + at, 1);
  }
}

inline TileScales tile_scales(const GemmParams& p, int64_t m, int64_t n, bool last) {
  if (!p.is_int8) return {};
  const float* const bias = p.tile_bias;
  return {last ? p.int8.row + m : nullptr, p.int8.column + n, bias == nullptr ? bias : bias + n,
          p.int8.offset + n};
}

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
