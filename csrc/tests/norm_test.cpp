// Layer norm and RMS norm, alone and of a residual sum, forward and backward, against double: all
// lengths around the vector width, misaligned, at page ends, strided and expanded rows, rows far
// from zero, squares out of range, special values, results written past the caches, several
// threads.
#include "cpu/norm.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/memory.h"
#include "tests/isa.h"
#include "tests/norm_calls.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

template <class F>
void for_each_norm(F f) {
  for_each_isa([&](const char* isa) {
    for (const DType dtype : kAllTypes) {
      for (const bool rms : {false, true}) {
        for (const bool add : {false, true}) f(Where{isa, 3, 0, 0, dtype, rms, add});
      }
    }
  });
}

TEST(every_row_length_and_misalignment) {
  // 64 elements is the unrolled step of the widest set: every length up to two of them and one
  // more.
  for_each_norm([](Where w) {
    for (w.columns = 0; w.columns <= 2 * 64 + 1; ++w.columns) {
      w.row_stride = w.columns;
      w.parameter_dtype = w.columns % 2 == 0 ? w.dtype : DType::kFloat32;
      const int64_t offset = w.columns % 4;
      const Flush flush = w.columns % 3 == 0 ? Flush::kStart : Flush::kEnd;
      check_forward(w, flush, offset);
      check_backward(w, flush, offset);
    }
  });
}

TEST(strided_and_expanded_rows) {
  for_each_norm([](Where w) {
    for (const int64_t columns : {1, 5, 16, 33, 100}) {
      for (const int64_t stride : {int64_t{0}, columns + 3, 2 * columns}) {
        w.columns = columns;
        w.row_stride = stride;
        check_forward(w);
        check_backward(w);
      }
    }
  });
}

TEST(long_rows) {
  for_each_norm([](Where w) {
    for (const int64_t columns : {4097, 70000}) {  // 64 blocks of more than the least
      w.rows = 2;
      w.columns = w.row_stride = columns;
      check_forward(w);
      check_backward(w);
    }
  });
}

// The variance of 1e4 and noise has no digits left in a plain sum of squares.
TEST(rows_far_from_zero) {
  for_each_norm([](Where w) {
    if (w.dtype != DType::kFloat32) return;
    for (const int64_t columns : {1, 7, 33, 768}) {
      w.columns = w.row_stride = columns;
      for (const double scale : {0.01, 1.0}) {
        w.scale = scale;
        w.shift = 1e4;
        check_forward(w);
      }
    }
  });
}

// The moments are taken about the mean of a row's first elements: here one is far from all others.
TEST(first_element_is_an_outlier) {
  for_each_norm([](Where w) {
    w.columns = w.row_stride = 100;
    Forward f(w, Flush::kEnd, 0);
    for (int64_t r = 0; r < w.rows; ++r) f.x.set(r * w.columns, r == 1 ? -6e4 : 300);
    f.run(w);
    for (int64_t r = 0; r < w.rows; ++r) {
      const auto row = [&](int64_t c) { return (w.add ? f.total : f.x).at(r * w.columns + c); };
      const Stats s = stats_of(w, row);
      for (int64_t c = 0; c < w.columns; ++c) {
        const double h = (row(c) - s.mean) * s.rstd, weight = f.weight.at(c);
        const double truth = h * weight + (w.rms ? 0 : f.bias.at(c));
        const double bound = kEps * 16 * (std::abs(weight) * (std::abs(h) + 1) + 2);
        check_close(w, "outlier", f.y.at(r * w.columns + c), truth,
                    bound + storing_bound(truth, w.dtype), r, c);
      }
    }
  });
}

// Squares overflow, or vanish where epsilon is 0.
TEST(squares_out_of_range) {
  for_each_norm([](Where w) {
    if (w.dtype == DType::kFloat16 || w.add) return;
    for (const int64_t columns : {2, 33, 768}) {
      w.columns = w.row_stride = columns;
      for (const double scale : {1e30, 1e19, 1e-25, 1e-35}) {
        w.scale = scale;
        w.eps = scale > 1 ? 1e-5 : 0;
        check_forward(w);
      }
    }
  });
}

TEST(constant_rows_give_the_bias) {
  for_each_norm([](Where w) {
    if (w.rms) return;
    for (const int64_t columns : {1, 3, 33, 768, 1000}) {
      w.columns = w.row_stride = columns;
      Forward f(w, Flush::kEnd, 0);
      for (int64_t i = 0; i < w.elements(); ++i) {
        f.x.set(i, 0.1 + static_cast<double>(i / columns));
        if (w.add) f.residual.set(i, 0.3);
      }
      f.run(w);
      for (int64_t i = 0; i < w.elements(); ++i) {
        const double bias = rounded(f.bias.at(i % columns), w.dtype);
        check_close(w, "constant", f.y.at(i), bias, 0, i / columns, i % columns);
      }
    }
  });
}

TEST(nan_and_infinities_stay_in_their_row) {
  for_each_norm([](Where w) {
    for (const double special : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
      for (const int64_t at : {0, 20, 36}) {
        w.columns = w.row_stride = 37;
        Forward f(w, Flush::kEnd, 0);
        f.x.set(w.columns + at, special);
        f.run(w);
        for (int64_t i = 0; i < w.elements(); ++i) {
          // RMS norm divides by infinity: the infinite element is NaN, the others are 0.
          const bool alone = w.rms && std::isinf(special);
          const bool nan = i / w.columns == 1 && (!alone || i == w.columns + at);
          const double y = f.y.at(i);
          const bool right = nan                           ? std::isnan(y)
                             : alone && i / w.columns == 1 ? y == 0
                                                           : std::isfinite(y);
          CHECK(right, "%s rms %d %s: special %g at %ld, element %ld is %g", w.isa, w.rms,
                type_name(w.dtype), special, static_cast<long>(at), static_cast<long>(i), y);
        }
      }
    }
  });
}

// Many chunks of rows; some gradients only; one thread and four.
TEST(same_bits_with_any_number_of_threads) {
  for_each_norm([](Where w) {
    w.rows = 1100;
    w.columns = w.row_stride = 257;
    const auto bytes = static_cast<size_t>(w.rows * w.columns * element_bytes(w.dtype));
    const auto row_bytes = static_cast<size_t>(w.columns * element_bytes(w.parameter_dtype));
    Forward f(w, Flush::kEnd, 0), f4(w, Flush::kEnd, 0);
    Backward b(w, Flush::kEnd, 0), b4(w, Flush::kEnd, 0), alone(w, Flush::kEnd, 0);
    f.run(w);
    norm_bwd(b.params(w));
    check_parameter_gradients(w, b);
    const PoolGuard pool(4);
    f4.run(w);
    norm_bwd(b4.params(w));
    for (const int wanted : {0, 1, 2}) {
      NormBwdParams p = alone.params(w);
      if (wanted != 0) p.dx = nullptr;
      if (wanted != 1) p.dw = nullptr;
      if (wanted != 2) p.db = nullptr;
      norm_bwd(p);
    }
    CHECK(pool.runs() > 0, "%s: the pool was not used", w.isa);
    CHECK(std::memcmp(f.y.memory.data(), f4.y.memory.data(), bytes) == 0, "%s: y differs", w.isa);
    for (const Backward* const other : {&b4, &alone}) {
      CHECK(std::memcmp(b.dx.memory.data(), other->dx.memory.data(), bytes) == 0 &&
                std::memcmp(b.dw.memory.data(), other->dw.memory.data(), row_bytes) == 0 &&
                (w.rms || std::memcmp(b.db.memory.data(), other->db.memory.data(), row_bytes) == 0),
            "%s: gradients differ with threads, or with what else is wanted", w.isa);
    }
  });
}

// Row by row the results are small and written through the caches.
TEST(results_written_past_the_caches) {
  for_each_norm([](Where w) {
    w.columns = w.row_stride = 2048;
    w.rows = kStreamFromBytes / (2 * w.columns * element_bytes(w.dtype)) + 1;
    const int64_t row_bytes = w.columns * element_bytes(w.dtype);
    const Scratch memory(w.rows * row_bytes * 5 + 64);
    char* const base = static_cast<char*>(memory.get());
    const auto tensor = [&](int64_t i) { return base + i * w.rows * row_bytes; };
    Random random(5);
    for (int64_t i = 0; i < w.columns; ++i) put(tensor(0), i, random.value(), w.dtype);
    std::vector<float> weight(static_cast<size_t>(w.columns), 0.5f), stats(2);
    NormParams p = {w.rows,
                    w.columns,
                    tensor(0),
                    0,
                    w.add ? tensor(0) : nullptr,
                    0,
                    weight.data(),
                    nullptr,
                    1,
                    1,
                    tensor(1),
                    w.add ? tensor(2) : nullptr,
                    nullptr,
                    w.dtype,
                    DType::kFloat32,
                    1e-5f,
                    w.rms};
    norm_fwd(p);
    CHECK(streams(p.y, w.rows, row_bytes, 2), "%s: not large enough", w.isa);
    p.rows = 1;
    p.y = tensor(3);
    if (w.add) p.total = tensor(4);
    p.stats = stats.data();
    norm_fwd(p);
    bool same = true;
    for (int64_t r = 0; r < w.rows; ++r) {
      same &= std::memcmp(tensor(1) + r * row_bytes, p.y, static_cast<size_t>(row_bytes)) == 0;
      same &= !w.add ||
              std::memcmp(tensor(2) + r * row_bytes, p.total, static_cast<size_t>(row_bytes)) == 0;
    }
    CHECK(same, "%s: forward differs past the caches", w.isa);
    std::vector<float> all_stats(static_cast<size_t>(2 * w.rows));
    for (size_t i = 0; i < all_stats.size(); ++i) all_stats[i] = stats[i % 2];
    NormBwdParams q = {w.rows,        w.columns, tensor(3),        0,
                       nullptr,       0,         tensor(0),        0,
                       weight.data(), 1,         all_stats.data(), tensor(1),
                       nullptr,       nullptr,   w.dtype,          DType::kFloat32,
                       w.rms};
    norm_bwd(q);
    q.rows = 1;
    q.dx = tensor(4);
    norm_bwd(q);
    same = true;
    for (int64_t r = 0; r < w.rows; ++r) {
      same &= std::memcmp(tensor(1) + r * row_bytes, q.dx, static_cast<size_t>(row_bytes)) == 0;
    }
    CHECK(same, "%s: backward differs past the caches", w.isa);
  });
}

}  // namespace
