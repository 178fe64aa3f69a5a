// Scaled dot-product attention on the register tile of the matrix product.
//
// Queries lie in lanes: a tile is up to 48 queries, and S^T [key][query] and O^T [feature][query]
// are products whose broadcast operand (K, V) is read from its own rows. Softmax is then per lane:
// no operation across lanes, no tails in the keys. Backward recomputes P from the saved logsumexp.
// All arithmetic is float32; half-precision K and V are widened once per call, Q, the output and
// the gradients as they are read and written. Nothing of size S_q x S_k exists.
#pragma once
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

// Rows [first, first + count) of a head as float32: in place where they are float32, else from the
// widened copy.
struct FloatRows {
  const float* data;
  int64_t row_stride;
};

template <class T>
FASTNN_INLINE const T* head_data(const Heads& h, int64_t b, int64_t head) {
  return static_cast<const T*>(h.data) + b * h.batch_stride + head * h.head_stride;
}

inline int64_t padded_features(int64_t d) { return (d + kStrip - 1) / kStrip * kStrip; }
// Floats between rows of the widened copy: not a multiple of 4 KiB, or all rows share a set of L1.
inline int64_t widened_stride(int64_t d) { return padded_features(d) + kStrip; }

// Keys and values of one (batch entry, key head) as float32, to `k` and `v`.
void attention_widen(const AttentionParams& p, int64_t item, float* k, float* v) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t b = item / p.H_kv, head = item % p.H_kv;
    auto widen_rows = [&](const Heads& h, int64_t d, float* out) {
      const T* const rows = head_data<T>(h, b, head);
      const int64_t stride = widened_stride(d);
      for (int64_t j = 0; j < p.S_k; ++j) {
        for (int64_t i = 0; i < d; i += kLanes) {
          store(out + j * stride + i,
                load_some(rows + j * h.row_stride + i, d - i < kLanes ? (int)(d - i) : kLanes));
        }
      }
    };
    widen_rows(p.k, p.D, k);
    widen_rows(p.v, p.D_v, v);
  });
}

int64_t attention_widened_floats(const AttentionParams& p) {
  return p.dtype == DType::kFloat32 ? 0 : p.S_k * widened_stride(p.D);
}
int64_t attention_widened_value_floats(const AttentionParams& p) {
  return p.dtype == DType::kFloat32 ? 0 : p.S_k * widened_stride(p.D_v);
}

// rows (features next to each other, times factor) to [feature][kQueries], queries past `rows`
// zero.
template <class T>
FASTNN_INLINE void pack_queries(const T* x, int64_t row_stride, int64_t rows, int64_t d,
                                float factor, float* out) {
  for (int64_t r0 = 0; r0 < kQueries; r0 += kLanes) {
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

// t (rows x 16 strips, row stride ldt) = or += A B for any number of rows.
FASTNN_INLINE void product(int64_t rows, int64_t strips, int64_t depth, const float* a,
                           int64_t a_row, int64_t a_unit, const Strips& b, float* t, int64_t ldt,
                           bool accumulate) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
    run_tiles<DotF32>(r1 - r0, strips, depth, reinterpret_cast<const char*>(a + r0 * a_row),
                      a_row * 4, a_unit * 4, b, t + r0 * ldt, ldt, accumulate);
  }
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
  if (p.mask_kind != MaskKind::kNone) {
    const int64_t offset = t.b * p.mask_strides[0] + t.head * p.mask_strides[1];
    auto each = [&](auto value_at) __attribute__((always_inline)) {
      for (int64_t j = 0; j < keys; ++j) {
        const int64_t key = offset + (j0 + j) * p.mask_strides[3];
        if (p.mask_strides[2] == 0) {  // the same for all queries: a padding mask
          const float m = value_at(key);
          for (int64_t r = 0; r < width; r += kLanes)
            store(s + j * kQueries + r, load(s + j * kQueries + r) + m);
        } else {
          for (int64_t r = 0; r < t.rows; ++r)
            s[j * kQueries + r] += value_at(key + (t.first + r) * p.mask_strides[2]);
        }
      }
    };
    if (p.mask_kind == MaskKind::kBool) {
      const uint8_t* const m = static_cast<const uint8_t*>(p.mask);
      each([m](int64_t at) { return m[at] ? 0.f : -__builtin_inff(); });
    } else {
      with_type(p.mask_dtype, [&](auto type) {
        const auto* const m = static_cast<const decltype(type)*>(p.mask);
        each([m](int64_t at) { return to_float(m[at]); });
      });
    }
  }
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

template <class T>
FASTNN_INLINE void attention_tile(const AttentionFwdParams& f, const QueryTile& t, FloatRows k,
                                  FloatRows v, float* scratch) {
  const AttentionParams& p = f.a;
  float* const q = scratch;
  float* const o = q + kQueries * p.D;
  float* const s = o + kQueries * p.D_v;
  float* const running_max = s + kQueries * kKeys;
  float* const sum = running_max + kQueries;
  float* const factor = sum + kQueries;
  pack_queries(head_data<T>(p.q, t.b, t.head) + t.first * p.q.row_stride, p.q.row_stride, t.rows,
               p.D, p.scale, q);
  const int64_t width = t.strips * kStrip;
  for (int64_t i = 0; i < p.D_v * kQueries; i += kLanes) store(o + i, zero());
  for (int64_t r = 0; r < kQueries; r += kLanes) {
    store(running_max + r, splat(-__builtin_inff()));
    store(sum + r, zero());
  }
  for (int64_t j0 = t.key_begin; j0 < t.key_end; j0 += kKeys) {
    const int64_t keys = t.key_end - j0 < kKeys ? t.key_end - j0 : kKeys;
    product(keys, t.strips, p.D, k.data + j0 * k.row_stride, k.row_stride, 1, {q, kStrip, kQueries},
            s, kQueries, false);
    finish_scores(p, t, j0, keys, s, nullptr);
    bool rescale = false;
    for (int64_t r = 0; r < width; r += kLanes) {
      const Vec before = load(running_max + r);
      Vec m[2] = {before, before};
      for (int64_t j = 0; j < keys; ++j) m[j & 1] = max(load(s + j * kQueries + r), m[j & 1]);
      const Vec after = max(m[0], m[1]);
      // Nothing seen yet: 0 instead of -inf keeps -inf - -inf out; every e^(-inf - 0) is 0.
      const Vec top = select(after == splat(-__builtin_inff()), zero(), after);
      const Vec correction = exp(before - top);
      Vec total[2] = {load(sum + r) * correction, zero()};
      for (int64_t j = 0; j < keys; ++j) {
        const Vec e = exp(load(s + j * kQueries + r) - top);
        store(s + j * kQueries + r, e);
        total[j & 1] += e;
      }
      store(sum + r, total[0] + total[1]);
      store(running_max + r, after);
      store(factor + r, correction);
      rescale = rescale || (j0 > t.key_begin && any_differs(before, after));
    }
    if (rescale) {
      for (int64_t d = 0; d < p.D_v; ++d) {
        for (int64_t r = 0; r < width; r += kLanes)
          store(o + d * kQueries + r, load(o + d * kQueries + r) * load(factor + r));
      }
    }
    if (p.dropout > 0.f) drop(p, t, j0, keys, s);
    product(p.D_v, t.strips, keys, v.data + j0 * v.row_stride, 1, v.row_stride,
            {s, kStrip, kQueries}, o, kQueries, true);
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
                                   int64_t kv_head, const float* widened) {
  if (p.dtype == DType::kFloat32)
    return {reinterpret_cast<const float*>(head_data<T>(h, b, kv_head)), h.row_stride};
  return {widened + (b * p.H_kv + kv_head) * p.S_k * widened_stride(d), widened_stride(d)};
}

int64_t attention_fwd_items(const AttentionParams& p) { return p.B * p.H * query_tiles(p); }

// Items [begin, end): query tiles of all heads, tile running fastest.
void attention_fwd(const AttentionFwdParams& f, const float* k, const float* v, int64_t begin,
                   int64_t end, float* scratch) {
  const AttentionParams& p = f.a;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t tiles = query_tiles(p);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / tiles;
      const QueryTile t = query_tile(p, head / p.H, head % p.H, item % tiles);
      attention_tile<T>(f, t, float_rows<T>(p, p.k, p.D, t.b, t.kv_head, k),
                        float_rows<T>(p, p.v, p.D_v, t.b, t.kv_head, v), scratch);
    }
  });
}

}  // namespace
}  // namespace fastnn
