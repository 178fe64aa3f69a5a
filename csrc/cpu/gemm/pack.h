// Packed B: strips of 16 columns, [ceil(N / 16)][U][16] units of 4 bytes, K running through the
// whole strip, so that a tile of any width reads neighbouring strips and one token reads one
// forward stream.
//
//   strip 0 | u0: n0 .. n15 | u1: n0 .. n15 | ... | u(U-1) |      columns past N and elements past
//   K are zero strip 1 | u0: n16 .. n31 | ...
#pragma once
#include "cpu/gemm/units.h"

namespace fastnn {
namespace {

// Columns [n, n + kStrip) of b for units [u0, u1), K elements in all, to out[u - u0][16].
template <class Dot, class T>
FASTNN_INLINE void pack_strip_along_k(const T* b, int64_t column_stride, int64_t columns, int64_t K,
                                      int64_t u0, int64_t u1, float* out) {
  for (int64_t group = 0; group < kStrip; group += kLanes) {
    for (int64_t u = u0; u < u1; u += kLanes) {
      const int64_t k = u * Dot::kPerUnit;
      Vec r[kLanes];
      load_turned<Dot>(b + group * column_stride + k, column_stride, columns - group, K - k, r);
      const int64_t count = u1 - u < kLanes ? u1 - u : kLanes;
      for (int64_t i = 0; i < count; ++i) store(out + (u - u0 + i) * kStrip + group, r[i]);
    }
  }
}

// Strips of columns [0, columns) where neighbouring columns are next to each other: rows are
// copied, converted or interleaved by pairs. All strips of a row before the next row: its cache
// lines are neighbours, those of two rows are pages apart.
template <class Dot, class T>
FASTNN_INLINE void pack_strips_along_n(const T* b, int64_t row_stride, int64_t columns, int64_t K,
                                       int64_t u0, int64_t u1, float* out, int64_t strip_floats,
                                       int64_t strips) {
  for (int64_t u = u0; u < u1; ++u, out += kStrip) {
    const T* const row = b + u * Dot::kPerUnit * row_stride;
    for (int64_t group = 0; group < strips * kStrip; group += kLanes) {
      float* const to = out + group / kStrip * strip_floats + group % kStrip;
      const int count = (int)(columns - group < kLanes ? columns - group : kLanes);
      if (count <= 0) {
        store(to, zero());
      } else if constexpr (Dot::kPerUnit == 1) {
        store(to, load_some(row + group, count));
      } else if constexpr (Dot::kPerUnit == 2) {
        const bool pair = u * 2 + 1 < K;
        const Vec odd = pair ? load_some(row + row_stride + group, count) : zero();
        store(to, interleave_pairs(load_some(row + group, count), odd));
      } else {
        for (int n = 0; n < kLanes; ++n) {
          to[n] = n < count ? gather_unit<Dot>(row + group + n, row_stride, K - u * Dot::kPerUnit)
                            : 0.f;
        }
      }
    }
  }
}

template <class Dot, class T>
FASTNN_INLINE void pack_strip_strided(const T* b, int64_t row_stride, int64_t column_stride,
                                      int64_t columns, int64_t K, int64_t u0, int64_t u1,
                                      float* out) {
  for (int64_t u = u0; u < u1; ++u, out += kStrip) {
    const int64_t k = u * Dot::kPerUnit;
    for (int64_t n = 0; n < kStrip; ++n) {
      out[n] = n < columns
                   ? gather_unit<Dot>(b + k * row_stride + n * column_stride, row_stride, K - k)
                   : 0.f;
    }
  }
}

// Strips of columns [n0, n0 + 16 strips) of the K x N matrix b, units [u0, u1), `strip_floats`
// apart in out.
template <class Dot, class T>
void pack_panel(const Matrix& b, int64_t N, int64_t K, int64_t n0, int64_t strips, int64_t u0,
                int64_t u1, float* out, int64_t strip_floats) {
  const T* const data = static_cast<const T*>(b.data);
  if (b.col_stride == 1 && b.row_stride != 1) {
    return pack_strips_along_n<Dot>(data + n0, b.row_stride, N - n0, K, u0, u1, out, strip_floats,
                                    strips);
  }
  for (int64_t s = 0; s < strips; ++s, out += strip_floats) {
    const int64_t n = n0 + s * kStrip;
    const int64_t columns = N - n < kStrip ? N - n : kStrip;
    const T* const strip = data + n * b.col_stride;
    if (b.row_stride == 1) {
      pack_strip_along_k<Dot>(strip, b.col_stride, columns, K, u0, u1, out);
    } else {
      pack_strip_strided<Dot>(strip, b.row_stride, b.col_stride, columns, K, u0, u1, out);
    }
  }
}

// Calls f(Dot, storage type) for operands of `dtype`: bfloat16 keeps its pairs where there is a dot
// instruction for them.
template <class F>
FASTNN_INLINE void with_dot(DType dtype, F f) {
  with_type(dtype, [&](auto t) __attribute__((always_inline)) {
    if constexpr (kHasBf16Dot && sizeof(t) == sizeof(BFloat16) &&
                  !__is_same(decltype(t), Float16)) {
      f(DotBf16{}, t);
    } else {
      f(DotF32{}, t);
    }
  });
}

inline int64_t packed_floats(int64_t N, int64_t K, DType dtype) {
  int64_t units = 0;
  with_dot(dtype, [&](auto dot, auto) { units = units_of(K, decltype(dot)::kPerUnit); });
  return round_up(N, kStrip) * units;
}

inline void pack(const Matrix& b, int64_t N, int64_t K, int64_t s0, int64_t s1, float* out) {
  with_dot(b.dtype, [&](auto dot, auto t) {
    const int64_t units = units_of(K, decltype(dot)::kPerUnit);
    const int64_t strip_floats = units * kStrip;
    pack_panel<decltype(dot), decltype(t)>(b, N, K, s0 * kStrip, s1 - s0, 0, units,
                                           out + s0 * strip_floats, strip_floats);
  });
}

// Rows [m, m + rows) of a, units [u0, u1), where a cannot be read in place: another type, an odd K,
// or columns apart.
struct RowPanel {
  const char* data;
  int64_t row_bytes, unit_bytes;
};

// One unit each of MR neighbouring rows. By vectors: the gradient of a weight packs all of its
// incoming gradient so.
template <class Dot, int MR, class T>
FASTNN_INLINE void gather_units(const T* p, int64_t stride, int64_t elements, float* out) {
  if constexpr (Dot::kPerUnit == 1) {
    store_some(out, load_some(p, MR), MR);
  } else if constexpr (Dot::kPerUnit == 2) {
    const Vec odd = elements > 1 ? load_some(p + stride, MR) : zero();
    store_some(out, interleave_pairs(load_some(p, MR), odd), MR);
  } else {
    for (int i = 0; i < MR; ++i) out[i] = gather_unit<Dot>(p + i, stride, elements);
  }
}

template <class Dot, class T, int MR>
FASTNN_INLINE RowPanel pack_rows(const Matrix& a, int64_t K, int64_t m, int64_t rows, int64_t u0,
                                 int64_t u1, float* out) {
  const T* const data = static_cast<const T*>(a.data) + m * a.row_stride;
  if (a.col_stride == 1) {
    const int64_t width =
        round_up(u1 - u0, kLanes) + kStrip;  // not a multiple of 4 KiB, or all rows share an L1 set
    for (int64_t i = 0; i < rows; ++i) {
      const T* const row = data + i * a.row_stride;
      for (int64_t u = u0; u < u1; u += kLanes) {
        const int64_t left = K - u * Dot::kPerUnit;
        const T* const p = row + u * Dot::kPerUnit;
        store(out + i * width + (u - u0),
              left >= kLanes * Dot::kPerUnit ? load_units<Dot>(p) : load_units_first<Dot>(p, left));
      }
    }
    return {reinterpret_cast<const char*>(out), width * 4, 4};
  }
  float* o = out;
  for (int64_t u = u0; u < u1; ++u, o += MR) {
    const int64_t k = u * Dot::kPerUnit;
    const T* const column = data + k * a.col_stride;
    if (a.row_stride == 1 && rows == MR) {
      gather_units<Dot, MR>(column, a.col_stride, K - k, o);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        o[i] = gather_unit<Dot>(column + i * a.row_stride, a.col_stride, K - k);
    }
  }
  return {reinterpret_cast<const char*>(out), 4, MR * 4};
}

// Whether rows of a can be broadcast from where they lie: whole units, next to each other.
template <class Dot, class T>
FASTNN_INLINE bool reads_in_place(const Matrix& a, int64_t K) {
  return sizeof(T) * Dot::kPerUnit == 4 && a.col_stride == 1 && K % Dot::kPerUnit == 0;
}

}  // namespace
}  // namespace fastnn
