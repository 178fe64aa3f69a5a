// One call of the norms, forward or backward, made up, run and compared with double.
#pragma once
#include <cmath>

#include "cpu/norm.h"
#include "tests/buffer.h"
#include "tests/check.h"

namespace fastnn::test {

inline constexpr double kEps = 0x1p-23;

struct Where {
  const char* isa;
  int64_t rows, columns, row_stride;  // the stride of x, residual and dy
  DType dtype;
  bool rms, add;
  double scale = 1, shift = 0, eps = 1e-5;
  DType parameter_dtype = DType::kFloat32;
  int64_t elements() const { return rows * columns == 0 ? 0 : (rows - 1) * row_stride + columns; }
  int64_t at(int64_t r, int64_t c) const { return r * row_stride + c; }
};

inline void check_close(const Where& w, const char* what, double got, double truth, double bound,
                        int64_t r, int64_t c) {
  CHECK(std::abs(got - truth) <= bound || (std::isnan(got) && std::isnan(truth)),
        "%s %s%s %s %s [%ld %ld stride %ld, scale %g, shift %g] at (%ld, %ld): %.9g, truth %.9g, "
        "bound %.3g",
        w.isa, w.add ? "add " : "", w.rms ? "rms" : "layer", what, type_name(w.dtype),
        static_cast<long>(w.rows), static_cast<long>(w.columns), static_cast<long>(w.row_stride),
        w.scale, w.shift, static_cast<long>(r), static_cast<long>(c), got, truth, bound);
}

// Roundings of a sum over a row, and of what is made from it.
inline double steps_of(int64_t columns) { return 12 + static_cast<double>(columns) / 64; }

struct Stats {
  double mean, rstd;
};
template <class At>
Stats stats_of(const Where& w, At at) {
  const auto n = static_cast<double>(w.columns);
  double mean = 0, square = 0;
  for (int64_t c = 0; c < w.columns && !w.rms; ++c) mean += at(c) / n;
  for (int64_t c = 0; c < w.columns; ++c) square += (at(c) - mean) * (at(c) - mean) / n;
  return {mean, 1 / std::sqrt(square + w.eps)};
}

struct Forward {
  Buffer x, residual, weight, bias, y, total;
  Guarded<float> stats;
  Forward(const Where& w, Flush flush, int64_t offset)
      : x(w.elements(), w.dtype, flush, offset),
        residual(w.add ? w.elements() : 0, w.dtype, flush, offset),
        weight(w.columns, w.parameter_dtype, flush, offset),
        bias(w.columns, w.parameter_dtype, flush, offset),
        y(w.rows * w.columns, w.dtype, flush, offset),
        total(w.add ? w.rows * w.columns : 0, w.dtype, flush, offset),
        stats(2 * w.rows, flush) {
    Random random(static_cast<uint64_t>(w.columns * 131 + w.row_stride));
    for (int64_t i = 0; i < w.elements(); ++i) x.set(i, random.value() * w.scale + w.shift);
    if (w.add) residual.fill(w.elements(), random);
    weight.fill(w.columns, random);
    bias.fill(w.columns, random);
  }
  void run(const Where& w) {
    norm_fwd({w.rows, w.columns, x.memory.data(), w.row_stride,
              w.add ? residual.memory.data() : nullptr, w.row_stride, weight.memory.data(),
              w.rms ? nullptr : bias.memory.data(), 1, 1, y.memory.data(),
              w.add ? total.memory.data() : nullptr, stats.data(), w.dtype, w.parameter_dtype,
              static_cast<float>(w.eps), w.rms});
  }
};

inline void check_forward(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  Forward f(w, flush, offset);
  f.run(w);
  for (int64_t r = 0; r < w.rows; ++r) {
    const auto row = [&](int64_t c) {
      return w.add ? f.total.at(r * w.columns + c) : f.x.at(w.at(r, c));
    };
    const Stats s = stats_of(w, row);
    for (int64_t c = 0; c < w.columns; ++c) {
      if (w.add) {
        const double sum = f.x.at(w.at(r, c)) + f.residual.at(w.at(r, c));
        check_close(w, "sum", row(c), rounded(sum, w.dtype), 0, r, c);
      }
      const double h = (row(c) - s.mean) * s.rstd, weight = f.weight.at(c);
      const double bias = w.rms ? 0 : f.bias.at(c), truth = h * weight + bias;
      const double arithmetic = std::abs(weight) * (std::abs(h) + 1) + std::abs(bias);
      check_close(w, "forward", f.y.at(r * w.columns + c), truth,
                  kEps * steps_of(w.columns) * arithmetic + storing_bound(truth, w.dtype), r, c);
    }
    if (w.columns == 0) continue;
    check_close(w, "mean", f.stats[2 * r], s.mean, kEps * (std::abs(s.mean) + 8 / s.rstd), r, 0);
    check_close(w, "rstd", f.stats[2 * r + 1], s.rstd, kEps * steps_of(w.columns) * s.rstd, r, 1);
  }
  CHECK(f.x.memory.intact() && f.residual.memory.intact() && f.y.memory.intact() &&
            f.total.memory.intact() && f.stats.intact(),
        "%s forward wrote outside, columns %ld", w.isa, static_cast<long>(w.columns));
}

struct Backward {
  Buffer x, dy, d_total, weight, dx, dw, db;
  Guarded<float> stats;
  Backward(const Where& w, Flush flush, int64_t offset)
      : x(w.elements(), w.dtype, flush, offset),
        dy(w.elements(), w.dtype, flush, offset),
        d_total(w.add ? w.elements() : 0, w.dtype, flush, offset),
        weight(w.columns, w.parameter_dtype, flush, offset),
        dx(w.rows * w.columns, w.dtype, flush, offset),
        dw(w.columns, w.parameter_dtype, flush, offset),
        db(w.columns, w.parameter_dtype, flush, offset),
        stats(2 * w.rows, flush) {
    Random random(static_cast<uint64_t>(w.columns * 137 + w.row_stride));
    x.fill(w.elements(), random);
    dy.fill(w.elements(), random);
    if (w.add) d_total.fill(w.elements(), random);
    weight.fill(w.columns, random);
    for (int64_t r = 0; r < w.rows; ++r) {
      const Stats s = stats_of(w, [&](int64_t c) { return x.at(w.at(r, c)); });
      stats[2 * r] = static_cast<float>(s.mean);
      stats[2 * r + 1] = static_cast<float>(s.rstd);
    }
  }
  NormBwdParams params(const Where& w) {
    return {w.rows,
            w.columns,
            dy.memory.data(),
            w.row_stride,
            w.add ? d_total.memory.data() : nullptr,
            w.row_stride,
            x.memory.data(),
            w.row_stride,
            weight.memory.data(),
            1,
            stats.data(),
            dx.memory.data(),
            dw.memory.data(),
            w.rms ? nullptr : db.memory.data(),
            w.dtype,
            w.parameter_dtype,
            w.rms};
  }
  double normalised(const Where& w, int64_t r, int64_t c) const {
    return (x.at(w.at(r, c)) - stats[2 * r]) * stats[2 * r + 1];
  }
  bool intact() const {
    return x.memory.intact() && dy.memory.intact() && d_total.memory.intact() &&
           dx.memory.intact() && dw.memory.intact() && db.memory.intact() && stats.intact();
  }
};

inline void check_input_gradient(const Where& w, const Backward& b) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const auto n = static_cast<double>(w.columns);
    double mean_g = 0, mean_gh = 0, size_g = 0, size_gh = 0;
    for (int64_t c = 0; c < w.columns; ++c) {
      const double g = b.dy.at(w.at(r, c)) * b.weight.at(c), gh = g * b.normalised(w, r, c);
      mean_g += w.rms ? 0 : g / n;
      mean_gh += gh / n;
      size_g += std::abs(g) / n;
      size_gh += std::abs(gh) / n;
    }
    for (int64_t c = 0; c < w.columns; ++c) {
      const double g = b.dy.at(w.at(r, c)) * b.weight.at(c), h = b.normalised(w, r, c);
      const double rstd = b.stats[2 * r + 1], more = w.add ? b.d_total.at(w.at(r, c)) : 0;
      const double truth = (g - mean_g - h * mean_gh) * rstd + more;
      const double size = (std::abs(g) + size_g + (std::abs(h) + 1) * size_gh) * rstd;
      const double arithmetic = size + std::abs(more);
      check_close(w, "dx", b.dx.at(r * w.columns + c), truth,
                  kEps * steps_of(w.columns) * arithmetic + storing_bound(truth, w.dtype), r, c);
    }
  }
}

inline void check_parameter_gradients(const Where& w, const Backward& b) {
  for (int64_t c = 0; c < w.columns; ++c) {
    double dw = 0, db = 0, size_dw = 0, size_db = 0;
    for (int64_t r = 0; r < w.rows; ++r) {
      const double dy = b.dy.at(w.at(r, c)), h = b.normalised(w, r, c);
      dw += dy * h;
      db += dy;
      size_dw += std::abs(dy) * (std::abs(h) + 1);
      size_db += std::abs(dy);
    }
    const double steps = 4 + static_cast<double>(w.rows) / 8;
    check_close(w, "dw", b.dw.at(c), dw,
                kEps * steps * size_dw + storing_bound(dw, w.parameter_dtype), -1, c);
    if (w.rms) continue;
    check_close(w, "db", b.db.at(c), db,
                kEps * steps * size_db + storing_bound(db, w.parameter_dtype), -1, c);
  }
}

inline void check_backward(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  Backward b(w, flush, offset);
  norm_bwd(b.params(w));
  check_input_gradient(w, b);
  check_parameter_gradients(w, b);
  CHECK(b.intact(), "%s backward wrote outside, columns %ld", w.isa, static_cast<long>(w.columns));
}

}  // namespace fastnn::test
