// Scaled dot-product attention on the register tile of the matrix product.
//
// Queries lie in lanes: a tile is up to 48 queries, and S^T [key][query] and O^T [feature][query]
// are products whose broadcast operand (K, V) is read from its own rows. Softmax is then per lane:
// no operation across lanes, no tails in the keys. Backward recomputes P from the saved logsumexp.
// Nothing of size S_q x S_k exists.
//
// Arithmetic is float32; half-precision K and V are widened once per call, Q, the output and the
// gradients as they are read and written. Where there are dot products of bfloat16 pairs, forward
// uses them: K is then read in place, V interleaved by pairs of keys once per call, and P rounded
// to bfloat16 as torch rounds it; sums, maxima and P's own sum stay float32.
#pragma once
#include "cpu/gemm/pack.h"
#include "cpu/gemm/tile.h"
#include "cpu/kernels/rows.h"
#include "cpu/simd/math.h"
#include "cpu/simd/philox.h"
#include "params/attention.h"

namespace fastnn {
namespace {

constexpr int64_t kQueries = 48;  // of a tile: three strips
constexpr int64_t kKeys =
    96;  // of a block: S^T is then 18 KiB; 64 .. 192 are within 3 % of each other
constexpr int kQueryVecs = (int)kQueries / kLanes;

// Rows of a head as float32: in place where they are float32, else from the widened copy.
struct FloatRows {
  const float* data;
  int64_t row_stride;
};

template <class T>
FASTNN_INLINE const T* head_data(const Heads& h, int64_t b, int64_t head) {
  return static_cast<const T*>(h.data) + b * h.batch_stride + head * h.head_stride;
}

inline int64_t padded_features(int64_t d) { return (d + kStrip - 1) / kStrip * kStrip; }
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
  const int64_t last = t.first + t.rows - 1;
  t.key_begin = p.window_left >= 0 && t.first > p.window_left ? t.first - p.window_left : 0;
  if (t.key_begin > p.S_k) t.key_begin = p.S_k;
  t.key_end =
      p.window_right >= 0 && last + p.window_right + 1 < p.S_k ? last + p.window_right + 1 : p.S_k;
  if (t.key_end < t.key_begin) t.key_end = t.key_begin;
  return t;
}

inline int64_t query_tiles(const AttentionParams& p) { return (p.S_q + kQueries - 1) / kQueries; }

// An element of a boolean mask: what it adds to a score is 0 where it is set, else -inf.
struct MaskByte {
  uint8_t set;
};
FASTNN_INLINE float to_float(MaskByte m) { return m.set != 0 ? 0.f : -__builtin_inff(); }
// Calls f(elements) where there is a mask.
template <class F>
FASTNN_INLINE void with_mask(const AttentionParams& p, F f) {
  if (p.mask_kind == MaskKind::kBool) {
    f(static_cast<const MaskByte*>(p.mask));
  } else if (p.mask_kind == MaskKind::kAdditive) {
    with_type(p.mask_dtype, [&](auto type) { f(static_cast<const decltype(type)*>(p.mask)); });
  }
}
template <class M>
FASTNN_INLINE Vec load_mask(const M* m, int count) {
  if constexpr (__is_same(M, MaskByte)) {
    Bytes bytes = {};
    if (count == kLanes) {
      std::memcpy(&bytes, m, sizeof bytes);
    } else {
      std::memcpy(&bytes, m, (size_t)count);
    }
    return select((IVec)(widen(bytes) == UVec{}), splat(-__builtin_inff()), zero());
  } else {
    return load_some(m, count);
  }
}

// Adds the mask to scores s [key][kQueries] of keys [j0, j0 + keys).
template <class M>
inline void add_mask(const AttentionParams& p, const QueryTile& t, int64_t j0, int64_t keys,
                     const M* mask, float* s) {
  const int64_t by_query = p.mask_strides[2], by_key = p.mask_strides[3];
  mask += t.b * p.mask_strides[0] + t.head * p.mask_strides[1] + t.first * by_query + j0 * by_key;
  const int64_t width = t.strips * kStrip;
  if (by_query == 0) {  // the same for all queries: padding
    for (int64_t j = 0; j < keys; ++j) {
      const Vec m = splat(to_float(mask[j * by_key]));
      for (int64_t r = 0; r < width; r += kLanes)
        store(s + j * kQueries + r, load(s + j * kQueries + r) + m);
    }
  } else if (by_key == 1) {  // keys next to each other: turned as the scores are
    for (int64_t r0 = 0; r0 < t.rows; r0 += kLanes) {
      for (int64_t j = 0; j < keys; j += kLanes) {
        const int count = keys - j < kLanes ? (int)(keys - j) : kLanes;
        Vec m[kLanes];
        FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) {
          m[i] = r0 + i < t.rows ? load_mask(mask + (r0 + i) * by_query + j, count) : zero();
        }
        transpose(m);
        float* const at = s + j * kQueries + r0;
        for (int k = 0; k < count; ++k) store(at + k * kQueries, load(at + k * kQueries) + m[k]);
      }
    }
  } else {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t r = 0; r < t.rows; ++r)
        s[j * kQueries + r] += to_float(mask[r * by_query + j * by_key]);
    }
  }
}

// Scores s [key][kQueries] of keys [j0, j0 + keys) become capped, masked scores; slope (same
// layout) receives the cap's derivative where one is wanted.
inline void finish_scores(const AttentionParams& p, const QueryTile& t, int64_t j0, int64_t keys,
                          float* s, float* slope) {
  const int64_t width = t.strips * kStrip;
  if (p.softcap != 0.f) {
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t r = 0; r < width; r += kLanes) {
        const Vec h = tanh(load(s + j * kQueries + r) * (1.f / p.softcap));
        store(s + j * kQueries + r, h * p.softcap);
        if (slope != nullptr) store(slope + j * kQueries + r, fma(-h, h, splat(1.f)));
      }
    }
  }
  with_mask(p, [&](const auto* mask) { add_mask(p, t, j0, keys, mask, s); });
  const bool left = p.window_left >= 0 && t.first + t.rows - 1 - p.window_left > j0;
  const bool right = p.window_right >= 0 && t.first + p.window_right < j0 + keys - 1;
  if (!left && !right) return;
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t key = j0 + j - t.first;  // relative to the tile's first query
    // Visible to queries r with r - window_left <= key <= r + window_right.
    const int64_t from = right ? key - p.window_right : 0,
                  to = left ? key + p.window_left : kQueries;
    for (int64_t r = 0; r < width; ++r) {
      if (r < from || r > to) s[j * kQueries + r] = -__builtin_inff();
    }
  }
}

// Multiplies the weights x of one query, `stride` apart for keys j0, j0 + 1, ..., by 0 (dropped) or
// 1 / (1 - dropout), by their positions in (B, H, S_q, S_k). One counter gives four neighbouring
// keys.
inline void drop_query(const AttentionParams& p, int64_t b, int64_t head, int64_t query, int64_t j0,
                       int64_t keys, float* x, int64_t stride) {
  const float keep_scale = 1.f / (1.f - p.dropout);
  const uint64_t threshold = (uint64_t)((double)p.dropout * 4294967296.0);
  const uint64_t groups = (uint64_t)(p.S_k + 3) / 4;
  const uint64_t row = (uint64_t)((b * p.H + head) * p.S_q + query) * groups;
  for (int64_t j = 0; j < keys;) {
    const Philox4 random = philox(p.seed, row + (uint64_t)(j0 + j) / 4);
    do {
      x[j * stride] *= random.x[(j0 + j) % 4] < threshold ? 0.f : keep_scale;
      ++j;
    } while (j < keys && (j0 + j) % 4 != 0);
  }
}
inline void drop(const AttentionParams& p, const QueryTile& t, int64_t j0, int64_t keys, float* x) {
  for (int64_t r = 0; r < t.rows; ++r)
    drop_query(p, t.b, t.head, t.first + r, j0, keys, x + r, kQueries);
}

int64_t attention_fwd_scratch(const AttentionParams& p) {
  return kQueries * (p.D + p.D_v + kKeys) + 3 * kQueries + 4 * kStrip;
}

// The operands of forward's two products as `Dot` takes them: keys by features, values by keys.
struct KeysValues {
  RowPanel k, v;
};

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

// How the scale meets the scores. float32 queries are scaled as they are packed. Pairs stay exact:
// their scores are scaled inside the exponential where nothing comes in between (-inf stays -inf),
// else before it.
struct ScoreScale {
  float first, inside;
};
template <class Dot>
FASTNN_INLINE ScoreScale score_scale(const AttentionParams& p) {
  if (Dot::kPerUnit == 1) return {1.f, 1.f};
  const bool between = p.softcap != 0.f || p.mask_kind != MaskKind::kNone || !(p.scale > 0.f);
  return between ? ScoreScale{p.scale, 1.f} : ScoreScale{1.f, p.scale};
}
inline void scale_scores(float factor, int64_t keys, int64_t width, float* s) {
  if (factor == 1.f) return;
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t r = 0; r < width; r += kLanes)
      store(s + j * kQueries + r, load(s + j * kQueries + r) * factor);
  }
}

// The first key of a tile's loop: pairs of keys begin at even ones, and the key before the window
// is masked.
template <class Dot>
FASTNN_INLINE int64_t first_key(const QueryTile& t) {
  return t.key_begin < t.key_end ? t.key_begin / Dot::kPerUnit * Dot::kPerUnit : t.key_end;
}

template <class Dot, class T>
FASTNN_INLINE void attention_tile(const AttentionFwdParams& f, const QueryTile& t,
                                  const KeysValues& from, float* scratch) {
  const AttentionParams& p = f.a;
  float* const o = scratch + kQueries * p.D;
  float* const s = o + kQueries * p.D_v;
  float* const running_max = s + kQueries * kKeys;
  float* const sum = running_max + kQueries;
  float* const factor = sum + kQueries;
  const int64_t width = t.strips * kStrip;
  const Strips q = queries_in_lanes<Dot>(head_data<T>(p.q, t.b, t.head) + t.first * p.q.row_stride,
                                         p.q.row_stride, t, p.D, p.scale, scratch);
  const ScoreScale scale = score_scale<Dot>(p);
  const Vec inside = splat(scale.inside);
  auto scaled_minus = [inside](Vec x, Vec y) __attribute__((always_inline)) {
    return Dot::kPerUnit == 2 ? fma(x, inside, -y) : x - y;
  };
  const int64_t key_begin = first_key<Dot>(t);
  if (key_begin == t.key_end) {
    for (int64_t i = 0; i < p.D_v * kQueries; i += kLanes) store(o + i, zero());
  }
  for (int64_t r = 0; r < width; r += kLanes) {
    store(running_max + r, splat(-__builtin_inff()));
    store(sum + r, zero());
  }
  for (int64_t j0 = key_begin; j0 < t.key_end; j0 += kKeys) {
    const int64_t keys = t.key_end - j0 < kKeys ? t.key_end - j0 : kKeys;
    product<Dot>(keys, t.strips, units_of(p.D, Dot::kPerUnit), from_row(from.k, j0), q, s, kQueries,
                 false);
    scale_scores(scale.first, keys, width, s);
    finish_scores(p, t, j0, keys, s, nullptr);
    bool rescale = false;
    for (int64_t r = 0; r < width; r += kLanes) {
      const Vec before = load(running_max + r);
      Vec m[2] = {before, before};
      for (int64_t j = 0; j < keys; ++j)
        m[j & 1] = max(scaled_minus(load(s + j * kQueries + r), zero()), m[j & 1]);
      const Vec after = max(m[0], m[1]);
      // Nothing seen yet: 0 instead of -inf keeps -inf - -inf out; every e^(-inf - 0) is 0.
      const Vec top = select(after == splat(-__builtin_inff()), zero(), after);
      const Vec correction = exp(before - top);
      Vec total[2] = {load(sum + r) * correction, zero()};
      for (int64_t j = 0; j < keys; ++j) {
        const Vec e = exp(scaled_minus(load(s + j * kQueries + r), top));
        store(s + j * kQueries + r, e);
        total[j & 1] += e;
      }
      store(sum + r, total[0] + total[1]);
      store(running_max + r, after);
      store(factor + r, correction);
      rescale = rescale || (j0 > key_begin && any_differs(before, after));
    }
    if (rescale) {
      for (int64_t d = 0; d < p.D_v; ++d) {
        for (int64_t r = 0; r < width; r += kLanes)
          store(o + d * kQueries + r, load(o + d * kQueries + r) * load(factor + r));
      }
    }
    if (p.dropout > 0.f) drop(p, t, j0, keys, s);
    if constexpr (Dot::kPerUnit == 2) round_to_pairs(s, keys, width, s);
    product<Dot>(p.D_v, t.strips, units_of(keys, Dot::kPerUnit),
                 from_unit(from.v, j0 / Dot::kPerUnit), {s, kStrip, kQueries}, o, kQueries,
                 j0 > key_begin);
  }
  for (int64_t r = 0; r < width; r += kLanes) {
    const Vec total = load(sum + r);
    const Vec none = total;
    store(factor + r, select(none == zero(), zero(), 1.f / total));
    const Vec lse = load(running_max + r) + log(total);
    store(sum + r, select(none == zero(), splat(__builtin_inff()), lse));
  }
  unpack_queries(o, t.rows, p.D_v, factor,
                 static_cast<T*>(f.out) + t.b * f.out_batch_stride + t.head * f.out_head_stride +
                     t.first * f.out_row_stride,
                 f.out_row_stride);
  if (f.lse != nullptr)
    std::memcpy(f.lse + (t.b * p.H + t.head) * p.S_q + t.first, sum, (size_t)t.rows * 4);
}

template <class T>
FASTNN_INLINE FloatRows float_rows(const AttentionParams& p, const Heads& h, int64_t d, int64_t b,
                                   int64_t kv_head, const float* prepared) {
  if (p.dtype == DType::kFloat32)
    return {reinterpret_cast<const float*>(head_data<T>(h, b, kv_head)), h.row_stride};
  return {prepared + (b * p.H_kv + kv_head) * p.S_k * prepared_stride(d), prepared_stride(d)};
}

int64_t attention_fwd_items(const AttentionParams& p) { return p.B * p.H * query_tiles(p); }

// Items [begin, end): query tiles of all heads, tile running fastest.
void attention_fwd(const AttentionFwdParams& f, const float* k, const float* v, int64_t begin,
                   int64_t end, float* scratch) {
  const AttentionParams& p = f.a;
  with_dot(p.dtype, [&](auto dot, auto type) {
    using T = decltype(type);
    using Dot = decltype(dot);
    const int64_t tiles = query_tiles(p);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / tiles;
      const QueryTile t = query_tile(p, head / p.H, head % p.H, item % tiles);
      if constexpr (Dot::kPerUnit == 2) {
        if (multiplies_pairs(p, true)) {
          const int64_t stride = prepared_stride(p.D_v);
          const float* const values = v + (t.b * p.H_kv + t.kv_head) * units_of(p.S_k, 2) * stride;
          attention_tile<Dot, T>(
              f, t, {head_panel<T>(p.k, t.b, t.kv_head), word_panel(values, 1, stride)}, scratch);
          continue;
        }
      }
      const FloatRows keys = float_rows<T>(p, p.k, p.D, t.b, t.kv_head, k);
      const FloatRows values = float_rows<T>(p, p.v, p.D_v, t.b, t.kv_head, v);
      attention_tile<DotF32, T>(f, t,
                                {word_panel(keys.data, keys.row_stride, 1),
                                 word_panel(values.data, 1, values.row_stride)},
                                scratch);
    }
  });
}

}  // namespace
}  // namespace fastnn
