// Rows and the threads that share one. A team of lanes or a whole block works on a row; its
// members take the row's chunks of N elements in turn.
#pragma once
#include "cuda/common.cuh"
#include "cuda/policy.h"

namespace fastnn {

// Elements of a chunk: 16 bytes of the narrower of two types.
template <class A, class B = A>
constexpr int kChunk = 16 / static_cast<int>(sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// kLanes neighbouring lanes of a warp. All lanes of the warp walk together: a row past the end is
// one of no elements.
template <int kLanes>
struct LaneTeam {
  static constexpr bool kIsBlock = false;
  static constexpr int kSpare = 1;
  FASTNN_DEVICE explicit LaneTeam(float*) {}
  FASTNN_DEVICE int member() const { return static_cast<int>(threadIdx.x) % kLanes; }
  FASTNN_DEVICE int size() const { return kLanes; }
  FASTNN_DEVICE int64_t first() const {  // the warp's first row
    return (static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32) *
           (32 / kLanes);
  }
  FASTNN_DEVICE int64_t step() const {
    return static_cast<int64_t>(gridDim.x) * (blockDim.x / kLanes);
  }
  FASTNN_DEVICE int which() const { return static_cast<int>(threadIdx.x) % 32 / kLanes; }
  template <int K, class Op>
  FASTNN_DEVICE void reduce(float (&v)[K], Op op) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_reduce<kLanes>(v[k], op);
  }
};

struct BlockTeam {
  static constexpr bool kIsBlock = true;
  static constexpr int kSpare = kReduceSpare;
  float* spare;
  int turn = 0;
  FASTNN_DEVICE explicit BlockTeam(float* memory) : spare(memory) {}
  FASTNN_DEVICE int member() const { return static_cast<int>(threadIdx.x); }
  FASTNN_DEVICE int size() const { return static_cast<int>(blockDim.x); }
  FASTNN_DEVICE int64_t first() const { return blockIdx.x; }
  FASTNN_DEVICE int64_t step() const { return gridDim.x; }
  FASTNN_DEVICE int which() const { return 0; }
  template <int K, class Op>
  FASTNN_DEVICE void reduce(float (&v)[K], Op op) {
    block_reduce(v, op, spare, turn);
  }
};
// Blocks of 128 threads, `kHeld` numbers of a row in each, that a multiprocessor has registers for:
// ptxas left to itself aims at more for sm_120 and spills.
template <class Team, int kHeld>
constexpr int kHeldBlocks = Team::kIsBlock ? 1
                            : kHeld <= 8   ? 8
                            : kHeld <= 16  ? 5
                                           : 4;

template <class Team, class Op>
FASTNN_DEVICE float reduce_one(Team& team, float v, Op op) {
  float one[1] = {v};
  team.reduce(one, op);
  return one[0];
}

// The chunks of a row: chunk k begins at element k N - lead, so that those of `like` lie on 16-byte
// boundaries wherever the row begins.
template <int N>
struct Span {
  int64_t n;      // elements
  int lead;       // elements of chunk 0 before the row
  int64_t count;  // chunks
  template <class T>
  FASTNN_DEVICE Span(const T* like, int64_t elements)
      : n(elements),
        lead(static_cast<int>(reinterpret_cast<uintptr_t>(like) % 16 / sizeof(T))),
        count((elements + lead + N - 1) / N) {}
  FASTNN_DEVICE int64_t begin(int64_t chunk) const { return chunk * N - lead; }
};

FASTNN_DEVICE float exp_of(float x) { return exp2f(x * 1.4426950408889634f); }

// Maximum and sum of e^(x - maximum) of what has been seen. The maximum starts at the lowest finite
// number, not at -inf: who has seen nothing then adds e^(-inf) = 0 and not NaN.
struct MaxSum {
  float max = -FLT_MAX, sum = 0.f;
  template <int N>
  FASTNN_DEVICE void add(const float (&x)[N]) {
    float top = max;
#pragma unroll
    for (int i = 0; i < N; ++i) top = fmaxf(top, x[i]);
    float more = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) more += exp_of(x[i] - top);
    sum = sum * exp_of(max - top) + more;
    max = top;
  }
  template <class Team>
  FASTNN_DEVICE void meet(Team& team) {
    const float top = reduce_one(team, max, Max{});
    sum = reduce_one(team, sum * exp_of(max - top), Add{});
    max = top;
  }
};

// A part of a row for each block.
struct Part {
  int64_t from, to;
};
template <int N>
FASTNN_DEVICE Part part_of(const Span<N>& span, int parts) {
  const int index = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  return {span.count * index / parts, span.count * (index + 1) / parts};
}
// ---- slices along another dimension than the last

// Where a thread of the column kernels works: W neighbouring slices from `inner`, columns `first`,
// `first + step`, ...
struct Place {
  int64_t outer, inner, first, step;
};
template <int W>
FASTNN_DEVICE Place place_of(const ColumnPlan& plan, int64_t item) {
  const int64_t side = item % plan.grid_x;
  return {item / plan.grid_x,
          (side * plan.lanes + threadIdx.x % static_cast<unsigned>(plan.lanes)) * W,
          threadIdx.x / static_cast<unsigned>(plan.lanes),
          blockDim.x / static_cast<unsigned>(plan.lanes)};
}

// Folds v of the threads that share a lane, W values each, in thread order; `spare` is W floats a
// thread.
template <int W, class Fold>
FASTNN_DEVICE void across_columns(float (&v)[W], int lanes, float* spare, Fold fold) {
  const int threads = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x) % lanes;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < W; ++w) spare[w * threads + static_cast<int>(threadIdx.x)] = v[w];
  __syncthreads();
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float total = spare[w * threads + lane];
    for (int t = lane + lanes; t < threads; t += lanes) total = fold(total, spare[w * threads + t]);
    v[w] = total;
  }
}

// ---- host side

// Whether rows `stride` elements apart from `p` on all begin on 16-byte boundaries.
inline bool rows_on_boundaries(const void* p, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * element_bytes(dtype) % 16 == 0;
}
// Columns for which a plan must make room: those of a row, and of one that begins off a boundary.
inline int64_t planned_columns(int64_t columns, int chunk, bool on_boundaries) {
  return ceil_div(columns, chunk) * chunk + (on_boundaries ? 0 : chunk);
}

}  // namespace fastnn
