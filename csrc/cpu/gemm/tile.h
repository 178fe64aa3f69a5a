// The register tile: MR rows x NS strips of 16 columns, K units deep, sums in registers.
#pragma once
#include "cpu/gemm/units.h"

namespace fastnn {
namespace {

constexpr int kVecsPerStrip = (int)kStrip / kLanes;
// AVX-512: 8 x 48 is 24 sums + 3 of B + 1 of A in 32 registers; AVX2: 6 x 16 is 12 + 2 + 1 in 16.
// Any tile with that many sums and at most 0.6 loads per FMA runs at the peak; more than 8 rows
// would share an L1 set at 4 KiB row strides.
constexpr int kTileRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 2;

// Strips for a tile of so many rows. One row takes one strip: a single forward stream is what the
// prefetcher likes best.
constexpr int tile_strips(int rows) {
  if (kLanes == 16) return rows == 1 ? 1 : rows <= 4 ? 4 : 3;
  if (kLanes == 8) return rows == 1 ? 1 : rows <= 3 ? 2 : 1;
  return 1;
}
constexpr int kMaxTileStrips = 4;

FASTNN_INLINE float load_unit(const char* p) {
  float unit;
  std::memcpy(&unit, p, sizeof unit);
  return unit;
}

// Where B lies: unit u of strip s at data + s * strip_floats + u * unit_floats. Packed strips have
// unit_floats = kStrip; a plain row-major matrix has strip_floats = kStrip and its row stride.
struct Strips {
  const float* data;
  int64_t strip_floats, unit_floats;
};

constexpr int64_t kLineBytes = 64;
// What is read after this product: tiles fetch it into L2 while they compute, a line per unit.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;
};

// t (row stride ldt floats) = or += rows of A times strips of B. With kFetch, a line of `ahead` per
// unit is fetched; a template argument, because the instruction alone costs large products 3 %.
template <class Dot, int MR, int NS, bool kFetch>
__attribute__((noinline)) void tile(int64_t units, const char* a, int64_t row_bytes,
                                    int64_t unit_bytes, const Strips& strips, float* t, int64_t ldt,
                                    bool accumulate, const char* ahead) {
  const float* b = strips.data;
  const int64_t strip_floats = strips.strip_floats, unit_floats = strips.unit_floats;
  constexpr int NV = NS * kVecsPerStrip;
  for (int64_t left = units;;) {
    const int64_t depth = left < Dot::kSumUnits ? left : Dot::kSumUnits;
    Vec sums[MR][NV];
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) sums[i][v] = zero();
    }
#pragma GCC unroll 2
    for (int64_t u = 0; u < depth; ++u) {
      Vec column[NV];
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
        column[v] = load(b + v / kVecsPerStrip * strip_floats + v % kVecsPerStrip * kLanes);
      }
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        const Vec row = splat(load_unit(a + i * row_bytes));
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) sums[i][v] =
            Dot::dot(sums[i][v], row, column[v]);
      }
      if constexpr (kFetch) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += kLineBytes;
      }
      a += unit_bytes;
      b += unit_floats;
    }
    if (accumulate) {
      FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
        FASTNN_UNROLL for (int v = 0; v < NV; ++v) {
          sums[i][v] = Dot::add(sums[i][v], load(t + i * ldt + v * kLanes));
        }
      }
    }
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < NV; ++v) store(t + i * ldt + v * kLanes, sums[i][v]);
    }
    left -= depth;
    if (left == 0) return;
    accumulate = true;
  }
}

using TileFunction = void (*)(int64_t, const char*, int64_t, int64_t, const Strips&, float*,
                              int64_t, bool, const char*);

template <class Dot, int MR, int NS, bool kFetch = false>
constexpr TileFunction tile_or_null() {
  if constexpr (MR <= kTileRows && NS <= tile_strips(MR)) {
    return tile<Dot, MR, NS, kFetch>;
  } else {
    return nullptr;
  }
}

template <class Dot>
struct Tiles {
  template <int MR>
  struct Row {
    TileFunction by_strips[kMaxTileStrips] = {
        tile_or_null<Dot, MR, 1>(), tile_or_null<Dot, MR, 2>(), tile_or_null<Dot, MR, 3>(),
        tile_or_null<Dot, MR, 4>()};
    TileFunction fetching = tile_or_null<Dot, MR, tile_strips(MR), true>();  // of the widest only
  };
  static TileFunction get(int64_t rows, int64_t strips, bool fetch) {
    static constexpr Row<1> r1;
    static constexpr Row<2> r2;
    static constexpr Row<3> r3;
    static constexpr Row<4> r4;
    static constexpr Row<5> r5;
    static constexpr Row<6> r6;
    static constexpr Row<7> r7;
    static constexpr Row<8> r8;
    static constexpr const TileFunction* table[8] = {r1.by_strips, r2.by_strips, r3.by_strips,
                                                     r4.by_strips, r5.by_strips, r6.by_strips,
                                                     r7.by_strips, r8.by_strips};
    static constexpr TileFunction fetching[8] = {r1.fetching, r2.fetching, r3.fetching,
                                                 r4.fetching, r5.fetching, r6.fetching,
                                                 r7.fetching, r8.fetching};
    return fetch ? fetching[rows - 1] : table[rows - 1][strips - 1];
  }
};

// t = or += rows x strips of a product that is `units` deep.
template <class Dot>
FASTNN_INLINE void run_tiles(int64_t rows, int64_t strips, int64_t units, const char* a,
                             int64_t row_bytes, int64_t unit_bytes, const Strips& b, float* t,
                             int64_t ldt, bool accumulate, Ahead* ahead = nullptr) {
  const int64_t widest = tile_strips((int)rows);
  for (int64_t s = 0; s < strips; s += widest) {
    const int64_t wide = strips - s < widest ? strips - s : widest;
    const bool fetch = ahead != nullptr && ahead->next < ahead->end && wide == widest;
    Tiles<Dot>::get(rows, wide, fetch)(units, a, row_bytes, unit_bytes,
                                       {b.data + s * b.strip_floats, b.strip_floats, b.unit_floats},
                                       t + s * kStrip, ldt, accumulate,
                                       fetch ? ahead->next : nullptr);
    if (fetch) ahead->next += units * kLineBytes;
  }
}

}  // namespace
}  // namespace fastnn
