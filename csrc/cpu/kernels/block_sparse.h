// The product with a block-sparse weight, on the strips and units of cpu/gemm/: a tile of up to 24
// rows x one strip, its sums in registers. Each stored unit of 16 outputs is loaded once and
// multiplied by as many broadcasts of the input as there are rows. The input is packed so that a
// block's share of a tile is one run of memory, [block of columns][unit][row]; which blocks there
// are then hardly matters, and time goes with their number. No sum depends on how the work is
// split.
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

// Calls f(Dot, storage type).
template <class F>
FASTNN_INLINE void with_units(SparseUnits units, DType dtype, F f) {
  if (units == SparseUnits::kCodes) return f(DotInt8{}, Int8{});
  with_dot(dtype, [&](auto dot, auto type) {
    if (units == SparseUnits::kWidened) return f(DotF32{}, type);
    f(dot, type);
  });
}

inline int64_t sparse_units(int64_t depth, DType dtype, SparseUnits units) {
  int64_t count = depth;
  with_units(units, dtype,
             [&](auto dot, auto) { count = units_of(depth, decltype(dot)::kPerUnit); });
  return count;
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
      const T* const corner = x + group * row_stride + k;
      if (group + kLanes <= rows && left >= kLanes * Dot::kPerUnit && count == kLanes) {
        FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) r[i] =
            load_units<Dot>(corner + i * row_stride);
        transpose(r);
        FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) store(out + i * tile_rows + group, r[i]);
        continue;
      }
      FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) {
        const T* const row = corner + i * row_stride;
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
  if constexpr (sizeof(T) * Dot::kPerUnit == sizeof(float)) {
    if (tile_rows == 1 && x.col_stride == 1) {  // elements lie as units already
      const int64_t from = u0 * Dot::kPerUnit, stop = u1 * Dot::kPerUnit,
                    last = stop < K ? stop : K;
      const size_t bytes = last > from ? (size_t)(last - from) * sizeof(T) : 0;
      char* const to = reinterpret_cast<char*>(out + u0);
      std::memcpy(to, data + from, bytes);
      std::memset(to + bytes, 0, (size_t)(u1 - u0) * sizeof(float) - bytes);
      return;
    }
  }
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
                 int64_t tile_rows, int64_t c0, int64_t c1, SparseUnits units, float* out) {
  with_units(units, x.dtype, [&](auto dot, auto type) {
    sparse_pack_typed<decltype(dot), decltype(type)>(x, K, depth, begin, end, tile_rows, c0, c1,
                                                     out);
  });
}

struct SparseTile {
  const void* values;  // of the strip's first block
  const int32_t* columns;
  int64_t blocks, depth;
  const char* panel;
  TileScales scales;  // of codes; of the others the bias alone
};

// A unit of 16 outputs, a part of kLanes of them.
template <class Dot, class T>
FASTNN_INLINE Vec sparse_values(const T* p, int v) {
  if constexpr (Dot::kPerUnit == 1) {
    return load(p + v * kLanes);
  } else if constexpr (Dot::kExact) {
    return load(reinterpret_cast<const float*>(p) + v * kLanes);
  } else {
    return interleave_bf16(load(reinterpret_cast<const float*>(p)));
  }
}

// t (row stride ldt floats) = a tile of MR rows times a strip. Few rows have two or four sums
// each, which do not wait for one another; those of integers, which may be summed in any order,
// take whole blocks, of which the shallow ones have one unit.
template <class Dot, class T, int MR>
__attribute__((noinline)) void sparse_tile(const SparseTile& g, float* t, int64_t ldt) {
  constexpr int kSums = MR * kVecsPerStrip;
  constexpr int kChains = kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1;
  const int64_t units = g.depth / Dot::kPerUnit;
  const int64_t block_bytes = units * MR * 4;
  const int64_t most = Dot::kExact ? g.blocks : Dot::kSumUnits >> __builtin_ctzll(units);
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
    auto add_unit = [&](Vec(&to)[MR][kVecsPerStrip],
                        const char*& x) __attribute__((always_inline)) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
        const Vec w = sparse_values<Dot>(values, v);
        FASTNN_UNROLL for (int i = 0; i < MR; ++i) add_product<Dot>(to[i][v], w, x + i * 4);
      }
      if constexpr (MR > kStreamedRows && Dot::kPerUnit == 1) {
        __builtin_prefetch(reinterpret_cast<const char*>(values) + kFetchBytes);
      }
      values += kStrip * Dot::kPerUnit;
      x += MR * 4;
    };
    if constexpr (Dot::kExact) {
      for (int64_t b = 0; b < blocks; b += kChains) {
        FASTNN_UNROLL for (int c = 0; c < kChains; ++c) {
          if (c > 0 && b + c >= blocks) break;
          const char* x = g.panel + *column++ * block_bytes;
          int64_t u = 0;
          do add_unit(sums[c], x);
          while (++u < units);
        }
      }
    } else {
      for (int64_t b = 0; b < blocks; ++b) {
        const char* x = g.panel + *column++ * block_bytes;
        int64_t u = 0;
        do {
          FASTNN_UNROLL for (int c = 0; c < kChains; ++c) {
            if (c > 0 && u + c >= units) break;  // one unit: pairs of a block that is two deep
            add_unit(sums[c], x);
          }
          u += kChains;
        } while (u < units);
      }
    }
    FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
      const TileScales& s = g.scales;
      Vec offset, scale, bias = splat(-0.f);  // -0 changes nothing
      if (s.bias != nullptr && left == blocks) bias = load(s.bias + v * kLanes);
      if constexpr (Dot::kExact) {
        offset = (Vec)load_ints(s.offset + v * kLanes);
        scale = load(s.column + v * kLanes);
      }
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        Vec sum = sums[0][i][v];
        FASTNN_UNROLL for (int c = 1; c < kChains; ++c) sum = Dot::add(sum, sums[c][i][v]);
        float* const at = t + i * ldt + v * kLanes;
        if constexpr (Dot::kExact) {
          const IVec codes = (IVec)((UVec)sum - (UVec)offset);
          const Vec value = __builtin_convertvector(codes, Vec);
          store(at, value * (splat(g.scales.row[i]) * scale) + bias);
        } else {
          store(at, (accumulate ? sum + load(at) : sum) + bias);
        }
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
  alignas(64) float group[kSparseRows * kSparseGroup];
  with_units(w.units, w.dtype, [&](auto dot, auto type) {
    using T = decltype(type);
    const int64_t rows = sparse_tile_rows(end - begin);
    const SparseTileFunction tile = sparse_tile_of<decltype(dot), T>(rows);
    SparseTile g = {};
    g.depth = w.depth;
    g.panel = reinterpret_cast<const char*>(panel);
    if (p.is_int8) g.scales.row = p.int8.row + begin;
    constexpr int64_t kStrips = kSparseGroup / kStrip;
    for (int64_t s = s0; s < s1; s += kStrips) {
      const int64_t after = s + kStrips < s1 ? s + kStrips : s1;
      const int64_t n0 = s * kStrip, stop = after * kStrip < p.N ? after * kStrip : p.N;
      const bool done = rows == end - begin && is_done(p, stop - n0);
      float* const t = done ? static_cast<float*>(p.c) + begin * p.c_stride + n0 : group;
      const int64_t ldt = done ? p.c_stride : kSparseGroup;
      for (int64_t i = s; i < after; ++i) {
        const int64_t first = w.starts[i], n = i * kStrip;
        g.values = static_cast<const T*>(w.values) + first * w.depth * kStrip;
        g.columns = w.columns + first;
        g.blocks = w.starts[i + 1] - first;
        if (p.tile_bias != nullptr) g.scales.bias = p.tile_bias + n;
        if (p.is_int8) {
          g.scales.column = p.int8.column + n;
          g.scales.offset = p.int8.offset + n;
        }
        tile(g, t + (n - n0), ldt);
      }
      if (!done) finish(p, t, ldt, begin, end - begin, n0, stop - n0);
    }
  });
}

}  // namespace
}  // namespace fastnn
