// Softmax and log-softmax. A row is read once and stays in registers where it fits (up to 16384
// columns); a longer one is read again, from L1 or L2. Maximum and sum are
// taken in one pass (MaxSum). Along another dimension than the last, lanes run across neighbouring
// slices and the block's other threads share out the columns.
#include "cuda/softmax.h"

#include "cuda/rows.cuh"

namespace fastnn {
namespace {

constexpr float kNothing = -INFINITY;  // what elements outside a row read as

// What is written of an element: e^(x - max) / sum or (x - max) - log(sum). Not x - (max +
// log(sum)), which loses what tells large inputs apart.
struct Result {
  float max, by;
  bool log;
  FASTNN_DEVICE Result(const MaxSum& s, bool is_log)
      : max(s.max), by(is_log ? logf(s.sum) : 1.f / s.sum), log(is_log) {}
  template <int N>
  FASTNN_DEVICE void apply(float (&v)[N]) const {
    if (log) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = (v[i] - max) - by;
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = exp_of(v[i] - max) * by;
    }
  }
};

template <class Team, int kValues, class TX, class TY>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 128, kHeldBlocks<Team, kValues>)
    softmax_held(SoftmaxParams p) {
  constexpr int N = kChunk<TX, TY>, C = kValues / N;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  for (int64_t base = team.first(); base < p.outer; base += team.step()) {
    const int64_t r = base + team.which();
    const bool mine = r < p.outer;
    const TX* const x = static_cast<const TX*>(p.x) + (mine ? r : 0) * p.x_row_stride;
    TY* const y = static_cast<TY*>(p.y) + (mine ? r : 0) * p.cols;
    const Span<N> span(x, mine ? p.cols : 0);
    float v[C][N];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      load_chunk(x, span.begin(team.member() + c * team.size()), span.n, v[c], kNothing);
    }
    float top[1] = {-FLT_MAX};
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) top[0] = fmaxf(top[0], v[c][i]);
    }
    team.reduce(top, Max{});
    float sum[1] = {0.f};
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float shifted = v[c][i] - top[0], e = exp_of(shifted);
        sum[0] += e;
        v[c][i] = p.log ? shifted : e;
      }
    }
    team.reduce(sum, Add{});
    const float by = p.log ? logf(sum[0]) : 1.f / sum[0];
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[c][i] = p.log ? v[c][i] - by : v[c][i] * by;
      store_chunk(y, span.begin(team.member() + c * team.size()), span.n, v[c]);
    }
  }
}

// Chunks [from, to) of a row, kTogether loads in flight.
constexpr int kTogether = 4;
template <int N, class T>
FASTNN_DEVICE MaxSum statistics(const T* x, const Span<N>& span, int64_t from, int64_t to) {
  MaxSum s;
  for (int64_t k = from + threadIdx.x; k < to; k += kTogether * blockDim.x) {
    float v[kTogether][N];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int64_t chunk = k + u * static_cast<int64_t>(blockDim.x);
      load_chunk(x, span.begin(chunk), chunk < to ? span.n : 0, v[u], kNothing);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) s.add(v[u]);
  }
  return s;
}
template <int N, class TX, class TY>
FASTNN_DEVICE void write_result(const TX* x, TY* y, const Span<N>& span, int64_t from, int64_t to,
                                const Result& result) {
  for (int64_t k = from + threadIdx.x; k < to; k += blockDim.x) {
    float v[N];
    load_chunk(x, span.begin(k), span.n, v);
    result.apply(v);
    store_chunk(y, span.begin(k), span.n, v);
  }
}

template <class TX, class TY>
__global__ void __launch_bounds__(1024) softmax_stream(SoftmaxParams p) {
  constexpr int N = kChunk<TX, TY>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  for (int64_t r = team.first(); r < p.outer; r += team.step()) {
    const TX* const x = static_cast<const TX*>(p.x) + r * p.x_row_stride;
    const Span<N> span(x, p.cols);
    MaxSum s = statistics(x, span, 0, span.count);
    s.meet(team);
    write_result(x, static_cast<TY*>(p.y) + r * p.cols, span, 0, span.count, Result(s, p.log));
  }
}

template <class TX>
__global__ void __launch_bounds__(kSplitThreads)
    softmax_parts(SoftmaxParams p, int parts, float2* found) {
  constexpr int N = kChunk<TX>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts);
  const TX* const x = static_cast<const TX*>(p.x) + r * p.x_row_stride;
  const Span<N> span(x, p.cols);
  const Part part = part_of(span, parts);
  MaxSum s = statistics(x, span, part.from, part.to);
  s.meet(team);
  if (threadIdx.x == 0) store_global(found + blockIdx.x, make_float2(s.max, s.sum));
}
template <class TX, class TY>
__global__ void __launch_bounds__(kSplitThreads)
    softmax_write_parts(SoftmaxParams p, int parts, const float2* found) {
  constexpr int N = kChunk<TX>;
  const int64_t r = blockIdx.x / static_cast<unsigned>(parts);
  const TX* const x = static_cast<const TX*>(p.x) + r * p.x_row_stride;
  const Span<N> span(x, p.cols);
  const Part part = part_of(span, parts);
  MaxSum s;
  for (int i = 0; i < parts; ++i) {
    const float2 one = load_cached(found + r * parts + i);
    const float top = fmaxf(s.max, one.x);
    s.sum = s.sum * exp_of(s.max - top) + one.y * exp_of(one.x - top);
    s.max = top;
  }
  write_result(x, static_cast<TY*>(p.y) + r * p.cols, span, part.from, part.to, Result(s, p.log));
}

// ---- along another dimension than the last

template <int W, class TX, class TY>
__global__ void __launch_bounds__(512) softmax_columns(SoftmaxParams p, ColumnPlan plan) {
  FASTNN_DYN_SHARED(float, spare);
  for (int64_t item = blockIdx.x; item < p.outer * plan.grid_x; item += gridDim.x) {
    const Place at = place_of<W>(plan, item);
    const int64_t inside = at.inner < p.inner ? p.inner - at.inner : 0;
    const int64_t offset = at.outer * p.cols * p.inner + at.inner;
    const TX* const x = static_cast<const TX*>(p.x) + offset;
    TY* const y = static_cast<TY*>(p.y) + offset;
    float max[W], sum[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
      max[w] = -FLT_MAX;
      sum[w] = 0.f;
    }
    for (int64_t c = at.first; c < p.cols; c += at.step) {
      float v[W];
      load_chunk(x + c * p.inner, 0, inside, v, kNothing);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float top = fmaxf(max[w], v[w]);
        sum[w] = sum[w] * exp_of(max[w] - top) + exp_of(v[w] - top);
        max[w] = top;
      }
    }
    float top[W];
#pragma unroll
    for (int w = 0; w < W; ++w) top[w] = max[w];
    across_columns(top, plan.lanes, spare, Max{});
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] *= exp_of(max[w] - top[w]);
    across_columns(sum, plan.lanes, spare, Add{});
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] = p.log ? logf(sum[w]) : 1.f / sum[w];
    for (int64_t c = at.first; c < p.cols; c += at.step) {
      float v[W];
      load_chunk(x + c * p.inner, 0, inside, v);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float shifted = v[w] - top[w];
        v[w] = p.log ? shifted - sum[w] : exp_of(shifted) * sum[w];
      }
      store_chunk(y + c * p.inner, 0, inside, v);
    }
  }
}

// ---- launching

template <class TX, class TY>
RowPlan plan_of(const SoftmaxParams& p) {
  const int64_t columns =
      planned_columns(p.cols, kChunk<TX, TY>, rows_on_boundaries(p.x, p.x_row_stride, p.x_dtype));
  return row_plan(p.outer, columns, 32, multiprocessors());
}

template <class TX, class TY>
int launch_rows(const SoftmaxParams& p, void* workspace, void* stream) {
  const RowPlan plan = plan_of<TX, TY>(p);
  const dim3 grid(static_cast<unsigned>(plan.grid)), threads(static_cast<unsigned>(plan.threads));
  auto* const found = static_cast<float2*>(workspace);
  switch (plan.kind) {
    case RowKind::kLanes:
      if (plan.lanes == 8) {
        FASTNN_LAUNCH((softmax_held<LaneTeam<8>, 8, TX, TY>), grid, threads, 0, stream, p);
      } else if (plan.values == 8) {
        FASTNN_LAUNCH((softmax_held<LaneTeam<32>, 8, TX, TY>), grid, threads, 0, stream, p);
      } else if (plan.values == 16) {
        FASTNN_LAUNCH((softmax_held<LaneTeam<32>, 16, TX, TY>), grid, threads, 0, stream, p);
      } else {
        FASTNN_LAUNCH((softmax_held<LaneTeam<32>, 32, TX, TY>), grid, threads, 0, stream, p);
      }
      break;
    case RowKind::kBlock:
      FASTNN_LAUNCH((softmax_held<BlockTeam, 16, TX, TY>), grid, threads, 0, stream, p);
      break;
    case RowKind::kStream:
      FASTNN_LAUNCH((softmax_stream<TX, TY>), grid, threads, 0, stream, p);
      break;
    case RowKind::kSplit:
      FASTNN_LAUNCH((softmax_parts<TX>), grid, threads, 0, stream, p, plan.parts, found);
      FASTNN_LAUNCH((softmax_write_parts<TX, TY>), grid, threads, 0, stream, p, plan.parts, found);
      break;
  }
  return launch_result();
}

template <int W, class TX, class TY>
int launch_columns_of(const SoftmaxParams& p, void* stream) {
  const ColumnPlan plan = column_plan(p.outer, p.cols, ceil_div(p.inner, W), multiprocessors());
  FASTNN_LAUNCH((softmax_columns<W, TX, TY>), dim3(static_cast<unsigned>(plan.grid)),
                dim3(static_cast<unsigned>(plan.threads)), plan.threads * W * sizeof(float), stream,
                p, plan);
  return launch_result();
}
template <class TX, class TY>
int launch_columns(const SoftmaxParams& p, void* stream) {
  constexpr int N = kChunk<TX, TY>;
  const bool wide = p.inner % N == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  return wide ? launch_columns_of<N, TX, TY>(p, stream) : launch_columns_of<1, TX, TY>(p, stream);
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_softmax_fwd_workspace(const SoftmaxParams* p) {
  if (p->inner != 1 || p->outer == 0 || p->cols == 0) return 0;
  int64_t bytes = 0;
  with_type_pair(p->x_dtype, p->y_dtype, [&](auto x, auto y) {
    const RowPlan plan = plan_of<decltype(x), decltype(y)>(*p);
    if (plan.kind == RowKind::kSplit) bytes = plan.grid * static_cast<int64_t>(sizeof(float2));
    return 0;
  });
  return bytes;
}

int fastnn_cuda_softmax_fwd(const SoftmaxParams* p, void* workspace, void* stream) {
  if (p->outer == 0 || p->cols == 0 || p->inner == 0) return 0;
  return with_type_pair(p->x_dtype, p->y_dtype, [&](auto x, auto y) {
    using TX = decltype(x);
    using TY = decltype(y);
    return p->inner == 1 ? launch_rows<TX, TY>(*p, workspace, stream)
                         : launch_columns<TX, TY>(*p, stream);
  });
}
