// The register tile: MR rows x NS strips of 16 columns, K units deep, sums in registers.
#pragma once
#include <utility>

#include "cpu/gemm/units.h"

namespace fastnn {
namespace {

constexpr int kVecsPerStrip = (int)kStrip / kLanes;
// AVX-512: 8 x 48 is 24 sums + 3 of B + 1 of A in 32 registers; AVX2: 6 x 16 is 12 + 2 + 1 in 16.
// Any tile with that many sums and at most 0.6 loads per FMA runs at the peak; more than 8 rows
// would share an L1 set at 4 KiB row strides, unless they are packed into a panel.
constexpr int kTileRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;
constexpr int kPanelRows = kLanes == 16 ? 24 : kTileRows;

// Strips for a tile of so many rows. One row takes one strip: a single forward stream is what the
// prefetcher likes best.
constexpr int tile_strips(int rows) {
  if (kLanes == 16) return rows == 1 ? 1 : rows <= 4 ? 4 : rows <= 8 ? 3 : rows <= 12 ? 2 : 1;
  if (kLanes == 8) return rows == 1 ? 1 : rows <= 3 ? 2 : 1;
  return 1;
}
constexpr int kMaxTileStrips = 4;

constexpr int64_t kBlockColumns = 96;  // NC: whose sums are finished together; a panel of B fits L2

// Where B lies: unit u of strip s at data + s * strip_floats + u * unit_floats. Packed strips have
// unit_floats = kStrip; a plain row-major matrix has strip_floats = kStrip and its row stride.
struct Strips {
  const float* data;
  int64_t strip_floats, unit_floats;
  int64_t ahead = 0;  // bytes from the line that a panel's tile reads to the one it fetches into L2
};

// What makes values of a tile's sums of codes, in registers: float(sum) * (row * column) + bias.
// `offset` is what the 128 in each of A's codes adds to a sum.
struct TileScales {
  const float* row;     // of the tile's rows; null where the sums of a part of K stay integers
  const float* column;  // of its columns, as the others
  const float* bias;    // or null
  const int32_t* offset;
};

// t (row stride ldt floats) = or += rows of A times strips of B. kPanel: rows are packed,
// [unit][row], their strides not read, and B is fetched ahead.
// `alone`: the row is the product's only one. One sum would wait for itself: out of a cache four
// are 1.2 times as fast in float32 and 1.5 times in bfloat16, but they round in another order, and
// how many rows a tile has may depend on how the work is split.
template <class Dot, int MR, int NS, bool kPanel>
__attribute__((noinline)) void tile(int64_t units, const char* a, int64_t row_bytes,
                                    int64_t unit_bytes, const Strips& strips, float* t, int64_t ldt,
                                    bool accumulate, const TileScales* scales, bool alone) {
  if constexpr (kPanel) {
    row_bytes = 4;
    unit_bytes = 4 * MR;
  }
  const float* b = strips.data;
  const int64_t strip_floats = strips.strip_floats, unit_floats = strips.unit_floats,
                strips_ahead = strips.ahead;
  constexpr int NV = NS * kVecsPerStrip;
  constexpr int kChains = MR == 1 ? 4 : 1;
  const bool chained = kChains > 1 && (Dot::kExact || alone);
  const int64_t most = chained ? kChains * Dot::kSumUnits : Dot::kSumUnits;
  for (int64_t left = units;;) {
    const int64_t depth = Dot::kExact || left < most ? left : most;
    Vec sums[kChains][MR][NV];
    FASTNN_UNROLL for (int i = 0; i < kChains * MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) sums[i / MR][i % MR][v] = zero();
    }
    if constexpr (Dot::kExact) {
      if (!accumulate) {
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
          const Vec start = (Vec)(UVec{} - (UVec)load_ints(scales->offset + v * kLanes));
          FASTNN_UNROLL for (int i = 0; i < MR; ++i) sums[0][i][v] = start;
        }
      }
    }
    auto add_unit = [&](Vec(&to)[MR][NV]) __attribute__((always_inline)) {
      Vec column[NV];
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
        const float* const at = b + v / kVecsPerStrip * strip_floats + v % kVecsPerStrip * kLanes;
        column[v] = load(at);
        if (kPanel && v % kVecsPerStrip == 0) {
          __builtin_prefetch(reinterpret_cast<const char*>(at) + strips_ahead, 0, 2);
        }
      }
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        if constexpr (NV == 1 && MR > 1) {
          add_product<Dot>(to[i][0], column[0], a + i * row_bytes);
        } else {
          const Vec row = splat_unit<Dot>(a + i * row_bytes);
          FASTNN_UNROLL for (int v = 0; v < NV; ++v) to[i][v] = Dot::dot(to[i][v], row, column[v]);
        }
      }
      a += unit_bytes;
      b += unit_floats;
    };
    int64_t u = 0;
    if (chained) {
      for (; u + kChains <= depth; u += kChains) {
        FASTNN_UNROLL for (int c = 0; c < kChains; ++c) add_unit(sums[c]);
      }
      FASTNN_UNROLL for (int c = 1; c < kChains; ++c) {
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
          sums[0][0][v] = Dot::add(sums[0][0][v], sums[c][0][v]);
        }
      }
    }
    if constexpr (kPanel) {
#pragma GCC unroll 1  // by two, the compiler spills sums
      for (; u < depth; ++u) add_unit(sums[0]);
    } else {
#pragma GCC unroll 2
      for (; u < depth; ++u) add_unit(sums[0]);
    }
    if (accumulate) {
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
          sums[0][i][v] = Dot::add(sums[0][i][v], load(t + i * ldt + v * kLanes));
        }
      }
    }
    if constexpr (Dot::kExact) {
      if (scales->row != nullptr) {
        Vec scale[NV], bias[NV];
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
          scale[v] = load(scales->column + v * kLanes);
          // Adding -0 changes nothing.
          bias[v] = scales->bias != nullptr ? load(scales->bias + v * kLanes) : splat(-0.f);
        }
        FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
          const Vec row = splat(scales->row[i]);
          FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
            const Vec value = __builtin_convertvector((IVec)sums[0][i][v], Vec);
            sums[0][i][v] = value * (row * scale[v]) + bias[v];
          }
        }
      }
    }
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) store(t + i * ldt + v * kLanes, sums[0][i][v]);
    }
    if constexpr (Dot::kExact) return;
    left -= depth;
    if (left == 0) return;
    accumulate = true;
  }
}

using TileFunction = void (*)(int64_t, const char*, int64_t, int64_t, const Strips&, float*,
                              int64_t, bool, const TileScales*, bool);

template <class Dot, bool kPanel>
struct Tiles {
  static constexpr int kRows = kPanel ? kPanelRows : kTileRows;
  struct Row {
    TileFunction by_strips[kMaxTileStrips];
  };
  struct Table {
    Row by_rows[kRows];
  };
  template <int MR, int NS>
  static constexpr TileFunction tile_or_null() {
    if constexpr (NS <= tile_strips(MR)) {
      return tile<Dot, MR, NS, kPanel>;
    } else {
      return nullptr;
    }
  }
  template <int... I>
  static constexpr Table all(std::integer_sequence<int, I...>) {
    return {{{{tile_or_null<I + 1, 1>(), tile_or_null<I + 1, 2>(), tile_or_null<I + 1, 3>(),
               tile_or_null<I + 1, 4>()}}...}};
  }
  static TileFunction get(int64_t rows, int64_t strips) {
    static constexpr Table table = all(std::make_integer_sequence<int, kRows>{});
    return table.by_rows[rows - 1].by_strips[strips - 1];
  }
};

inline TileScales part_of(const TileScales& s, int64_t m, int64_t n) {
  return {s.row == nullptr ? nullptr : s.row + m, s.column + n,
          s.bias == nullptr ? nullptr : s.bias + n, s.offset + n};
}

// t = or += rows x strips of a product that is `units` deep.
template <class Dot>
FASTNN_INLINE void run_tiles(int64_t rows, int64_t strips, int64_t units, const char* a,
                             int64_t row_bytes, int64_t unit_bytes, const Strips& b, float* t,
                             int64_t ldt, bool accumulate, const TileScales& scales = {},
                             bool alone = false) {
  const int64_t widest = tile_strips((int)rows);
  for (int64_t s = 0; s < strips; s += widest) {
    const int64_t wide = strips - s < widest ? strips - s : widest, n = s * kStrip;
    TileScales of = {};
    if constexpr (Dot::kExact) of = part_of(scales, 0, n);
    Tiles<Dot, false>::get(rows, wide)(units, a, row_bytes, unit_bytes,
                                       {b.data + s * b.strip_floats, b.strip_floats, b.unit_floats},
                                       t + n, ldt, accumulate, &of, alone);
  }
}

}  // namespace
}  // namespace fastnn
