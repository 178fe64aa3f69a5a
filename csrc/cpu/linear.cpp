#include "cpu/linear.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kSerialFlops = int64_t{2}
                                 << 20;  // about 20 us of one core: a thread more would not pay
constexpr int64_t kTileColumns = 48;
constexpr int64_t kRowsPerThread =
    16;  // two row tiles: fewer rows than that per thread split the columns instead
constexpr int64_t kChunkRows =
    256;  // rows summed by one chunk of the bias gradient, whatever the thread count

struct Split {
  int64_t rows, columns;  // parts
};

// Each thread packs or streams its own columns of B, so columns are split where B is packed on the
// way; a packed copy is shared, and splitting rows keeps every thread's A in its own cache. No sum
// depends on how the work is split.
Split split_work(const GemmParams& p) {
  const int64_t threads = thread_count();
  const int64_t serial = p.is_int8 ? 4 * kSerialFlops : kSerialFlops;
  if (threads == 1 || 2 * p.M * p.N * p.K <= serial) return {1, 1};
  const int64_t most_columns = std::max<int64_t>(1, p.N / kTileColumns);
  const int64_t most_rows = std::max<int64_t>(1, p.M / kRowsPerThread);
  if (p.b_packed != nullptr) {
    const int64_t rows = std::min(threads, most_rows);
    return {rows, std::min(std::max<int64_t>(1, threads / rows), most_columns)};
  }
  const int64_t columns = std::min(threads, most_columns);
  const bool columns_only =
      p.M <= 128;  // the ways for few rows take all rows at once (gemm/gemm.h)
  return {columns_only ? 1 : std::min(std::max<int64_t>(1, threads / columns), most_rows), columns};
}

}  // namespace

void run_slope(const LinearBwdParams& p, void* dz, const KernelTable& table) {
  const int64_t chunks = std::max<int64_t>(1, (p.M + kChunkRows - 1) / kChunkRows);
  const Scratch partial(p.db != nullptr ? chunks * p.N * 4 : 0);
  float* const sums = p.db != nullptr ? static_cast<float*>(partial.get()) : nullptr;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, kChunkRows * p.N));
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      table.linear_slope(p, c * kChunkRows, std::min(p.M, (c + 1) * kChunkRows), dz,
                         sums ? sums + c * p.N : nullptr);
    }
  });
  if (p.db != nullptr) add_chunks(table, sums, chunks, p.N, p.dy.dtype, p.db);
}

void run_gemm(const GemmParams& p, const KernelTable& table) {
  if (p.M == 0 || p.N == 0) return;
  const Split split = split_work(p);
  const int64_t scratch_bytes = table.gemm_scratch_floats(p) * 4;
  const int64_t strips = (p.N + kStrip - 1) / kStrip;
  parallel_for(split.rows * split.columns, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / split.columns, column = task % split.columns;
      const int64_t m0 = p.M * row / split.rows, m1 = p.M * (row + 1) / split.rows;
      const int64_t n0 = strips * column / split.columns * kStrip;
      const int64_t n1 = std::min(p.N, strips * (column + 1) / split.columns * kStrip);
      table.gemm(p, m0, m1, n0, n1, static_cast<float*>(scratch.get()));
    }
  });
}

void linear_fwd(const LinearParams& p) {
  const KernelTable& table = kernels();
  record_run(p.is_packed ? "linear_packed_fwd" : "linear_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.x.dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  GemmParams g = {};
  g.M = p.M;
  g.N = p.N;
  g.K = p.K;
  g.a = p.x;
  g.b = {p.w.data, p.w.col_stride, p.w.row_stride, p.w.dtype};  // W^T
  g.b_packed = static_cast<const float*>(p.packed);
  g.c = p.y;
  g.c_stride = p.N;
  g.c_dtype = p.x.dtype;
  g.epilogue.bias = biased ? bias.get() : nullptr;
  g.epilogue.pre = p.pre;
  g.epilogue.pre_stride = p.N;
  g.epilogue.activation = p.activation;
  run_gemm(g, table);
}

void linear_bwd(const LinearBwdParams& p) {
  const KernelTable& table = kernels();
  record_run("linear_bwd", table.isa);
  const bool products = p.dx != nullptr || p.dw != nullptr;
  // Without an activation dz is dy itself, unless its columns lie apart (an expanded gradient):
  // then a copy of it.
  const bool own_dz = products && (p.activation != Activation::kNone || p.dy.col_stride != 1);
  const Scratch dz_memory(own_dz ? p.M * p.N * element_bytes(p.dy.dtype) : 0);
  void* const dz = own_dz ? dz_memory.get() : nullptr;
  if (own_dz || p.db != nullptr) run_slope(p, dz, table);
  const Matrix z = own_dz ? Matrix{dz, p.N, 1, p.dy.dtype} : p.dy;
  GemmParams g = {};
  g.c_stride = p.K;
  g.c_dtype = p.dy.dtype;
  if (p.dx != nullptr) {
    g.M = p.M;
    g.N = p.K;
    g.K = p.N;
    g.a = z;
    g.b = p.w;
    g.c = p.dx;
    run_gemm(g, table);
  }
  if (p.dw != nullptr) {
    g.M = p.N;
    g.N = p.K;
    g.K = p.M;
    g.a = {z.data, z.col_stride, z.row_stride, z.dtype};
    g.b = p.x;
    g.c = p.dw;
    run_gemm(g, table);
  }
}

int64_t linear_packed_bytes(int64_t N, int64_t K, DType dtype) {
  return kernels().packed_floats(N, K, dtype) * 4;
}

void linear_pack(const Matrix& w, int64_t N, int64_t K, void* packed) {
  const KernelTable& table = kernels();
  record_run("linear_pack", table.isa);
  const Matrix b = {w.data, w.col_stride, w.row_stride, w.dtype};
  parallel_for((N + kStrip - 1) / kStrip, 8, [&](int64_t begin, int64_t end) {
    table.pack(b, N, K, begin, end, static_cast<float*>(packed));
  });
}

}  // namespace fastnn
