// exp, log, tanh, erf, sigmoid against double, over the whole float range, on every instruction
// set.
//
// Takes every kStride-th bit pattern and every one near the points where the algorithms change.
// Every float there is:
//   FASTNN_EXHAUSTIVE=1 vector_math_test      (about a minute a function and instruction set)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <vector>

#include "tests/guarded.h"
#include "tests/isa.h"
#include "tests/reference.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

constexpr uint32_t kStride = 4099;  // a prime: no bit of the mantissa stays the same
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Function {
  const char* name;
  MathFunction code;
  double (*truth)(double);
  double max_ulp;               // docs/numerics.md states them
  std::vector<float> switches;  // where the algorithm or the result changes kind
};

const std::vector<Function> kFunctions = {
    {"exp",
     MathFunction::kExp,
     [](double x) { return std::exp(x); },
     1.1,
     {0.f, 0.34657359f, 1.f, 88.72283f, 89.f, 87.33654f, 103.9721f, 104.f}},
    {"log",
     MathFunction::kLog,
     [](double x) { return std::log(x); },
     1.0,
     {0.f, 1.f, 0.70710678f, 1.41421356f, 1.17549435e-38f, 2.f, 0.5f}},
    {"tanh",
     MathFunction::kTanh,
     [](double x) { return std::tanh(x); },
     1.5,
     {0.f, 0.55f, 9.1f, 9.010913f, 1e-4f}},
    {"erf",
     MathFunction::kErf,
     [](double x) { return std::erf(x); },
     1.5,
     {0.f, 0.9f, 4.f, 3.9192059f, 1e-4f}},
    {"sigmoid",
     MathFunction::kSigmoid,
     [](double x) { return 1 / (1 + std::exp(-x)); },
     3.0,
     {0.f, 88.72283f, 87.33654f, 103.9721f, 17.f}},
};

// Error of y in units of the last place of the truth; infinite where one is NaN or infinite and the
// other is not.
double ulp_error(float y, double truth) {
  const double nearest = rounded(truth, DType::kFloat32);
  if (std::isnan(nearest) || std::isnan(y))
    return std::isnan(nearest) && std::isnan(y) ? 0 : INFINITY;
  if (std::isinf(nearest) || std::isinf(y)) return y == nearest ? 0 : INFINITY;
  return std::abs(y - truth) / ulp_of(truth, DType::kFloat32);
}

struct Worst {
  double ulp = 0;
  float at = 0, got = 0;
};

void compare(const Function& f, const std::vector<float>& x, Worst* worst) {
  std::vector<float> y(x.size());
  kernels().vector_math(f.code, x.data(), y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < x.size(); ++i) {
    const double error = ulp_error(y[i], f.truth(x[i]));
    if (error > worst->ulp) *worst = {error, x[i], y[i]};
  }
}

Worst worst_over_all(const Function& f, uint32_t stride) {
  constexpr size_t kChunk = 1 << 16;
  Worst worst;
  std::vector<float> x;
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += stride) {
    x.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
    if (x.size() == kChunk || bits + stride >= (uint64_t{1} << 32)) {
      compare(f, x, &worst);
      x.clear();
    }
  }
  return worst;
}

Worst worst_near_switches(const Function& f) {
  Worst worst;
  std::vector<float> x;
  for (const float point : f.switches) {
    const int64_t center = std::bit_cast<uint32_t>(point);
    for (int64_t bits = std::max<int64_t>(0, center - 3000); bits <= center + 3000; ++bits) {
      const float v = std::bit_cast<float>(static_cast<uint32_t>(bits));
      x.push_back(v);
      x.push_back(-v);
    }
  }
  compare(f, x, &worst);
  return worst;
}

TEST(within_the_stated_ulp_over_the_whole_range) {
  const uint32_t stride = std::getenv("FASTNN_EXHAUSTIVE") != nullptr ? 1 : kStride;
  for_each_isa([&](const char* isa) {
    for (const Function& f : kFunctions) {
      const Worst sampled = worst_over_all(f, stride), near = worst_near_switches(f);
      const Worst worst = sampled.ulp > near.ulp ? sampled : near;
      std::printf("       %-12s %-8s %.3f ulp at %a\n", isa, f.name, worst.ulp, worst.at);
      CHECK(worst.ulp <= f.max_ulp, "%s %s(%a) = %a, truth %a: %.3f ulp, bound %.1f", isa, f.name,
            worst.at, worst.got, f.truth(worst.at), worst.ulp, f.max_ulp);
    }
  });
}

TEST(special_values) {
  struct Special {
    MathFunction f;
    float x, y;
  };
  const Special specials[] = {
      {MathFunction::kExp, kInf, kInf},     {MathFunction::kExp, -kInf, 0.f},
      {MathFunction::kExp, 0.f, 1.f},       {MathFunction::kExp, -0.f, 1.f},
      {MathFunction::kExp, 1e30f, kInf},    {MathFunction::kExp, -1e30f, 0.f},
      {MathFunction::kLog, kInf, kInf},     {MathFunction::kLog, 0.f, -kInf},
      {MathFunction::kLog, -0.f, -kInf},    {MathFunction::kLog, 1.f, 0.f},
      {MathFunction::kLog, -1.f, kNaN},     {MathFunction::kLog, -kInf, kNaN},
      {MathFunction::kLog, -1e-45f, kNaN},  {MathFunction::kTanh, kInf, 1.f},
      {MathFunction::kTanh, -kInf, -1.f},   {MathFunction::kTanh, -0.f, -0.f},
      {MathFunction::kTanh, 0.f, 0.f},      {MathFunction::kErf, kInf, 1.f},
      {MathFunction::kErf, -kInf, -1.f},    {MathFunction::kErf, -0.f, -0.f},
      {MathFunction::kErf, 0.f, 0.f},       {MathFunction::kSigmoid, kInf, 1.f},
      {MathFunction::kSigmoid, -kInf, 0.f}, {MathFunction::kSigmoid, 0.f, 0.5f},
      {MathFunction::kSigmoid, -0.f, 0.5f},
  };
  for_each_isa([&](const char* isa) {
    for (const Special& s : specials) {
      float y = -1;
      kernels().vector_math(s.f, &s.x, &y, 1);
      const bool same =
          std::isnan(s.y) ? std::isnan(y) : y == s.y && std::signbit(y) == std::signbit(s.y);
      CHECK(same, "%s function %d of %g gave %g, not %g", isa, static_cast<int>(s.f), s.x, y, s.y);
    }
    for (const Function& f : kFunctions) {
      for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0x7fffffffu}) {
        const float x = std::bit_cast<float>(bits);
        float y = 0;
        kernels().vector_math(f.code, &x, &y, 1);
        CHECK(std::isnan(y), "%s %s of NaN %08x gave %g", isa, f.name, bits, y);
      }
    }
  });
}

// A value's result does not depend on where in the array it stands, and nothing outside the array
// is touched.
TEST(every_length_and_misalignment) {
  constexpr int64_t kMax = 2 * 16 + 1;
  for_each_isa([&](const char* isa) {
    for (const Function& f : kFunctions) {
      for (int64_t n = 0; n <= kMax; ++n) {
        for (const int64_t offset : {0, 1, 3}) {
          for (const Flush flush : {Flush::kEnd, Flush::kStart}) {
            Guarded<float> x(n, flush, offset), y(n, flush, offset);
            Random random(static_cast<uint64_t>(n + 1));
            for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(random.value());
            kernels().vector_math(f.code, x.data(), y.data(), n);
            for (int64_t i = 0; i < n; ++i) {
              float alone;
              kernels().vector_math(f.code, x.data() + i, &alone, 1);
              CHECK(std::bit_cast<uint32_t>(y[i]) == std::bit_cast<uint32_t>(alone) ||
                        (std::isnan(y[i]) && std::isnan(alone)),
                    "%s %s: element %ld of %ld is %a, alone %a", isa, f.name, static_cast<long>(i),
                    static_cast<long>(n), y[i], alone);
            }
            CHECK(x.intact() && y.intact(), "%s %s wrote outside %ld elements", isa, f.name,
                  static_cast<long>(n));
          }
        }
      }
    }
  });
}

}  // namespace
