// What attention's products take: keys and values in place or prepared once per call, tiles of
// queries with queries in lanes.
#pragma once
#include "cpu/gemm/pack.h"
#include "cpu/gemm/tile.h"
#include "cpu/kernels/rows.h"
#include "params/attention.h"

namespace fastnn {
namespace {

constexpr int64_t kQueries = 48;  // of a tile: three strips
constexpr int64_t kKeys =
    96;  // of a block: S^T is then 18 KiB; 64 .. 192 are within 3 % of each other

// Rows of a head as float32: in place where they are float32, else from the widened copy.
struct FloatRows {
  const float* data;
  int64_t row_stride;
};

template <class T>
FASTNN_INLINE const T* head_data(const Heads& h, int64_t b, int64_t head) {
  return static_cast<const T*>(h.data) + b * h.batch_stride + head * h.head_stride;
}

inline int64_t padded_features(int64_t d) { return round_up(d, kStrip); }
// Words between rows of a prepared copy: not a multiple of 4 KiB, or all rows share a set of L1.
inline int64_t prepared_stride(int64_t d) { return padded_features(d) + kStrip; }

// Up to so many queries of a head decode (kernels/attention_decode.h); from there on the tile is
// quicker. Backward goes by the same answer: it adds up scores as forward did.
constexpr int64_t kDecodeQueries = 8;
inline bool is_decoding(const AttentionParams& p) { return p.S_q <= kDecodeQueries; }

// Whether the products are of bfloat16 pairs: rows of K, and in backward of V, must be whole pairs.
inline bool multiplies_pairs(const AttentionParams& p, bool forward) {
  if (!kHasBf16Dot || p.dtype != DType::kBFloat16 || p.D == 0 || p.D % 2 != 0) return false;
  return forward || (p.D_v % 2 == 0 && !is_decoding(p));
}

// Floats of the prepared keys and values of one (batch entry, key head).
int64_t attention_key_floats(const AttentionParams& p, bool forward) {
  if (p.dtype == DType::kFloat32) return 0;
  if (!multiplies_pairs(p, forward)) return p.S_k * prepared_stride(p.D);
  return forward ? 0 : units_of(p.S_k, 2) * prepared_stride(p.D);
}
int64_t attention_value_floats(const AttentionParams& p, bool forward) {
  if (p.dtype == DType::kFloat32) return 0;
  if (!multiplies_pairs(p, forward)) return p.S_k * prepared_stride(p.D_v);
  return forward ? units_of(p.S_k, 2) * prepared_stride(p.D_v) : 0;
}

template <class T>
FASTNN_INLINE Vec load_features(const T* row, int64_t i, int64_t d) {
  return load_some(row + i, d - i < kLanes ? (int)(d - i) : kLanes);
}
template <class T>
FASTNN_INLINE void widen_rows(const T* row, int64_t row_stride, int64_t rows, int64_t d, float* out,
                              int64_t out_stride) {
  for (int64_t j = 0; j < rows; ++j, row += row_stride, out += out_stride) {
    for (int64_t i = 0; i < d; i += kLanes) store(out + i, load_features(row, i, d));
  }
}
// Rows j, j + 1 become row j / 2 of pairs.
template <class T>
FASTNN_INLINE void pair_rows(const T* row, int64_t row_stride, int64_t rows, int64_t d, float* out,
                             int64_t out_stride) {
  for (int64_t j = 0; j < rows; j += 2, row += 2 * row_stride, out += out_stride) {
    for (int64_t i = 0; i < d; i += kLanes) {
      const Vec odd = j + 1 < rows ? load_features(row + row_stride, i, d) : zero();
      store(out + i, interleave_pairs(load_features(row, i, d), odd));
    }
  }
}

// Prepares keys and values of one (batch entry, key head): as float32, or in pairs of keys
// whichever of them a product takes by features (forward: values, backward: keys); the other is
// read in place.
void attention_prepare(const AttentionParams& p, bool forward, int64_t item, float* k, float* v) {
  const int64_t b = item / p.H_kv, head = item % p.H_kv;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const keys = head_data<T>(p.k, b, head);
    const T* const values = head_data<T>(p.v, b, head);
    if (!multiplies_pairs(p, forward)) {
      widen_rows(keys, p.k.row_stride, p.S_k, p.D, k, prepared_stride(p.D));
      widen_rows(values, p.v.row_stride, p.S_k, p.D_v, v, prepared_stride(p.D_v));
    } else if (forward) {
      pair_rows(values, p.v.row_stride, p.S_k, p.D_v, v, prepared_stride(p.D_v));
    } else {
      pair_rows(keys, p.k.row_stride, p.S_k, p.D, k, prepared_stride(p.D));
    }
  });
}

// rows (features next to each other, times factor) to [feature][kQueries], queries past `rows` zero
// to the end of their strip.
template <class T>
FASTNN_INLINE void pack_queries(const T* x, int64_t row_stride, int64_t rows, int64_t d,
                                float factor, float* out) {
  for (int64_t r0 = 0; r0 < round_up(rows, kStrip); r0 += kLanes) {
    for (int64_t i = 0; i < d; i += kLanes) {
      const int count = d - i < kLanes ? (int)(d - i) : kLanes;
      Vec t[kLanes];
      FASTNN_UNROLL for (int r = 0; r < kLanes; ++r) {
        t[r] = r0 + r < rows ? load_some(x + (r0 + r) * row_stride + i, count) * factor : zero();
      }
      transpose(t);
      for (int k = 0; k < count; ++k) store(out + (i + k) * kQueries + r0, t[k]);
    }
  }
}
// The reverse, times a factor per query: [feature][kQueries] to rows.
template <class T>
FASTNN_INLINE void unpack_queries(const float* x, int64_t rows, int64_t d, const float* factor,
                                  T* out, int64_t row_stride) {
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    const Vec scale = load(factor + r0);
    for (int64_t i = 0; i < d; i += kLanes) {
      const int count = d - i < kLanes ? (int)(d - i) : kLanes;
      Vec t[kLanes];
      FASTNN_UNROLL for (int k = 0; k < kLanes; ++k) t[k] =
          k < count ? load(x + (i + k) * kQueries + r0) * scale : zero();
      transpose(t);
      for (int r = 0; r < kLanes && r0 + r < rows; ++r)
        store_some(out + (r0 + r) * row_stride + i, t[r], count);
    }
  }
}

// t (rows x 16 strips, row stride ldt) = or += A B for any number of rows, A by units of 4 bytes.
template <class Dot>
FASTNN_INLINE void product(int64_t rows, int64_t strips, int64_t units, const RowPanel& a,
                           const Strips& b, float* t, int64_t ldt, bool accumulate) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
    run_tiles<Dot>(r1 - r0, strips, units, a.data + r0 * a.row_bytes, a.row_bytes, a.unit_bytes, b,
                   t + r0 * ldt, ldt, accumulate);
  }
}
// Words of 4 bytes, `row` and `unit` of them apart.
FASTNN_INLINE RowPanel word_panel(const float* a, int64_t row, int64_t unit) {
  return {reinterpret_cast<const char*>(a), row * 4, unit * 4};
}
// Rows of a head whose units along the features are read in place.
template <class T>
FASTNN_INLINE RowPanel head_panel(const Heads& h, int64_t b, int64_t head) {
  return {reinterpret_cast<const char*>(head_data<T>(h, b, head)),
          h.row_stride * (int64_t)sizeof(T), 4};
}
FASTNN_INLINE RowPanel from_row(const RowPanel& a, int64_t row) {
  return {a.data + row * a.row_bytes, a.row_bytes, a.unit_bytes};
}
FASTNN_INLINE RowPanel from_unit(const RowPanel& a, int64_t unit) {
  return {a.data + unit * a.unit_bytes, a.row_bytes, a.unit_bytes};
}

// One tile of queries of one head.
struct QueryTile {
  int64_t b, head, kv_head, first, rows, strips;
  int64_t key_begin, key_end;  // that any of them may see
};

inline QueryTile query_tile(const AttentionParams& p, int64_t b, int64_t head, int64_t tile) {
  QueryTile t;
  t.b = b;
  t.head = head;
  t.kv_head = head / (p.H / p.H_kv);
  t.first = tile * kQueries;
  t.rows = p.S_q - t.first < kQueries ? p.S_q - t.first : kQueries;
  t.strips = (t.rows + kStrip - 1) / kStrip;
  const int64_t first = p.position + t.first, last = first + t.rows - 1;
  t.key_begin = p.window_left >= 0 && first > p.window_left ? first - p.window_left : 0;
  if (t.key_begin > p.S_k) t.key_begin = p.S_k;
  t.key_end =
      p.window_right >= 0 && last + p.window_right + 1 < p.S_k ? last + p.window_right + 1 : p.S_k;
  if (t.key_end < t.key_begin) t.key_end = t.key_begin;
  return t;
}

inline int64_t query_tiles(const AttentionParams& p) { return (p.S_q + kQueries - 1) / kQueries; }

// Rows j, j + 1 of x [key][kQueries] become row j / 2 of pairs; out may be x.
inline void round_to_pairs(const float* x, int64_t keys, int64_t width, float* out) {
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t r = 0; r < width; r += kLanes) {
      const Vec odd = j + 1 < keys ? load(x + (j + 1) * kQueries + r) : zero();
      store(out + j / 2 * kQueries + r, to_bf16_pairs(load(x + j * kQueries + r), odd));
    }
  }
}

// Queries (or their gradients) [query][feature] with queries in lanes, for products of depth d:
// float32 times factor, or pairs of features as they are.
template <class Dot, class T>
FASTNN_INLINE Strips queries_in_lanes(const T* x, int64_t row_stride, const QueryTile& t, int64_t d,
                                      float factor, float* out) {
  if constexpr (Dot::kPerUnit == 2) {
    const int64_t strip_floats = units_of(d, 2) * kStrip;
    pack_panel<Dot, T>({x, 1, row_stride, DType::kBFloat16}, t.rows, d, 0, t.strips, 0,
                       units_of(d, 2), out, strip_floats);
    return {out, strip_floats, kStrip};
  } else {
    pack_queries(x, row_stride, t.rows, d, factor, out);
    return {out, kStrip, kQueries};
  }
}

// The first key of a tile's loop: pairs of keys begin at even ones, and the key before the window
// is masked.
template <class Dot>
FASTNN_INLINE int64_t first_key(const QueryTile& t) {
  return t.key_begin < t.key_end ? t.key_begin / Dot::kPerUnit * Dot::kPerUnit : t.key_end;
}

}  // namespace
}  // namespace fastnn
