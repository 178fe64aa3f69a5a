// Cross-entropy, backward: the softmax again from the saved maximum and log-sum; dx = slope of the
// cap * (softmax * scale * share of the whole target - share of the class * scale + z term).
// Nothing is summed along a row but the shares of a target that is a distribution, so that rows and
// parts of rows are all alike.
#include "cuda/cross_entropy.cuh"

namespace fastnn {
namespace {

// Sum of all class weights, in double.
template <class T>
__global__ void __launch_bounds__(256)
    cross_entropy_weights(const T* weight, int64_t n, float* sum) {
  FASTNN_SHARED(double, shared, 256);
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += 256) {
    float w[1];
    load_chunk(weight, i, n, w);
    total += w[0];
  }
  shared[threadIdx.x] = total;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) store_global(sum, static_cast<float>(shared[0]));
}

// The factors of a row.
struct Slope {
  float max, log_sum, scale, softmax_scale, z, own;
};

template <class T, TargetKind kKind>
FASTNN_DEVICE Slope slope_of(const CudaLossBwdParams& b, const LossRow<T, kKind>& row, int64_t r,
                             float share_sum) {
  float grad[1];
  load_chunk<1, true>(static_cast<const T*>(b.grad), r * b.grad_stride, INT64_MAX, grad);
  Slope s;
  s.max = load_cached(b.stats + 2 * r);
  s.log_sum = load_cached(b.stats + 2 * r + 1);
  s.scale = grad[0] / load_cached(b.divisors);
  s.own = kKind == TargetKind::kProbabilities ? 0.f : row.rest * row.weight_of_target();
  s.softmax_scale = s.scale * (s.own + share_sum);
  s.z = b.loss.z_loss != 0.f
            ? 2.f * b.loss.z_loss * (s.max + s.log_sum) * (grad[0] / load_cached(b.divisors + 1))
            : 0.f;
  return s;
}

// dx of chunks member, member + size, ... in [from, to).
template <class T, TargetKind kKind, int N>
FASTNN_DEVICE void write_slopes(const LossRow<T, kKind>& row, const Slope& s, T* dx,
                                const Span<N>& span, int64_t from, int64_t to, int size) {
#pragma unroll 1
  for (int64_t k = from; k < to; k += size) {
    const int64_t at = span.begin(k);
    float x[N], share[N];
    load_chunk(row.x, at, span.n, x);
#pragma unroll
    for (int i = 0; i < N; ++i) share[i] = 0.f;
    if constexpr (kKind != TargetKind::kIndex) row.shares(at, span.n, share);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (kKind != TargetKind::kProbabilities && at + i == row.target) share[i] += s.own;
      float curve = 1.f;
      if (row.cap != 0.f) {
        const float h = tanhf(x[i] / row.cap);
        x[i] = h * row.cap;
        curve = 1.f - h * h;
      }
      const float e = exp_of((x[i] - s.max) - s.log_sum);
      // Products rounded alike and then subtracted: where softmax and target agree the gradient is
      // exactly z's.
      const float pull = __fmul_rn(share[i], s.scale), push = __fmul_rn(e, s.softmax_scale);
      x[i] = fmaf(e, s.z, __fadd_rn(push, -pull)) * curve;
      if (row.ignored) x[i] = 0.f;
      if (row.bad) x[i] = NAN;
    }
    store_chunk(dx, at, span.n, x);
  }
}

template <class Team, class T, TargetKind kKind>
__global__ void __launch_bounds__(Team::kIsBlock ? 1024 : 128, 1)
    cross_entropy_bwd_rows(CudaLossBwdParams b, const float* weight_sum, int parts) {
  constexpr int N = kChunk<T>;
  FASTNN_SHARED(float, spare, Team::kSpare);
  Team team(spare);
  const int64_t items = b.loss.rows * parts;
  for (int64_t base = team.first(); base < items; base += team.step()) {
    const int64_t item = base + team.which();
    const bool mine = item < items;
    const int64_t r = mine ? item / parts : 0, part = item % parts;
    const LossRow<T, kKind> row(b.loss, b.weight, r);
    T* const dx = static_cast<T*>(b.dx) + r * b.loss.classes;
    const Span<N> span(dx, mine ? b.loss.classes : 0);
    float shares[1] = {0.f};
    if constexpr (kKind == TargetKind::kSmoothed) {
      shares[0] = row.even * (row.weight == nullptr ? static_cast<float>(b.loss.classes)
                                                    : load_cached(weight_sum));
    } else if constexpr (kKind == TargetKind::kProbabilities) {
#pragma unroll 1
      for (int64_t k = team.member(); k < span.count; k += team.size()) {
        float s[N];
        row.shares(span.begin(k), span.n, s);
#pragma unroll
        for (int i = 0; i < N; ++i) shares[0] += s[i];
      }
      team.reduce(shares, Add{});
    }
    const Slope s = slope_of(b, row, r, shares[0]);
    const int64_t from = span.count * part / parts, to = span.count * (part + 1) / parts;
    write_slopes(row, s, dx, span, from + team.member(), to, team.size());
  }
}

template <class T, TargetKind kKind>
int launch(const CudaLossBwdParams& b, float* weight_sum, void* stream) {
  const CrossEntropyParams& p = b.loss;
  RowPlan plan = loss_plan<T, kKind>(p, b.dx, p.classes);
  if (plan.kind == RowKind::kSplit && kKind == TargetKind::kProbabilities) {
    plan.parts = 1;  // each part would sum the whole row's shares
    plan.threads = 1024;
    plan.grid = p.rows;
  }
  if (kKind == TargetKind::kSmoothed && b.weight != nullptr) {
    const auto* const weight = static_cast<const T*>(b.weight);
    FASTNN_LAUNCH((cross_entropy_weights<T>), dim3(1), dim3(256), 0, stream, weight, p.classes,
                  weight_sum);
  }
  const dim3 grid(static_cast<unsigned>(plan.grid)), threads(static_cast<unsigned>(plan.threads));
  if (plan.kind != RowKind::kLanes) {
    FASTNN_LAUNCH((cross_entropy_bwd_rows<BlockTeam, T, kKind>), grid, threads, 0, stream, b,
                  weight_sum, plan.parts);
  } else if (plan.lanes == 8) {
    FASTNN_LAUNCH((cross_entropy_bwd_rows<LaneTeam<8>, T, kKind>), grid, threads, 0, stream, b,
                  weight_sum, 1);
  } else {
    FASTNN_LAUNCH((cross_entropy_bwd_rows<LaneTeam<32>, T, kKind>), grid, threads, 0, stream, b,
                  weight_sum, 1);
  }
  return launch_result();
}

}  // namespace
}  // namespace fastnn

using namespace fastnn;

int64_t fastnn_cuda_cross_entropy_bwd_workspace(const CudaLossBwdParams* b) {
  return b->weight != nullptr && kind_of(b->loss) == TargetKind::kSmoothed ? 16 : 0;
}

int fastnn_cuda_cross_entropy_bwd(const CudaLossBwdParams* b, void* workspace, void* stream) {
  if (b->loss.rows == 0 || b->loss.classes == 0) return 0;
  return with_loss_kind(b->loss, [&](auto t, auto kind) {
    return launch<decltype(t), decltype(kind)::kind>(*b, static_cast<float*>(workspace), stream);
  });
}
