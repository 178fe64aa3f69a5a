#include "cpu/block_sparse.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/gemm/params.h"
#include "cpu/int8_rows.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kSerialOperations = int64_t{2} << 20;  // as in cpu/linear.cpp
// Tiles of the input that are packed at once: shared by all threads, so that few rows are packed
// once however many threads split the strips.
constexpr int64_t kPanelBytes = int64_t{8} << 20;
constexpr int64_t kPackColumns = 1024;  // of a tile, packed by one task
constexpr int64_t kDxRows = 32;         // rows of dz that stay in L2 while blocks of columns go by
constexpr int64_t kLine = 16;  // floats: rows a multiple of 4 KiB apart share one set of L1

struct Shape {
  int64_t strips, columns, blocks;  // of 16 outputs, of `depth` columns, stored
};
Shape shape_of(const BlockSparseWeight& w, int64_t N, int64_t K) {
  const int64_t strips = (N + kStrip - 1) / kStrip;
  return {strips, (K + w.depth - 1) / w.depth, strips > 0 ? w.starts[strips] : 0};
}

int64_t parts_wanted(const Shape& shape, const BlockSparseWeight& w, int64_t rows) {
  const int64_t operations = 2 * rows * shape.blocks * w.depth * kStrip;
  return operations <= kSerialOperations ? 1 : thread_count();
}

// Where part `part` of `parts` begins in [0, n], cut where running[i] - running[0], the work before
// i, says so; an item itself counts as one.
template <class Int>
int64_t cut(const Int* running, int64_t n, int64_t part, int64_t parts) {
  if (part <= 0 || part >= parts) return part <= 0 ? 0 : n;
  const int64_t goal = (running[n] - running[0] + n) * part / parts;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    (running[middle] - running[0] + middle < goal ? low : high) =
        running[middle] - running[0] + middle < goal ? middle + 1 : middle;
  }
  return low;
}

// g's rows and columns of c = epilogue(x (M x K) w^T).
void run_blocks(const GemmParams& g, const Matrix& x, int64_t K, const BlockSparseWeight& w,
                const KernelTable& table) {
  const Shape shape = shape_of(w, g.N, K);
  const int64_t most = table.sparse_tile_rows(g.M);
  const int64_t tiles = (g.M + most - 1) / most;
  const int64_t units = shape.columns * table.sparse_units(w.depth, w.dtype, w.units);
  const int64_t tile_floats = most * units + kLine;
  const int64_t at_once = std::clamp<int64_t>(kPanelBytes / (tile_floats * 4), 1, tiles);
  const Scratch memory(at_once * tile_floats * 4);
  auto* const panels = static_cast<float*>(memory.get());
  const auto row_of = [&](int64_t tile) { return g.M * tile / tiles; };
  const int64_t chunks = std::max<int64_t>(1, (K + kPackColumns - 1) / kPackColumns);
  for (int64_t t0 = 0; t0 < tiles; t0 += at_once) {
    const int64_t count = std::min(at_once, tiles - t0);
    parallel_for(count * chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task / chunks, chunk = task % chunks;
        const int64_t m0 = row_of(t0 + tile), m1 = row_of(t0 + tile + 1);
        table.sparse_pack(x, K, w.depth, m0, m1, table.sparse_tile_rows(m1 - m0),
                          shape.columns * chunk / chunks, shape.columns * (chunk + 1) / chunks,
                          w.units, panels + tile * tile_floats);
      }
    });
    const int64_t threads = parts_wanted(shape, w, row_of(t0 + count) - row_of(t0));
    const int64_t parts = std::min((threads + count - 1) / count, shape.strips);
    parallel_for(count * parts, threads == 1 ? count * parts : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task / parts, part = task % parts;
        table.sparse_fwd(g, w, panels + tile * tile_floats, row_of(t0 + tile),
                         row_of(t0 + tile + 1), cut(w.starts, shape.strips, part, parts),
                         cut(w.starts, shape.strips, part + 1, parts));
      }
    });
  }
}

// What goes with the codes of a weight: N, rounded up to strips, offsets and as many scales.
struct Packed {
  int64_t columns;
  explicit Packed(int64_t N) : columns(round_up(N, kStrip)) {}
  int64_t bytes() const { return 2 * columns * 4; }
  const int32_t* offset(const void* p) const { return static_cast<const int32_t*>(p); }
  const float* scale(const void* p) const { return static_cast<const float*>(p) + columns; }
};

}  // namespace

void block_sparse_fwd(const BlockSparseParams& p) {
  const KernelTable& table = kernels();
  record_run("linear_block_sparse_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.x.dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  GemmParams g = {};
  g.M = p.M;
  g.N = p.N;
  g.c = p.y;
  g.c_stride = p.N;
  g.c_dtype = p.x.dtype;
  g.tile_bias = biased ? bias.get() : nullptr;
  g.epilogue.pre = p.pre;
  g.epilogue.pre_stride = p.N;
  g.epilogue.activation = p.activation;
  run_blocks(g, p.x, p.K, p.w, table);
}

void block_sparse_bwd(const BlockSparseBwdParams& p) {
  const KernelTable& table = kernels();
  record_run("linear_block_sparse_bwd", table.isa);
  const LinearBwdParams& l = p.linear;
  const bool products = l.dx != nullptr || l.dw != nullptr;
  const bool own_dz = products && l.activation != Activation::kNone;
  const int64_t size = element_bytes(l.dy.dtype);
  const Scratch dz_memory(own_dz ? l.M * l.N * size : 0);
  void* const dz = own_dz ? dz_memory.get() : nullptr;
  if (own_dz || l.db != nullptr) run_slope(l, dz, table);
  if (!products) return;
  const Matrix z = own_dz ? Matrix{dz, l.N, 1, l.dy.dtype} : l.dy;
  const Shape shape = shape_of(p.w, l.N, l.K);

  // dz as float32 rows of whole strips.
  const int64_t z_stride = shape.strips * kStrip + kLine;
  const Scratch z_memory(l.M * z_stride * 4);
  auto* const rows = static_cast<float*>(z_memory.get());
  parallel_for(l.M, std::max<int64_t>(1, 16384 / z_stride), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      float* const row = rows + m * z_stride;
      table.to_float32(static_cast<const char*>(z.data) + m * z.row_stride * size, z.col_stride,
                       z.dtype, l.N, row);
      std::fill(row + l.N, row + shape.strips * kStrip, 0.f);
    }
  });
  SparseGradients g = {};
  g.M = l.M;
  g.N = l.N;
  g.K = l.K;
  g.dz = rows;
  g.dz_stride = z_stride;
  g.w = p.w;
  g.dx = l.dx;
  g.dw = l.dw;
  const int64_t threads = parts_wanted(shape, p.w, l.M);
  if (l.dx != nullptr && l.M > 0 && l.K > 0) {
    std::vector<int64_t> starts(shape.columns + 2, 0);
    std::vector<SparseCell> cells(shape.blocks);
    for (int64_t b = 0; b < shape.blocks; ++b) ++starts[p.w.columns[b] + 2];
    for (int64_t c = 2; c < shape.columns + 2; ++c) starts[c] += starts[c - 1];
    for (int64_t s = 0; s < shape.strips; ++s) {
      for (int32_t b = p.w.starts[s]; b < p.w.starts[s + 1]; ++b) {
        cells[starts[p.w.columns[b] + 1]++] = {b, (int32_t)s};
      }
    }
    g.column_starts = starts.data();
    g.cells = cells.data();
    const int64_t chunks = (l.M + kDxRows - 1) / kDxRows;
    const int64_t parts = std::min((threads + chunks - 1) / chunks, shape.columns);
    parallel_for(chunks * parts, threads == 1 ? chunks * parts : 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t chunk = task / parts, part = task % parts;
                     table.sparse_dx(g, l.M * chunk / chunks, l.M * (chunk + 1) / chunks,
                                     cut(g.column_starts, shape.columns, part, parts),
                                     cut(g.column_starts, shape.columns, part + 1, parts));
                   }
                 });
  }
  if (l.dw != nullptr && shape.blocks > 0) {
    const int64_t tiles = (l.M + kSparseDwRows - 1) / kSparseDwRows;
    g.panel_floats = shape.columns * p.w.depth * kSparseDwRows + kLine;
    const Scratch panels(tiles * g.panel_floats * 4);
    g.panel = static_cast<const float*>(panels.get());
    const int64_t chunks = std::max<int64_t>(1, (l.K + kPackColumns - 1) / kPackColumns);
    parallel_for(tiles * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task / chunks, chunk = task % chunks;
        const int64_t m0 = tile * kSparseDwRows;
        // Rows past M are never read.
        const Matrix& x = l.x;
        table.sparse_pack(x, l.K, p.w.depth, m0, std::min(l.M, m0 + kSparseDwRows), kSparseDwRows,
                          shape.columns * chunk / chunks, shape.columns * (chunk + 1) / chunks,
                          SparseUnits::kWidened,
                          static_cast<float*>(panels.get()) + tile * g.panel_floats);
      }
    });
    parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t s1 = cut(p.w.starts, shape.strips, part + 1, threads);
        for (int64_t s = cut(p.w.starts, shape.strips, part, threads); s < s1; ++s) {
          table.sparse_dw(g, s, p.w.starts[s], p.w.starts[s + 1]);
        }
      }
    });
  }
}

void block_sparse_int8_fwd(const BlockSparseInt8Params& p) {
  const KernelTable& table = kernels();
  record_run("linear_block_sparse_int8_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.bias_dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  const int64_t whole = shape_of(p.w, p.N, p.K).columns * p.w.depth;
  const Int8Rows rounded(p.x, p.M, p.K, whole);
  const Packed layout(p.N);
  rounded.each_part(table, [&](int64_t m0, int64_t rows, const Matrix& codes, const float* scale) {
    GemmParams g = {};
    g.M = rows;
    g.N = p.N;
    g.c = static_cast<char*>(p.y) + m0 * p.N * element_bytes(p.x.dtype);
    g.c_stride = p.N;
    g.c_dtype = p.x.dtype;
    g.is_int8 = true;
    g.int8 = {scale, layout.scale(p.packed), layout.offset(p.packed)};
    g.tile_bias = biased ? bias.get() : nullptr;
    g.epilogue.activation = p.activation;
    run_blocks(g, codes, whole, p.w, table);
  });
}

int64_t block_sparse_int8_packed_bytes(int64_t N) { return Packed(N).bytes(); }

void block_sparse_int8_pack(const BlockSparseWeight& w, const float* scale, int64_t scale_stride,
                            int64_t N, void* packed) {
  record_run("linear_block_sparse_int8_pack", kernels().isa);
  const Packed layout(N);
  auto* const offset = const_cast<int32_t*>(layout.offset(packed));
  auto* const scales = const_cast<float*>(layout.scale(packed));
  constexpr int64_t kUnit = 4;  // codes of an output next to each other
  parallel_for(layout.columns / kStrip, 8, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      int32_t sums[kStrip] = {};
      const int64_t units = (w.starts[s + 1] - w.starts[s]) * (w.depth / kUnit);
      const auto* code = static_cast<const int8_t*>(w.values) + w.starts[s] * w.depth * kStrip;
      for (int64_t u = 0; u < units; ++u) {
        for (int64_t n = 0; n < kStrip; ++n) {
          for (int64_t k = 0; k < kUnit; ++k) sums[n] += *code++;
        }
      }
      // Wraps where the sum of the shifted codes does: only the difference of the two matters.
      for (int64_t n = 0; n < kStrip; ++n) {
        offset[s * kStrip + n] = (int32_t)((uint32_t)sums[n] * 128u);
      }
    }
  });
  for (int64_t n = 0; n < layout.columns; ++n) scales[n] = n < N ? scale[n * scale_stride] : 0.f;
}

}  // namespace fastnn
