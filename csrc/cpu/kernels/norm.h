// Layer norm and RMS norm, alone or of a residual sum. A row is read twice, the second time from
// cache: its moments, then the result. RMS norm is layer norm about 0, without a mean to take and
// without a bias. All arithmetic in float32, whatever the storage type.
//
// Rows go in groups: weight and bias are loaded once for all of them, and the sums of one hide the
// latency of the other's. Weight and bias are in the order in which pairs of vectors have a row
// (norm_order).
//
// The moments are taken about a pivot near the mean, the mean of the row's first elements:
// differences from it are exact where a row lies far from zero, and a constant row gives exactly 0.
// Dot products of bfloat16 take them about 0. Where the pivot was far from the mean, or a square
// leaves float32's range, the moments are taken again, in the end about the mean, at another scale.
#pragma once
#include "cpu/simd/pair.h"
#include "params/norm.h"

namespace fastnn {
namespace {

// A row that is there; packed(i): 2 kLanes of its elements as they lie.
template <class T>
struct NormRow {
  const T* x;
  FASTNN_INLINE Vec packed(int64_t i) const { return fastnn::packed(x + i); }
  template <class Part, int V>
  FASTNN_INLINE void get(int64_t i, Part part, Vec (&v)[V]) const {
    part.get(x + i, v);
  }
};
// A row of input + residual as its type has it; kKeep: written to `total` when it is read.
template <class T, bool kKeep>
struct SummedRow {
  const T *x, *residual;
  T* total;
  FASTNN_INLINE Vec packed(int64_t i) const {
    Vec v[2], r[2];
    Pair<false>{}.get(x + i, v);
    Pair<false>{}.get(residual + i, r);
    const Vec sum = bf16_pairs(v[0] + r[0], v[1] + r[1]);
    if constexpr (kKeep) store(reinterpret_cast<float*>(total + i), sum);
    return sum;
  }
  template <class Part, int V>
  FASTNN_INLINE void get(int64_t i, Part part, Vec (&v)[V]) const {
    Vec r[V];
    part.get(x + i, v);
    part.get(residual + i, r);
    FASTNN_UNROLL for (int k = 0; k < V; ++k) v[k] += r[k];
    if constexpr (kKeep) part.template put<false>(total + i, v);
    part.round(T{}, v);
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
template <bool kRms, bool kUnit, bool kDots, class Row>
FASTNN_INLINE Moments row_moments(const Row& row, int64_t n, float pivot, float unit) {
  constexpr int kSums = kRms ? 1 : 2;
  const Vec p = splat(pivot), u = splat(unit);
  float sum[kSums];
  part_sums<kSums>(n, sum, [&](int64_t i, auto part, auto& s) __attribute__((always_inline)) {
    if constexpr (kDots && part.kVectors == 2) {
      const Vec x = row.packed(i);
      s[0][0] = dot_bf16_pairs(s[0][0], x, x);
      if constexpr (!kRms) s[0][1] = dot_bf16_pairs(s[0][1], x, bf16_ones());
      return;
    }
    Vec d[part.kVectors];
    row.get(i, part, d);
    FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
      if constexpr (kUnit) d[v] = d[v] * u;
      if constexpr (!kRms) {
        d[v] = part.keep(d[v] - p);
        s[v][1] += d[v];
      }
      s[v][0] = fma(d[v], d[v], s[v][0]);
    }
  });
  const float inverse = 1.f / (float)n;
  return {kRms ? 0.f : sum[kSums - 1] * inverse, sum[0] * inverse};
}

// The result before weight and bias is (x - pivot) rstd + shift.
struct Normaliser {
  float pivot, rstd, shift, mean;
};

// 2^-80 brings the squares of everything in range; 2^80 those of a row that nears zero, where
// epsilon does not hide it.
constexpr float kSmallUnit = 0x1p-80f, kLargeUnit = 0x1p80f, kLeastVariance = 0x1p-100f;

// Of one vector, whose sum of equal elements is exact, or the first element of shorter rows.
template <class Row>
FASTNN_INLINE float mean_of_first(const Row& row, int64_t n, float unit) {
  Vec v[1];
  row.get(0, Some{n < kLanes ? 1 : kLanes}, v);
  v[0] = v[0] * unit;
  return n < kLanes ? v[0][0] : sum_lanes(v[0]) * (1.f / kLanes);
}

// Whether the moments were taken near enough to the mean: the variance is their difference, and
// its error that of the square. For rows of bfloat16 an eighth of it will do.
FASTNN_INLINE bool near_enough(const Moments& m, float share = 0.5f) {
  return m.variance() >= share * m.square;
}

template <bool kRms, class Row>
__attribute__((noinline)) Normaliser normaliser_again(const Row& row, int64_t n, float eps,
                                                      Moments first) {
  float unit = !(first.square <= __FLT_MAX__)        ? kSmallUnit
               : first.square + eps < kLeastVariance ? kLargeUnit
                                                     : 1.f;
  float pivot = kRms ? 0.f : mean_of_first(row, n, unit);
  Moments m = row_moments<kRms, true, false>(row, n, pivot, unit);
  // Only now it shows how little a row far from zero varies. (What varies so little is below 1.)
  const bool tiny = unit == 1.f && m.square + eps < kLeastVariance && __builtin_fabsf(pivot) < 1.f;
  if (tiny) {
    unit = kLargeUnit;
    pivot *= unit;
    m.mean *= unit;
  }
  if (tiny || (!kRms && !near_enough(m))) {
    pivot += m.mean;
    m = row_moments<kRms, true, false>(row, n, pivot, unit);
  }
  const float rstd = 1.f / __builtin_sqrtf(m.variance() + eps * unit * unit);
  return {pivot / unit, rstd * unit, -m.mean * rstd, (pivot + m.mean) / unit};
}

template <bool kRms, bool kDots, class Row>
FASTNN_INLINE Normaliser normaliser(const Row& row, int64_t n, float eps) {
  const float pivot = kRms || kDots ? 0.f : mean_of_first(row, n, 1.f);
  const Moments m = row_moments<kRms, false, kDots>(row, n, pivot, 1.f);
  const float variance = m.variance();
  const bool good = m.square <= __FLT_MAX__ && near_enough(m, kDots ? 0.125f : 0.5f);
  if (__builtin_expect(!good || variance + eps < kLeastVariance, 0)) {
    return normaliser_again<kRms>(row, n, eps, m);
  }
  const float rstd = 1.f / __builtin_sqrtf(variance + eps);
  return {pivot, rstd, -m.mean * rstd, pivot + m.mean};
}

// R rows from `first` on, whose summed rows are in `total` by now where it is not null: what is
// normalized goes there.
template <bool kStream, bool kRms, int R, class T, class Row>
FASTNN_INLINE void norm_rows(const Row (&row)[R], const Normaliser (&by)[R], const float* weight,
                             const float* bias, int64_t n, T* y, T* total) {
  Vec pivot[R], rstd[R], shift[R];
  FASTNN_UNROLL for (int r = 0; r < R; ++r) {
    pivot[r] = splat(by[r].pivot);
    rstd[r] = splat(by[r].rstd);
    shift[r] = splat(by[r].shift);
  }
  each_part<false>(0, n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    Vec w[part.kVectors], b[part.kVectors];
    part.get(weight + i, w);
    if constexpr (!kRms) part.get(bias + i, b);
    FASTNN_UNROLL for (int r = 0; r < R; ++r) {
      Vec v[part.kVectors];
      row[r].get(i, part, v);
      if (total != nullptr) part.template put<kStream>(total + r * n + i, v);
      FASTNN_UNROLL for (int k = 0; k < part.kVectors; ++k) {
        v[k] =
            kRms ? v[k] * rstd[r] * w[k] : fma(fma(v[k] - pivot[r], rstd[r], shift[r]), w[k], b[k]);
      }
      part.template put<kStream>(y + r * n + i, v);
    }
  });
}

// A sum is written with the moments and read again from cache; past the caches, with the result.
template <class T, bool kAdd, bool kRms, bool kStream, int R>
FASTNN_INLINE void norm_fwd_group(const NormParams& p, const float* weight, const float* bias,
                                  int64_t first) {
  constexpr bool kDots = kHasBf16Dot && std::is_same_v<T, BFloat16>;
  const int64_t n = p.columns;
  const T* const x = static_cast<const T*>(p.x) + first * p.x_row_stride;
  T* const y = static_cast<T*>(p.y) + first * n;
  Normaliser by[R];
  NormRow<T> plain[R];
  if constexpr (kAdd) {
    const T* const residual = static_cast<const T*>(p.residual) + first * p.residual_row_stride;
    T* const total = static_cast<T*>(p.total) + first * n;
    SummedRow<T, !kStream> row[R];
    FASTNN_UNROLL for (int r = 0; r < R; ++r) {
      row[r] = {x + r * p.x_row_stride, residual + r * p.residual_row_stride, total + r * n};
      plain[r] = {total + r * n};
    }
    FASTNN_UNROLL for (int r = 0; r < R; ++r) by[r] = normaliser<kRms, kDots>(row[r], n, p.eps);
    if constexpr (kStream) {
      norm_rows<true, kRms>(row, by, weight, bias, n, y, total);
    } else {
      norm_rows<false, kRms, R, T>(plain, by, weight, bias, n, y, nullptr);
    }
  } else {
    FASTNN_UNROLL for (int r = 0; r < R; ++r) plain[r] = {x + r * p.x_row_stride};
    FASTNN_UNROLL for (int r = 0; r < R; ++r) by[r] = normaliser<kRms, kDots>(plain[r], n, p.eps);
    norm_rows<kStream, kRms, R, T>(plain, by, weight, bias, n, y, nullptr);
  }
  if (p.stats == nullptr) return;
  FASTNN_UNROLL for (int r = 0; r < R; ++r) {
    p.stats[2 * (first + r)] = by[r].mean;
    p.stats[2 * (first + r) + 1] = by[r].rstd;
  }
}

// Longer rows go one by one: two of float32 are slower by a fifth, and the latency of a row's sums
// and its square root, which two share, is nothing by then.
constexpr int64_t kTogetherBytes = 64 << 10;

template <class T, bool kAdd, bool kRms>
void norm_fwd_typed(const NormParams& p, const float* weight, const float* bias, int64_t begin,
                    int64_t end) {
  const bool together = p.columns * (int64_t)sizeof(T) <= kTogetherBytes;
  with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
    constexpr bool kStream = decltype(stream)::value;
    constexpr int kRows = kStream ? 1 : 2;
    int64_t r = begin;
    for (; together && r + kRows <= end; r += kRows) {
      norm_fwd_group<T, kAdd, kRms, kStream, kRows>(p, weight, bias, r);
    }
    for (; r < end; ++r) norm_fwd_group<T, kAdd, kRms, kStream, 1>(p, weight, bias, r);
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

void norm_order(DType dtype, float* values, int64_t n) {
  with_type(dtype, [&](auto type) { order_pairs<decltype(type)>(values, n); });
}

}  // namespace
}  // namespace fastnn
