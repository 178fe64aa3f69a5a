// What the tests compare with: storage types converted bit by bit, random numbers that bite, errors
// in ulp.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "params/common.h"

namespace fastnn::test {

inline constexpr DType kAllTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
inline const char* type_name(DType t) {
  return t == DType::kFloat32 ? "float32" : t == DType::kBFloat16 ? "bfloat16" : "float16";
}

// Digits after the leading one, and the exponents of the smallest and largest normal number.
struct Format {
  int digits, min_exponent, max_exponent;
};
inline Format format_of(DType t) {
  if (t == DType::kFloat32) return {23, -126, 127};
  if (t == DType::kBFloat16) return {7, -126, 127};
  return {10, -14, 15};
}

// Distance between neighbouring numbers of the type around x.
inline double ulp_of(double x, DType t) {
  const Format f = format_of(t);
  const int e =
      x == 0 || !std::isfinite(x) ? f.min_exponent : std::max(std::ilogb(x), f.min_exponent);
  return std::ldexp(1.0, std::min(e, f.max_exponent) - f.digits);
}

// x rounded to the type, to nearest, ties to even; beyond the largest number infinity.
inline double rounded(double x, DType t) {
  if (!std::isfinite(x) || x == 0) return x;
  const double ulp = ulp_of(x, t), y = std::nearbyint(x / ulp) * ulp;
  const Format f = format_of(t);
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -f.digits), f.max_exponent);
  return std::abs(y) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : y;
}

// Largest error of storing a value that is exact to float32: one rounding; and the bfloat16
// instructions take subnormal numbers for zero (docs/numerics.md).
inline double storing_bound(double x, DType t) {
  return 0.51 * ulp_of(x, t) + (t == DType::kBFloat16 ? 0x1p-126 : 0.0);
}

// The bits of x, which the type holds exactly (see rounded).
inline uint32_t encode(double x, DType t) {
  if (t == DType::kFloat32) return std::bit_cast<uint32_t>(static_cast<float>(x));
  if (t == DType::kBFloat16) return std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16;
  const uint32_t sign = std::signbit(x) ? 0x8000u : 0u;
  if (std::isnan(x)) return sign | 0x7e00u;
  if (std::isinf(x)) return sign | 0x7c00u;
  if (x == 0) return sign;
  const int e = std::max(std::ilogb(x), -14);
  const auto units =
      static_cast<uint32_t>(std::ldexp(std::abs(x), 10 - e));  // 1024 .. 2047 where normal
  return sign | (units + (static_cast<uint32_t>(e + 14) << 10));
}
inline double decode(uint32_t bits, DType t) {
  if (t == DType::kFloat32) return std::bit_cast<float>(bits);
  if (t == DType::kBFloat16) return std::bit_cast<float>(bits << 16);
  const double sign = bits & 0x8000u ? -1 : 1;
  const int e = static_cast<int>(bits >> 10 & 31), m = static_cast<int>(bits & 1023);
  if (e == 31) return m != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  return sign * (e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25));
}

inline void put(void* p, int64_t i, double x, DType t) {
  const uint32_t bits = encode(rounded(x, t), t);
  if (t == DType::kFloat32) {
    static_cast<uint32_t*>(p)[i] = bits;
  } else {
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(bits);
  }
}
inline double get(const void* p, int64_t i, DType t) {
  return decode(t == DType::kFloat32 ? static_cast<const uint32_t*>(p)[i]
                                     : static_cast<const uint16_t*>(p)[i],
                t);
}

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // About normal, with one in 32 twenty times as large: outliers show a missing maximum or a lost
  // digit.
  double value() {
    const double v = (uniform() + uniform() + uniform() + uniform() - 2) * 1.7;
    return bits() % 32 == 0 ? 20 * v : v;
  }

 private:
  uint64_t state_;
};

}  // namespace fastnn::test
