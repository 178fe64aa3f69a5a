// The gradients of linear with a block-sparse weight.
//
//   dx   lanes along the outputs: for a block of columns, rows of dz times rows of values, summed
//        over the strips that have it, and over lanes at the end.
//   dw   of stored blocks alone: a strip's values as rows of 16 sums, a row of dz loaded once for
//        many broadcasts of the input.
//
// No sum depends on how the work is split.
#pragma once
#include "cpu/gemm/tile.h"
#include "params/block_sparse.h"

namespace fastnn {
namespace {

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
