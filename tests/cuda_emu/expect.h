// What the programs that run kernels under sanitizers share: buffers of exact size, and the
// comparison.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

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

inline int report() {
  if (g_wrong == 0) std::printf("right\n");
  return 0;
}

}  // namespace fastnn
