// Storage types to float32 and back: every half-precision number, every rounding, NaN, no byte too
// far.
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/guarded.h"
#include "tests/isa.h"
#include "tests/reference.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

constexpr DType kHalves[] = {DType::kBFloat16, DType::kFloat16};

TEST(every_half_widens_exactly) {
  for_each_isa([](const char* isa) {
    for (const DType type : kHalves) {
      std::vector<uint16_t> halves(1 << 16);
      for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
      std::vector<float> wide(halves.size());
      kernels().to_float32(halves.data(), 1, type, static_cast<int64_t>(halves.size()),
                           wide.data());
      for (size_t i = 0; i < halves.size(); ++i) {
        const double truth = decode(halves[i], type);
        const bool same = std::isnan(truth)
                              ? std::isnan(wide[i])
                              : wide[i] == truth && std::signbit(wide[i]) == std::signbit(truth);
        CHECK(same, "%s %s %04zx gave %g, not %g", isa, type_name(type), i, wide[i], truth);
      }
    }
  });
}

// Each half, the points half way to its neighbour, and the floats on both sides of those.
std::vector<float> rounding_cases(DType type) {
  std::vector<float> cases;
  for (uint32_t bits = 0; bits < 0x8000; ++bits) {
    const double value = decode(bits, type);
    if (std::isnan(value)) continue;
    const double half_way = std::isinf(value) ? value : value + ulp_of(value, type) / 2;
    for (const double v : {value, half_way}) {
      const auto f = static_cast<float>(v);
      for (const float x : {f, std::nextafter(f, 0.f), std::nextafter(f, INFINITY)}) {
        cases.push_back(x);
        cases.push_back(-x);
      }
    }
  }
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0xff800001u,
                              0x7f7fffffu, 0xff7fffffu, 1u, 0x80000001u, 0x007fffffu}) {
    cases.push_back(std::bit_cast<float>(bits));
  }
  Random random(7);
  for (int i = 0; i < 100000; ++i)
    cases.push_back(std::bit_cast<float>(static_cast<uint32_t>(random.bits())));
  return cases;
}

TEST(narrowing_rounds_to_nearest_even) {
  for_each_isa([](const char* isa) {
    for (const DType type : kHalves) {
      const std::vector<float> x = rounding_cases(type);
      std::vector<uint16_t> y(x.size());
      kernels().from_float32(x.data(), static_cast<int64_t>(x.size()), type, y.data());
      for (size_t i = 0; i < x.size(); ++i) {
        const double truth = rounded(x[i], type), got = decode(y[i], type);
        // The bfloat16 instruction takes subnormal numbers for zero (docs/numerics.md).
        const bool flushed = type == DType::kBFloat16 && std::abs(x[i]) < 1.2e-38 && got == 0;
        const bool same = std::isnan(truth) ? std::isnan(got) : got == truth || flushed;
        CHECK(same && (std::isnan(truth) || std::signbit(got) == std::signbit(x[i])),
              "%s %s of %a gave %a, not %a", isa, type_name(type), x[i], got, truth);
      }
    }
  });
}

TEST(float32_passes_unchanged) {
  for_each_isa([](const char* isa) {
    const uint32_t bits[] = {0, 0x80000000u, 1, 0x7f800000u, 0xff800000u, 0x3f800000u, 0x00800000u};
    uint32_t through[7] = {}, back[7] = {};
    kernels().to_float32(bits, 1, DType::kFloat32, 7, reinterpret_cast<float*>(through));
    kernels().from_float32(reinterpret_cast<const float*>(through), 7, DType::kFloat32, back);
    for (int i = 0; i < 7; ++i)
      CHECK(back[i] == bits[i], "%s %08x became %08x", isa, bits[i], back[i]);
  });
}

template <class Storage>
void check_lengths(const char* isa, DType type) {
  for (int64_t n = 0; n <= 33; ++n) {
    for (const int64_t stride : {0, 1, 2, 5}) {
      for (const Flush flush : {Flush::kEnd, Flush::kStart}) {
        Guarded<Storage> x(n == 0 ? 0 : (n - 1) * stride + 1, flush), back(n, flush, 1);
        Guarded<float> wide(n, flush, 3);
        for (int64_t i = 0; i < n; ++i)
          put(x.data(), i * stride, 0.25 * static_cast<double>(i) - 3, type);
        kernels().to_float32(x.data(), stride, type, n, wide.data());
        kernels().from_float32(wide.data(), n, type, back.data());
        for (int64_t i = 0; i < n; ++i) {
          CHECK(get(back.data(), i, type) == get(x.data(), i * stride, type),
                "%s %s n %ld stride %ld element %ld", isa, type_name(type), static_cast<long>(n),
                static_cast<long>(stride), static_cast<long>(i));
        }
        CHECK(x.intact() && wide.intact() && back.intact(), "%s %s n %ld: wrote outside", isa,
              type_name(type), static_cast<long>(n));
      }
    }
  }
}

TEST(every_length_and_stride) {
  for_each_isa([](const char* isa) {
    check_lengths<uint32_t>(isa, DType::kFloat32);
    check_lengths<uint16_t>(isa, DType::kBFloat16);
    check_lengths<uint16_t>(isa, DType::kFloat16);
  });
}

}  // namespace
