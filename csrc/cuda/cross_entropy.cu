// Cross-entropy, forward. The logits are read once, whatever the target: maximum and sum as in
// softmax, and with them, where every class has a share in the target, sum of share (maximum - x),
// which follows the maximum as it rises: all terms of one sign, nothing cancels. A row belongs to a
// part of a warp, a block, or several blocks whose results meet in a second launch. Losses are
// added up in double, in an order that depends on their number alone.
#include "cuda/cross_entropy.cuh"

namespace fastnn {
namespace {

// Of the classes seen: MaxSum, sum of share (max - x), sum of share.
struct LossSums {
  MaxSum of;
  float gap = 0.f, share = 0.f;

  FASTNN_DEVICE void rise(float top) {
    if (share != 0.f) gap += share * (top - of.max);
  }
  template <TargetKind kKind, int N, class Row>
  FASTNN_DEVICE void add(const Row& row, int64_t at, int64_t n) {
    float x[N];
    row.logits(at, n, x);
    const float before = of.max;
    MaxSum next = of;
    next.add(x);
    if constexpr (kKind != TargetKind::kIndex) {
      float s[N];
      row.shares(at, n, s);
      if (next.max != before) rise(next.max);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (at + i < 0 || at + i >= n) continue;
        gap += s[i] * (next.max - x[i]);
        share += s[i];
      }
    }
    of = next;
  }
  template <class Team>
  FASTNN_DEVICE void meet(Team& team) {
    const float top = reduce_one(team, of.max, Max{});
    rise(top);
    float sums[3] = {of.sum * exp_of(of.max - top), gap, share};
    team.reduce(sums, Add{});
    of.max = top;
    of.sum = sums[0];
    gap = sums[1];
    share = sums[2];
  }
};

struct Found {
  float *loss, *z;  // of each row
};

// What one thread of a row writes once its sums are known.
template <class T, TargetKind kKind>
FASTNN_DEVICE void write_loss(const CudaLossFwdParams& f, const LossRow<T, kKind>& row, int64_t r,
                              const LossSums& s, const Found& found) {
  float loss = 0.f, z = 0.f, max = 0.f, log_sum = 0.f;
  if (row.bad) {
    loss = z = max = log_sum = NAN;
  } else if (!row.ignored) {
    max = s.of.max;
    log_sum = logf(s.of.sum);
    if constexpr (kKind != TargetKind::kProbabilities) {
      loss = row.rest * row.weight_of_target() * ((max - row.logit_of_target()) + log_sum);
    }
    if constexpr (kKind != TargetKind::kIndex) loss += s.gap + s.share * log_sum;
    const float lse = max + log_sum;
    z = f.loss.z_loss * lse * lse;
  }
  store_global(found.loss + r, loss);
  if (f.loss.z_loss != 0.f) store_global(found.z + r, z);
  store_global(f.stats + 2 * r, max);
  store_global(f.stats + 2 * r + 1, log_sum);
}

template <class Team, class T, TargetKind kKind>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 128)
    cross_entropy_rows(CudaLossFwdParams f, Found found) {
  constexpr int N = kChunk<T>;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  for (int64_t base = team.first(); base < f.loss.rows; base += team.step()) {
    const int64_t r = base + team.which();
    const bool mine = r < f.loss.rows;
    const LossRow<T, kKind> row(f.loss, f.weight, mine ? r : 0);
    const bool counts = mine && !row.ignored && !row.bad;
    const Span<N> span(row.x, counts ? f.loss.classes : 0);
    LossSums s;
#pragma unroll(Team::kIsBlock&& kKind != TargetKind::kProbabilities ? 2 : 1)
    for (int64_t k = team.member(); k < span.count; k += team.size()) {
      s.template add<kKind, N>(row, span.begin(k), span.n);
    }
    s.meet(team);
    if (mine && team.member() == 0) write_loss(f, row, r, s, found);
  }
}

template <class T, TargetKind kKind>
__global__ void __launch_bounds__(1024)
    cross_entropy_parts(CudaLossFwdParams f, int parts, float4* partial) {
  constexpr int N = kChunk<T>;
  FASTNN_SHARED(float, spare, kReduceSpare);
  BlockTeam team(spare);
  const LossRow<T, kKind> row(f.loss, f.weight, blockIdx.x / static_cast<unsigned>(parts));
  const Span<N> span(row.x, row.ignored || row.bad ? 0 : f.loss.classes);
  const Part part = part_of(span, parts);
  LossSums s;
#pragma unroll 2
  for (int64_t k = part.from + threadIdx.x; k < part.to; k += blockDim.x) {
    s.template add<kKind, N>(row, span.begin(k), span.n);
  }
  s.meet(team);
  if (threadIdx.x == 0) {
    store_global(partial + blockIdx.x, make_float4(s.of.max, s.of.sum, s.gap, s.share));
  }
}
// A thread for each row: it meets the row's parts in order.
template <class T, TargetKind kKind>
__global__ void __launch_bounds__(128)
    cross_entropy_meet(CudaLossFwdParams f, int parts, const float4* partial, Found found) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r >= f.loss.rows) return;
  LossSums s;
  for (int i = 0; i < parts; ++i) {
    const float4 one = load_global(partial + r * parts + i);
    const float top = fmaxf(s.of.max, one.x);
    s.rise(top);
    s.gap += one.z + (one.w != 0.f ? one.w * (top - one.x) : 0.f);
    s.share += one.w;
    s.of.sum = s.of.sum * exp_of(s.of.max - top) + one.y * exp_of(one.x - top);
    s.of.max = top;
  }
  write_loss(f, LossRow<T, kKind>(f.loss, f.weight, r), r, s, found);
}

// ---- from the rows' losses to the result

template <class T>
__global__ void __launch_bounds__(256) cross_entropy_each(CudaLossFwdParams f, Found found) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r == 0) {
    store_global(f.divisors, 1.f);
    store_global(f.divisors + 1, 1.f);
  }
  if (r >= f.loss.rows) return;
  float loss[1] = {load_global(found.loss + r)};
  if (f.loss.z_loss != 0.f) loss[0] += load_global(found.z + r);
  store_chunk(static_cast<T*>(f.result) + r, 0, 1, loss);
}

struct Totals {
  double loss, z, weights, count;
};
template <class T>
FASTNN_DEVICE void write_result(const CudaLossFwdParams& f, Totals t) {
  const bool mean = f.reduction == LossReduction::kMean;
  store_global(f.divisors, mean ? static_cast<float>(t.weights) : 1.f);
  store_global(f.divisors + 1, mean ? static_cast<float>(t.count) : 1.f);
  if (mean) {
    t.loss /= t.weights;
    t.z /= t.count;
  }
  const float total[1] = {static_cast<float>(f.loss.z_loss != 0.f ? t.loss + t.z : t.loss)};
  store_chunk(static_cast<T*>(f.result), 0, 1, total);
}

// Rows begin .. begin + rows_per_block of each block; the totals of several blocks go to `partial`.
constexpr int kSumThreads = 256;
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    cross_entropy_sum(CudaLossFwdParams f, Found found, int64_t rows_per_block, double* partial) {
  FASTNN_SHARED(double, shared, 4 * kSumThreads);
  const CrossEntropyParams& p = f.loss;
  const auto* const weight = static_cast<const T*>(f.weight);
  const int64_t begin = blockIdx.x * rows_per_block, end = min(p.rows, begin + rows_per_block);
  Totals t = {0.0, 0.0, 0.0, 0.0};
#pragma unroll 4
  for (int64_t r = begin + threadIdx.x; r < end; r += kSumThreads) {
    t.loss += load_global(found.loss + r);
    if (p.z_loss != 0.f) t.z += load_global(found.z + r);
    if (p.target == nullptr) {
      t.weights += 1.0;
      t.count += 1.0;
      continue;
    }
    const int64_t target = load_global(p.target + r);
    if (target == p.ignore_index) continue;
    float w[1] = {1.f};
    if (weight != nullptr) load_chunk<1, true>(weight, target, p.classes, w);
    t.weights += w[0];
    t.count += 1.0;
  }
  double* const mine = shared + 4 * threadIdx.x;
  mine[0] = t.loss;
  mine[1] = t.z;
  mine[2] = t.weights;
  mine[3] = t.count;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= half) continue;
    for (int k = 0; k < 4; ++k) mine[k] += mine[4 * half + k];
  }
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_result<T>(f, {mine[0], mine[1], mine[2], mine[3]});
  } else {
    for (int k = 0; k < 4; ++k) store_global(partial + 4 * blockIdx.x + k, mine[k]);
  }
}
template <class T>
__global__ void __launch_bounds__(32)
    cross_entropy_total(CudaLossFwdParams f, int64_t blocks, const double* partial) {
  FASTNN_SHARED(double, total, 4);
  if (threadIdx.x < 4) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += load_global(partial + 4 * b + threadIdx.x);
    total[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) write_result<T>(f, {total[0], total[1], total[2], total[3]});
}

// ---- launching

SumPlan loss_sums(const CrossEntropyParams& p) {
  return sum_plan(p.rows, kSumThreads, 64, 1, 4096);
}

// The workspace: totals of blocks, partial results of parts, losses, z terms.
struct Layout {
  int64_t totals, parts, loss, z, bytes;
};
Layout layout_of(const CudaLossFwdParams& f, const RowPlan& plan) {
  Layout l = {};
  l.parts = 32 * loss_sums(f.loss).blocks;
  l.loss = l.parts + (plan.kind == RowKind::kSplit ? 16 * plan.grid : 0);
  l.z = l.loss + 4 * f.loss.rows;
  l.bytes = l.z + (f.loss.z_loss != 0.f ? 4 * f.loss.rows : 0);
  return l;
}

template <class T, TargetKind kKind>
int launch(const CudaLossFwdParams& f, void* workspace, void* stream) {
  const CrossEntropyParams& p = f.loss;
  const RowPlan plan = loss_plan<T, kKind>(p, p.x, p.x_row_stride);
  const Layout layout = layout_of(f, plan);
  auto* const memory = static_cast<char*>(workspace);
  auto* const partial = reinterpret_cast<float4*>(memory + layout.parts);
  auto* const totals = reinterpret_cast<double*>(memory + layout.totals);
  const Found found = {reinterpret_cast<float*>(memory + layout.loss),
                       reinterpret_cast<float*>(memory + layout.z)};
  const dim3 grid(static_cast<unsigned>(plan.grid)), threads(static_cast<unsigned>(plan.threads));
  const auto by_rows = [&](int size) {
    return dim3(static_cast<unsigned>(ceil_div(p.rows, size)));
  };
  if (p.rows != 0) {
    if (plan.kind == RowKind::kSplit) {
      FASTNN_LAUNCH((cross_entropy_parts<T, kKind>), grid, threads, 0, stream, f, plan.parts,
                    partial);
      FASTNN_LAUNCH((cross_entropy_meet<T, kKind>), by_rows(128), dim3(128), 0, stream, f,
                    plan.parts, partial, found);
    } else if (plan.kind == RowKind::kStream) {
      FASTNN_LAUNCH((cross_entropy_rows<BlockTeam, T, kKind>), grid, threads, 0, stream, f, found);
    } else if (plan.lanes == 8) {
      FASTNN_LAUNCH((cross_entropy_rows<LaneTeam<8>, T, kKind>), grid, threads, 0, stream, f,
                    found);
    } else {
      FASTNN_LAUNCH((cross_entropy_rows<LaneTeam<32>, T, kKind>), grid, threads, 0, stream, f,
                    found);
    }
  }
  if (f.reduction == LossReduction::kNone) {
    const dim3 blocks(static_cast<unsigned>(most(1, ceil_div(p.rows, 256))));
    FASTNN_LAUNCH((cross_entropy_each<T>), blocks, dim3(256), 0, stream, f, found);
    return launch_result();
  }
  const SumPlan sums = loss_sums(p);
  const dim3 blocks(static_cast<unsigned>(sums.blocks));
  FASTNN_LAUNCH((cross_entropy_sum<T>), blocks, dim3(kSumThreads), 0, stream, f, found,
                sums.rows_per_block, totals);
  if (sums.blocks > 1) {
    FASTNN_LAUNCH((cross_entropy_total<T>), dim3(1), dim3(32), 0, stream, f, sums.blocks, totals);
  }
  return launch_result();
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_cross_entropy_fwd_workspace(const CudaLossFwdParams* f) {
  int64_t bytes = 0;
  with_loss_kind(f->loss, [&](auto t, auto kind) {
    const RowPlan plan =
        loss_plan<decltype(t), decltype(kind)::kind>(f->loss, f->loss.x, f->loss.x_row_stride);
    bytes = layout_of(*f, plan).bytes;
    return 0;
  });
  return bytes;
}

int fastnn_cuda_cross_entropy_fwd(const CudaLossFwdParams* f, void* workspace, void* stream) {
  return with_loss_kind(f->loss, [&](auto t, auto kind) {
    return launch<decltype(t), decltype(kind)::kind>(*f, workspace, stream);
  });
}
