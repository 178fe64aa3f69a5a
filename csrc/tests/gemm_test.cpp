// The matrix product of every instruction set against double: all ways through it, all orders of
// its operands, edges of tiles, strips and blocks, parts of the result, the epilogue program.
#include <cmath>
#include <vector>

#include "cpu/gemm/params.h"
#include "tests/activations.h"
#include "tests/isa.h"
#include "tests/matrix.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Sizes {
  int64_t M, N, K;
};
// 1..4 rows take dot products, up to 128 the swapped roles, more the tiles; 16 columns are a strip,
// 48 a tile or a group of weight rows, 192 and 384 a block; 1024 units (4096 with few rows) split
// K.
constexpr Sizes kSizes[] = {
    {1, 1, 1},     {1, 17, 5},    {1, 50, 33},    {2, 16, 16},   {3, 49, 64},     {4, 193, 31},
    {5, 15, 17},   {7, 48, 8},    {8, 47, 65},    {9, 16, 2},    {12, 97, 40},    {16, 200, 3},
    {17, 33, 129}, {31, 65, 16},  {48, 96, 50},   {127, 20, 19}, {128, 51, 12},   {129, 49, 23},
    {150, 17, 7},  {137, 400, 9}, {20, 30, 1100}, {6, 18, 4200}, {130, 35, 2100}, {530, 20, 1030},
    {3, 5, 0},     {140, 20, 0},
};

struct Case {
  const char* isa;
  Sizes n;
  DType type;
  Order a, b;
  bool packed;
};

void check_values(const Case& c, const Buffer& out, const Product& truth,
                  const std::vector<float>& bias) {
  for (int64_t i = 0; i < c.n.M * c.n.N; ++i) {
    const auto at = static_cast<size_t>(i);
    const double b = bias.empty() ? 0 : static_cast<double>(bias[static_cast<size_t>(i % c.n.N)]);
    const double value = truth.value[at] + b, got = out.at(i);
    const double bound =
        sum_bound(truth.size[at] + std::abs(b), c.n.K) + storing_bound(value, c.type);
    CHECK(std::abs(got - value) <= bound,
          "%s %s (%ld, %ld, %ld) a%d b%d packed %d: [%ld, %ld] is %.9g, not %.9g within %.2g",
          c.isa, type_name(c.type), static_cast<long>(c.n.M), static_cast<long>(c.n.N),
          static_cast<long>(c.n.K), static_cast<int>(c.a), static_cast<int>(c.b), c.packed,
          static_cast<long>(i / c.n.N), static_cast<long>(i % c.n.N), got, value, bound);
  }
}

struct Packed {
  Guarded<float> floats;
  Packed(const Operand& b, int64_t N, int64_t K, bool wanted)
      : floats(wanted ? kernels().packed_floats(N, K, b.matrix.dtype) : 0) {
    if (wanted) kernels().pack(b.matrix, N, K, 0, (N + kStrip - 1) / kStrip, floats.data());
  }
};

GemmParams params_of(const Case& c, const Operand& a, const Operand& b, Packed& copy, Buffer& out) {
  GemmParams p = {};
  p.M = c.n.M;
  p.N = c.n.N;
  p.K = c.n.K;
  p.a = a.matrix;
  p.b = b.matrix;
  p.b_packed = c.packed ? copy.floats.data() : nullptr;
  p.c = out.memory.data();
  p.c_stride = p.N;
  p.c_dtype = c.type;
  return p;
}

// Scratch exactly as large as asked for, and poisoned: neither written past nor read before it is
// written.
void run(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int64_t floats = kernels().gemm_scratch_floats(p);
  Guarded<float> scratch(floats);
  std::fill(scratch.data(), scratch.data() + floats, NAN);
  kernels().gemm(p, m0, m1, n0, n1, scratch.data());
  CHECK(scratch.intact(), "scratch overrun");
}

void check_product(Case c, Flush flush) {
  const auto [M, N, K] = c.n;
  const Operand a(M, K, c.a, c.type, flush, 1), b(K, N, c.b, c.type, flush, 2);
  const Product truth = multiply(dense(a), turned(dense(b), K, N), M, N, K);
  for_each_isa([&](const char* isa) {
    c.isa = isa;
    for (const bool packed : {false, true}) {
      c.packed = packed;
      Packed copy(b, N, K, packed);
      Buffer out(M * N, c.type, flush, 1);
      const GemmParams p = params_of(c, a, b, copy, out);
      run(p, 0, M, 0, N);
      check_values(c, out, truth, {});
      CHECK(out.memory.intact() && copy.floats.intact(), "%s wrote outside (%ld, %ld, %ld)", isa,
            static_cast<long>(M), static_cast<long>(N), static_cast<long>(K));
    }
  });
}

TEST(every_way_and_order) {
  for (const Sizes& n : kSizes) {
    const bool large = n.M * n.N * n.K > 500000;
    for (const DType type : kAllTypes) {
      for (const Order a : {Order::kRows, Order::kPadded, Order::kColumns}) {
        for (const Order b : kOrders) {
          if (large && (a == Order::kPadded || b == Order::kPadded || b == Order::kStrided))
            continue;
          check_product({"", n, type, a, b, false},
                        (n.M + n.N) % 2 == 0 ? Flush::kStart : Flush::kEnd);
        }
      }
    }
  }
}

// Threads share a product by rows and strips: every part must come out as in the whole. At 110 rows
// panels hold the parts of 52 and 55, and the part of 3 has too few for one.
TEST(parts_of_the_result) {
  constexpr int64_t kN = 115, kK = 37;
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const bool packed : {false, true}) {
        for (const int64_t M : {150, 110}) {
          const Case c = {isa, {M, kN, kK}, type, Order::kRows, Order::kColumns, packed};
          const Operand a(M, kK, c.a, type, Flush::kEnd, 1), b(kK, kN, c.b, type, Flush::kEnd, 2);
          Packed copy(b, kN, kK, packed);
          Buffer out(M * kN, type, Flush::kEnd, 0);
          const GemmParams p = params_of(c, a, b, copy, out);
          const bool by_rows = packed || M > 128;  // few rows are shared by columns alone
          const std::vector<int64_t> cuts =
              by_rows ? std::vector<int64_t>{0, 3, M / 2, M} : std::vector<int64_t>{0, M};
          for (size_t i = 1; i < cuts.size(); ++i) {
            run(p, cuts[i - 1], cuts[i], 0, 48);
            run(p, cuts[i - 1], cuts[i], 48, kN);
          }
          check_values(c, out, multiply(dense(a), turned(dense(b), kK, kN), M, kN, kK), {});
        }
      }
    }
  });
}

TEST(epilogue_runs_in_order) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const int64_t M : {3, 21, 140}) {
        constexpr int64_t kN = 53, kK = 19;
        const Operand a(M, kK, Order::kRows, type, Flush::kEnd, 3),
            b(kK, kN, Order::kColumns, type, Flush::kEnd, 4);
        std::vector<float> bias(round_up(kN, kStrip), 0.f);
        for (int64_t n = 0; n < kN; ++n)
          bias[static_cast<size_t>(n)] = 0.5f * static_cast<float>(n) - 10;
        Buffer before(M * kN, type, Flush::kEnd, 0), after(M * kN, type, Flush::kStart, 0);
        GemmParams p = {};
        p.M = M;
        p.N = kN;
        p.K = kK;
        p.a = a.matrix;
        p.b = b.matrix;
        p.c = after.memory.data();
        p.c_stride = p.N;
        p.c_dtype = type;
        p.epilogue.bias = bias.data();
        p.epilogue.pre = before.memory.data();
        p.epilogue.pre_stride = kN;
        p.epilogue.activation = Activation::kRelu;
        run(p, 0, M, 0, kN);
        const Product truth = multiply(dense(a), turned(dense(b), kK, kN), M, kN, kK);
        check_values({isa, {M, kN, kK}, type, Order::kRows, Order::kColumns, false}, before, truth,
                     bias);
        for (int64_t i = 0; i < M * kN; ++i) {
          CHECK(after.at(i) == std::max(before.at(i), 0.0), "%s %s: relu of %g is %g", isa,
                type_name(type), before.at(i), after.at(i));
        }
        CHECK(before.memory.intact() && after.memory.intact(), "%s wrote outside", isa);
      }
    }
  });
}

}  // namespace
