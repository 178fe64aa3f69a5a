// Activations with a bias and products with them, forward and backward, against double: all lengths
// around the vector width, misaligned, at page ends, strided and expanded rows, packed gradients,
// special values, results written past the caches, several threads.
#include "cpu/activation.h"

#include <cstring>
#include <vector>

#include "cpu/memory.h"
#include "tests/activations.h"
#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

enum class Kind { kPlain, kBias, kProduct, kPacked };
constexpr Kind kKinds[] = {Kind::kPlain, Kind::kBias, Kind::kProduct, Kind::kPacked};

struct Where {
  const char* isa;
  Kind kind;
  Activation activation;
  DType dtype;
  int64_t rows, columns, padding;  // elements between rows of x, factor and dy
  DType bias_dtype = DType::kFloat32;
  bool expanded = false;  // rows of stride 0

  bool packed() const { return kind == Kind::kPacked; }
  bool product() const { return packed() || kind == Kind::kProduct; }
  int64_t halves() const { return packed() ? 2 : 1; }
  int64_t stride() const { return expanded ? 0 : halves() * columns + padding; }
  int64_t dy_stride() const { return expanded ? 0 : columns + padding; }
  int64_t elements() const { return rows * (halves() * columns + padding); }
};

void check_close(const Where& w, const char* what, double got, double truth, double bound,
                 int64_t r, int64_t c) {
  CHECK(std::abs(got - truth) <= bound || (std::isnan(got) && std::isnan(truth)) || got == truth,
        "%s %s kind %d %s %s [%ld %ld + %ld] at (%ld, %ld): %.9g, truth %.9g, bound %.3g", w.isa,
        activation_name(w.activation), static_cast<int>(w.kind), what, type_name(w.dtype),
        static_cast<long>(w.rows), static_cast<long>(w.columns), static_cast<long>(w.padding),
        static_cast<long>(r), static_cast<long>(c), got, truth, bound);
}

struct Call {
  Buffer x, factor, bias, dy, y, dx, d_factor, db;
  Call(const Where& w, Flush flush, int64_t offset)
      : x(w.elements(), w.dtype, flush, offset),
        factor(w.kind == Kind::kProduct ? w.elements() : 0, w.dtype, flush, offset),
        bias(w.columns, w.bias_dtype, flush, offset),
        dy(w.elements(), w.dtype, flush, offset),
        y(w.rows * w.columns, w.dtype, flush, offset),
        dx(w.rows * w.columns * w.halves(), w.dtype, flush, offset),
        d_factor(w.kind == Kind::kProduct ? w.rows * w.columns : 0, w.dtype, flush, offset),
        db(w.columns, w.bias_dtype, flush, offset) {
    Random random(static_cast<uint64_t>(w.columns * 131 + w.rows));
    x.fill(w.elements(), random);
    dy.fill(w.elements(), random);
    bias.fill(w.columns, random);
    if (w.kind == Kind::kProduct) factor.fill(w.elements(), random);
  }

  const void* factor_of(const Where& w) const {
    if (w.packed()) return x.memory.data() + w.columns * element_bytes(w.dtype);
    return w.product() ? factor.memory.data() : nullptr;
  }
  ActivationParams forward(const Where& w) {
    return {w.rows,
            w.columns,
            x.memory.data(),
            w.stride(),
            factor_of(w),
            w.stride(),
            w.kind == Kind::kBias ? bias.memory.data() : nullptr,
            1,
            y.memory.data(),
            w.dtype,
            w.bias_dtype,
            w.activation};
  }
  ActivationBwdParams backward(const Where& w) {
    char* const half = dx.memory.data() + w.columns * element_bytes(w.dtype);
    return {w.rows,
            w.columns,
            dy.memory.data(),
            w.dy_stride(),
            x.memory.data(),
            w.stride(),
            factor_of(w),
            w.stride(),
            w.kind == Kind::kBias ? bias.memory.data() : nullptr,
            1,
            dx.memory.data(),
            w.packed()    ? half
            : w.product() ? d_factor.memory.data()
                          : nullptr,
            w.halves() * w.columns,
            w.kind == Kind::kBias ? db.memory.data() : nullptr,
            w.dtype,
            w.bias_dtype,
            w.activation};
  }

  double z(const Where& w, int64_t r, int64_t c) const {
    return x.at(r * w.stride() + c) + (w.kind == Kind::kBias ? bias.at(c) : 0);
  }
  double f(const Where& w, int64_t r, int64_t c) const {
    if (!w.product()) return 1;
    return w.packed() ? x.at(r * w.stride() + w.columns + c) : factor.at(r * w.stride() + c);
  }
  bool intact() const {
    return x.memory.intact() && factor.memory.intact() && bias.memory.intact() &&
           dy.memory.intact() && y.memory.intact() && dx.memory.intact() &&
           d_factor.memory.intact() && db.memory.intact();
  }
};

// Of arithmetic on an activation's value and on its slope: in float32, or rough where the result is
// rounded to 16 bits.
double value_bound(DType t, double z, double y) {
  const double rough = t == DType::kFloat32 ? 0 : 0x1p-12 * std::abs(y);
  return 0x1p-20 * (std::min(1.0, std::abs(z)) + std::abs(z) / 2 + std::abs(y)) + rough;
}
double slope_bound(DType t, double slope) {
  return (t == DType::kFloat32 ? 0x1p-20 : 0x1p-13) * (1 + std::abs(slope));
}

void check_call(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  Call call(w, flush, offset);
  activation_fwd(call.forward(w));
  activation_bwd(call.backward(w));
  const int64_t d_stride = w.halves() * w.columns;
  for (int64_t c = 0; c < w.columns; ++c) {
    double sum = 0, sum_bound = 0;
    for (int64_t r = 0; r < w.rows; ++r) {
      const double z = call.z(w, r, c), f = call.f(w, r, c);
      const double g = call.dy.at(r * w.dy_stride() + c);
      const double y = activation_of(w.activation, z), slope = slope_at(w.activation, z);
      const double dx = g * f * slope, dx_bound = std::abs(g * f) * slope_bound(w.dtype, slope);
      const double doubt = std::abs(slope) * std::abs(z) * 0x1p-23;  // of z itself
      const auto stored = [&](double truth) { return storing_bound(truth, w.dtype); };
      check_close(w, "forward", call.y.at(r * w.columns + c), y * f,
                  std::abs(f) * (value_bound(w.dtype, z, y) + doubt) + stored(y * f), r, c);
      check_close(w, "dx", call.dx.at(r * d_stride + c), dx, dx_bound + stored(dx), r, c);
      if (w.product()) {
        const double got = w.packed() ? call.dx.at(r * d_stride + w.columns + c)
                                      : call.d_factor.at(r * w.columns + c);
        check_close(w, "d_factor", got, g * y,
                    std::abs(g) * value_bound(w.dtype, z, y) + stored(g * y), r, c);
      }
      sum += dx;
      sum_bound += 4 * dx_bound;
    }
    if (w.kind == Kind::kBias) {
      check_close(w, "db", call.db.at(c), sum, sum_bound + storing_bound(sum, w.bias_dtype), -1, c);
    }
  }
  CHECK(call.intact(), "%s wrote outside, kind %d, columns %ld", w.isa, static_cast<int>(w.kind),
        static_cast<long>(w.columns));
}

Activation activation_at(int64_t i) {
  return static_cast<Activation>(1 + i % (kActivationCount - 1));
}

template <class F>
void for_each_kind(F f) {
  for_each_isa([&](const char* isa) {
    for (const DType dtype : kAllTypes) {
      for (const Kind kind : kKinds) f(Where{isa, kind, Activation::kSilu, dtype, 3, 0, 0});
    }
  });
}

TEST(every_activation) {
  for_each_kind([](Where w) {
    w.rows = 40;
    w.columns = 67;
    for (int64_t i = 0; i < kActivationCount - 1; ++i) {
      w.activation = activation_at(i);
      check_call(w);
    }
  });
}

TEST(every_row_length_and_misalignment) {
  // Two vectors of the widest set are a step: every length up to two steps and one more.
  for_each_kind([](Where w) {
    for (w.columns = 0; w.columns <= 2 * 32 + 1; ++w.columns) {
      w.activation = activation_at(w.columns);
      w.padding = w.columns % 2 == 0 ? 0 : 3;
      w.bias_dtype = w.columns % 2 == 0 ? w.dtype : DType::kFloat32;
      check_call(w, w.columns % 3 == 0 ? Flush::kStart : Flush::kEnd, w.columns % 4);
    }
  });
}

TEST(no_rows_and_expanded_rows) {
  for_each_kind([](Where w) {
    w.columns = 33;
    w.rows = 0;
    check_call(w);
    w.rows = 5;
    w.expanded = true;
    check_call(w);
  });
}

TEST(one_long_row) {
  for_each_kind([](Where w) {
    w.rows = 2;
    w.columns = 2 * 16384 + 7;  // blocks of columns
    w.padding = 1;
    check_call(w);
  });
}

// Where a float32 formula overflows or cancels: far out, at the kinks, and what is no number.
TEST(special_values) {
  const double values[] = {0.0, -0.0, 3,    -3,   1e-30, -1e-30,   100,       -100,
                           6e4, -6e4, 1e15, 1e18, -1e15, INFINITY, -INFINITY, NAN};
  for_each_kind([&](Where w) {
    if (w.kind != Kind::kPlain) return;
    w.rows = 1;
    w.columns = 16;
    for (int64_t i = 0; i < kActivationCount - 1; ++i) {
      w.activation = activation_at(i);
      Call call(w, Flush::kEnd, 0);
      for (int64_t c = 0; c < w.columns; ++c) {
        call.x.set(c, values[c]);
        call.dy.set(c, 1);
      }
      activation_fwd(call.forward(w));
      activation_bwd(call.backward(w));
      for (int64_t c = 0; c < w.columns; ++c) {
        const double z = call.x.at(c);
        // relu and relu2 hand NaN on, with its gradient, unlike the formulas in double.
        const bool kept = std::isnan(z);
        const double y = kept ? NAN : rounded(activation_of(w.activation, z), w.dtype);
        check_close(w, "special", call.y.at(c), y,
                    value_bound(w.dtype, z, y) + storing_bound(y, w.dtype), 0, c);
        const double slope = rounded(slope_at(w.activation, z), w.dtype);
        if (std::isinf(z) || kept) continue;
        check_close(w, "special slope", call.dx.at(c), slope,
                    slope_bound(w.dtype, slope) + storing_bound(slope, w.dtype), 0, c);
      }
    }
  });
}

// Many chunks of rows; one thread and four; some gradients only.
TEST(same_bits_with_any_number_of_threads) {
  for_each_kind([](Where w) {
    w.rows = 1100;
    w.columns = 257;
    Call one(w, Flush::kEnd, 0), four(w, Flush::kEnd, 0), alone(w, Flush::kEnd, 0);
    activation_fwd(one.forward(w));
    activation_bwd(one.backward(w));
    const PoolGuard pool(4);
    activation_fwd(four.forward(w));
    activation_bwd(four.backward(w));
    for (const int wanted : {0, 1, 2}) {
      if (w.packed()) break;
      ActivationBwdParams p = alone.backward(w);
      if (wanted != 0) p.dx = nullptr;
      if (wanted != 1) p.d_factor = nullptr;
      if (wanted != 2) p.db = nullptr;
      activation_bwd(p);
    }
    CHECK(pool.runs() > 0, "%s: the pool was not used", w.isa);
    const auto same = [](const Buffer& a, const Buffer& b, int64_t n) {
      return std::memcmp(a.memory.data(), b.memory.data(),
                         static_cast<size_t>(n * element_bytes(a.type))) == 0;
    };
    const int64_t n = w.rows * w.columns;
    CHECK(same(one.y, four.y, n), "%s: y differs", w.isa);
    for (const Call* const other : {&four, &alone}) {
      if (w.packed() && other == &alone) continue;
      CHECK(same(one.dx, other->dx, n * w.halves()), "%s: dx differs", w.isa);
      CHECK(w.kind != Kind::kProduct || same(one.d_factor, other->d_factor, n),
            "%s: d_factor differs", w.isa);
      CHECK(w.kind != Kind::kBias || same(one.db, other->db, w.columns), "%s: db differs", w.isa);
    }
  });
}

// Row by row the results are small and written through the caches.
TEST(results_written_past_the_caches) {
  for_each_kind([](Where w) {
    const int64_t columns = 2048, bytes = element_bytes(w.dtype), row_bytes = columns * bytes;
    const int64_t rows = kStreamFromBytes / (2 * row_bytes) + 1;
    const Scratch memory((2 + 2 * rows + 4) * row_bytes);
    char* const base = static_cast<char*>(memory.get());
    char* const all = base + 2 * row_bytes;
    char* const alone = all + 2 * rows * row_bytes;
    Random random(5);
    for (int64_t i = 0; i < 2 * columns; ++i) put(base, i, random.value(), w.dtype);
    std::vector<float> bias(static_cast<size_t>(columns), 0.5f), db(bias);
    w.columns = columns;
    const auto check = [&](const char* what, int64_t stride) {
      bool same = true;
      for (int64_t r = 0; r < rows; ++r)
        same &= std::memcmp(all + r * stride, alone, static_cast<size_t>(stride)) == 0;
      CHECK(same, "%s kind %d: %s differs past the caches", w.isa, static_cast<int>(w.kind), what);
    };
    const void* const factor = w.product() ? base + row_bytes : nullptr;
    const void* const shift = w.kind == Kind::kBias ? bias.data() : nullptr;
    ActivationParams p = {rows,  columns, base, 0,       factor,          0,
                          shift, 1,       all,  w.dtype, DType::kFloat32, w.activation};
    CHECK(streams(p.y, rows, row_bytes, 2), "%s: not large enough", w.isa);
    activation_fwd(p);
    p.rows = 1;
    p.y = alone;
    activation_fwd(p);
    check("forward", row_bytes);
    const int64_t halves = w.product() ? 2 : 1;
    ActivationBwdParams q = {rows,
                             columns,
                             base,
                             0,
                             base,
                             0,
                             factor,
                             0,
                             shift,
                             1,
                             all,
                             w.product() ? all + row_bytes : nullptr,
                             halves * columns,
                             shift == nullptr ? nullptr : db.data(),
                             w.dtype,
                             DType::kFloat32,
                             w.activation};
    activation_bwd(q);
    q.rows = 1;
    q.dx = alone;
    q.d_factor = w.product() ? alone + row_bytes : nullptr;
    activation_bwd(q);
    check("backward", halves * row_bytes);
  });
}

}  // namespace
