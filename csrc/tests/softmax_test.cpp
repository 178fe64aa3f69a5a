// Softmax and log-softmax, forward and backward, against double: all lengths around the vector
// width, misaligned, at page ends, strided and expanded rows, neighbouring slices (inner > 1),
// special values, several threads.
#include "cpu/softmax.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

constexpr double kEps = 0x1p-23;
constexpr double kTiny =
    0x1p-149;  // a subnormal exponential is rounded once more before it is scaled
constexpr double kRounding =
    0.51;  // of an ulp of the result's type: one rounding, of a value exact to float32

struct Types {
  DType narrow, wide;  // equal, or wide is float32
};
constexpr Types kTypes[] = {{DType::kFloat32, DType::kFloat32},
                            {DType::kBFloat16, DType::kBFloat16},
                            {DType::kFloat16, DType::kFloat16},
                            {DType::kBFloat16, DType::kFloat32},
                            {DType::kFloat16, DType::kFloat32}};

struct Shape {
  int64_t outer, cols, inner;
  int64_t row_stride;  // with inner == 1
  int64_t input_elements() const {
    if (outer * cols * inner == 0) return 0;
    return inner == 1 ? (outer - 1) * row_stride + cols : outer * cols * inner;
  }
  int64_t input_at(int64_t o, int64_t c, int64_t i) const {
    return inner == 1 ? o * row_stride + c : (o * cols + c) * inner + i;
  }
  int64_t output_at(int64_t o, int64_t c, int64_t i) const { return (o * cols + c) * inner + i; }
};

struct Where {
  const char* isa;
  Shape shape;
  Types types;
  bool log;
  double shift = 0;  // of every input
};

void check_close(const Where& w, const char* what, double got, double truth, double bound,
                 int64_t o, int64_t c, int64_t i) {
  CHECK(std::abs(got - truth) <= bound || (std::isnan(got) && std::isnan(truth)),
        "%s %s%s %s->%s [%ld %ld %ld stride %ld] at (%ld, %ld, %ld): %.9g, truth %.9g, bound %.3g",
        w.isa, w.log ? "log_softmax " : "softmax ", what, type_name(w.types.narrow),
        type_name(w.types.wide), static_cast<long>(w.shape.outer), static_cast<long>(w.shape.cols),
        static_cast<long>(w.shape.inner), static_cast<long>(w.shape.row_stride),
        static_cast<long>(o), static_cast<long>(c), static_cast<long>(i), got, truth, bound);
}

// Rounding of float32 arithmetic: exp's argument, exp itself, the sum of n terms, the last product.
double forward_bound(double shifted, double log_sum, double truth, int64_t n, const Where& w) {
  const double steps = 6 + static_cast<double>(n) / 16;
  const double arithmetic = w.log ? kEps * (std::abs(shifted) + std::abs(log_sum) + steps)
                                  : kEps * truth * (steps + std::abs(shifted));
  return arithmetic + kTiny + storing_bound(truth, w.types.wide);
}

void check_forward_slice(const Where& w, const Buffer& x, const Buffer& y, int64_t o, int64_t i) {
  double top = -INFINITY, sum = 0;
  for (int64_t c = 0; c < w.shape.cols; ++c) top = std::max(top, x.at(w.shape.input_at(o, c, i)));
  for (int64_t c = 0; c < w.shape.cols; ++c) sum += std::exp(x.at(w.shape.input_at(o, c, i)) - top);
  for (int64_t c = 0; c < w.shape.cols; ++c) {
    const double shifted = x.at(w.shape.input_at(o, c, i)) - top;
    const double truth = w.log ? shifted - std::log(sum) : std::exp(shifted) / sum;
    const double bound = forward_bound(shifted, std::log(sum), truth, w.shape.cols, w);
    check_close(w, "forward", y.at(w.shape.output_at(o, c, i)), truth, bound, o, c, i);
  }
}

void check_forward(const Where& w, Flush flush, int64_t offset) {
  const Shape& s = w.shape;
  Buffer x(s.input_elements(), w.types.narrow, flush, offset);
  Buffer y(s.outer * s.cols * s.inner, w.types.wide, flush, offset);
  Random random(static_cast<uint64_t>(s.cols * 131 + s.inner * 7 + s.row_stride));
  for (int64_t i = 0; i < s.input_elements(); ++i) x.set(i, random.value() + w.shift);
  softmax_fwd({x.memory.data(), y.memory.data(), s.outer, s.cols, s.inner, s.row_stride,
               w.types.narrow, w.types.wide, w.log});
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t i = 0; i < s.inner; ++i) check_forward_slice(w, x, y, o, i);
  }
  CHECK(x.memory.intact() && y.memory.intact(), "%s forward wrote outside, cols %ld", w.isa,
        static_cast<long>(s.cols));
}

void check_backward_slice(const Where& w, const Buffer& dy, const Buffer& y, const Buffer& dx,
                          int64_t o, int64_t i) {
  double sum = 0, size = 0;
  for (int64_t c = 0; c < w.shape.cols; ++c) {
    const double term =
        dy.at(w.shape.input_at(o, c, i)) * (w.log ? 1 : y.at(w.shape.output_at(o, c, i)));
    sum += term;
    size += std::abs(term);
  }
  const double steps = 6 + static_cast<double>(w.shape.cols) / 16;
  for (int64_t c = 0; c < w.shape.cols; ++c) {
    const double g = dy.at(w.shape.input_at(o, c, i)), v = y.at(w.shape.output_at(o, c, i));
    const double p = w.log ? std::exp(v) : v;
    const double truth = w.log ? g - p * sum : (g - sum) * p;
    const double arithmetic = w.log ? std::abs(g) + p * size * (steps + std::abs(v))
                                    : p * (std::abs(g) + size * steps) * 2;
    const double bound = kEps * arithmetic + storing_bound(truth, w.types.narrow);
    check_close(w, "backward", dx.at(w.shape.output_at(o, c, i)), truth, bound, o, c, i);
  }
}

// The gradient has the output's type; dx has the input's.
void check_backward(const Where& w, Flush flush, int64_t offset) {
  const Shape& s = w.shape;
  const int64_t n = s.outer * s.cols * s.inner;
  Buffer dy(s.input_elements(), w.types.wide, flush, offset), y(n, w.types.wide, flush, offset);
  Buffer dx(n, w.types.narrow, flush, offset);
  Random random(static_cast<uint64_t>(s.cols * 137 + s.inner * 11 + s.row_stride));
  dy.fill(s.input_elements(), random);
  for (int64_t i = 0; i < n; ++i) y.set(i, w.log ? -3 * random.uniform() : random.uniform());
  softmax_bwd({dy.memory.data(), y.memory.data(), dx.memory.data(), s.outer, s.cols, s.inner,
               s.row_stride, w.types.wide, w.types.narrow, w.log});
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t i = 0; i < s.inner; ++i) check_backward_slice(w, dy, y, dx, o, i);
  }
  CHECK(dy.memory.intact() && y.memory.intact() && dx.memory.intact(),
        "%s backward wrote outside, cols %ld", w.isa, static_cast<long>(s.cols));
}

void check_shape(const char* isa, const Shape& shape, Flush flush, int64_t offset) {
  for (const Types& types : kTypes) {
    for (const bool log : {false, true}) {
      check_forward({isa, shape, types, log, 0}, flush, offset);
      check_backward({isa, shape, types, log, 0}, flush, offset);
    }
  }
}

TEST(every_row_length_and_misalignment) {
  // 64 elements is the unrolled step of the widest set: every length up to two of them and one
  // more.
  for_each_isa([](const char* isa) {
    for (int64_t cols = 0; cols <= 2 * 64 + 1; ++cols) {
      for (const int64_t offset : {0, 1, 3}) {
        const Flush flush = offset == 1 ? Flush::kStart : Flush::kEnd;
        check_shape(isa, {2, cols, 1, cols}, flush, offset);
      }
    }
  });
}

// The maximum must be subtracted, and be the row's own: e^500 and e^-500 are not float32.
TEST(inputs_far_from_zero) {
  for_each_isa([](const char* isa) {
    for (int64_t cols = 1; cols <= 33; ++cols) {
      for (const Types& types : kTypes) {
        for (const double shift : {-500.0, 500.0}) {
          check_forward({isa, {2, cols, 1, cols}, types, false, shift}, Flush::kEnd, 0);
          check_forward({isa, {2, cols, 1, cols}, types, true, shift}, Flush::kEnd, 0);
          check_forward({isa, {1, 3, cols, 0}, types, false, shift}, Flush::kEnd, 0);
        }
      }
    }
  });
}

TEST(strided_and_expanded_rows) {
  for_each_isa([](const char* isa) {
    for (const int64_t cols : {1, 5, 16, 33, 100}) {
      for (const int64_t stride : {int64_t{0}, cols + 3, 2 * cols})
        check_shape(isa, {3, cols, 1, stride}, Flush::kEnd, 1);
    }
  });
}

TEST(neighbouring_slices) {
  for_each_isa([](const char* isa) {
    for (const int64_t inner : {2, 3, 4, 7, 15, 16, 17, 31, 33, 48, 63, 64, 65, 129}) {
      for (const int64_t cols : {0, 1, 2, 9}) {
        check_shape(isa, {2, cols, inner, 0}, inner % 2 == 0 ? Flush::kStart : Flush::kEnd,
                    inner % 3);
      }
    }
  });
}

TEST(long_rows) {
  for_each_isa([](const char* isa) {
    // Beyond 65536 half-precision rows compute their exponentials twice.
    for (const int64_t cols : {4097, 65536, 65537})
      check_shape(isa, {1, cols, 1, cols}, Flush::kEnd, 0);
  });
}

// Row 1 of three, or slice 1 of three, holds the special value; the others must not notice.
void check_special(const char* isa, const Types& types, bool log, int64_t inner, double special,
                   bool everywhere) {
  constexpr int64_t kCols = 37;
  const Shape s = {inner == 1 ? 3 : 1, kCols, inner, kCols};
  Buffer x(3 * kCols, types.narrow, Flush::kEnd, 0), y(3 * kCols, types.wide, Flush::kEnd, 0);
  for (int64_t i = 0; i < 3 * kCols; ++i) x.set(i, 0.01 * static_cast<double>(i % kCols));
  const auto slice_at = [&](int64_t slice, int64_t c) {
    return inner == 1 ? slice * kCols + c : c * inner + slice;
  };
  for (int64_t c = 0; c < kCols; ++c) {
    if (everywhere || c == 20) x.set(slice_at(1, c), special);
  }
  softmax_fwd({x.memory.data(), y.memory.data(), s.outer, s.cols, s.inner, s.row_stride,
               types.narrow, types.wide, log});
  const bool poisons = everywhere || !(special < 0);
  for (int64_t slice = 0; slice < 3; ++slice) {
    for (int64_t c = 0; c < kCols; ++c) {
      const double v = y.at(slice_at(slice, c));
      const bool want_nan = slice == 1 && poisons, want_none = slice == 1 && !poisons && c == 20;
      const bool right = want_nan    ? std::isnan(v)
                         : want_none ? v == (log ? -INFINITY : 0.0)
                                     : std::isfinite(v);
      CHECK(right, "%s %s inner %ld special %g: slice %ld column %ld is %g", isa,
            log ? "log_softmax" : "softmax", static_cast<long>(inner), special,
            static_cast<long>(slice), static_cast<long>(c), v);
    }
  }
}

TEST(nan_and_infinities_stay_in_their_slice) {
  for_each_isa([](const char* isa) {
    for (const Types& types : kTypes) {
      for (const bool log : {false, true}) {
        for (const int64_t inner : {1, 3}) {
          check_special(isa, types, log, inner, NAN, false);
          check_special(isa, types, log, inner, INFINITY, false);
          check_special(isa, types, log, inner, -INFINITY, false);
          check_special(isa, types, log, inner, -INFINITY, true);
        }
      }
    }
  });
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_isa([](const char* isa) {
    for (const Types& types : kTypes) {
      for (const int64_t inner : {1, 40}) {
        const int64_t outer = inner == 1 ? 300 : 30, cols = 257, n = outer * cols * inner;
        Buffer x(n, types.narrow, Flush::kEnd, 0), one(n, types.wide, Flush::kEnd, 0),
            four(n, types.wide, Flush::kEnd, 0);
        Random random(3);
        x.fill(n, random);
        SoftmaxParams p = {x.memory.data(), one.memory.data(), outer, cols, inner, cols,
                           types.narrow,    types.wide,        false};
        softmax_fwd(p);
        p.y = four.memory.data();
        const PoolGuard pool(4);
        softmax_fwd(p);
        CHECK(pool.runs() > 0, "%s: the pool was not used", isa);
        CHECK(std::memcmp(one.memory.data(), four.memory.data(),
                          static_cast<size_t>(n * element_bytes(types.wide))) == 0,
              "%s: one and four threads differ", isa);
      }
    }
  });
}

}  // namespace
