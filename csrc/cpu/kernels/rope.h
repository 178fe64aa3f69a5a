// Rotary position embedding. Memory is what it takes; each row is read once and written once.
#pragma once
#include "cpu/simd/pair.h"
#include "params/rope.h"

namespace fastnn {
namespace {

// What one position's rows are rotated by: float32, or of the rows' type.
struct RopeAngles {
  const void* cos;
  const void* sin;
};

// A row of a table as float32, with an entry for each feature where `expand`ed.
FASTNN_INLINE void copy_angles(const void* row, DType dtype, int64_t width, bool expand,
                               float* out) {
  with_type(dtype, [&](auto type) __attribute__((always_inline)) {
    const auto* const values = static_cast<const decltype(type)*>(row);
    each_part<true>(0, width, [=](int64_t i, auto part) __attribute__((always_inline)) {
      Vec v[part.kVectors];
      part.get(values + i, v);
      put_part(part, false, out + i, v);
    });
  });
  if (!expand) return;
  for (int64_t i = width - 1; i >= 0; --i) out[2 * i] = out[2 * i + 1] = out[i];
}

FASTNN_INLINE const char* table_row(const RopeTable& table, DType dtype, int64_t b, int64_t row) {
  return static_cast<const char*>(table.data) +
         (b * table.batch_stride + row * table.row_stride) * element_bytes(dtype);
}

// Of position s of batch entry b: in place, or copied to `copy`.
FASTNN_INLINE RopeAngles angles_of(const RopeParams& p, int64_t b, int64_t s, float* copy) {
  const int64_t row = p.positions ? p.positions[b * p.positions_batch_stride + s] : s;
  const char* const cos = table_row(p.cos, p.table_dtype, b, row);
  const char* const sin = table_row(p.sin, p.table_dtype, b, row);
  if (!rope_copies_tables(p)) {
    return {cos, sin};
  }
  const bool expand = p.interleaved && p.table_width != p.rotary;
  copy_angles(cos, p.table_dtype, p.table_width, expand, copy);
  copy_angles(sin, p.table_dtype, p.table_width, expand, copy + p.rotary);
  return {copy, copy + p.rotary};
}

// Tables U of the rows' own type T come in the same order of elements, whichever that is.
template <class U, class T>
FASTNN_INLINE void rotate_halves(const RopeParams& p, RopeAngles angles, const T* x, T* y,
                                 bool stream) {
  constexpr bool kOrdered = !std::is_same_v<T, U>;
  const int64_t half = p.rotary / 2, second = p.table_width == p.rotary ? half : 0;
  const U* const cos_a = static_cast<const U*>(angles.cos);
  const U* const sin = static_cast<const U*>(angles.sin);
  const U* const cos_b = cos_a + second;
  const U* const sin_a = sin + (p.inverse ? second : 0);
  const U* const sin_b = sin + (p.inverse ? 0 : second);
  const Vec sign = splat(p.inverse ? -1.f : 1.f);
  each_part<kOrdered>(0, half, [=](int64_t i, auto part) __attribute__((always_inline)) {
    Vec a[part.kVectors], b[part.kVectors], c[part.kVectors], s[part.kVectors];
    Vec first[part.kVectors], last[part.kVectors];
    part.get(x + i, a);
    part.get(x + half + i, b);
    part.get(cos_a + i, c);
    part.get(sin_a + i, s);
    FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
      first[v] = fma(a[v], c[v], -(sign * s[v]) * b[v]);
    }
    part.get(cos_b + i, c);
    part.get(sin_b + i, s);
    FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
      last[v] = fma(b[v], c[v], sign * s[v] * a[v]);
    }
    put_part(part, stream, y + i, first);
    put_part(part, stream, y + half + i, last);
  });
}

template <class U, class T>
FASTNN_INLINE void rotate_neighbours(const RopeParams& p, RopeAngles angles, const T* x, T* y,
                                     bool stream) {
  const U* const cos = static_cast<const U*>(angles.cos);
  const U* const sin = static_cast<const U*>(angles.sin);
  each_part<true>(
      0, p.rotary, [=, inverse = p.inverse](int64_t i, auto part) __attribute__((always_inline)) {
        Vec a[part.kVectors], c[part.kVectors], s[part.kVectors];
        part.get(x + i, a);
        part.get(cos + i, c);
        part.get(sin + i, s);
        FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
          const Vec turn = negate_even(s[v]);
          a[v] = fma(a[v], c[v],
                     inverse ? swap_neighbours(turn * a[v]) : turn * swap_neighbours(a[v]));
        }
        put_part(part, stream, y + i, a);
      });
}

// The features that are not rotated, bit for bit.
template <class T>
FASTNN_INLINE void keep_rest(const T* x, T* y, int64_t n, bool stream) {
  if (!stream) {
    std::memcpy(y, x, (size_t)n * sizeof(T));
    return;
  }
  const auto* const from = reinterpret_cast<const float*>(x);
  auto* const to = reinterpret_cast<float*>(y);
  for (int64_t i = 0; i < n * (int64_t)sizeof(T) / 4; i += kLanes) {
    stream_store(to + i, load(from + i));
  }
}

template <class T, class U>
void rope_rows(const RopeParams& p, const RopeOperand& o, int64_t b, int64_t begin, int64_t end,
               int64_t head_begin, int64_t head_end, const RopeAngles* angles) {
  const T* const from = static_cast<const T*>(o.x) + b * o.x_batch_stride;
  T* const to = static_cast<T*>(o.y) + b * o.y_batch_stride;
  const auto row = [&](int64_t head, int64_t s) __attribute__((always_inline)) {
    const T* const x = from + head * o.x_head_stride + s * o.x_row_stride;
    T* const y = to + head * o.y_head_stride + s * o.y_row_stride;
    if (p.interleaved) {
      rotate_neighbours<U>(p, angles[s - begin], x, y, o.stream);
    } else {
      rotate_halves<U>(p, angles[s - begin], x, y, o.stream);
    }
    if (p.rotary < p.D) keep_rest(x + p.rotary, y + p.rotary, p.D - p.rotary, o.stream);
  };
  // As the rows lie in memory: head by head, or position by position.
  if (o.x_head_stride >= o.x_row_stride) {
    for (int64_t head = head_begin; head < head_end; ++head) {
      for (int64_t s = begin; s < end; ++s) row(head, s);
    }
  } else {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t head = head_begin; head < head_end; ++head) row(head, s);
    }
  }
}

// Positions [begin, end), at most kRopePositions, of some heads of query and key in that order.
FASTNN_INLINE void rope_block(const RopeParams& p, int64_t b, int64_t begin, int64_t end,
                              int64_t head_begin, int64_t head_end, float* scratch) {
  RopeAngles angles[kRopePositions];
  for (int64_t s = begin; s < end; ++s) {
    angles[s - begin] = angles_of(p, b, s, scratch + (s - begin) * 2 * p.rotary);
  }
  int64_t before = 0;
  for (int32_t i = 0; i < p.count; ++i) {
    const RopeOperand& o = p.operands[i];
    const int64_t first = head_begin > before ? head_begin - before : 0;
    const int64_t last = head_end - before < o.heads ? head_end - before : o.heads;
    before += o.heads;
    if (first >= last) continue;
    with_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      const bool floats = p.table_dtype == DType::kFloat32 || rope_copies_tables(p);
      (floats ? rope_rows<T, float> : rope_rows<T, T>)(p, o, b, begin, end, first, last, angles);
    });
  }
}

void rope(const RopeParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t blocks = (p.S + kRopePositions - 1) / kRopePositions, heads = rope_heads(p);
  const int64_t parts = p.by_heads ? heads : blocks;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / parts, part = item % parts;
    const int64_t first_block = p.by_heads ? 0 : part, last_block = p.by_heads ? blocks : part + 1;
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t first = block * kRopePositions;
      const int64_t last = first + kRopePositions < p.S ? first + kRopePositions : p.S;
      rope_block(p, b, first, last, p.by_heads ? part : 0, p.by_heads ? part + 1 : heads, scratch);
    }
  }
  if (p.operands[0].stream || p.operands[p.count - 1].stream) stream_fence();
}

}  // namespace
}  // namespace fastnn
