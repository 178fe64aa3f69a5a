// Gradients of layer norm and RMS norm: with g = dy weight and h = (x - mean) rstd, dx = rstd (g -
// mean(g) - h mean(g h)) + d_total, dw = sum of dy h and db = sum of dy over rows.
//
// Rows of up to 8192 elements: each block walks through rows of its own, keeps its share of dw and
// db in registers and writes one partial sum; a second launch adds the partial sums in block order.
// Longer rows: dx in one kernel, dw and db in another that runs down the columns.
#include "cuda/norm.h"
#include "cuda/rows.cuh"

namespace fastnn {
namespace {

constexpr int kMostValues = 8;
constexpr int64_t kMostHeld = 1024 * kMostValues;

template <bool kRms, class T, class P>
struct Row {
  const T *dy, *x, *d_total;
  T* dx;
  const P* weight;
  float mean, rstd;
  FASTNN_DEVICE Row(const NormBwdParams& p, int64_t r)
      : dy(static_cast<const T*>(p.dy) + r * p.dy_row_stride),
        x(static_cast<const T*>(p.x) + r * p.x_row_stride),
        d_total(p.d_total == nullptr ? nullptr
                                     : static_cast<const T*>(p.d_total) + r * p.d_total_row_stride),
        dx(p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + r * p.columns),
        weight(static_cast<const P*>(p.weight)),
        mean(kRms ? 0.f : load_cached(p.stats + 2 * r)),
        rstd(load_cached(p.stats + 2 * r + 1)) {}
  FASTNN_DEVICE float normalised(float v) const { return (v - mean) * rstd; }

  // dy and h of a chunk; outside of the row dy is 0.
  template <int N>
  FASTNN_DEVICE void load(int64_t at, int64_t n, float (&d)[N], float (&h)[N]) const {
    load_chunk(dy, at, n, d);
    load_chunk(x, at, n, h, mean);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = normalised(h[i]);
  }
  template <int N>
  FASTNN_DEVICE void weigh(int64_t at, int64_t n, float (&g)[N]) const {
    if (weight == nullptr) return;
    float w[N];
    load_chunk<N, true>(weight, at, n, w);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] *= w[i];
  }
  template <int N>
  FASTNN_DEVICE void add(const float (&g)[N], const float (&h)[N], float (&sums)[2]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!kRms) sums[0] += g[i];
      sums[1] += g[i] * h[i];
    }
  }
  template <int N>
  FASTNN_DEVICE void write(int64_t at, int64_t n, float (&g)[N], const float (&h)[N],
                           const float (&means)[2]) const {
    float more[N];
    if (d_total != nullptr) load_chunk(d_total, at, n, more);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float centred = kRms ? g[i] : g[i] - means[0];
      g[i] = (centred - h[i] * means[1]) * rstd;
      if (d_total != nullptr) g[i] += more[i];
    }
    store_chunk(dx, at, n, g);
  }
};

// kSums: dw or db is wanted, and the block's partial sums go to `partial`: (blocks, 2, columns).
template <class Team, int kValues, bool kSums, bool kRms, class T, class P>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 256)
    norm_bwd_held(NormBwdParams p, int64_t rows_per_block, float* partial) {
  constexpr int N = kChunk<T>, C = kValues / N;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  const float inverse = 1.f / static_cast<float>(p.columns);
  float dw[C][N], db[C][N];
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) dw[c][i] = db[c][i] = 0.f;
  }
  const int warps = Team::kIsBlock ? 1 : static_cast<int>(blockDim.x) / 32;
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = min(p.rows, begin + rows_per_block);
  for (int64_t r = begin + (Team::kIsBlock ? 0 : threadIdx.x / 32); r < end; r += warps) {
    const Row<kRms, T, P> row(p, r);
    float d[C][N], h[C][N], sums[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      row.load((team.member() + c * team.size()) * N, p.columns, d[c], h[c]);
    }
    if (kSums) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          dw[c][i] += d[c][i] * h[c][i];
          db[c][i] += d[c][i];
        }
      }
    }
    if (row.dx == nullptr) continue;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      row.weigh((team.member() + c * team.size()) * N, p.columns, d[c]);
      row.add(d[c], h[c], sums);
    }
    team.reduce(sums, Add{});
    const float means[2] = {sums[0] * inverse, sums[1] * inverse};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      row.write((team.member() + c * team.size()) * N, p.columns, d[c], h[c], means);
    }
  }
  if (!kSums) return;
  float* const mine = partial + blockIdx.x * 2 * p.columns;
  if constexpr (Team::kIsBlock) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int64_t at = static_cast<int64_t>(team.member() + c * team.size()) * N;
      store_chunk(mine, at, p.columns, dw[c]);
      store_chunk(mine + p.columns, at, p.columns, db[c]);
    }
  } else {  // warp after warp adds to what is in shared memory
    FASTNN_SHARED(float, total, 2 * 32 * kValues);
    for (int w = 0; w < warps; ++w) {
      if (static_cast<int>(threadIdx.x) / 32 == w) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const int at = (c * N + i) * 32 + team.member();
            total[at] = w == 0 ? dw[c][i] : total[at] + dw[c][i];
            total[32 * kValues + at] = w == 0 ? db[c][i] : total[32 * kValues + at] + db[c][i];
          }
        }
      }
      __syncthreads();
    }
    for (int j = static_cast<int>(threadIdx.x); j < p.columns; j += static_cast<int>(blockDim.x)) {
      const int chunk = j / N, at = (chunk / 32 * N + j % N) * 32 + chunk % 32;
      store_global(mine + j, total[at]);
      store_global(mine + p.columns + j, total[32 * kValues + at]);
    }
  }
}

template <bool kRms, class T, class P>
__global__ void __launch_bounds__(1024) norm_bwd_stream(NormBwdParams p) {
  constexpr int N = kChunk<T>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  for (int64_t r = team.first(); r < p.rows; r += team.step()) {
    const Row<kRms, T, P> row(p, r);
    const Span<N> span(row.dx, p.columns);
    float sums[2] = {0.f, 0.f};
    for (int64_t k = threadIdx.x; k < span.count; k += blockDim.x) {
      float g[N], h[N];
      row.load(span.begin(k), span.n, g, h);
      row.weigh(span.begin(k), span.n, g);
      row.add(g, h, sums);
    }
    team.reduce(sums, Add{});
    const float n = static_cast<float>(p.columns);
    const float means[2] = {sums[0] / n, sums[1] / n};
    for (int64_t k = threadIdx.x; k < span.count; k += blockDim.x) {
      float g[N], h[N];
      row.load(span.begin(k), span.n, g, h);
      row.weigh(span.begin(k), span.n, g);
      row.write(span.begin(k), span.n, g, h, means);
    }
  }
}

// dw and db of long rows: a thread has N columns of the rows of one part.
template <bool kRms, class T, class P>
__global__ void __launch_bounds__(256)
    norm_bwd_columns(NormBwdParams p, int tiles, int64_t rows_per_part, float* partial) {
  constexpr int N = kChunk<T>;
  const int64_t part = blockIdx.x / static_cast<unsigned>(tiles);
  const int64_t at =
      (blockIdx.x % static_cast<unsigned>(tiles) * static_cast<int64_t>(blockDim.x) + threadIdx.x) *
      N;
  float dw[N], db[N];
#pragma unroll
  for (int i = 0; i < N; ++i) dw[i] = db[i] = 0.f;
  const int64_t end = min(p.rows, (part + 1) * rows_per_part);
  for (int64_t r = part * rows_per_part; r < end; ++r) {
    const Row<kRms, T, P> row(p, r);
    float d[N], h[N];
    row.load(at, p.columns, d, h);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dw[i] += d[i] * h[i];
      db[i] += d[i];
    }
  }
  float* const mine = partial + part * 2 * p.columns;
  store_chunk(mine, at, p.columns, dw);
  store_chunk(mine + p.columns, at, p.columns, db);
}

// Adds `count` partial sums in order: 32 columns and 16 shares of the sums in a block.
constexpr int kShares = 16;
template <class P>
__global__ void __launch_bounds__(32 * kShares)
    norm_bwd_finish(const float* partial, int64_t count, int64_t columns, P* dw, P* db) {
  FASTNN_SHARED(float, shared, 2 * 32 * kShares);
  const int lane = static_cast<int>(threadIdx.x) % 32, share = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float w = 0.f, b = 0.f;
  if (column < columns) {
    for (int64_t i = share; i < count; i += kShares) {
      const float* const one = partial + i * 2 * columns + column;
      if (dw != nullptr) w += load_global(one);
      if (db != nullptr) b += load_global(one + columns);
    }
  }
  shared[threadIdx.x] = w;
  shared[32 * kShares + threadIdx.x] = b;
  __syncthreads();
  if (share != 0 || column >= columns) return;
  for (int s = 1; s < kShares; ++s) {
    w += shared[s * 32 + lane];
    b += shared[32 * kShares + s * 32 + lane];
  }
  const float one_w[1] = {w}, one_b[1] = {b};
  if (dw != nullptr) store_chunk(dw + column, 0, 1, one_w);
  if (db != nullptr) store_chunk(db + column, 0, 1, one_b);
}

// ---- launching

struct Plan {
  bool held, by_warps, sums;
  int threads;
  SumPlan share;  // of rows among blocks, or parts
  int tiles;
};

Plan plan_of(const NormBwdParams& p) {
  Plan plan = {};
  plan.sums = p.dw != nullptr || p.db != nullptr;
  plan.held = p.columns <= kMostHeld;
  const int multi = multiprocessors();
  const int chunk = p.dtype == DType::kFloat32 ? 4 : 8;
  if (plan.held) {
    plan.by_warps = p.columns <= 256;
    plan.threads =
        plan.by_warps ? 256 : static_cast<int>(ceil_div(ceil_div(p.columns, kMostValues), 32) * 32);
    const int together = static_cast<int>(most(1, 1024 / plan.threads));
    plan.share = sum_plan(p.rows, plan.by_warps ? 8 : 1, multi, together, plan.sums ? 16 : 1);
  } else {
    plan.tiles = static_cast<int>(ceil_div(p.columns, 256 * chunk));
    plan.share = sum_plan(p.rows, 1, static_cast<int>(ceil_div(2 * multi, plan.tiles)), 1, 16);
  }
  return plan;
}

template <bool kSums, bool kRms, class T, class P>
void launch_held(const NormBwdParams& p, const Plan& plan, float* partial, void* stream) {
  const dim3 grid(static_cast<unsigned>(plan.share.blocks)),
      threads(static_cast<unsigned>(plan.threads));
  const int64_t each = plan.share.rows_per_block;
  if (!plan.by_warps) {
    FASTNN_LAUNCH((norm_bwd_held<BlockTeam, 8, kSums, kRms, T, P>), grid, threads, 0, stream, p,
                  each, partial);
  } else {
    FASTNN_LAUNCH((norm_bwd_held<LaneTeam<32>, 8, kSums, kRms, T, P>), grid, threads, 0, stream, p,
                  each, partial);
  }
}

template <bool kRms, class T, class P>
int launch(const NormBwdParams& p, float* partial, void* stream) {
  const Plan plan = plan_of(p);
  if (plan.held) {
    plan.sums ? launch_held<true, kRms, T, P>(p, plan, partial, stream)
              : launch_held<false, kRms, T, P>(p, plan, partial, stream);
  } else {
    if (p.dx != nullptr && p.rows != 0) {
      const dim3 grid(static_cast<unsigned>(least(kMaxGrid, p.rows)));
      FASTNN_LAUNCH((norm_bwd_stream<kRms, T, P>), grid, dim3(1024), 0, stream, p);
    }
    if (plan.sums) {
      const dim3 grid(static_cast<unsigned>(plan.share.blocks * plan.tiles));
      FASTNN_LAUNCH((norm_bwd_columns<kRms, T, P>), grid, dim3(256), 0, stream, p, plan.tiles,
                    plan.share.rows_per_block, partial);
    }
  }
  if (plan.sums) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.columns, 32)));
    auto* const dw = static_cast<P*>(p.dw);
    auto* const db = static_cast<P*>(p.db);
    FASTNN_LAUNCH((norm_bwd_finish<P>), grid, dim3(32 * kShares), 0, stream, partial,
                  plan.share.blocks, p.columns, dw, db);
  }
  return launch_result();
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_norm_bwd_workspace(const NormBwdParams* p) {
  const Plan plan = plan_of(*p);
  return plan.sums && p->columns != 0 ? plan.share.blocks * 2 * p->columns * 4 : 0;
}

int fastnn_cuda_norm_bwd(const NormBwdParams* p, void* workspace, void* stream) {
  if (p->columns == 0) return 0;
  if (p->rows == 0 && p->dw == nullptr && p->db == nullptr) return 0;
  return with_type_pair(p->dtype, p->parameter_dtype, [&](auto t, auto parameter) {
    using T = decltype(t);
    using P = decltype(parameter);
    auto* const partial = static_cast<float*>(workspace);
    return p->rms ? launch<true, T, P>(*p, partial, stream)
                  : launch<false, T, P>(*p, partial, stream);
  });
}
