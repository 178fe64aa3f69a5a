// Few rows by a packed B, the rows packed into panels too: [unit][row], up to kPanelRows of them. A
// tile is then tall and reads one to three strips, which it fetches ahead; at 16 rows it does 92 %
// of the peak where B comes from memory.
#pragma once
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/pack.h"
#include "cpu/gemm/tile.h"

namespace fastnn {
namespace {

// Few rows by a packed B: below, panels of A cost more than B's being fetched ahead saves; above,
// tiles that read A in place are as fast.
constexpr int64_t kPanelsMinRows = 5, kPanelsMaxRows = 128;
constexpr int64_t kPanelsFloats = 1 << 19;  // of all panels: 2 MB, in L2 or L3
// Tiles fetch the strips of the next while they compute, or, of long strips, so many bytes ahead.
constexpr int64_t kAheadBytes = 192 << 10, kLongAheadBytes = 16 << 10;

// All units of rows [m, m + rows) of a, to out[unit][row].
template <class Dot, class T>
void turn_rows(const Matrix& a, int64_t K, int64_t m, int64_t rows, float* out) {
  const T* const data = static_cast<const T*>(a.data) + m * a.row_stride;
  const int64_t units = units_of(K, Dot::kPerUnit);
  if (a.col_stride != 1) {
    for (int64_t u = 0; u < units; ++u, out += rows) {
      const int64_t k = u * Dot::kPerUnit;
      for (int64_t i = 0; i < rows; ++i) {
        out[i] = gather_unit<Dot>(data + i * a.row_stride + k * a.col_stride, a.col_stride, K - k);
      }
    }
    return;
  }
  for (int64_t group = 0; group < rows; group += kLanes) {
    const int count = (int)min_of(rows - group, kLanes);
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t k = u * Dot::kPerUnit;
      Vec r[kLanes];
      load_turned<Dot>(data + group * a.row_stride + k, a.row_stride, count, K - k, r);
      const int64_t whole = min_of(units - u, kLanes);
      for (int64_t i = 0; i < whole; ++i) {
        store_some(out + (u + i) * rows + group, r[i], count);
      }
    }
  }
}

// Scratch: sums of a block of columns | panels of A.
template <class Dot>
int64_t panels_scratch(const GemmParams& p) {
  return p.M * kBlockColumns + p.M * units_of(p.K, Dot::kPerUnit);
}

// Where the dot product of codes is emulated, a tile's strips share the widening of a row's codes,
// and one strip does not.
template <class Dot>
bool takes_panels(const GemmParams& p, int64_t rows) {
  return p.b_packed != nullptr && rows >= kPanelsMinRows && p.M <= kPanelsMaxRows && p.K > 0 &&
         p.M * units_of(p.K, Dot::kPerUnit) <= kPanelsFloats && (!Dot::kExact || kHasCodeDot);
}

template <class Dot, class T>
void gemm_panels(const GemmParams& p, int64_t m0, int64_t m1, int64_t n_begin, int64_t n_end,
                 float* scratch) {
  const int64_t units = units_of(p.K, Dot::kPerUnit), rows = m1 - m0, strip_floats = units * kStrip;
  float* const sums = scratch;
  float* const panels = sums + rows * kBlockColumns;
  const int64_t tiles = (rows + kPanelRows - 1) / kPanelRows;
  auto row_of = [&](int64_t i) { return rows * i / tiles; };
  for (int64_t i = 0; i < tiles; ++i) {
    turn_rows<Dot, T>(p.a, p.K, m0 + row_of(i), row_of(i + 1) - row_of(i),
                      panels + row_of(i) * units);
  }
  const int64_t widest = tile_strips((int)((rows + tiles - 1) / tiles));
  const int64_t next = widest * strip_floats * 4,
                ahead = next <= kAheadBytes ? next : kLongAheadBytes;
  for (int64_t n0 = n_begin; n0 < n_end; n0 += kBlockColumns) {
    const int64_t columns = min_of(kBlockColumns, n_end - n0),
                  strips = (columns + kStrip - 1) / kStrip;
    // Sums that are cut are read and written again, and rows of a result may share an L1 set.
    const bool done = is_done(p, columns) && (Dot::kExact || units <= Dot::kSumUnits);
    float* const t = done ? static_cast<float*>(p.c) + m0 * p.c_stride + n0 : sums;
    const int64_t ldt = done ? p.c_stride : kBlockColumns;
    const TileScales scales = tile_scales(p, m0, n0, true);
    prefetch_output(p, m0, rows, n0, columns);
    for (int64_t s = 0; s < strips; s += widest) {
      const int64_t n = s * kStrip;
      const Strips b = {p.b_packed + (n0 / kStrip + s) * strip_floats, strip_floats, kStrip, ahead};
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t r0 = row_of(i), r1 = row_of(i + 1);
        TileScales of = {};
        if constexpr (Dot::kExact) of = part_of(scales, r0, n);
        Tiles<Dot, true>::get(r1 - r0, min_of(widest, strips - s))(
            units, reinterpret_cast<const char*>(panels + r0 * units), 0, 0, b, t + r0 * ldt + n,
            ldt, done && p.epilogue.addend != nullptr, &of, false);
      }
    }
    if (!done) finish(p, t, ldt, m0, rows, n0, columns);
  }
}

}  // namespace
}  // namespace fastnn
