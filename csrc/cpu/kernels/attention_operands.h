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
// Keys of a block. Forward's S^T is then 24 KiB, and 128 keys are one block: a second one rescales
// the output and reads it again. Backward has P and dP beside each other: 128 gained it nothing.
constexpr int64_t kForwardKeys = 128, kBackwardKeys = 96;

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

// Whether the products are of bfloat16 pairs.
inline bool multiplies_pairs(const AttentionParams& p, bool forward) {
  return kHasBf16Dot && p.dtype == DType::kBFloat16 && p.D > 0 && (forward || !is_decoding(p));
}
// Pairs along the features are read in place, unless the last one is half a pair.
inline int64_t whole_pairs_stride(int64_t d) { return prepared_stride(units_of(d, 2)); }
inline int64_t whole_pairs_floats(int64_t rows, int64_t d) {
  return d % 2 == 0 ? 0 : rows * whole_pairs_stride(d);
}

// Floats of the prepared keys and values of one (batch entry, key head).
int64_t attention_key_floats(const AttentionParams& p, bool forward) {
  if (p.dtype == DType::kFloat32) return 0;
  if (!multiplies_pairs(p, forward)) return p.S_k * prepared_stride(p.D);
  return whole_pairs_floats(p.S_k, p.D) + (forward ? 0 : units_of(p.S_k, 2) * prepared_stride(p.D));
}
int64_t attention_value_floats(const AttentionParams& p, bool forward) {
  if (p.dtype == DType::kFloat32) return 0;
  if (!multiplies_pairs(p, forward)) return p.S_k * prepared_stride(p.D_v);
  return forward ? units_of(p.S_k, 2) * prepared_stride(p.D_v) : whole_pairs_floats(p.S_k, p.D_v);
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

// Rows of an odd number of 16-bit features, with a zero behind the last.
template <class T>
FASTNN_INLINE void complete_pairs(const T* row, int64_t row_stride, int64_t rows, int64_t d,
                                  float* out) {
  for (int64_t j = 0; j < rows; ++j, row += row_stride, out += whole_pairs_stride(d)) {
    for (int64_t i = 0; i < d; i += 2 * kLanes) {
      const int64_t left = d - i;
      store(out + i / 2, left >= 2 * kLanes ? load_units<DotBf16>(row + i)
                                            : load_units_first<DotBf16>(row + i, left));
    }
  }
}

// Prepares keys and values of one (batch entry, key head): as float32, or in pairs of keys
// whichever of them a product takes by features (forward: values, backward: keys), where its rows
// by features begin with whole_pairs_floats.
void attention_prepare(const AttentionParams& p, bool forward, int64_t item, float* k, float* v) {
  const int64_t b = item / p.H_kv, head = item % p.H_kv;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* const keys = head_data<T>(p.k, b, head);
    const T* const values = head_data<T>(p.v, b, head);
    if (!multiplies_pairs(p, forward)) {
      widen_rows(keys, p.k.row_stride, p.S_k, p.D, k, prepared_stride(p.D));
      widen_rows(values, p.v.row_stride, p.S_k, p.D_v, v, prepared_stride(p.D_v));
      return;
    }
    if constexpr (sizeof(T) == 2) {
      if (p.D % 2 != 0) complete_pairs(keys, p.k.row_stride, p.S_k, p.D, k);
      if (forward) {
        pair_rows(values, p.v.row_stride, p.S_k, p.D_v, v, prepared_stride(p.D_v));
      } else {
        pair_rows(keys, p.k.row_stride, p.S_k, p.D, k + whole_pairs_floats(p.S_k, p.D),
                  prepared_stride(p.D));
        if (p.D_v % 2 != 0) complete_pairs(values, p.v.row_stride, p.S_k, p.D_v, v);
      }
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
// The reverse, times a factor per query: [feature][kQueries] to rows. Where bfloat16 pairs are made
// in one instruction, two features turn as one.
template <class T>
FASTNN_INLINE void unpack_queries(const float* x, int64_t rows, int64_t d, const float* factor,
                                  T* out, int64_t row_stride) {
  constexpr bool kPairs = kHasBf16Dot && __is_same(T, BFloat16);
  constexpr int64_t kFeatures = kPairs ? 2 * kLanes : kLanes;  // of a word per query
  for (int64_t r0 = 0; r0 < rows; r0 += kLanes) {
    const Vec scale = load(factor + r0);
    for (int64_t i = 0; i < d; i += kFeatures) {
      const int count = d - i < kFeatures ? (int)(d - i) : (int)kFeatures;
      auto feature = [&](int k) __attribute__((always_inline)) {
        return k < count ? load(x + (i + k) * kQueries + r0) * scale : zero();
      };
      Vec t[kLanes];
      FASTNN_UNROLL for (int k = 0; k < kLanes; ++k) {
        if constexpr (kPairs) {
          t[k] = to_bf16_pairs(feature(2 * k), feature(2 * k + 1));
        } else {
          t[k] = feature(k);
        }
      }
      transpose(t);
      for (int r = 0; r < kLanes && r0 + r < rows; ++r) {
        T* const row = out + (r0 + r) * row_stride + i;
        if constexpr (kPairs) {
          store_first_halves(row, t[r], count);
        } else {
          store_some(row, t[r], count);
        }
      }
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
// Rows of a head whose units are pairs of features: in place, or those of complete_pairs.
template <class T>
FASTNN_INLINE RowPanel feature_pairs(const Heads& h, int64_t d, int64_t b, int64_t head,
                                     const float* completed) {
  if (d % 2 != 0) return word_panel(completed, whole_pairs_stride(d), 1);
  return {reinterpret_cast<const char*>(head_data<T>(h, b, head)),
          h.row_stride * (int64_t)sizeof(T), 4};
}
FASTNN_INLINE RowPanel from_row(const RowPanel& a, int64_t row) {
  return {a.data + row * a.row_bytes, a.row_bytes, a.unit_bytes};
}
FASTNN_INLINE RowPanel from_unit(const RowPanel& a, int64_t unit) {
  return {a.data + unit * a.unit_bytes, a.row_bytes, a.unit_bytes};
}
FASTNN_INLINE Strips from_strip(const Strips& b, int64_t strip) {
  return {b.data + strip * b.strip_floats, b.strip_floats, b.unit_floats};
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

// Of a block of keys, how many each strip of a tile's queries sees the first of: the last strip
// all, those before it fewer where the window's right edge (the diagonal) crosses the block. What
// lies beyond is neither computed nor read.
struct SeenKeys {
  int64_t strips, of[kQueries / kStrip];

  int64_t by(int64_t query) const { return of[query / kStrip]; }
  // body(j, end, strip): keys [j, end) are seen by that strip and those after it.
  template <class Body>
  FASTNN_INLINE void each_keys(Body body) const {
    for (int64_t s = 0, j = 0; s < strips; ++s) {
      if (of[s] <= j) continue;
      body(j, of[s], s);
      j = of[s];
    }
  }
  // body(begin, end, keys): strips [begin, end) see so many.
  template <class Body>
  FASTNN_INLINE void each_strips(Body body) const {
    for (int64_t s = 0, end; s < strips; s = end) {
      for (end = s + 1; end < strips && of[end] == of[s];) ++end;
      body(s, end, of[s]);
    }
  }
};
inline SeenKeys seen_keys(const AttentionParams& p, const QueryTile& t, int64_t j0, int64_t keys) {
  SeenKeys seen = {t.strips, {}};
  for (int64_t s = 0; s < t.strips; ++s) {
    seen.of[s] = keys;
    if (p.window_right < 0 || s == t.strips - 1) continue;
    const int64_t last = p.position + t.first + s * kStrip + kStrip - 1 + p.window_right;
    if (last + 1 < j0 + keys) seen.of[s] = last < j0 ? 0 : last + 1 - j0;
  }
  return seen;
}

// Rows j, j + 1 of x [key][kQueries] become row j / 2 of pairs; out may be x.
inline void round_to_pairs(const float* x, const SeenKeys& seen, float* out) {
  for (int64_t r = 0; r < seen.strips * kStrip; r += kLanes) {
    const int64_t keys = seen.by(r);
    for (int64_t j = 0; j < keys; j += 2) {
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
