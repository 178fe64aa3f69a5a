// Layer norm and RMS norm, alone or of a residual sum. A row of up to 16384 elements is read once
// and stays in registers; a longer one is read again, from L1 or L2.
//
// The mean is taken about the row's first element and the moments about that mean: differences are
// exact where a row lies far from zero, and a constant row gives exactly 0. Where a square leaves
// float32's range the moments are taken again at another scale.
#include "cuda/norm.h"

#include "cuda/rows.cuh"

namespace fastnn {
namespace {

constexpr int kMostValues = 16;
// 2^-80 brings the squares of everything in range; 2^80 those of a row that nears zero, where
// epsilon does not hide it.
constexpr float kSmallUnit = 0x1p-80f, kLargeUnit = 0x1p80f, kLeastVariance = 0x1p-100f;

// The row that is normalized: x, or x + residual rounded to the type, written to `total` on its
// way. Elements outside read as `outside`.
template <class T>
struct Input {
  const T *x, *residual;
  T* total;
  FASTNN_DEVICE Input(const NormParams& p, int64_t r)
      : x(static_cast<const T*>(p.x) + r * p.x_row_stride),
        residual(p.residual == nullptr
                     ? nullptr
                     : static_cast<const T*>(p.residual) + r * p.residual_row_stride),
        total(static_cast<T*>(p.total) + r * p.columns) {}
  FASTNN_DEVICE float first() const {
    float v[1], more[1];
    load_chunk<1, true>(x, 0, 1, v);
    if (residual == nullptr) return v[0];
    load_chunk<1, true>(residual, 0, 1, more);
    return to_float(from_float<T>(v[0] + more[0]));
  }
  template <int N>
  FASTNN_DEVICE void load(int64_t at, int64_t n, float (&v)[N], float outside) const {
    load_chunk(x, at, n, v, outside);
    if (residual == nullptr) return;
    float more[N];
    load_chunk(residual, at, n, more);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(from_float<T>(v[i] + more[i]));
    store_chunk(total, at, n, v);
  }
  // Once more, for the same thread.
  template <int N>
  FASTNN_DEVICE void load_again(int64_t at, int64_t n, float (&v)[N]) const {
    load_chunk(residual == nullptr ? x : total, at, n, v);
  }
};

// What has been found of a row: its elements minus `pivot` minus `mean` have mean `shift` / rstd.
struct Normaliser {
  float pivot, mean, shift, rstd;
  FASTNN_DEVICE float apply(float centred) const { return centred * rstd - shift; }
};

struct Moments {
  float mean, square;
  FASTNN_DEVICE float variance() const { return fmaxf(square - mean * mean, 0.f); }
  FASTNN_DEVICE bool fits(float eps) const {
    return square <= FLT_MAX && variance() + eps >= kLeastVariance;
  }
  FASTNN_DEVICE float next_unit() const { return square <= FLT_MAX ? kLargeUnit : kSmallUnit; }
};

FASTNN_DEVICE Normaliser normaliser(float pivot, float mean, const Moments& m, float unit,
                                    float eps) {
  const float variance = m.square != m.square ? m.square : m.variance();
  const float rstd = 1.f / sqrtf(variance + eps * unit * unit);
  return {pivot, mean, m.mean * rstd, rstd * unit};
}

template <bool kRms, int N>
FASTNN_DEVICE void add_moments(const float (&centred)[N], float unit, float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float u = centred[i] * unit;
    if (!kRms) sums[0] += u;
    sums[1] += u * u;
  }
}

// v - pivot - mean, and 0 outside of the row.
template <int N>
FASTNN_DEVICE void centre(float (&v)[N], int64_t at, int64_t n, float pivot, float mean) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = at + i >= 0 && at + i < n ? (v[i] - pivot) - mean : 0.f;
}

template <int N, class P>
FASTNN_DEVICE void scale(float (&v)[N], const Normaliser& by, const NormParams& p, int64_t at) {
  float w[N];
  if (p.weight != nullptr) load_chunk<N, true>(static_cast<const P*>(p.weight), at, p.columns, w);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = by.apply(v[i]) * (p.weight != nullptr ? w[i] : 1.f);
  if (p.bias == nullptr) return;
  load_chunk<N, true>(static_cast<const P*>(p.bias), at, p.columns, w);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] += w[i];
}

FASTNN_DEVICE void keep_stats(const NormParams& p, int64_t r, const Normaliser& by) {
  if (p.stats == nullptr) return;
  const float back = by.rstd == 0.f ? 0.f : by.shift / by.rstd;
  store_global(p.stats + 2 * r, by.pivot + (by.mean + back));
  store_global(p.stats + 2 * r + 1, by.rstd);
}

template <class Team, int kValues, bool kRms, class T, class P>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 128, kHeldBlocks<Team, kValues>)
    norm_held(NormParams p) {
  constexpr int N = kChunk<T>, C = kValues / N;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  for (int64_t base = team.first(); base < p.rows; base += team.step()) {
    const int64_t r = base;  // a whole warp or block has one row: all of it takes the same branches
    const Input<T> row(p, r);
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    const Span<N> span(row.x, p.columns);
    const float inverse = 1.f / static_cast<float>(p.columns);
    const float pivot = kRms ? 0.f : row.first();
    float v[C][N], mean[1] = {0.f};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      row.load(span.begin(team.member() + c * team.size()), span.n, v[c], pivot);
    }
    if (!kRms) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < N; ++i) mean[0] += v[c][i] - pivot;
      }
      team.reduce(mean, Add{});
      mean[0] *= inverse;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        centre(v[c], span.begin(team.member() + c * team.size()), span.n, pivot, mean[0]);
      }
    }
    float unit = 1.f;
    Moments m;
    for (bool again = false;; again = true) {
      float sums[2] = {0.f, 0.f};
#pragma unroll
      for (int c = 0; c < C; ++c) add_moments<kRms>(v[c], unit, sums);
      team.reduce(sums, Add{});
      m = {sums[0] * inverse, sums[1] * inverse};
      if (again || m.fits(p.eps)) break;
      unit = m.next_unit();
    }
    const Normaliser by = normaliser(pivot, mean[0], m, unit, p.eps);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t at = span.begin(team.member() + c * team.size());
      scale<N, P>(v[c], by, p, at);
      store_chunk(y, at, span.n, v[c]);
    }
    if (team.member() == 0) keep_stats(p, r, by);
  }
}

// Moments of a row that is read again, for the threads of a block.
template <bool kRms, int N, class T>
FASTNN_DEVICE Moments moments_again(BlockTeam& team, const Input<T>& row, const Span<N>& span,
                                    float pivot, float mean, float unit) {
  float sums[2] = {0.f, 0.f};
#pragma unroll 1
  for (int64_t k = threadIdx.x; k < span.count; k += blockDim.x) {
    float v[N];
    row.load_again(span.begin(k), span.n, v);
    centre(v, span.begin(k), span.n, pivot, mean);
    add_moments<kRms>(v, unit, sums);
  }
  team.reduce(sums, Add{});
  const float n = static_cast<float>(span.n);
  return {sums[0] / n, sums[1] / n};
}

template <bool kRms, class T, class P>
__global__ void __launch_bounds__(512, 1) norm_stream(NormParams p) {
  constexpr int N = kChunk<T>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  for (int64_t r = team.first(); r < p.rows; r += team.step()) {
    const Input<T> row(p, r);
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    const Span<N> span(row.x, p.columns);
    const float pivot = kRms ? 0.f : row.first();
    float mean[1] = {0.f};
    if (!kRms || row.residual != nullptr) {
#pragma unroll 1
      for (int64_t k = threadIdx.x; k < span.count; k += blockDim.x) {
        float v[N];
        row.load(span.begin(k), span.n, v, pivot);
#pragma unroll
        for (int i = 0; i < N; ++i) mean[0] += v[i] - pivot;
      }
      team.reduce(mean, Add{});
      mean[0] = kRms ? 0.f : mean[0] / static_cast<float>(p.columns);
    }
    float unit = 1.f;
    Moments m = moments_again<kRms>(team, row, span, pivot, mean[0], unit);
    if (!m.fits(p.eps)) {
      unit = m.next_unit();
      m = moments_again<kRms>(team, row, span, pivot, mean[0], unit);
    }
    const Normaliser by = normaliser(pivot, mean[0], m, unit, p.eps);
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < span.count; k += blockDim.x) {
      float v[N];
      row.load_again(span.begin(k), span.n, v);
      centre(v, span.begin(k), span.n, pivot, mean[0]);
      scale<N, P>(v, by, p, span.begin(k));
      store_chunk(y, span.begin(k), span.n, v);
    }
    if (threadIdx.x == 0) keep_stats(p, r, by);
  }
}

template <bool kRms, class T, class P>
int launch(const NormParams& p, void* stream) {
  const bool on = rows_on_boundaries(p.x, p.x_row_stride, p.dtype);
  const RowPlan plan =
      row_plan(p.rows, planned_columns(p.columns, kChunk<T>, on), kMostValues, kNeverSplit, 8);
  const dim3 grid(static_cast<unsigned>(plan.grid)), threads(static_cast<unsigned>(plan.threads));
  if (plan.kind == RowKind::kStream) {
    FASTNN_LAUNCH((norm_stream<kRms, T, P>), grid, dim3(512), 0, stream, p);
  } else if (plan.kind == RowKind::kBlock) {
    FASTNN_LAUNCH((norm_held<BlockTeam, 16, kRms, T, P>), grid, threads, 0, stream, p);
  } else {  // a whole warp for each row, however short: its lanes take the same branches
    const dim3 by_warps(static_cast<unsigned>(least(kMaxGrid, ceil_div(p.rows, 4))));
    FASTNN_LAUNCH((norm_held<LaneTeam<32>, 8, kRms, T, P>), by_warps, threads, 0, stream, p);
  }
  return launch_result();
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_norm_fwd_workspace(const NormParams*) { return 0; }

int fastnn_cuda_norm_fwd(const NormParams* p, void*, void* stream) {
  if (p->rows == 0 || p->columns == 0) return 0;
  return with_type_pair(p->dtype, p->parameter_dtype, [&](auto t, auto parameter) {
    using T = decltype(t);
    using P = decltype(parameter);
    return p->rms ? launch<true, T, P>(*p, stream) : launch<false, T, P>(*p, stream);
  });
}
