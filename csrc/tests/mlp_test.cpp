// Feed-forward blocks through their drivers, against double: plain and gated, saved, recomputed and
// packed, whole and in parts, every gradient, strided operands, several threads.
#include "cpu/mlp.h"

#include <cstring>
#include <vector>

#include "cpu/linear.h"
#include "tests/activations.h"
#include "tests/isa.h"
#include "tests/matrix.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

using Values = std::vector<double>;

struct Case {
  const char* isa;
  int64_t M, K, hidden, N;
  DType type;
  bool gated;
  Order order = Order::kRows;
  Activation activation = Activation::kSilu;
};

// An eighth of every element: products of three operands then stay within float16.
void shrink(Operand& m) {
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j)
      m.buffer.set(i * m.matrix.row_stride + j * m.matrix.col_stride, m.at(i, j) / 8);
  }
}

struct Given {
  Operand x, w_in, w_factor, w_out, dy;
  Buffer b_in, b_out;
  explicit Given(const Case& c)
      : x(c.M, c.K, c.order, c.type, Flush::kEnd, 1),
        w_in(c.hidden, c.K, c.order, c.type, Flush::kStart, 2),
        w_factor(c.hidden, c.K, c.order, c.type, Flush::kEnd, 3),
        w_out(c.N, c.hidden, c.order, c.type, Flush::kEnd, 4),
        dy(c.M, c.N, c.order, c.type, Flush::kStart, 5),
        b_in(c.hidden, c.type, Flush::kEnd, 1),
        b_out(c.N, c.type, Flush::kEnd, 1) {
    for (Operand* const m : {&w_in, &w_factor, &w_out, &dy}) shrink(*m);
    Random random(6);
    b_in.fill(c.hidden, random);
    b_out.fill(c.N, random);
  }
  template <class Params>
  Params params(const Case& c) const {
    Params p = {};
    p.M = c.M;
    p.K = c.K;
    p.hidden = c.hidden;
    p.N = c.N;
    p.gated = c.gated;
    p.activation = c.activation;
    p.x = x.matrix;
    p.w_in = w_in.matrix;
    p.w_factor = w_factor.matrix;
    p.w_out = w_out.matrix;
    p.b_in = c.gated ? nullptr : b_in.memory.data();
    p.b_in_stride = 1;
    return p;
  }
};

// The block and its gradients in double.
struct Truth {
  Values z, f, h, y, dz, df, dx, dw_in, db_in, dw_factor, dw_out, db_out;
  Truth(const Case& c, const Given& g) {
    const Values x = dense(g.x), w_in = dense(g.w_in), w_factor = dense(g.w_factor),
                 w_out = dense(g.w_out), dy = dense(g.dy);
    z = multiply(x, w_in, c.M, c.hidden, c.K).value;
    f = multiply(x, w_factor, c.M, c.hidden, c.K).value;
    for (size_t i = 0; i < z.size(); ++i) {
      if (!c.gated) z[i] += g.b_in.at(static_cast<int64_t>(i) % c.hidden);
      h.push_back(activation_of(c.activation, z[i]) * (c.gated ? f[i] : 1));
    }
    y = multiply(h, w_out, c.M, c.N, c.hidden).value;
    for (size_t i = 0; i < y.size(); ++i) y[i] += g.b_out.at(static_cast<int64_t>(i) % c.N);
    const Values dh = multiply(dy, turned(w_out, c.N, c.hidden), c.M, c.hidden, c.N).value;
    for (size_t i = 0; i < z.size(); ++i) {
      dz.push_back(dh[i] * slope_at(c.activation, z[i]) * (c.gated ? f[i] : 1));
      df.push_back(dh[i] * activation_of(c.activation, z[i]));
    }
    dx = multiply(dz, turned(w_in, c.hidden, c.K), c.M, c.K, c.hidden).value;
    const Values more = multiply(df, turned(w_factor, c.hidden, c.K), c.M, c.K, c.hidden).value;
    for (size_t i = 0; i < dx.size() && c.gated; ++i) dx[i] += more[i];
    const Values x_turned = turned(x, c.M, c.K);
    dw_in = multiply(turned(dz, c.M, c.hidden), x_turned, c.hidden, c.K, c.M).value;
    dw_factor = multiply(turned(df, c.M, c.hidden), x_turned, c.hidden, c.K, c.M).value;
    dw_out = multiply(turned(dy, c.M, c.N), turned(h, c.M, c.hidden), c.N, c.hidden, c.M).value;
    db_in = sums(dz, c.hidden);
    db_out = sums(dy, c.N);
  }
  static Values sums(const Values& m, int64_t columns) {
    Values s(static_cast<size_t>(columns), 0);
    for (size_t i = 0; i < m.size(); ++i) s[i % s.size()] += m[i];
    return s;
  }
};

// Rounding of the stored middle and of the result, relative to the largest value.
double tolerance(DType type) {
  return type == DType::kFloat32 ? 2e-5 : type == DType::kFloat16 ? 0x1p-8 : 0x1p-5;
}

void check_close(const Case& c, const char* what, const Buffer& got, const Values& truth) {
  double scale = 0;
  for (const double t : truth) scale = std::max(scale, std::abs(t));
  for (size_t i = 0; i < truth.size(); ++i) {
    const double value = got.at(static_cast<int64_t>(i));
    CHECK(std::abs(value - truth[i]) <= tolerance(c.type) * scale,
          "%s mlp %s %s gated %d (%ld, %ld, %ld, %ld): element %zu is %.9g, not %.9g", c.isa, what,
          type_name(c.type), c.gated, static_cast<long>(c.M), static_cast<long>(c.K),
          static_cast<long>(c.hidden), static_cast<long>(c.N), i, value, truth[i]);
  }
  CHECK(got.memory.intact(), "%s wrote outside %s", c.isa, what);
}

void check_backward(const Case& c, const Given& g, const Truth& truth, const Buffer* z,
                    const Buffer* f) {
  const auto result = [&](int64_t n) { return Buffer(n, c.type, Flush::kEnd, 1); };
  Buffer dx = result(c.M * c.K), dw_in = result(c.hidden * c.K), db_in = result(c.hidden),
         dw_factor = result(c.hidden * c.K), dw_out = result(c.N * c.hidden), db_out = result(c.N);
  auto p = g.params<MlpBwdParams>(c);
  p.dy = g.dy.matrix;
  p.z = z == nullptr ? nullptr : z->memory.data();
  p.factor = f == nullptr ? nullptr : f->memory.data();
  p.dx = dx.memory.data();
  p.dw_in = dw_in.memory.data();
  p.db_in = c.gated ? nullptr : db_in.memory.data();
  p.dw_factor = c.gated ? dw_factor.memory.data() : nullptr;
  p.dw_out = dw_out.memory.data();
  p.db_out = db_out.memory.data();
  mlp_bwd(p);
  check_close(c, "dx", dx, truth.dx);
  check_close(c, "dw_in", dw_in, truth.dw_in);
  if (c.gated) check_close(c, "dw_factor", dw_factor, truth.dw_factor);
  if (!c.gated) check_close(c, "db_in", db_in, truth.db_in);
  check_close(c, "dw_out", dw_out, truth.dw_out);
  check_close(c, "db_out", db_out, truth.db_out);
}

void check_block(const Case& c) {
  const Given g(c);
  const Truth truth(c, g);
  for (const bool save : {false, true}) {
    Buffer y(c.M * c.N, c.type, Flush::kEnd, 1), z(c.M * c.hidden, c.type, Flush::kEnd, 1),
        f(c.M * c.hidden, c.type, Flush::kStart, 1);
    auto p = g.params<MlpParams>(c);
    p.b_out = g.b_out.memory.data();
    p.b_out_stride = 1;
    p.y = y.memory.data();
    p.z = save ? z.memory.data() : nullptr;
    p.factor = save && c.gated ? f.memory.data() : nullptr;
    mlp_fwd(p);
    check_close(c, "y", y, truth.y);
    if (save) check_close(c, "z", z, truth.z);
    if (save && c.gated) check_close(c, "f", f, truth.f);
    check_backward(c, g, truth, save ? &z : nullptr, save && c.gated ? &f : nullptr);
  }
}

struct Packed {
  Guarded<char> memory;
  explicit Packed(const Operand& w) : memory(linear_packed_bytes(w.rows, w.cols, w.matrix.dtype)) {
    linear_pack(w.matrix, w.rows, w.cols, memory.data());
  }
};

void check_packed(const Case& c) {
  const Given g(c);
  const Truth truth(c, g);
  const Packed in(g.w_in), factor(g.w_factor), out(g.w_out);
  Buffer y(c.M * c.N, c.type, Flush::kEnd, 1);
  auto p = g.params<MlpParams>(c);
  p.w_in.data = p.w_factor.data = p.w_out.data = nullptr;
  p.is_packed = true;
  p.packed_in = in.memory.data();
  p.packed_factor = c.gated ? factor.memory.data() : nullptr;
  p.packed_out = out.memory.data();
  p.b_out = g.b_out.memory.data();
  p.b_out_stride = 1;
  p.y = y.memory.data();
  mlp_fwd(p);
  check_close(c, "packed y", y, truth.y);
}

TEST(every_type_and_few_to_many_rows) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const int64_t M : {1, 4, 19, 131}) {
        for (const bool gated : {false, true}) {
          check_block({isa, M, 21, 53, 18, type, gated});
          check_packed({isa, M, 21, 53, 18, type, gated});
        }
      }
    }
  });
}

TEST(strided_operands) {
  for_each_isa([](const char* isa) {
    for (const Order order : {Order::kPadded, Order::kColumns, Order::kStrided}) {
      for (const bool gated : {false, true})
        check_block({isa, 7, 10, 35, 9, DType::kBFloat16, gated, order});
    }
  });
}

// 1056 and 1044 columns; 272 and 258 rows of a packed block.
TEST(parts_on_one_thread_and_three) {
  for (const int64_t threads : {1, 3}) {
    const PoolGuard pool(threads);
    for_each_isa([threads](const char* isa) {
      for (const bool gated : {false, true}) {
        const DType type = gated == (threads == 1) ? DType::kBFloat16 : DType::kFloat32;
        check_block({isa, 530, 5, 2100, 6, type, gated});
        check_packed({isa, 530, 5, 2100, 6, type, gated});
      }
    });
  }
}

TEST(nothing_to_add_up) {
  for_each_isa([](const char* isa) {
    for (const bool gated : {false, true}) {
      for (const Case& c : {Case{isa, 0, 3, 20, 4, DType::kFloat32, gated},
                            Case{isa, 5, 0, 20, 4, DType::kBFloat16, gated},
                            Case{isa, 5, 3, 0, 4, DType::kFloat16, gated},
                            Case{isa, 5, 3, 20, 0, DType::kFloat32, gated}}) {
        check_block(c);
        check_packed(c);
      }
    }
  });
}

}  // namespace
