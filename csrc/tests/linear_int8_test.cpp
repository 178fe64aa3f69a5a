// linear on int8 codes through its driver: codes and sums exactly, results bit by bit over
// instruction sets and threads; edges of tiles, strips and blocks; rows of zeros, outliers, NaN and
// infinity; the longest sum.
#include "cpu/linear_int8.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "tests/activations.h"
#include "tests/isa.h"
#include "tests/matrix.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Sizes {
  int64_t M, N, K;
};
// 8 rows are a tile, 16 columns a strip, 48 a tile's columns, 192 a block; 4 codes a unit, 1024
// units a block of K (4096 up to 16 rows).
constexpr Sizes kSizes[] = {{1, 1, 1},      {1, 17, 5},     {2, 16, 4},   {3, 50, 33},
                            {5, 15, 17},    {8, 48, 64},    {9, 49, 66},  {16, 193, 31},
                            {17, 33, 129},  {31, 65, 3},    {130, 20, 7}, {6, 3, 17000},
                            {19, 18, 4500}, {530, 17, 4098}};

struct Codes {
  std::vector<int> code;
  std::vector<float> scale;
};

// What the kernel must give, in the float arithmetic that it is defined by.
Codes quantised(const Operand& x) {
  Codes c;
  for (int64_t m = 0; m < x.rows; ++m) {
    float top = 0;
    bool finite = true;
    for (int64_t k = 0; k < x.cols; ++k) {
      const auto v = static_cast<float>(x.at(m, k));
      finite = finite && std::isfinite(v);
      top = std::max(top, std::abs(v));
    }
    const float scale = std::max(top / 127.f, 0x1p-126f);
    const float inverse = 1.f / scale;
    for (int64_t k = 0; k < x.cols; ++k) {
      const auto v = static_cast<float>(x.at(m, k));
      c.code.push_back(finite ? static_cast<int>(std::nearbyint(v * inverse)) : 0);
    }
    c.scale.push_back(finite ? scale : NAN);
  }
  return c;
}

struct Weight {
  int64_t N, K;
  Guarded<int8_t> codes;
  Guarded<float> scale;
  Matrix matrix;
  std::vector<int> code;

  Weight(int64_t n, int64_t k, bool columns, uint64_t seed)
      : N(n),
        K(k),
        codes(n * k),
        scale(n),
        matrix{codes.data(), columns ? 1 : k, columns ? n : 1, DType::kFloat32} {
    Random random(seed);
    for (int64_t i = 0; i < n; ++i) {
      scale[i] = 0.001f * static_cast<float>(i + 1);
      for (int64_t j = 0; j < k; ++j) {
        const auto c = static_cast<int8_t>(std::lround(127 * std::sin(50 * random.value())));
        codes[i * matrix.row_stride + j * matrix.col_stride] = c;
        code.push_back(c);
      }
    }
  }
};

std::vector<char> run(const Operand& x, const Weight& w, const Buffer* bias, Activation activation,
                      const char* isa) {
  Guarded<char> packed(linear_int8_packed_bytes(w.N, w.K));
  linear_int8_pack(w.matrix, w.scale.data(), 1, w.N, w.K, packed.data());
  const DType type = x.matrix.dtype;
  Buffer y(x.rows * w.N, type, Flush::kEnd, 1);
  LinearInt8Params p = {};
  p.M = x.rows;
  p.N = w.N;
  p.K = w.K;
  p.x = x.matrix;
  p.packed = packed.data();
  p.bias = bias != nullptr ? bias->memory.data() : nullptr;
  p.bias_stride = 1;
  p.bias_dtype = bias != nullptr ? bias->type : DType::kFloat32;
  p.activation = activation;
  p.y = y.memory.data();
  linear_int8_fwd(p);
  CHECK(y.memory.intact() && packed.intact(), "%s wrote outside", isa);
  const char* const bytes = y.memory.data();
  return {bytes, bytes + x.rows * w.N * element_bytes(type)};
}

// sum x (row's scale x column's) + bias, each step rounded to float32.
float expected(const Codes& x, const Weight& w, const Buffer* bias, int64_t m, int64_t n) {
  int64_t sum = 0;
  for (int64_t k = 0; k < w.K; ++k) {
    sum += x.code[static_cast<size_t>(m * w.K + k)] * w.code[static_cast<size_t>(n * w.K + k)];
  }
  const float both = x.scale[static_cast<size_t>(m)] * w.scale[n];
  const float value = static_cast<float>(sum) * both;
  return bias != nullptr ? value + static_cast<float>(bias->at(n)) : value;
}

void check_product(const Sizes& s, DType type, Order order, bool columns, bool biased) {
  const Operand x(s.M, s.K, order, type, s.M % 2 ? Flush::kStart : Flush::kEnd, 3);
  const Weight w(s.N, s.K, columns, 5);
  Buffer bias(s.N, biased && s.N % 2 ? DType::kFloat32 : type, Flush::kEnd, 1);
  Random random(7);
  bias.fill(s.N, random);
  const Buffer* const b = biased ? &bias : nullptr;
  const Codes codes = quantised(x);
  std::vector<char> first;
  for_each_isa([&](const char* isa) {
    const std::vector<char> y = run(x, w, b, Activation::kNone, isa);
    if (!first.empty()) {
      CHECK(y == first, "%s %s (%ld, %ld, %ld): other bits than the first instruction set", isa,
            type_name(type), (long)s.M, (long)s.N, (long)s.K);
      return;
    }
    first = y;
    for (int64_t i = 0; i < s.M * s.N; ++i) {
      const double truth =
          rounded(static_cast<double>(expected(codes, w, b, i / s.N, i % s.N)), type);
      const double got = get(y.data(), i, type);
      CHECK(got == truth, "%s %s (%ld, %ld, %ld): element %ld is %.9g, not %.9g", isa,
            type_name(type), (long)s.M, (long)s.N, (long)s.K, (long)i, got, truth);
    }
  });
}

TEST(exact_for_every_size_and_type) {
  for (const Sizes& s : kSizes) {
    for (const DType type : kAllTypes) {
      if (s.M * s.N * s.K > 5'000'000 && type != DType::kFloat32) continue;
      check_product(s, type, Order::kRows, false, s.M % 2 == 0);
    }
  }
}

TEST(exact_for_every_order) {
  for (const DType type : kAllTypes) {
    for (const Order order : kOrders) {
      for (const bool columns : {false, true})
        check_product({11, 37, 30}, type, order, columns, true);
    }
  }
}

TEST(activations_follow) {
  for_each_isa([](const char* isa) {
    const Operand x(9, 40, Order::kRows, DType::kFloat32, Flush::kEnd, 3);
    const Weight w(35, 40, false, 5);
    const Codes codes = quantised(x);
    for (const Activation activation : kLinearActivations) {
      const std::vector<char> y = run(x, w, nullptr, activation, isa);
      for (int64_t i = 0; i < 9 * 35; ++i) {
        const auto z = static_cast<double>(expected(codes, w, nullptr, i / 35, i % 35));
        const double truth = activation_of(activation, z), got = get(y.data(), i, DType::kFloat32);
        CHECK(std::abs(got - truth) <= 0x1p-19 * (1 + std::abs(z)), "%s %s: %.9g, not %.9g", isa,
              activation_name(activation), got, truth);
      }
    }
  });
}

TEST(codes_of_rows) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Order order : kOrders) {
        for (const int64_t K : {1, 3, 16, 67, 200}) {
          Operand x(6, K, order, type, Flush::kEnd, 3);
          const auto set = [&](int64_t m, int64_t k, double v) {
            x.buffer.set(m * x.matrix.row_stride + k * x.matrix.col_stride, v);
          };
          for (int64_t k = 0; k < K; ++k) set(1, k, 0);
          set(2, K - 1, 1000);
          set(3, K / 2, NAN);
          set(4, K - 1, -INFINITY);
          for (int64_t k = 0; k < K; ++k) set(5, k, type == DType::kFloat16 ? 0x1p-24 : 0x1p-130);
          const Codes truth = quantised(x);
          Guarded<int8_t> codes(6 * K);
          Guarded<float> scale(6);
          linear_int8_quantize(x.matrix, 6, K, codes.data(), scale.data());
          for (int64_t i = 0; i < 6 * K; ++i) {
            CHECK(codes[i] == truth.code[static_cast<size_t>(i)], "%s %s K %ld: code %ld is %d",
                  isa, type_name(type), (long)K, (long)i, codes[i]);
          }
          CHECK(std::memcmp(scale.data(), truth.scale.data(), 3 * 4) == 0 && scale[5] > 0 &&
                    scale[5] == truth.scale[5] && std::isnan(scale[3]) && std::isnan(scale[4]),
                "%s %s K %ld: scales", isa, type_name(type), (long)K);
          CHECK(codes.intact() && scale.intact(), "%s wrote outside", isa);
        }
      }
    }
  });
}

TEST(longest_sum_of_largest_codes) {
  constexpr int64_t K = kInt8MaxFeatures;
  Operand x(2, K, Order::kRows, DType::kFloat32, Flush::kEnd, 1);
  Weight w(2, K, false, 1);
  for (int64_t k = 0; k < K; ++k) {
    x.buffer.set(k, 127);
    x.buffer.set(K + k, -127);
    w.codes[k] = 127;
    w.codes[K + k] = -127;
  }
  w.scale[0] = w.scale[1] = 1;
  for_each_isa([&](const char* isa) {
    const std::vector<char> y = run(x, w, nullptr, Activation::kNone, isa);
    for (int64_t i = 0; i < 4; ++i) {
      const double truth = 127.0 * 127.0 * K * (i == 0 || i == 3 ? 1 : -1);
      const double got = get(y.data(), i, DType::kFloat32);
      CHECK(got == static_cast<double>(static_cast<float>(truth)), "%s: %.9g, not %.9g", isa, got,
            truth);
    }
  });
}

TEST(rows_that_are_not_finite_touch_no_other) {
  for_each_isa([](const char* isa) {
    Operand x(4, 21, Order::kRows, DType::kFloat32, Flush::kEnd, 1);
    const Weight w(18, 21, false, 1);
    const std::vector<char> clean = run(x, w, nullptr, Activation::kNone, isa);
    x.buffer.set(1 * 21 + 20, NAN);
    x.buffer.set(2 * 21, INFINITY);
    const std::vector<char> y = run(x, w, nullptr, Activation::kNone, isa);
    for (int64_t i = 0; i < 4 * 18; ++i) {
      const double got = get(y.data(), i, DType::kFloat32);
      const bool spoilt = i / 18 == 1 || i / 18 == 2;
      CHECK(spoilt ? std::isnan(got) : got == get(clean.data(), i, DType::kFloat32), "%s: %ld", isa,
            (long)i);
    }
  });
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_isa([](const char* isa) {
    for (const Sizes& s : {Sizes{3, 1000, 700}, Sizes{100, 210, 300}, Sizes{1200, 65, 130}}) {
      const Operand x(s.M, s.K, Order::kRows, DType::kFloat32, Flush::kEnd, 1);
      const Weight w(s.N, s.K, false, 1);
      const std::vector<char> one = run(x, w, nullptr, Activation::kGelu, isa);
      const PoolGuard pool(3);
      const std::vector<char> three = run(x, w, nullptr, Activation::kGelu, isa);
      CHECK(one == three && pool.runs() > 0, "%s M %ld: one and three threads differ", isa,
            (long)s.M);
    }
  });
}

TEST(nothing_to_sum_is_the_bias) {
  for (const DType type : kAllTypes) check_product({5, 20, 0}, type, Order::kRows, false, true);
}

}  // namespace
