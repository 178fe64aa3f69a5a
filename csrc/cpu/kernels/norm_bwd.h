// Gradients of layer norm and RMS norm. Rows go in groups: the sums for the gradients of weight and
// bias are loaded and stored once for all of them, row after row into each sum.
#pragma once
#include "cpu/simd/pair.h"
#include "params/norm.h"

namespace fastnn {
namespace {

// One row of backward.
template <class T, bool kRms>
struct NormBwdRow {
  const T *dy, *x, *d_total;
  T* dx;
  Vec mean, rstd;
  Vec mean_g, mean_gh;

  FASTNN_INLINE Vec normalised(Vec x) const { return kRms ? x * rstd : (x - mean) * rstd; }
  FASTNN_INLINE Vec gradient(Vec g, Vec h) const {
    return fma(-h, mean_gh, kRms ? g : g - mean_g) * rstd;
  }
};

template <class T, bool kRms>
FASTNN_INLINE void norm_bwd_means(NormBwdRow<T, kRms>& row, const float* weight, int64_t n) {
  constexpr int kSums = kRms ? 1 : 2;
  float sum[kSums];
  part_sums<kSums>(n, sum, [&](int64_t i, auto part, auto& s) __attribute__((always_inline)) {
    Vec w[part.kVectors], g[part.kVectors], x[part.kVectors];
    part.get(weight + i, w);
    part.get(row.dy + i, g);
    part.get(row.x + i, x);
    FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
      g[v] = g[v] * w[v];
      s[v][0] = fma(g[v], row.normalised(x[v]), s[v][0]);
      if constexpr (!kRms) s[v][1] += g[v];
    }
  });
  row.mean_gh = splat(sum[0] / (float)n);
  row.mean_g = splat(kRms ? 0.f : sum[kSums - 1] / (float)n);
}

template <bool kStream, bool kSum, class T, bool kRms, int R>
FASTNN_INLINE void norm_bwd_write(const NormBwdRow<T, kRms> (&row)[R], const float* weight,
                                  int64_t n, bool wants_dx, float* dw, float* db) {
  each_part<false>(0, n, [&](int64_t i, auto part) __attribute__((always_inline)) {
    Vec w[part.kVectors], of_w[part.kVectors] = {}, of_b[part.kVectors] = {};
    part.get(weight + i, w);
    if (dw) part.get(dw + i, of_w);
    if (db) part.get(db + i, of_b);
    FASTNN_UNROLL for (int r = 0; r < R; ++r) {
      Vec g[part.kVectors], h[part.kVectors], t[part.kVectors];
      part.get(row[r].dy + i, g);
      part.get(row[r].x + i, h);
      FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
        h[v] = row[r].normalised(h[v]);
        if (dw) of_w[v] = fma(g[v], h[v], of_w[v]);
        if (db) of_b[v] += g[v];
        g[v] = row[r].gradient(g[v] * w[v], h[v]);
      }
      if constexpr (kSum) {
        part.get(row[r].d_total + i, t);
        FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) g[v] += t[v];
      }
      if (wants_dx) part.template put<kStream>(row[r].dx + i, g);
    }
    if (dw) part.template put<false>(dw + i, of_w);
    if (db) part.template put<false>(db + i, of_b);
  });
}

template <class T, bool kRms, bool kStream, int R>
FASTNN_INLINE void norm_bwd_group(const NormBwdParams& p, const float* weight, int64_t first,
                                  float* dw, float* db) {
  const int64_t n = p.columns;
  NormBwdRow<T, kRms> row[R] = {};
  FASTNN_UNROLL for (int r = 0; r < R; ++r) {
    const int64_t at = first + r;
    row[r].dy = static_cast<const T*>(p.dy) + at * p.dy_row_stride;
    row[r].x = static_cast<const T*>(p.x) + at * p.x_row_stride;
    row[r].mean = splat(p.stats[2 * at]);
    row[r].rstd = splat(p.stats[2 * at + 1]);
    if (p.dx != nullptr) row[r].dx = static_cast<T*>(p.dx) + at * n;
    if (p.d_total != nullptr) {
      row[r].d_total = static_cast<const T*>(p.d_total) + at * p.d_total_row_stride;
    }
  }
  if (p.dx != nullptr) {
    FASTNN_UNROLL for (int r = 0; r < R; ++r) norm_bwd_means(row[r], weight, n);
  }
  if (p.d_total != nullptr) {
    norm_bwd_write<kStream, true>(row, weight, n, p.dx != nullptr, dw, db);
  } else {
    norm_bwd_write<kStream, false>(row, weight, n, p.dx != nullptr, dw, db);
  }
}

template <class T, bool kRms>
void norm_bwd_typed(const NormBwdParams& p, const float* weight, int64_t begin, int64_t end,
                    float* dw, float* db) {
  with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
    constexpr bool kStream = decltype(stream)::value;
    constexpr int kRows = kStream ? 1 : 2;
    int64_t r = begin;
    for (; r + kRows <= end; r += kRows) {
      norm_bwd_group<T, kRms, kStream, kRows>(p, weight, r, dw, db);
    }
    for (; r < end; ++r) norm_bwd_group<T, kRms, kStream, 1>(p, weight, r, dw, db);
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
    for (float* const sums : {dw, db}) {
      if (sums != nullptr) restore_pairs<T>(sums, p.columns);
    }
  });
}

}  // namespace
}  // namespace fastnn
