// The products with a block-sparse weight, on the strips and units of cpu/gemm/.
//
//   forward   a tile of up to 24 rows x one strip, its sums in registers: each stored row of 16
//             values is loaded once and multiplied by as many broadcasts of the input as there are
//             rows. The input is packed so that a block's share of a tile is one run of memory,
//             [block of columns][unit][row]; which blocks there are then hardly matters, and time
//             goes with their number.
//   dx        lanes along the outputs: for a block of columns, rows of dz times rows of values,
//             summed over the strips that have it, and over lanes at the end.
//   dw        of stored blocks alone: a strip's values as rows of 16 sums, a row of dz loaded once
//             for many broadcasts of the input.
//
// No sum depends on how the work is split.
#pragma once
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/pack.h"
#include "cpu/gemm/tile.h"
#include "params/block_sparse.h"

namespace fastnn {
namespace {

constexpr int kSparseRows = kLanes == 16 ? 24 : kLanes == 8 ? 6 : 2;
// With many rows the values arrive too slowly for the processor to take them for a stream: fetched
// ahead, float32 is 1.2 to 1.35 times as fast where they come from memory. Few rows read them as a
// stream, and fetching takes 5 to 15 % there; in bfloat16, of half the size, it takes 3 %.
constexpr int kStreamedRows = 4;
constexpr int64_t kFetchBytes = 2048;
constexpr int64_t kSparseGroup = 96;  // columns between two runs of the epilogue

// Tiles exist for so many rows; others are padded to the next.
inline int64_t sparse_tile_rows(int64_t rows) {
  if (rows >= kSparseRows) return kSparseRows;
  return rows <= 4 ? rows : rows <= 8 ? round_up(rows, 2) : round_up(rows, 4);
}

inline int64_t sparse_units(int64_t depth, DType dtype) {
  int64_t units = depth;
  with_dot(dtype, [&](auto dot, auto) { units = units_of(depth, decltype(dot)::kPerUnit); });
  return units;
}

// Units [u0, u1) of `rows` rows to out[u - u0][tile_rows], zeros where there are fewer rows; by
// squares of a vector's width, turned.
template <class Dot, class T>
FASTNN_INLINE void sparse_pack_rows(const T* x, int64_t row_stride, int64_t rows, int64_t K,
                                    int64_t tile_rows, int64_t u0, int64_t u1, float* out) {
  for (int64_t u = u0; u < u1; u += kLanes, out += kLanes * tile_rows) {
    const int64_t k = u * Dot::kPerUnit, left = K - k;
    const int64_t count = u1 - u < kLanes ? u1 - u : kLanes;
    for (int64_t group = 0; group < tile_rows; group += kLanes) {
      Vec r[kLanes];
      FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) {
        const T* const row = x + (group + i) * row_stride + k;
        if (group + i >= rows || left <= 0) {
          r[i] = zero();
        } else if (left >= kLanes * Dot::kPerUnit) {
          r[i] = load_units<Dot>(row);
        } else {
          r[i] = load_units_first<Dot>(row, left);
        }
      }
      transpose(r);
      const int width = (int)(tile_rows - group < kLanes ? tile_rows - group : kLanes);
      for (int64_t i = 0; i < count; ++i) store_some(out + i * tile_rows + group, r[i], width);
    }
  }
}

template <class Dot, class T>
void sparse_pack_typed(const Matrix& x, int64_t K, int64_t depth, int64_t begin, int64_t end,
                       int64_t tile_rows, int64_t c0, int64_t c1, float* out) {
  const int64_t u0 = c0 * depth / Dot::kPerUnit, u1 = c1 * depth / Dot::kPerUnit;
  const T* const data = static_cast<const T*>(x.data) + begin * x.row_stride;
  if (x.col_stride == 1 && tile_rows > 1) {
    return sparse_pack_rows<Dot>(data, x.row_stride, end - begin, K, tile_rows, u0, u1,
                                 out + u0 * tile_rows);
  }
  for (int64_t u = u0; u < u1; ++u) {
    const int64_t k = u * Dot::kPerUnit;
    for (int64_t i = 0; i < tile_rows; ++i) {
      const T* const from = data + i * x.row_stride + k * x.col_stride;
      out[u * tile_rows + i] =
          i < end - begin && k < K ? gather_unit<Dot>(from, x.col_stride, K - k) : 0.f;
    }
  }
}

void sparse_pack(const Matrix& x, int64_t K, int64_t depth, int64_t begin, int64_t end,
                 int64_t tile_rows, int64_t c0, int64_t c1, bool widened, float* out) {
  with_dot(x.dtype, [&](auto dot, auto type) {
    using Dot = decltype(dot);
    using T = decltype(type);
    (widened ? sparse_pack_typed<DotF32, T> : sparse_pack_typed<Dot, T>)(x, K, depth, begin, end,
                                                                         tile_rows, c0, c1, out);
  });
}

// ---- forward

struct SparseTile {
  const void* values;  // of the strip's first block
  const int32_t* columns;
  int64_t blocks, depth;
  const char* panel;
};

// A unit of 16 outputs, a part of kLanes of them.
template <class Dot, class T>
FASTNN_INLINE Vec sparse_values(const T* p, int v) {
  if constexpr (Dot::kPerUnit == 1) {
    return load(p + v * kLanes);
  } else {
    return interleave_bf16(load(reinterpret_cast<const float*>(p)));
  }
}

template <class Dot>
FASTNN_INLINE void add_product(Vec& sum, Vec values, const char* x) {
  if constexpr (Dot::kPerUnit == 2) {
    add_bf16_pairs(sum, values, x);
  } else {
    sum = Dot::dot(sum, splat(load_unit(x)), values);
  }
}

// t (row stride ldt floats) = a tile of MR rows times a strip. Few rows have two or four sums
// each, which do not wait for one another.
template <class Dot, class T, int MR>
__attribute__((noinline)) void sparse_tile(const SparseTile& g, float* t, int64_t ldt) {
  constexpr int kSums = MR * kVecsPerStrip;
  constexpr int kChains = kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1;
  const int64_t units = g.depth / Dot::kPerUnit;
  const int64_t block_bytes = units * MR * 4;
  const int64_t most = Dot::kSumUnits / units;
  const T* values = static_cast<const T*>(g.values);
  const int32_t* column = g.columns;
  int64_t left = g.blocks;
  bool accumulate = false;
  do {
    const int64_t blocks = left < most ? left : most;
    Vec sums[kChains][MR][kVecsPerStrip];
    FASTNN_UNROLL for (int c = 0; c < kChains; ++c) {
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) sums[c][i][v] = zero();
      }
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const char* x = g.panel + *column++ * block_bytes;
      int64_t u = 0;
      do {
        FASTNN_UNROLL for (int c = 0; c < kChains; ++c) {
          if (c > 0 && u + c >= units) break;  // one unit: pairs of a block that is two deep
          FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
            const Vec w = sparse_values<Dot>(values, v);
            FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
              add_product<Dot>(sums[c][i][v], w, x + i * 4);
            }
          }
          if constexpr (MR > kStreamedRows && Dot::kPerUnit == 1) {
            __builtin_prefetch(reinterpret_cast<const char*>(values) + kFetchBytes);
          }
          values += kStrip * Dot::kPerUnit;
          x += MR * 4;
        }
        u += kChains;
      } while (u < units);
    }
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
        Vec sum = sums[0][i][v];
        FASTNN_UNROLL for (int c = 1; c < kChains; ++c) sum += sums[c][i][v];
        float* const at = t + i * ldt + v * kLanes;
        store(at, accumulate ? sum + load(at) : sum);
      }
    }
    left -= blocks;
    accumulate = true;
  } while (left > 0);
}

using SparseTileFunction = void (*)(const SparseTile&, float*, int64_t);

template <class Dot, class T, int MR>
constexpr SparseTileFunction sparse_tile_or_null() {
  if constexpr (MR <= kSparseRows) {
    return sparse_tile<Dot, T, MR>;
  } else {
    return nullptr;
  }
}

template <class Dot, class T>
SparseTileFunction sparse_tile_of(int64_t rows) {
  switch (rows) {
    case 1:
      return sparse_tile_or_null<Dot, T, 1>();
    case 2:
      return sparse_tile_or_null<Dot, T, 2>();
    case 3:
      return sparse_tile_or_null<Dot, T, 3>();
    case 4:
      return sparse_tile_or_null<Dot, T, 4>();
    case 6:
      return sparse_tile_or_null<Dot, T, 6>();
    case 8:
      return sparse_tile_or_null<Dot, T, 8>();
    case 12:
      return sparse_tile_or_null<Dot, T, 12>();
    case 16:
      return sparse_tile_or_null<Dot, T, 16>();
    case 20:
      return sparse_tile_or_null<Dot, T, 20>();
    default:
      return sparse_tile_or_null<Dot, T, 24>();
  }
}

void sparse_fwd(const GemmParams& p, const BlockSparseWeight& w, const float* panel, int64_t begin,
                int64_t end, int64_t s0, int64_t s1) {
  alignas(64) float t[kSparseRows * kSparseGroup];
  with_dot(w.dtype, [&](auto dot, auto type) {
    using T = decltype(type);
    const SparseTileFunction tile = sparse_tile_of<decltype(dot), T>(sparse_tile_rows(end - begin));
    constexpr int64_t kStrips = kSparseGroup / kStrip;
    for (int64_t s = s0; s < s1; s += kStrips) {
      const int64_t after = s + kStrips < s1 ? s + kStrips : s1;
      for (int64_t i = s; i < after; ++i) {
        const int64_t first = w.starts[i];
        const SparseTile g = {static_cast<const T*>(w.values) + first * w.depth * kStrip,
                              w.columns + first, w.starts[i + 1] - first, w.depth,
                              reinterpret_cast<const char*>(panel)};
        tile(g, t + (i - s) * kStrip, kSparseGroup);
      }
      const int64_t n = s * kStrip, stop = after * kStrip < p.N ? after * kStrip : p.N;
      finish(p, t, kSparseGroup, begin, end - begin, n, stop - n);
    }
  });
}

// ---- backward

// J columns of a block times kLanes / J rows: as many sums as lanes, so that one turn of sum_each
// finishes them all.
template <class T, int J>
void sparse_dx_typed(const SparseGradients& p, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
  constexpr int MR = kLanes / J;
  const int64_t depth = p.w.depth;
  const T* const values = static_cast<const T*>(p.w.values);
  T* const dx = static_cast<T*>(p.dx);
  for (int64_t c = c0; c < c1; ++c) {
    const SparseCell* const first = p.cells + p.column_starts[c];
    const SparseCell* const last = p.cells + p.column_starts[c + 1];
    for (int64_t j = 0; j < depth; j += J) {
      const int64_t k = c * depth + j;
      if (k >= p.K) break;
      const int columns = p.K - k < J ? (int)(p.K - k) : J;
      for (int64_t m = begin; m < end; m += MR) {
        const float* row[MR];
        FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
          row[i] = p.dz + (m + i < end ? m + i : end - 1) * p.dz_stride;
        }
        Vec total = zero();
        for (const SparseCell* from = first; from < last;) {
          const SparseCell* const to = last - from < kFloatSumUnits ? last : from + kFloatSumUnits;
          Vec sums[MR * J];
          FASTNN_UNROLL for (int i = 0; i < MR * J; ++i) sums[i] = zero();
          for (; from < to; ++from) {
            const T* const w = values + (from->block * depth + j) * kStrip;
            const int64_t n = from->strip * kStrip;
            FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
              Vec value[J];
              FASTNN_UNROLL for (int a = 0; a < J; ++a) {
                value[a] = load(w + a * kStrip + v * kLanes);
              }
              FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
                const Vec z = load(row[i] + n + v * kLanes);
                FASTNN_UNROLL for (int a = 0; a < J; ++a) {
                  sums[i * J + a] = fma(z, value[a], sums[i * J + a]);
                }
              }
            }
          }
          total += sum_each(sums);
        }
        float result[kLanes];
        store(result, total);
        for (int64_t i = 0; i < MR && m + i < end; ++i) {
          T* const at = dx + (m + i) * p.K + k;
          if constexpr (sizeof(T) == 4) {
            for (int a = 0; a < columns; ++a) at[a] = result[i * J + a];
          } else {
            const Half16 narrowed = narrow(total, T{});
            for (int a = 0; a < columns; ++a) at[a].bits = narrowed[i * J + a];
          }
        }
      }
    }
  }
}

void sparse_dx(const SparseGradients& p, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
  with_type(p.w.dtype, [&](auto type) {
    using T = decltype(type);
    (p.w.depth == 2 ? sparse_dx_typed<T, 2> : sparse_dx_typed<T, 4>)(p, begin, end, c0, c1);
  });
}

constexpr int kDwSums = kLanes == 16 ? 16 : kLanes == 8 ? 4 : 2;  // rows of 16 sums at once

// B pieces of J columns each, pieces [q, q + B) of strip s: a block has depth / J of them.
template <class T, int J, int B>
__attribute__((noinline)) void sparse_dw_pieces(const SparseGradients& p, int64_t s, int64_t q) {
  constexpr int kSums = J * B;
  const int64_t depth = p.w.depth, pieces = depth / J;
  int64_t offset[B];
  FASTNN_UNROLL for (int b = 0; b < B; ++b) {
    const int64_t block = (q + b) / pieces, piece = (q + b) % pieces;
    offset[b] = (p.w.columns[block] * depth + piece * J) * kSparseDwRows;
  }
  alignas(64) float total[kSums][kStrip] = {};
  for (int64_t m0 = 0; m0 < p.M; m0 += kSparseDwRows) {
    const int64_t rows = p.M - m0 < kSparseDwRows ? p.M - m0 : kSparseDwRows;
    const float* const panel = p.panel + m0 / kSparseDwRows * p.panel_floats;
    const float* z = p.dz + m0 * p.dz_stride + s * kStrip;
    const float* x[B];
    FASTNN_UNROLL for (int b = 0; b < B; ++b) x[b] = panel + offset[b];
    Vec sums[kSums][kVecsPerStrip];
    FASTNN_UNROLL for (int i = 0; i < kSums; ++i) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) sums[i][v] = zero();
    }
    for (int64_t m = 0; m < rows; ++m, z += p.dz_stride) {
      Vec row[kVecsPerStrip];
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) row[v] = load(z + v * kLanes);
      FASTNN_UNROLL for (int b = 0; b < B; ++b) {
        FASTNN_UNROLL for (int j = 0; j < J; ++j) {
          const Vec value = splat(x[b][m + j * kSparseDwRows]);
          FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
            sums[b * J + j][v] = fma(row[v], value, sums[b * J + j][v]);
          }
        }
      }
    }
    FASTNN_UNROLL for (int i = 0; i < kSums; ++i) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
        float* const at = total[i] + v * kLanes;
        store(at, load(at) + sums[i][v]);
      }
    }
  }
  T* const out = static_cast<T*>(p.dw) + q * J * kStrip;
  for (int64_t i = 0; i < kSums; ++i) {
    for (int64_t n = 0; n < kStrip; n += kLanes) store(out + i * kStrip + n, load(total[i] + n));
  }
}

template <class T, int J>
void sparse_dw_typed(const SparseGradients& p, int64_t s, int64_t b0, int64_t b1) {
  constexpr int B = kDwSums / J > 0 ? kDwSums / J : 1;
  const int64_t pieces = p.w.depth / J, last = b1 * pieces;
  int64_t q = b0 * pieces;
  for (; q + B <= last; q += B) sparse_dw_pieces<T, J, B>(p, s, q);
  for (; q < last; ++q) sparse_dw_pieces<T, J, 1>(p, s, q);
}

void sparse_dw(const SparseGradients& p, int64_t s, int64_t b0, int64_t b1) {
  with_type(p.w.dtype, [&](auto type) {
    using T = decltype(type);
    (p.w.depth == 2 || kLanes == 4 ? sparse_dw_typed<T, 2> : sparse_dw_typed<T, 4>)(p, s, b0, b1);
  });
}

}  // namespace
}  // namespace fastnn
