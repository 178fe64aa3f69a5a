// linear + activation through its drivers, against double: every activation, bias and gradient,
// packed and unpacked, strided and expanded operands, several threads.
#include "cpu/linear.h"

#include <cstring>
#include <vector>

#include "tests/activations.h"
#include "tests/isa.h"
#include "tests/matrix.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Case {
  const char* isa;
  int64_t M, N, K;
  DType type;
  Activation activation;
};

void check_close(const Case& c, const char* what, double got, double truth, double bound,
                 int64_t i) {
  CHECK(std::abs(got - truth) <= bound,
        "%s linear %s %s %s (%ld, %ld, %ld): element %ld is %.9g, not %.9g within %.2g", c.isa,
        what, activation_name(c.activation), type_name(c.type), static_cast<long>(c.M),
        static_cast<long>(c.N), static_cast<long>(c.K), static_cast<long>(i), got, truth, bound);
}

// Of an activation: its argument's error times its steepest slope, and its own rounding; it is
// rough where the result has 16 bits.
double activation_bound(const Case& c, double argument_error, double z, double y) {
  const double rough = c.type == DType::kFloat32 ? 0 : 0x1p-12 * std::abs(y);
  return 1.2 * argument_error + 0x1p-20 * std::min(1.0, std::abs(z)) + 0x1p-21 * std::abs(z) +
         rough;
}

struct Forward {
  Operand x, w;
  Buffer bias, y, pre;
  Forward(const Case& c, Order x_order, Order w_order, int64_t bias_stride, Flush flush)
      : x(c.M, c.K, x_order, c.type, flush, 5),
        w(c.N, c.K, w_order, c.type, flush, 6),
        bias(c.N == 0 ? 0 : (c.N - 1) * bias_stride + 1, c.type, flush, 1),
        y(c.M * c.N, c.type, flush, 1),
        pre(c.M * c.N, c.type, flush, 3) {
    Random random(9);
    bias.fill(c.N == 0 ? 0 : (c.N - 1) * bias_stride + 1, random);
  }
};

void check_forward(const Case& c, Order x_order, Order w_order, int64_t bias_stride, bool packed,
                   bool save) {
  const bool has_bias = bias_stride >= 0;
  const Flush flush = c.M % 2 == 0 ? Flush::kStart : Flush::kEnd;
  Forward f(c, x_order, w_order, has_bias ? bias_stride : 1, flush);
  Guarded<char> copy(packed ? linear_packed_bytes(c.N, c.K, c.type) : 0);
  if (packed) linear_pack(f.w.matrix, c.N, c.K, copy.data());
  LinearParams p = {};
  p.M = c.M;
  p.N = c.N;
  p.K = c.K;
  p.x = f.x.matrix;
  p.w = packed ? Matrix{nullptr, 0, 0, c.type} : f.w.matrix;
  p.is_packed = packed;
  p.packed = packed ? copy.data() : nullptr;
  p.bias = has_bias ? f.bias.memory.data() : nullptr;
  p.bias_stride = bias_stride;
  p.activation = c.activation;
  p.y = f.y.memory.data();
  p.pre = save ? f.pre.memory.data() : nullptr;
  linear_fwd(p);
  const Product product = multiply(dense(f.x), dense(f.w), c.M, c.N, c.K);
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    const double b = has_bias ? f.bias.at(i % c.N * bias_stride) : 0;
    const double z = product.value[static_cast<size_t>(i)] + b;
    const double error = sum_bound(product.size[static_cast<size_t>(i)] + std::abs(b), c.K);
    if (save) check_close(c, "pre-activation", f.pre.at(i), z, error + storing_bound(z, c.type), i);
    const double y = activation_of(c.activation, z);
    const double bound =
        c.activation == Activation::kNone ? error : activation_bound(c, error, z, y);
    check_close(c, "forward", f.y.at(i), y, bound + storing_bound(y, c.type), i);
  }
  CHECK(f.y.memory.intact() && f.pre.memory.intact() && copy.intact(), "%s wrote outside", c.isa);
}

TEST(forward_every_activation_and_type) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Activation activation : kLinearActivations) {
        for (const int64_t M : {1, 4, 19, 131}) {
          const Case c = {isa, M, 51, 37, type, activation};
          for (const bool packed : {false, true})
            check_forward(c, Order::kRows, Order::kRows, 1, packed, M == 19);
        }
      }
    }
  });
}

TEST(forward_orders_and_biases) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Order x : {Order::kPadded, Order::kColumns, Order::kStrided}) {
        for (const Order w : kOrders) {
          for (const int64_t bias_stride : {-1, 0, 1, 3}) {
            check_forward({isa, 6, 18, 21, type, Activation::kSilu}, x, w, bias_stride,
                          bias_stride == 3, true);
          }
        }
      }
    }
  });
}

TEST(forward_without_a_sum_is_the_bias) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      check_forward({isa, 5, 20, 0, type, Activation::kTanh}, Order::kRows, Order::kRows, 1, false,
                    true);
      check_forward({isa, 0, 20, 3, type, Activation::kTanh}, Order::kRows, Order::kRows, 1, false,
                    true);
      check_forward({isa, 5, 0, 3, type, Activation::kTanh}, Order::kRows, Order::kRows, 1, false,
                    true);
    }
  });
}

struct Gradients {
  bool dx, dw, db;
};

// dz as the kernel stores it, within one ulp: the products that follow are held to that.
struct Slopes {
  std::vector<double> dz, doubt;
};

Slopes slopes_of(const Case& c, const std::vector<double>& dy, const Buffer& slope, bool stored) {
  Slopes s;
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    const double g = dy[static_cast<size_t>(i)];
    const double factor =
        c.activation == Activation::kNone ? 1 : slope_of(c.activation, slope.at(i));
    const double dz = g * factor;
    const double arithmetic = c.activation == Activation::kNone ? 0 : std::abs(g) * 0x1p-20;
    s.dz.push_back(dz);
    s.doubt.push_back(arithmetic + (stored ? storing_bound(dz, c.type) : 0));
  }
  return s;
}

std::vector<double> absolute(std::vector<double> v) {
  for (double& x : v) x = std::abs(x);
  return v;
}

// out = z times t^T, as `multiply`, with the doubt about z carried along.
void check_products(const Case& c, const char* what, const Buffer& out,
                    const std::vector<double>& z, const std::vector<double>& doubt,
                    const std::vector<double>& t, int64_t M, int64_t N, int64_t K) {
  const Product product = multiply(z, t, M, N, K), carried = multiply(doubt, absolute(t), M, N, K);
  for (int64_t i = 0; i < M * N; ++i) {
    const auto at = static_cast<size_t>(i);
    const double bound = sum_bound(product.size[at], K) + carried.value[at] +
                         storing_bound(product.value[at], c.type);
    check_close(c, what, out.at(i), product.value[at], bound, i);
  }
}

void check_bias_gradient(const Case& c, const Buffer& db, const Slopes& s) {
  for (int64_t n = 0; n < c.N; ++n) {
    double sum = 0, size = 0, doubt = 0;
    for (int64_t m = 0; m < c.M; ++m) {
      const auto at = static_cast<size_t>(m * c.N + n);
      sum += s.dz[at];
      size += std::abs(s.dz[at]);
      doubt += s.doubt[at];
    }
    check_close(c, "db", db.at(n), sum, sum_bound(size, c.M) + doubt + storing_bound(sum, c.type),
                n);
  }
}

void check_backward(const Case& c, Order dy_order, bool expanded, Order x_order, Order w_order,
                    Gradients wanted) {
  const Flush flush = c.N % 2 == 0 ? Flush::kStart : Flush::kEnd;
  Operand dy(c.M, c.N, dy_order, c.type, flush, 11), x(c.M, c.K, x_order, c.type, flush, 12);
  Operand w(c.N, c.K, w_order, c.type, flush, 13);
  if (expanded) dy.matrix.row_stride = dy.matrix.col_stride = 0;
  Buffer slope(c.M * c.N, c.type, flush, 1), dx(c.M * c.K, c.type, flush, 1),
      dw(c.N * c.K, c.type, flush, 1);
  Buffer db(c.N, c.type, flush, 1);
  Random random(15);
  for (int64_t i = 0; i < c.M * c.N; ++i) {
    const double z = random.value();
    const bool from_output =
        c.activation == Activation::kRelu || c.activation >= Activation::kSigmoid;
    slope.set(i, from_output ? activation_of(c.activation, z) : z);
  }
  LinearBwdParams p = {};
  p.M = c.M;
  p.N = c.N;
  p.K = c.K;
  p.dy = dy.matrix;
  p.x = wanted.dw ? x.matrix : Matrix{nullptr, 0, 0, c.type};
  p.w = w.matrix;
  p.slope = c.activation == Activation::kNone ? nullptr : slope.memory.data();
  p.activation = c.activation;
  p.dx = wanted.dx ? dx.memory.data() : nullptr;
  p.dw = wanted.dw ? dw.memory.data() : nullptr;
  p.db = wanted.db ? db.memory.data() : nullptr;
  linear_bwd(p);
  const std::vector<double> gradient = dense(dy);
  const Slopes stored = slopes_of(c, gradient, slope, true),
               exact = slopes_of(c, gradient, slope, false);
  if (wanted.dx) {
    check_products(c, "dx", dx, stored.dz, stored.doubt, turned(dense(w), c.N, c.K), c.M, c.K, c.N);
  }
  if (wanted.dw) {
    check_products(c, "dw", dw, turned(stored.dz, c.M, c.N), turned(stored.doubt, c.M, c.N),
                   turned(dense(x), c.M, c.K), c.N, c.K, c.M);
  }
  if (wanted.db) check_bias_gradient(c, db, exact);
  CHECK(dx.memory.intact() && dw.memory.intact() && db.memory.intact(), "%s backward wrote outside",
        c.isa);
}

constexpr Gradients kAll = {true, true, true};

TEST(backward_every_activation_and_type) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Activation activation : kLinearActivations) {
        for (const int64_t M : {1, 7, 67}) {
          check_backward({isa, M, 35, 22, type, activation}, Order::kRows, false, Order::kRows,
                         Order::kRows, kAll);
        }
      }
    }
  });
}

TEST(backward_strided_and_expanded) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Activation activation : {Activation::kNone, Activation::kGelu}) {
        for (const Order order : kOrders) {
          check_backward({isa, 13, 18, 9, type, activation}, order, false, order, order, kAll);
          check_backward({isa, 13, 18, 9, type, activation}, order, true, Order::kRows, order,
                         kAll);
        }
      }
    }
  });
}

TEST(backward_each_gradient_alone) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Gradients& wanted : {Gradients{true, false, false}, Gradients{false, true, false},
                                      Gradients{false, false, true}}) {
        for (const Activation activation : {Activation::kNone, Activation::kRelu}) {
          check_backward({isa, 40, 17, 33, type, activation}, Order::kRows, false, Order::kRows,
                         Order::kRows, wanted);
        }
      }
    }
  });
}

TEST(backward_of_many_rows_sums_in_chunks) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      check_backward({isa, 700, 21, 5, type, Activation::kSigmoid}, Order::kRows, false,
                     Order::kRows, Order::kRows, kAll);
    }
  });
}

TEST(backward_of_nothing) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      check_backward({isa, 0, 6, 5, type, Activation::kRelu}, Order::kRows, false, Order::kRows,
                     Order::kRows, kAll);
      check_backward({isa, 4, 0, 5, type, Activation::kRelu}, Order::kRows, false, Order::kRows,
                     Order::kRows, kAll);
      check_backward({isa, 4, 6, 0, type, Activation::kRelu}, Order::kRows, false, Order::kRows,
                     Order::kRows, kAll);
    }
  });
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const int64_t M : {3, 100, 600}) {
        const Case c = {isa, M, 210, 90, type, Activation::kGeluTanh};
        Forward one(c, Order::kRows, Order::kRows, 1, Flush::kEnd),
            three(c, Order::kRows, Order::kRows, 1, Flush::kEnd);
        const auto run = [&](Forward& f) {
          LinearParams p = {};
          p.M = M;
          p.N = c.N;
          p.K = c.K;
          p.x = f.x.matrix;
          p.w = f.w.matrix;
          p.bias = f.bias.memory.data();
          p.bias_stride = 1;
          p.activation = c.activation;
          p.y = f.y.memory.data();
          p.pre = f.pre.memory.data();
          linear_fwd(p);
        };
        run(one);
        {
          const PoolGuard pool(3);
          run(three);
          CHECK(M == 3 || pool.runs() > 0, "%s: the pool was not used", isa);
        }
        const auto bytes = static_cast<size_t>(M * c.N * element_bytes(type));
        CHECK(std::memcmp(one.y.memory.data(), three.y.memory.data(), bytes) == 0 &&
                  std::memcmp(one.pre.memory.data(), three.pre.memory.data(), bytes) == 0,
              "%s %s M %ld: one and three threads differ", isa, type_name(type),
              static_cast<long>(M));
      }
    }
  });
}

}  // namespace
