// The matrix product: loops over packed panels and register tiles, and the epilogue on finished
// rows.
//
// Four ways through, all with the same tile, the same packed layout and the same epilogue:
//   gemm_tiles    B in strips (its packed copy, or a KC x NC panel packed on the way, hot in L2),
//   rows of A broadcast from
//                 where they lie.
//   gemm_panels   few rows, B packed: rows of A are packed too (panels.h).
//   gemm_swapped  few rows, no packed copy: rows of B^T (the weight) are broadcast from where they
//   lie, A^T (small) is
//                 packed, and the finished tile is transposed. The weight is read once and nothing
//                 of its size written.
//   gemm_dots     up to 4 rows, no packed copy: dot products along K, lanes along K, the weight
//   streamed once.
#pragma once
#include "cpu/gemm/panels.h"

namespace fastnn {
namespace {

constexpr int64_t kBlockUnits =
    1024;  // K in units per pass over the sums: below 1024 splitting K costs 2-5 %
constexpr int64_t kFewRowsUnits =
    4096;  // with few rows the sums are small and long streams matter more
constexpr int64_t kFewRows = 16;
constexpr int64_t kGatherColumns =
    384;  // where rows of A are packed on the way: packed half as often, and
constexpr int64_t kGatherUnits = 512;  // ... a panel twice as wide is half as deep to stay in L2
// Tiles of rows of A packed in one go: neighbouring tiles of a turned A share its cache lines.
constexpr int64_t kPackedTiles = 4;
constexpr int64_t kBlockRows = 512;       // rows of partial sums held while K is split
constexpr int64_t kCodeRows = 256;        // rows of codes between two passes over the weight
constexpr int64_t kSwappedMaxRows = 128;  // above, packing the weight on the way is cheaper
constexpr int64_t kSwappedGroup = 48;     // weight rows between two transpositions
constexpr int64_t kDotsMaxRows = 4;

// Of a tile's packed rows, so many units deep.
inline int64_t row_panel_floats(int64_t depth) {
  return kTileRows * (round_up(depth, kLanes) + kStrip);
}

struct Blocking {
  int64_t units, block_units, block_columns, block_rows;
  bool split_k;
};

template <class Dot, class T>
Blocking blocking_of(const GemmParams& p) {
  Blocking k;
  const bool in_place = reads_in_place<Dot, T>(p.a, p.K);
  k.units = units_of(p.K, Dot::kPerUnit);
  k.block_units = !in_place         ? kGatherUnits
                  : p.M <= kFewRows ? kFewRowsUnits
                                    : (Dot::kPerUnit == 2 ? 2 : 1) * kBlockUnits;
  k.split_k = k.units > k.block_units;
  k.block_columns = in_place ? kBlockColumns : kGatherColumns;
  // So rows of 384 codes and their results stay in L2: 9 % faster at 1024 rows.
  k.block_rows = k.split_k ? kBlockRows : p.is_int8 ? kCodeRows : max_of(p.M, 1);
  return k;
}

// Scratch of gemm_tiles: sums | packed rows of A | panel of B.
struct TileScratch {
  int64_t sums, rows, panel;
};
template <class Dot, class T>
TileScratch tile_scratch(const GemmParams& p) {
  const Blocking k = blocking_of<Dot, T>(p);
  const int64_t depth = min_of(k.units, k.block_units);
  TileScratch s;
  s.sums = round_up((k.split_k ? min_of(p.M, k.block_rows) : kTileRows) * k.block_columns, kStrip);
  s.rows = reads_in_place<Dot, T>(p.a, p.K) ? 0 : kPackedTiles * row_panel_floats(depth);
  s.panel = p.b_packed != nullptr ? 0 : k.block_columns * depth;
  return s;
}

template <class Dot, class T>
void gemm_tiles(const GemmParams& p, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end,
                float* scratch) {
  const Blocking k = blocking_of<Dot, T>(p);
  const TileScratch sizes = tile_scratch<Dot, T>(p);
  float* const sums = scratch;
  float* const packed_rows = sums + sizes.sums;
  float* const panel = packed_rows + sizes.rows;
  const bool in_place = reads_in_place<Dot, T>(p.a, p.K);
  const int64_t ldt = k.block_columns;
  for (int64_t m0 = m_begin; m0 < m_end; m0 += k.block_rows) {
    const int64_t rows = min_of(k.block_rows, m_end - m0);
    const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t n0 = n_begin; n0 < n_end; n0 += k.block_columns) {
      const int64_t columns = min_of(k.block_columns, n_end - n0);
      const int64_t strips = (columns + kStrip - 1) / kStrip;
      const bool done = !k.split_k && is_done(p, columns);
      int64_t u0 = 0;
      do {  // once even where K is zero: the result is then the epilogue of zeros
        const int64_t u1 = min_of(u0 + k.block_units, k.units);
        const float* b = panel;
        int64_t strip_floats = (u1 - u0) * kStrip;
        if (p.b_packed != nullptr) {
          strip_floats = k.units * kStrip;
          b = p.b_packed + n0 / kStrip * strip_floats + u0 * kStrip;
        } else {
          pack_panel<Dot, T>(p.b, p.N, p.K, n0, strips, u0, u1, panel, strip_floats);
        }
        const bool last = u1 == k.units;
        RowPanel ahead_rows[kPackedTiles];
        for (int64_t i = 0; i < row_tiles; ++i) {
          const int64_t r0 = rows * i / row_tiles,
                        r1 = rows * (i + 1) / row_tiles;  // balanced: no thin last tile
          float* const t = done        ? static_cast<float*>(p.c) + (m0 + r0) * p.c_stride + n0
                           : k.split_k ? sums + r0 * ldt
                                       : sums;
          RowPanel a;
          if (in_place) {
            const T* const data =
                static_cast<const T*>(p.a.data) + (m0 + r0) * p.a.row_stride + u0 * Dot::kPerUnit;
            a = {reinterpret_cast<const char*>(data), p.a.row_stride * (int64_t)sizeof(T), 4};
          } else {
            const int64_t at = i % kPackedTiles;
            for (int64_t j = i; at == 0 && j < min_of(i + kPackedTiles, row_tiles); ++j) {
              const int64_t j0 = rows * j / row_tiles, j1 = rows * (j + 1) / row_tiles;
              ahead_rows[j - i] =
                  pack_rows<Dot, T, kTileRows>(p.a, p.K, m0 + j0, j1 - j0, u0, u1,
                                               packed_rows + (j - i) * row_panel_floats(u1 - u0));
            }
            a = ahead_rows[at];
          }
          if (last) prefetch_output(p, m0 + r0, r1 - r0, n0, columns);
          run_tiles<Dot>(r1 - r0, strips, u1 - u0, a.data, a.row_bytes, a.unit_bytes,
                         {b, strip_floats, kStrip}, t, done ? p.c_stride : ldt,
                         u0 > 0 || (done && p.epilogue.addend != nullptr),
                         tile_scales(p, m0 + r0, n0, last), p.M == 1);
          if (last && !done) finish(p, t, ldt, m0 + r0, r1 - r0, n0, columns);
        }
        u0 = u1;
      } while (u0 < k.units);
    }
  }
}

// By tiles, of panels or not. The caller may split rows, so that a part has too few for panels.
template <class Dot, class T>
int64_t strips_scratch(const GemmParams& p) {
  const TileScratch s = tile_scratch<Dot, T>(p);
  return max_of(s.sums + s.rows + s.panel, takes_panels<Dot>(p, p.M) ? panels_scratch<Dot>(p) : 0);
}
template <class Dot, class T>
void gemm_strips(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                 float* scratch) {
  if (takes_panels<Dot>(p, m1 - m0)) return gemm_panels<Dot, T>(p, m0, m1, n0, n1, scratch);
  gemm_tiles<Dot, T>(p, m0, m1, n0, n1, scratch);
}

template <class Dot, class T>
bool takes_swapped(const GemmParams& p) {
  return p.b_packed == nullptr && p.M <= kSwappedMaxRows && p.K > 0 && p.b.row_stride == 1 &&
         p.a.col_stride == 1 && sizeof(T) * Dot::kPerUnit == 4 && p.K % Dot::kPerUnit == 0;
}

// Scratch: packed A^T | sums, weight rows x tokens | the same transposed.
template <class Dot>
int64_t swapped_scratch(const GemmParams& p) {
  const int64_t tokens = round_up(p.M, kStrip);
  return tokens * units_of(p.K, Dot::kPerUnit) + 2 * kSwappedGroup * tokens;
}

template <class Dot, class T>
void gemm_swapped(const GemmParams& p, int64_t n_begin, int64_t n_end, float* scratch) {
  const int64_t units = units_of(p.K, Dot::kPerUnit);
  const int64_t strips = (p.M + kStrip - 1) / kStrip, tokens = strips * kStrip,
                strip_floats = units * kStrip;
  float* const tokens_packed = scratch;
  float* const sums = tokens_packed + tokens * units;
  float* const turned = sums + kSwappedGroup * tokens;
  const Matrix a_turned = {p.a.data, p.a.col_stride, p.a.row_stride, p.a.dtype};
  pack_panel<Dot, T>(a_turned, p.M, p.K, 0, strips, 0, units, tokens_packed, strip_floats);
  for (int64_t n0 = n_begin; n0 < n_end; n0 += kSwappedGroup) {
    const int64_t group = min_of(kSwappedGroup, n_end - n0);
    const int64_t row_tiles = (group + kTileRows - 1) / kTileRows;
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t r0 = group * i / row_tiles, r1 = group * (i + 1) / row_tiles;
      const T* const weight = static_cast<const T*>(p.b.data) + (n0 + r0) * p.b.col_stride;
      for (int64_t u0 = 0; u0 < units; u0 += kBlockUnits) {
        const char* const rows = reinterpret_cast<const char*>(weight + u0 * Dot::kPerUnit);
        run_tiles<Dot>(r1 - r0, strips, min_of(kBlockUnits, units - u0), rows,
                       p.b.col_stride * (int64_t)sizeof(T), 4,
                       {tokens_packed + u0 * kStrip, strip_floats, kStrip}, sums + r0 * tokens,
                       tokens, u0 > 0);
      }
    }
    for (int64_t c = 0; c < tokens; c += kLanes) {
      for (int64_t n = 0; n < group; n += kLanes) {
        Vec r[kLanes];
        FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) {
          r[i] = n + i < group ? load(sums + (n + i) * tokens + c) : zero();
        }
        transpose(r);
        FASTNN_UNROLL for (int i = 0; i < kLanes; ++i)
            store(turned + (c + i) * kSwappedGroup + n, r[i]);
      }
    }
    finish(p, turned, kSwappedGroup, 0, p.M, n0, group);
  }
}

template <class Dot, class T>
bool takes_dots(const GemmParams& p) {
  return p.b_packed == nullptr && p.M <= kDotsMaxRows && p.K > 0 && p.b.row_stride == 1 &&
         p.a.col_stride == 1;
}

constexpr int kDotColumns = 4;  // weight rows at once: four streams, 4 x M sums

template <class T, int MR, int NC>
FASTNN_INLINE void dots(const T* a, int64_t a_stride, const T* w, int64_t w_stride, int64_t K,
                        float* t, int64_t ldt) {
  Vec sums[MR][NC];
  FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
    FASTNN_UNROLL for (int j = 0; j < NC; ++j) sums[i][j] = zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    Vec x[MR];
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) x[i] = load(a + i * a_stride + k);
    FASTNN_UNROLL for (int j = 0; j < NC; ++j) {
      const Vec y = load(w + j * w_stride + k);
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) sums[i][j] = fma(x[i], y, sums[i][j]);
    }
  }
  if (k < K) {
    FASTNN_UNROLL for (int j = 0; j < NC; ++j) {
      const Vec y = load_first(w + j * w_stride + k, (int)(K - k), 0.f);
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        sums[i][j] = fma(load_first(a + i * a_stride + k, (int)(K - k), 0.f), y, sums[i][j]);
      }
    }
  }
  FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
    FASTNN_UNROLL for (int j = 0; j < NC; ++j) t[i * ldt + j] = sum_lanes(sums[i][j]);
  }
}

template <class T, int MR>
void gemm_dots_rows(const GemmParams& p, int64_t n_begin, int64_t n_end, float* t) {
  const T* const a = static_cast<const T*>(p.a.data);
  for (int64_t n0 = n_begin; n0 < n_end; n0 += kBlockColumns) {
    const int64_t columns = min_of(kBlockColumns, n_end - n0);
    const T* const w = static_cast<const T*>(p.b.data) + n0 * p.b.col_stride;
    int64_t n = 0;
    for (; n + kDotColumns <= columns; n += kDotColumns) {
      dots<T, MR, kDotColumns>(a, p.a.row_stride, w + n * p.b.col_stride, p.b.col_stride, p.K,
                               t + n, kBlockColumns);
    }
    for (; n < columns; ++n) {
      dots<T, MR, 1>(a, p.a.row_stride, w + n * p.b.col_stride, p.b.col_stride, p.K, t + n,
                     kBlockColumns);
    }
    for (; n < round_up(columns, kStrip); ++n) {
      for (int i = 0; i < MR; ++i)
        t[i * kBlockColumns + n] = 0.f;  // the program runs over whole strips
    }
    finish(p, t, kBlockColumns, 0, MR, n0, columns);
  }
}

template <class T>
void gemm_dots(const GemmParams& p, int64_t n_begin, int64_t n_end, float* scratch) {
  switch (p.M) {
    case 1:
      return gemm_dots_rows<T, 1>(p, n_begin, n_end, scratch);
    case 2:
      return gemm_dots_rows<T, 2>(p, n_begin, n_end, scratch);
    case 3:
      return gemm_dots_rows<T, 3>(p, n_begin, n_end, scratch);
    case 4:
      return gemm_dots_rows<T, 4>(p, n_begin, n_end, scratch);
  }
}

int64_t gemm_scratch_floats(const GemmParams& p) {
  int64_t floats = 0;
  if (p.is_int8) {
    return strips_scratch<DotInt8, Int8>(p);
  }
  with_dot(p.a.dtype, [&](auto dot, auto type) {
    using Dot = decltype(dot);
    using T = decltype(type);
    if (takes_dots<Dot, T>(p)) {
      floats = kDotsMaxRows * kBlockColumns;
    } else if (takes_swapped<Dot, T>(p)) {
      floats = swapped_scratch<Dot>(p);
    } else {
      floats = strips_scratch<Dot, T>(p);
    }
  });
  return floats;
}

// Rows [m0, m1) and columns [n0, n1) of c. The ways for few rows take all rows at once: the caller
// splits columns only.
void gemm(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* scratch) {
  if (p.is_int8) return gemm_strips<DotInt8, Int8>(p, m0, m1, n0, n1, scratch);
  with_dot(p.a.dtype, [&](auto dot, auto type) {
    using Dot = decltype(dot);
    using T = decltype(type);
    if (takes_dots<Dot, T>(p)) {
      gemm_dots<T>(p, n0, n1, scratch);
    } else if (takes_swapped<Dot, T>(p)) {
      gemm_swapped<Dot, T>(p, n0, n1, scratch);
    } else {
      gemm_strips<Dot, T>(p, m0, m1, n0, n1, scratch);
    }
  });
}

}  // namespace
}  // namespace fastnn
