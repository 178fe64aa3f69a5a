// What the programs that run kernels under sanitizers share: buffers of exact size, and the
// comparison.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

#include "fiber.h"

namespace fastnn {

inline int g_wrong = 0;

using Buffer = std::unique_ptr<float[]>;
inline Buffer buffer(int64_t n) { return Buffer(new float[static_cast<size_t>(n)]); }
inline Buffer values(int64_t n, unsigned seed) {
  Buffer b = buffer(n);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < n; ++i) b[static_cast<size_t>(i)] = normal(random);
  return b;
}

inline void expect(const char* what, int64_t rows, int64_t n, double got, double want,
                   double allowed) {
  if (std::fabs(got - want) <= allowed || ++g_wrong > 5) return;
  std::printf("wrong: %s %ld x %ld: %g, not %g\n", what, static_cast<long>(rows),
              static_cast<long>(n), got, want);
}

// `rows` copies of a row more than 2^31 elements apart, amid pages that a wrapped offset reaches
// too: it reads zeros there.
template <class T>
struct FarRows {
  static constexpr int64_t kStride = (int64_t{1} << 31) + 8;
  T* data;
  FarRows(const T* row, int64_t n, int64_t rows = 2) {
    const auto elements = static_cast<size_t>((rows + 1) * kStride);
    data = reinterpret_cast<T*>(emu::fresh_pages(nullptr, elements * sizeof(T))) + kStride;
    for (int64_t r = 0; r < rows; ++r) std::copy(row, row + n, data + r * kStride);
  }
};
// The second of two equal rows gives what the first gives.
template <class T>
void expect_equal_rows(const char* what, const T* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) expect(what, 2, n, y[n + i], y[i], 0.0);
}

inline int report() {
  if (g_wrong == 0) std::printf("right\n");
  return 0;
}

}  // namespace fastnn
