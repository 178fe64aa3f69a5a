// The product with a weight of 4- or 8-bit codes in groups: integers inside a block, floats over
// blocks.
//
// Activations are whole numbers times a power of two for each block, written with digits of 8 bits
// (kernels/linear_groupwise.h): three for float32, two for 16-bit types, one where the caller asked
// for int8. So all products are those of bytes, four to a lane, and a block's sums are exact; only
// scales and the sum over blocks round, in a fixed order:
//
//   number = (sum2 * 256 + sum1) * 256 + sum0        result += number * weight scale * scale
//
// which gives the same bits on every instruction set, for any number of rows and of threads. Three
// digits cost 6 dot products for 128 weights where float32 would cost 8 multiply-adds, and
// expanding a nibble to a byte is three instructions for 128 of them.
#pragma once
#include "cpu/gemm/gemm.h"
#include "params/linear_groupwise.h"

namespace fastnn {
namespace {

// Rows of 64 bytes hold 16 outputs' dwords; unit u of one holds four neighbouring k as bytes.
struct Codes4 {
  static constexpr int kUnits = 2;  // byte b of a dword: k = b low, k = 4 + b high
  static FASTNN_INLINE Vec unit(Vec row, int u) {
    const UVec bits = (UVec)row;
    return (Vec)((u == 0 ? bits : bits >> 4) & 0x0f0f0f0fu);
  }
  // Where there is no exact product of bytes, that of unsigned bytes up to 15 with signed ones
  // cannot saturate: 2 * 15 * 128 fits 16 bits.
  static FASTNN_INLINE Vec dot(Vec c, Vec codes, Vec digits) {
#if defined(__AVX512VNNI__)
    return dot_code_quads(c, codes, digits);
#elif defined(__AVX512F__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)codes, (__m512i)digits);
    return (Vec)_mm512_add_epi32((__m512i)c, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)digits);
    return (Vec)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    return dot_code_quads(c, codes, digits);
#endif
  }
};
struct Codes8 {
  static constexpr int kUnits = 1;
  static FASTNN_INLINE Vec unit(Vec row, int) { return row; }
  static FASTNN_INLINE Vec dot(Vec c, Vec codes, Vec digits) {
    return dot_code_quads(c, codes, digits);
  }
};

// Adds to each sum the product of its column's four codes with the four digits at p. In assembler
// where it is one instruction: the compiler takes three, a broadcast, a copy of the sum, the dot.
template <class Codes>
FASTNN_INLINE void add_dots(Vec& sum, Vec codes, const char* p) {
#if defined(__AVX512VNNI__)
  struct Quad {
    char digits[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(codes), "m"(*reinterpret_cast<const Quad*>(p)));
#else
  sum = Codes::dot(sum, codes, splat_unit<DotInt8>(p));
#endif
}

// With 16 registers at most 12 sums; with 32 as many sums and totals as there is room for.
constexpr int group_tile_rows(int digits) {
  if (kLanes == 16) return digits == 1 ? 8 : digits == 2 ? 6 : 4;
  if (kLanes == 8) return digits == 1 ? 6 : digits == 2 ? 3 : 2;
  return digits == 1 ? 2 : 1;
}

// Tiles of several rows compute too long for the hardware to go on fetching: from memory a fourth
// less time.
constexpr int64_t kCodesAhead = 2048;

struct GroupTile {
  const GroupLayout* layout;
  const char* codes;  // of the strip
  const char* a;      // digits of the first row: [block][row of codes][unit][digit] quads
  int64_t a_stride;
  const BlockOfRow* of;  // of the first row
  int64_t of_stride;
};

FASTNN_INLINE Vec half_scales(const char* p) { return load(reinterpret_cast<const Float16*>(p)); }

// Adds block b to MR rows of totals of a strip: `add(i, v, f)` replaces one by f of it.
template <class Codes, int kDigits, int MR, class Add>
FASTNN_INLINE void add_block(const GroupTile& g, int64_t b, Add add) {
  const GroupLayout& layout = *g.layout;
  constexpr int kQuads = Codes::kUnits * kDigits;  // of a row of activations, for a row of codes
  // Few sums would wait for one another: then each unit has sums of its own.
  constexpr int kChains = MR * kVecsPerStrip * kDigits <= 6 ? Codes::kUnits : 1;
  const char* codes = g.codes + layout.codes_at(b);
  const char* a = g.a + b * layout.rows * kQuads * 4;
  Vec sums[kChains][MR][kDigits][kVecsPerStrip];
  FASTNN_UNROLL for (int c = 0; c < kChains; ++c) {
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int d = 0; d < kDigits; ++d) {
        const int32_t start = c == 0 ? g.of[i * g.of_stride + b].correction[d] : 0;
        FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
          sums[c][i][d][v] = (Vec)splat_int(start);
        }
      }
    }
  }
  const int64_t rows = layout.rows;
  if (rows <= 0) __builtin_unreachable();  // a block has codes: no sums that were not summed
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    Vec row[kVecsPerStrip];
    FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
      row[v] = load(reinterpret_cast<const float*>(codes) + v * kLanes);
    }
    FASTNN_UNROLL for (int u = 0; u < Codes::kUnits; ++u) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
        const Vec unit = Codes::unit(row[v], u);
        FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
          FASTNN_UNROLL for (int d = 0; d < kDigits; ++d) {
            add_dots<Codes>(sums[u % kChains][i][d][v], unit,
                            a + i * g.a_stride + (u * kDigits + d) * 4);
          }
        }
      }
    }
    if constexpr (MR > 1) __builtin_prefetch(codes + kCodesAhead, 0, 3);
    codes += GroupLayout::kLine;
    a += kQuads * 4;
  }
  const char* const scales = g.codes + layout.scales_at(b);
  FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
    const char* const at = scales + v * kLanes * 2;
    const Vec scale = half_scales(at);
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      const BlockOfRow& of = g.of[i * g.of_stride + b];
      auto number_of = [&](int d) __attribute__((always_inline)) {
        UVec sum = (UVec)sums[0][i][d][v];
        if constexpr (kChains == 2) sum += (UVec)sums[1][i][d][v];
        return __builtin_convertvector((IVec)sum, Vec);
      };
      Vec number = number_of(kDigits - 1);
      FASTNN_UNROLL for (int d = kDigits - 2; d >= 0; --d) {
        number = fma(number, splat(256.f), number_of(d));  // fused or not: times 256 is exact
      }
      add(i, v, [&](Vec total) __attribute__((always_inline)) {
        if constexpr (kDigits == 1) {
          total += number * scale;  // the row's scale comes last
        } else {
          total = fma(number * scale, splat(of.scale), total);  // a power of two: exact
        }
        return layout.offsets ? total + splat(of.sum) * half_scales(at + GroupLayout::kLine / 2)
                              : total;
      });
    }
  }
}

// A function of its own: inside the loop over blocks the compiler would put all sums on the stack.
template <class Codes, int kDigits, int MR>
__attribute__((noinline)) void add_block_in_memory(const GroupTile& g, int64_t b, float* t,
                                                   int64_t ldt) {
  add_block<Codes, kDigits, MR>(g, b, [&](int i, int v, auto added) __attribute__((always_inline)) {
    float* const at = t + i * ldt + v * kLanes;
    store(at, added(b == 0 ? zero() : load(at)));
  });
}

// t (row stride ldt floats) = MR rows times a strip. Totals stay in registers where there is room.
template <class Codes, int kDigits, int MR>
__attribute__((noinline)) void group_tile(const GroupTile& g, float* t, int64_t ldt) {
  const int64_t blocks = g.layout->blocks;
  if constexpr (MR == 1 || kLanes == 16) {
    Vec total[MR][kVecsPerStrip] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      add_block<Codes, kDigits, MR>(g, b,
                                    [&](int i, int v, auto added) __attribute__((always_inline)) {
                                      total[i][v] = added(total[i][v]);
                                    });
    }
    FASTNN_UNROLL for (int i = 0; i < MR; ++i) {
      FASTNN_UNROLL for (int v = 0; v < kVecsPerStrip; ++v) {
        store(t + i * ldt + v * kLanes, total[i][v]);
      }
    }
  } else {
    for (int64_t b = 0; b < blocks; ++b) add_block_in_memory<Codes, kDigits, MR>(g, b, t, ldt);
  }
}

using GroupTileFunction = void (*)(const GroupTile&, float*, int64_t);

template <class Codes, int kDigits, int MR>
constexpr GroupTileFunction group_tile_or_null() {
  if constexpr (MR <= group_tile_rows(kDigits)) {
    return group_tile<Codes, kDigits, MR>;
  } else {
    return nullptr;
  }
}

template <class Codes, int kDigits>
GroupTileFunction group_tile_of(int64_t rows) {
  static constexpr GroupTileFunction table[8] = {
      group_tile_or_null<Codes, kDigits, 1>(), group_tile_or_null<Codes, kDigits, 2>(),
      group_tile_or_null<Codes, kDigits, 3>(), group_tile_or_null<Codes, kDigits, 4>(),
      group_tile_or_null<Codes, kDigits, 5>(), group_tile_or_null<Codes, kDigits, 6>(),
      group_tile_or_null<Codes, kDigits, 7>(), group_tile_or_null<Codes, kDigits, 8>()};
  return table[rows - 1];
}

template <class Codes, int kDigits>
void gemm_groups_typed(const GemmParams& p, int64_t m_begin, int64_t m_end, int64_t n_begin,
                       int64_t n_end, float* t) {
  const GroupedProduct& product = *p.groups;
  const int64_t strip_bytes = product.layout.strip_bytes(), blocks = product.layout.blocks;
  const int64_t rows = m_end - m_begin, most = group_tile_rows(kDigits);
  const int64_t row_tiles = (rows + most - 1) / most;
  for (int64_t n0 = n_begin; n0 < n_end; n0 += kBlockColumns) {
    const int64_t columns = min_of(kBlockColumns, n_end - n0);
    const int64_t strips = (columns + kStrip - 1) / kStrip;
    for (int64_t tile = 0; tile < row_tiles; ++tile) {
      const int64_t r0 = m_begin + rows * tile / row_tiles;
      const int64_t r1 = m_begin + rows * (tile + 1) / row_tiles;
      for (int64_t s = 0; s < strips; ++s) {
        const GroupTile g = {
            &product.layout,
            reinterpret_cast<const char*>(p.b_packed) + (n0 / kStrip + s) * strip_bytes,
            static_cast<const char*>(p.a.data) + r0 * p.a.row_stride,
            p.a.row_stride,
            product.of + r0 * blocks,
            blocks};
        group_tile_of<Codes, kDigits>(r1 - r0)(g, t + s * kStrip, kBlockColumns);
      }
      if (blocks == 0) {
        for (int64_t i = 0; i < (r1 - r0) * kBlockColumns; ++i) t[i] = 0.f;
      } else if (kDigits == 1) {
        for (int64_t m = r0; m < r1; ++m) {
          float* const row = t + (m - r0) * kBlockColumns;
          const Vec scale = splat(product.of[m * blocks].scale);
          for (int64_t n = 0; n < strips * kStrip; n += kLanes) {
            store(row + n, load(row + n) * scale);
          }
        }
      }
      finish(p, t, kBlockColumns, r0, r1 - r0, n0, columns);
    }
  }
}

inline int64_t group_scratch_floats() { return kTileRows * kBlockColumns; }

inline void gemm_groups(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1,
                        float* scratch) {
  const bool four = p.groups->layout.bits == 4;
  switch (p.groups->digits) {
    case 1:
      return gemm_groups_typed<Codes4, 1>(p, m0, m1, n0, n1, scratch);
    case 2:
      return (four ? gemm_groups_typed<Codes4, 2> : gemm_groups_typed<Codes8, 2>)(p, m0, m1, n0, n1,
                                                                                  scratch);
    default:
      return (four ? gemm_groups_typed<Codes4, 3> : gemm_groups_typed<Codes8, 3>)(p, m0, m1, n0, n1,
                                                                                  scratch);
  }
}

}  // namespace
}  // namespace fastnn
