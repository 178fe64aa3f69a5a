// Gradient of softmax and log-softmax: dx = y (dy - sum(dy y)); of the logarithm, dx = dy - e^y
// sum(dy). Rows as in softmax.cu.
#include "cuda/rows.cuh"
#include "cuda/softmax.h"

namespace fastnn {
namespace {

constexpr int kMostValues = 16;  // of both dy and y

// What an element adds to the sum, and its gradient.
FASTNN_DEVICE float term(float dy, float y, bool log) { return log ? dy : dy * y; }
FASTNN_DEVICE float slope(float dy, float y, float sum, bool log) {
  return log ? dy - exp_of(y) * sum : (dy - sum) * y;
}

template <class TY, class TX>
struct Row {
  const TY *dy, *y;
  TX* dx;
  FASTNN_DEVICE Row(const SoftmaxBwdParams& p, int64_t r)
      : dy(static_cast<const TY*>(p.dy) + r * p.dy_row_stride),
        y(static_cast<const TY*>(p.y) + r * p.cols),
        dx(static_cast<TX*>(p.dx) + r * p.cols) {}
};

template <class Team, int kValues, class TY, class TX>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 128, kHeldBlocks<Team, 2 * kValues>)
    softmax_bwd_held(SoftmaxBwdParams p) {
  constexpr int N = kChunk<TY, TX>, C = kValues / N;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  for (int64_t base = team.first(); base < p.outer; base += team.step()) {
    const int64_t r = base + team.which();
    const bool mine = r < p.outer;
    const Row<TY, TX> row(p, mine ? r : 0);
    const Span<N> span(row.dx, mine ? p.cols : 0);
    float dy[C][N], y[C][N];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t at = span.begin(team.member() + c * team.size());
      load_chunk(row.dy, at, span.n, dy[c]);
      load_chunk(row.y, at, span.n, y[c]);
    }
    float sum[1] = {0.f};
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[0] += term(dy[c][i], y[c][i], p.log);
    }
    team.reduce(sum, Add{});
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) dy[c][i] = slope(dy[c][i], y[c][i], sum[0], p.log);
      store_chunk(row.dx, span.begin(team.member() + c * team.size()), span.n, dy[c]);
    }
  }
}

template <int N, class TY>
FASTNN_DEVICE float terms(const TY* dy, const TY* y, const Span<N>& span, int64_t from, int64_t to,
                          bool log) {
  constexpr int kTogether = 2;
  float sum = 0.f;
  for (int64_t k = from + threadIdx.x; k < to; k += kTogether * blockDim.x) {
    float a[kTogether][N], b[kTogether][N];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int64_t chunk = k + u * static_cast<int64_t>(blockDim.x);
      const int64_t n = chunk < to ? span.n : 0;
      load_chunk(dy, span.begin(chunk), n, a[u]);
      if (!log) load_chunk(y, span.begin(chunk), n, b[u]);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum += log ? a[u][i] : a[u][i] * b[u][i];
    }
  }
  return sum;
}
template <int N, class TY, class TX>
FASTNN_DEVICE void write_slopes(const Row<TY, TX>& row, const Span<N>& span, int64_t from,
                                int64_t to, float sum, bool log) {
  for (int64_t k = from + threadIdx.x; k < to; k += blockDim.x) {
    float dy[N], y[N];
    load_chunk(row.dy, span.begin(k), span.n, dy);
    load_chunk(row.y, span.begin(k), span.n, y);
#pragma unroll
    for (int i = 0; i < N; ++i) dy[i] = slope(dy[i], y[i], sum, log);
    store_chunk(row.dx, span.begin(k), span.n, dy);
  }
}

template <class TY, class TX>
__global__ void __launch_bounds__(1024) softmax_bwd_stream(SoftmaxBwdParams p) {
  constexpr int N = kChunk<TY, TX>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  for (int64_t r = team.first(); r < p.outer; r += team.step()) {
    const Row<TY, TX> row(p, r);
    const Span<N> span(row.dx, p.cols);
    const float mine = terms(row.dy, row.y, span, 0, span.count, p.log);
    write_slopes(row, span, 0, span.count, reduce_one(team, mine, Add{}), p.log);
  }
}

template <class TY, class TX>
__global__ void __launch_bounds__(kSplitThreads)
    softmax_bwd_parts(SoftmaxBwdParams p, int parts, float* found) {
  constexpr int N = kChunk<TY, TX>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  const Row<TY, TX> row(p, blockIdx.x / static_cast<unsigned>(parts));
  const Span<N> span(row.dx, p.cols);
  const Part part = part_of(span, parts);
  const float mine = terms(row.dy, row.y, span, part.from, part.to, p.log);
  const float sum = reduce_one(team, mine, Add{});
  if (threadIdx.x == 0) store_global(found + blockIdx.x, sum);
}
template <class TY, class TX>
__global__ void __launch_bounds__(kSplitThreads)
    softmax_bwd_write_parts(SoftmaxBwdParams p, int parts, const float* found) {
  constexpr int N = kChunk<TY, TX>;
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts);
  const Row<TY, TX> row(p, r);
  const Span<N> span(row.dx, p.cols);
  const Part part = part_of(span, parts);
  float sum = 0.f;
  for (int i = 0; i < parts; ++i) sum += load_cached(found + r * parts + i);
  write_slopes(row, span, part.from, part.to, sum, p.log);
}

template <int W, class TY, class TX>
__global__ void __launch_bounds__(512, 1) softmax_bwd_columns(SoftmaxBwdParams p, ColumnPlan plan) {
  FASTNN_DYN_SHARED(float, spare);
  for (int64_t item = blockIdx.x; item < p.outer * plan.grid_x; item += gridDim.x) {
    const Place at = place_of<W>(plan, item);
    const int64_t inside = at.inner < p.inner ? p.inner - at.inner : 0;
    const int64_t offset = at.outer * p.cols * p.inner + at.inner;
    const TY* const dy = static_cast<const TY*>(p.dy) + offset;
    const TY* const y = static_cast<const TY*>(p.y) + offset;
    TX* const dx = static_cast<TX*>(p.dx) + offset;
    float sum[W];
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] = 0.f;
    for (int64_t c = at.first; c < p.cols; c += at.step) {
      float a[W], b[W];
      load_chunk(dy + c * p.inner, 0, inside, a);
      load_chunk(y + c * p.inner, 0, inside, b);
#pragma unroll
      for (int w = 0; w < W; ++w) sum[w] += term(a[w], b[w], p.log);
    }
    across_columns(sum, plan.lanes, spare, Add{});
    for (int64_t c = at.first; c < p.cols; c += at.step) {
      float a[W], b[W];
      load_chunk(dy + c * p.inner, 0, inside, a);
      load_chunk(y + c * p.inner, 0, inside, b);
#pragma unroll
      for (int w = 0; w < W; ++w) a[w] = slope(a[w], b[w], sum[w], p.log);
      store_chunk(dx + c * p.inner, 0, inside, a);
    }
  }
}

template <class TY, class TX>
RowPlan plan_of(const SoftmaxBwdParams& p) {
  const bool on = rows_on_boundaries(p.dx, p.cols, p.dx_dtype);
  return row_plan(p.outer, planned_columns(p.cols, kChunk<TY, TX>, on), kMostValues,
                  multiprocessors());
}

template <class TY, class TX>
int launch_rows(const SoftmaxBwdParams& p, void* workspace, void* stream) {
  const RowPlan plan = plan_of<TY, TX>(p);
  const dim3 grid(static_cast<unsigned>(plan.grid)), threads(static_cast<unsigned>(plan.threads));
  auto* const found = static_cast<float*>(workspace);
  switch (plan.kind) {
    case RowKind::kLanes:
      if (plan.lanes == 8) {
        FASTNN_LAUNCH((softmax_bwd_held<LaneTeam<8>, 8, TY, TX>), grid, threads, 0, stream, p);
      } else if (plan.values == 8) {
        FASTNN_LAUNCH((softmax_bwd_held<LaneTeam<32>, 8, TY, TX>), grid, threads, 0, stream, p);
      } else {
        FASTNN_LAUNCH((softmax_bwd_held<LaneTeam<32>, 16, TY, TX>), grid, threads, 0, stream, p);
      }
      break;
    case RowKind::kBlock:
      FASTNN_LAUNCH((softmax_bwd_held<BlockTeam, 16, TY, TX>), grid, threads, 0, stream, p);
      break;
    case RowKind::kStream:
      FASTNN_LAUNCH((softmax_bwd_stream<TY, TX>), grid, threads, 0, stream, p);
      break;
    case RowKind::kSplit:
      FASTNN_LAUNCH((softmax_bwd_parts<TY, TX>), grid, threads, 0, stream, p, plan.parts, found);
      FASTNN_LAUNCH((softmax_bwd_write_parts<TY, TX>), grid, threads, 0, stream, p, plan.parts,
                    found);
      break;
  }
  return launch_result();
}

template <int W, class TY, class TX>
int launch_columns_of(const SoftmaxBwdParams& p, void* stream) {
  const ColumnPlan plan = column_plan(p.outer, p.cols, ceil_div(p.inner, W), multiprocessors());
  FASTNN_LAUNCH((softmax_bwd_columns<W, TY, TX>), dim3(static_cast<unsigned>(plan.grid)),
                dim3(static_cast<unsigned>(plan.threads)), plan.threads * W * sizeof(float), stream,
                p, plan);
  return launch_result();
}
template <class TY, class TX>
int launch_columns(const SoftmaxBwdParams& p, void* stream) {
  constexpr int N = kChunk<TY, TX>;
  const bool wide = p.inner % N == 0 && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
  return wide ? launch_columns_of<N, TY, TX>(p, stream) : launch_columns_of<1, TY, TX>(p, stream);
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_softmax_bwd_workspace(const SoftmaxBwdParams* p) {
  if (p->inner != 1 || p->outer == 0 || p->cols == 0) return 0;
  int64_t bytes = 0;
  with_type_pair(p->dx_dtype, p->y_dtype, [&](auto dx, auto y) {
    const RowPlan plan = plan_of<decltype(y), decltype(dx)>(*p);
    if (plan.kind == RowKind::kSplit) bytes = plan.grid * static_cast<int64_t>(sizeof(float));
    return 0;
  });
  return bytes;
}

int fastnn_cuda_softmax_bwd(const SoftmaxBwdParams* p, void* workspace, void* stream) {
  if (p->outer == 0 || p->cols == 0 || p->inner == 0) return 0;
  return with_type_pair(p->dx_dtype, p->y_dtype, [&](auto dx, auto y) {
    using TX = decltype(dx);
    using TY = decltype(y);
    return p->inner == 1 ? launch_rows<TY, TX>(*p, workspace, stream)
                         : launch_columns<TY, TX>(*p, stream);
  });
}
