// Layer norm and RMS norm, alone or of a residual sum. A row is read twice, the second time from
// cache: its moments, then the result. RMS norm is layer norm about 0, without a mean to take and
// without a bias. All arithmetic in float32, whatever the storage type.
//
// The moments are taken about a pivot near the mean, the mean of the row's first elements:
// differences from it are exact where a row lies far from zero, and a constant row gives exactly 0.
// Where they were outliers, or a square leaves float32's range, the moments are taken again about
// the mean, at another scale.
#pragma once
#include "cpu/kernels/rows.h"
#include "params/norm.h"

namespace fastnn {
namespace {

template <class T>
FASTNN_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return widen(narrow(v, T{}), T{});
  }
}

template <class T>
struct NormRow {
  const T* x;
  FASTNN_INLINE Vec at(int64_t i, int count) const { return load_some(x + i, count); }
};
// A row of input + residual as its type has it; kKeep: written to `total` when it is read.
template <class T, bool kKeep>
struct SummedRow {
  const T *x, *residual;
  T* total;
  FASTNN_INLINE Vec at(int64_t i, int count) const {
    const Vec sum = rounded<T>(load_some(x + i, count) + load_some(residual + i, count));
    if constexpr (kKeep) store_some(total + i, sum, count);
    return sum;
  }
};

// Mean and mean square of (x unit - pivot).
struct Moments {
  float mean, square;
  FASTNN_INLINE float variance() const {
    const float v = square - mean * mean;
    return v < 0.f ? 0.f : v;  // keeps NaN
  }
};
template <bool kRms, bool kUnit, class Row>
FASTNN_INLINE Moments row_moments(const Row& row, int64_t n, float pivot, float unit) {
  const Vec p = splat(pivot), u = splat(unit);
  const float inverse = 1.f / (float)n;
  const auto found =
      row_sums<2>(n, [=](int64_t i, int count, Vec(&s)[2]) __attribute__((always_inline)) {
        Vec d = row.at(i, count);
        if constexpr (kUnit) d = d * u;
        if constexpr (!kRms) {
          d = keep_first(d - p, count);
          s[0] += d;
        }
        s[1] = fma(d, d, s[1]);
      });
  return {kRms ? 0.f : found.sum[0] * inverse, found.sum[1] * inverse};
}

// The result before weight and bias is (x - pivot) rstd + shift.
struct Normaliser {
  float pivot, rstd, shift, mean;
};

// 2^-80 brings the squares of everything in range; 2^80 those of a row that nears zero, where
// epsilon does not hide it.
constexpr float kSmallUnit = 0x1p-80f, kLargeUnit = 0x1p80f, kLeastVariance = 0x1p-100f;

template <bool kRms, class Row>
__attribute__((noinline)) Normaliser normaliser_again(const Row& row, int64_t n, float eps,
                                                      Moments first) {
  const float unit = !(first.square <= __FLT_MAX__)            ? kSmallUnit
                     : first.variance() + eps < kLeastVariance ? kLargeUnit
                                                               : 1.f;
  float pivot = kRms ? 0.f : row.at(0, 1)[0] * unit;
  Moments m = row_moments<kRms, true>(row, n, pivot, unit);
  if constexpr (!kRms) {
    pivot += m.mean;
    m = row_moments<kRms, true>(row, n, pivot, unit);
  }
  const float rstd = 1.f / __builtin_sqrtf(m.variance() + eps * unit * unit);
  return {pivot / unit, rstd * unit, -m.mean * rstd, (pivot + m.mean) / unit};
}

// Of one vector, whose sum of equal elements is exact, or the first element of shorter rows.
template <class Row>
FASTNN_INLINE float mean_of_first(const Row& row, int64_t n) {
  return n < kLanes ? row.at(0, 1)[0] : sum_lanes(row.at(0, kLanes)) * (1.f / kLanes);
}

template <bool kRms, class Row>
FASTNN_INLINE Normaliser normaliser(const Row& row, int64_t n, float eps) {
  const float pivot = kRms ? 0.f : mean_of_first(row, n);
  const Moments m = row_moments<kRms, false>(row, n, pivot, 1.f);
  const float variance = m.variance();
  // An eighth: more than that and the difference of the two would lose digits.
  const bool good = m.square <= __FLT_MAX__ && variance >= 0.125f * m.square;
  if (__builtin_expect(!good || variance + eps < kLeastVariance, 0)) {
    return normaliser_again<kRms>(row, n, eps, m);
  }
  const float rstd = 1.f / __builtin_sqrtf(variance + eps);
  return {pivot, rstd, -m.mean * rstd, pivot + m.mean};
}

// put(i, v, count) sees what is normalized on its way.
template <bool kStream, bool kRms, class T, class Row, class Put>
FASTNN_INLINE void norm_row(const Row& row, const Normaliser& by, const float* weight,
                            const float* bias, int64_t n, T* y, Put put) {
  const Vec pivot = splat(by.pivot), rstd = splat(by.rstd), shift = splat(by.shift);
  row_map<kStream>(y, n, [=](int64_t i, int count) __attribute__((always_inline)) {
    const Vec v = row.at(i, count);
    put(i, v, count);
    const Vec w = load_some(weight + i, count);
    if constexpr (kRms) return v * rstd * w;
    return fma(fma(v - pivot, rstd, shift), w, load_some(bias + i, count));
  });
}

// The sum is written with the moments and read again from cache; past the caches, with the result.
template <bool kStream, bool kRms, class T>
FASTNN_INLINE Normaliser norm_summed_row(const SummedRow<T, !kStream>& row, const float* weight,
                                         const float* bias, int64_t n, float eps, T* y) {
  const Normaliser by = normaliser<kRms>(row, n, eps);
  if constexpr (kStream) {
    norm_row<true, kRms>(row, by, weight, bias, n, y,
                         [=](int64_t i, Vec v, int count) __attribute__((always_inline)) {
                           put_some<true>(row.total + i, v, count);
                         });
  } else {
    norm_row<false, kRms>(NormRow<T>{row.total}, by, weight, bias, n, y, [](int64_t, Vec, int) {});
  }
  return by;
}

template <class T, bool kAdd, bool kRms>
void norm_fwd_typed(const NormParams& p, const float* weight, const float* bias, int64_t begin,
                    int64_t end) {
  const int64_t n = p.columns;
  with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
    constexpr bool kStream = decltype(stream)::value;
    for (int64_t r = begin; r < end; ++r) {
      const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
      T* const y = static_cast<T*>(p.y) + r * n;
      Normaliser by;
      if constexpr (kAdd) {
        const T* const residual = static_cast<const T*>(p.residual) + r * p.residual_row_stride;
        by = norm_summed_row<kStream, kRms>(
            SummedRow<T, !kStream>{x, residual, static_cast<T*>(p.total) + r * n}, weight, bias, n,
            p.eps, y);
      } else {
        by = normaliser<kRms>(NormRow<T>{x}, n, p.eps);
        norm_row<kStream, kRms>(NormRow<T>{x}, by, weight, bias, n, y, [](int64_t, Vec, int) {});
      }
      if (p.stats != nullptr) {
        p.stats[2 * r] = by.mean;
        p.stats[2 * r + 1] = by.rstd;
      }
    }
  });
}

void norm_fwd(const NormParams& p, const float* weight, const float* bias, int64_t begin,
              int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (p.residual == nullptr) {
      p.rms ? norm_fwd_typed<T, false, true>(p, weight, bias, begin, end)
            : norm_fwd_typed<T, false, false>(p, weight, bias, begin, end);
    } else {
      p.rms ? norm_fwd_typed<T, true, true>(p, weight, bias, begin, end)
            : norm_fwd_typed<T, true, false>(p, weight, bias, begin, end);
    }
  });
}

// One row of backward.
template <class T, bool kRms>
struct NormBwdRow {
  const T *dy, *x, *d_total;
  T* dx;
  Vec mean, rstd;
  Vec mean_g, mean_gh;

  FASTNN_INLINE Vec normalised(int64_t i, int count) const {
    const Vec v = load_some(x + i, count);
    return kRms ? v * rstd : (v - mean) * rstd;
  }
  FASTNN_INLINE Vec gradient(Vec g, Vec h, int64_t i, int count) const {
    const Vec v = fma(-h, mean_gh, kRms ? g : g - mean_g) * rstd;
    return d_total == nullptr ? v : v + load_some(d_total + i, count);
  }
};

template <class T, bool kRms>
FASTNN_INLINE NormBwdRow<T, kRms> norm_bwd_row(const NormBwdParams& p, const float* weight,
                                               int64_t r) {
  const int64_t n = p.columns;
  NormBwdRow<T, kRms> row = {};
  row.dy = static_cast<const T*>(p.dy) + r * p.dy_row_stride;
  row.x = static_cast<const T*>(p.x) + r * p.x_row_stride;
  row.mean = splat(p.stats[2 * r]);
  row.rstd = splat(p.stats[2 * r + 1]);
  if (p.dx == nullptr) return row;
  row.dx = static_cast<T*>(p.dx) + r * n;
  if (p.d_total != nullptr) {
    row.d_total = static_cast<const T*>(p.d_total) + r * p.d_total_row_stride;
  }
  const auto found =
      row_sums<2>(n, [=](int64_t i, int count, Vec(&s)[2]) __attribute__((always_inline)) {
        const Vec g = load_some(row.dy + i, count) * load_some(weight + i, count);
        if constexpr (!kRms) s[0] += g;
        s[1] = fma(g, row.normalised(i, count), s[1]);
      });
  row.mean_g = splat(found.sum[0] / (float)n);
  row.mean_gh = splat(found.sum[1] / (float)n);
  return row;
}

template <class T, bool kRms, bool kStream>
FASTNN_INLINE void norm_bwd_write(const NormBwdRow<T, kRms>& row, const float* weight, int64_t n,
                                  float* dw, float* db) {
  auto step = [=](int64_t i, int count) __attribute__((always_inline)) {
    const Vec dy = load_some(row.dy + i, count);
    const Vec h = row.normalised(i, count);
    if (dw) store_some(dw + i, fma(dy, h, load_some(dw + i, count)), count);
    if (db) store_some(db + i, load_some(db + i, count) + dy, count);
    if (row.dx) {
      const Vec g = dy * load_some(weight + i, count);
      put_some<kStream>(row.dx + i, row.gradient(g, h, i, count), count);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
  if (i < n) step(i, (int)(n - i));
}

template <class T, bool kRms>
void norm_bwd_typed(const NormBwdParams& p, const float* weight, int64_t begin, int64_t end,
                    float* dw, float* db) {
  with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
    for (int64_t r = begin; r < end; ++r) {
      norm_bwd_write<T, kRms, decltype(stream)::value>(norm_bwd_row<T, kRms>(p, weight, r), weight,
                                                       p.columns, dw, db);
    }
  });
}

void norm_bwd(const NormBwdParams& p, const float* weight, int64_t begin, int64_t end, float* dw,
              float* db) {
  for (float* const sums : {dw, db}) {
    if (sums != nullptr) std::memset(sums, 0, (size_t)p.columns * sizeof(float));
  }
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.rms ? norm_bwd_typed<T, true>(p, weight, begin, end, dw, db)
          : norm_bwd_typed<T, false>(p, weight, begin, end, dw, db);
  });
}

}  // namespace
}  // namespace fastnn
