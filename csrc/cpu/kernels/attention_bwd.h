// Backward of scaled dot-product attention: the weights are recomputed tile by tile from the saved
// logsumexp, in the layout of the forward (kernels/attention.h).
#pragma once
#include "cpu/kernels/attention_decode.h"

namespace fastnn {
namespace {

// Scratch of backward: dk, dv sums | q, dO as lanes | dq sums | q, dO as rows | P | dP, dS | cap
// slope | lse, delta, ones | a query and scores of few.
int64_t attention_bwd_scratch(const AttentionParams& p) {
  const int64_t d = padded_features(p.D), dv = padded_features(p.D_v);
  return p.S_k * (d + dv) + kQueries * (2 * (p.D + p.D_v) + p.D + d + dv) +
         3 * kQueries * kBackwardKeys + 3 * kQueries + d + kDecodeKeys + 8 * kStrip;
}

struct BackwardMemory {
  float *dk, *dv, *q_lanes, *do_lanes, *dq, *q_rows, *do_rows, *p, *ds, *slope, *lse, *delta, *ones,
      *few_q, *few_s;
};
inline BackwardMemory backward_memory(const AttentionParams& p, float* scratch) {
  const int64_t d = padded_features(p.D), dv = padded_features(p.D_v);
  BackwardMemory m;
  auto take = [&scratch](int64_t floats) {
    float* const at = scratch;
    scratch += floats;
    return at;
  };
  m.dk = take(p.S_k * d);
  m.dv = take(p.S_k * dv);
  m.q_rows = take(kQueries * d);
  m.do_rows = take(kQueries * dv);
  m.p = take(kQueries * kBackwardKeys);
  m.ds = take(kQueries * kBackwardKeys);
  m.slope = take(kQueries * kBackwardKeys);
  m.lse = take(kQueries);
  m.delta = take(kQueries);
  m.ones = take(kQueries);
  m.few_q = take(d);
  m.few_s = take(kDecodeKeys);
  m.q_lanes = take(kQueries * p.D);
  m.do_lanes = take(kQueries * p.D_v);
  m.dq = take(kQueries * p.D);
  return m;
}

// Rows of a head as the products over queries take them, zero-padded to a strip of features and to
// kQueries rows: float32, or rows 2 r, 2 r + 1 in pairs.
template <class Dot, class T>
FASTNN_INLINE void copy_rows(const T* x, int64_t row_stride, int64_t rows, int64_t d, float* out) {
  const int64_t width = padded_features(d);
  for (int64_t i = 0; i < kQueries / Dot::kPerUnit * width; i += kLanes) store(out + i, zero());
  if constexpr (Dot::kPerUnit == 2) {
    pair_rows(x, row_stride, rows, d, out, width);
  } else {
    widen_rows(x, row_stride, rows, d, out, width);
  }
}

// Rows x [key][kQueries] rounded to bfloat16 in place: neighbouring queries are then pairs.
inline void round_rows(float* x, int64_t keys, int64_t width) {
  for (int64_t j = 0; j < keys; ++j, x += kQueries) {
    auto* const out = reinterpret_cast<BFloat16*>(x);
    for (int64_t r = 0; r < width; r += kLanes) store(out + r, load(x + r));
  }
}

// Scores s [key][kQueries] of few queries on keys [j0, j0 + keys), from the operands and added up
// in the order in which attention_decode did: the weights are e^(score - logsumexp), and two ways
// of adding would differ by more than a rounding.
template <class T>
FASTNN_INLINE void few_scores(const AttentionParams& p, const QueryTile& t, int64_t j0,
                              int64_t keys, const BackwardMemory& m, float* s) {
  const T* const k = head_data<T>(p.k, t.b, t.kv_head) + j0 * p.k.row_stride;
  const int64_t group = p.H / p.H_kv;
  for (int64_t j = 0; j < keys * kQueries; j += kLanes) store(s + j, zero());
  for (int64_t r = 0; r < t.rows; ++r) {
    auto score = [&](auto dot) __attribute__((always_inline)) {
      using Dot = decltype(dot);
      pack_decode_query<Dot>(head_data<T>(p.q, t.b, t.head) + (t.first + r) * p.q.row_stride, p.D,
                             m.few_q);
      decode_scores<Dot, 1>(m.few_q, 0, k, p.k.row_stride, p.D, keys, p.scale, m.few_s);
    };
    if (shares_loads(t.head % group * p.S_q + t.first + r, group * p.S_q)) {
      score(KeyDot<kDecodeShared, T>{});
    } else {
      score(KeyDot<1, T>{});
    }
    for (int64_t j = 0; j < keys; ++j) s[j * kQueries + r] = m.few_s[j];
  }
}

// The operands of backward's products: keys and values by features, features by keys.
struct BackwardOperands {
  RowPanel k, v, k_columns;
};

// Adds what one tile of queries gives to dk and dv, and writes its dq.
template <class Dot, class T>
FASTNN_INLINE void attention_bwd_tile(const AttentionBwdParams& b, const QueryTile& t,
                                      const BackwardOperands& from, const BackwardMemory& m) {
  constexpr bool kPairs = Dot::kPerUnit == 2;
  const AttentionParams& p = b.a;
  const int64_t width = t.strips * kStrip, d_pad = padded_features(p.D),
                dv_pad = padded_features(p.D_v);
  const T* const q = head_data<T>(p.q, t.b, t.head) + t.first * p.q.row_stride;
  const T* const out = head_data<T>(b.out, t.b, t.head) + t.first * b.out.row_stride;
  const T* const d_out = head_data<T>(b.d_out, t.b, t.head) + t.first * b.d_out.row_stride;
  // Weights are e^(score - logsumexp), not of base 2: a logsumexp times log2(e) is rounded again.
  const ScoreScale scale = score_scale<Dot>(p);
  const Strips q_lanes = queries_in_lanes<Dot>(q, p.q.row_stride, t, p.D, scale.queries, m.q_lanes);
  const Strips do_lanes =
      queries_in_lanes<Dot>(d_out, b.d_out.row_stride, t, p.D_v, 1.f, m.do_lanes);
  copy_rows<Dot>(q, p.q.row_stride, t.rows, p.D, m.q_rows);
  copy_rows<Dot>(d_out, b.d_out.row_stride, t.rows, p.D_v, m.do_rows);
  for (int64_t r = 0; r < kQueries; ++r) {
    m.lse[r] = r < t.rows ? b.lse[(t.b * p.H + t.head) * p.lse_head_stride + t.first + r]
                          : __builtin_inff();
    m.ones[r] = p.scale;
    m.delta[r] = 0.f;
    if (r >= t.rows) continue;
    m.delta[r] = row_sum(p.D_v, [&](int64_t i, int count) __attribute__((always_inline)) {
      return load_some(d_out + r * b.d_out.row_stride + i, count) *
             load_some(out + r * b.out.row_stride + i, count);
    });
  }
  for (int64_t i = 0; i < p.D * kQueries; i += kLanes) store(m.dq + i, zero());
  const bool few = is_decoding(p);
  for (int64_t j0 = first_key<Dot>(t); j0 < t.key_end; j0 += kBackwardKeys) {
    const int64_t keys = t.key_end - j0 < kBackwardKeys ? t.key_end - j0 : kBackwardKeys;
    const SeenKeys seen = seen_keys(p, t, j0, keys);
    if (few) few_scores<T>(p, t, j0, keys, m, m.p);
    seen.each_keys([&](int64_t j, int64_t end, int64_t strip) {
      auto by_features = [&](int64_t d, const RowPanel& rows, const Strips& lanes, float* to) {
        product<Dot>(end - j, t.strips - strip, units_of(d, Dot::kPerUnit), from_row(rows, j0 + j),
                     from_strip(lanes, strip), to + j * kQueries + strip * kStrip, kQueries, false);
      };
      if (!few) by_features(p.D, from.k, q_lanes, m.p);
      by_features(p.D_v, from.v, do_lanes, m.ds);
    });
    if (!few) scale_scores(scale.first, keys, width, m.p);
    finish_scores(p, t, j0, keys, m.p, m.slope);
    // A weight and the gradient of its score; keep: dropout's factor.
    struct Weighed {
      Vec weight, gradient;
    };
    auto weigh = [&](int64_t j, int64_t r, auto keep) __attribute__((always_inline)) {
      const float* const at = m.p + j * kQueries + r;
      const Vec exponent = fma(load(at), splat(scale.inside), -load(m.lse + r));
      const Vec weight = kPairs ? rough_exp(exponent) : exp(exponent);
      Vec ds = weight * (load(m.ds + j * kQueries + r) * keep - load(m.delta + r));
      if (p.softcap != 0.f) ds = ds * load(m.slope + j * kQueries + r);
      // A weight of 0 has gradient 0 even where dP is infinite or NaN: the key was not seen.
      return Weighed{weight * keep, select(weight == zero(), zero(), ds)};
    };
    auto put = [&](int64_t j, int64_t r, const Weighed& w) __attribute__((always_inline)) {
      store(m.p + j * kQueries + r, w.weight);
      store(m.ds + j * kQueries + r, w.gradient);
    };
    float* ds_by_keys = m.ds;
    if (p.dropout > 0.f) {
      each_keep(p, t, j0, seen, [&](int64_t j, int64_t r, Vec keep) __attribute__((always_inline)) {
        put(j, r, weigh(j, r, keep));
      });
      if constexpr (kPairs) {
        ds_by_keys = m.slope;  // the cap's slope has been used
        round_to_pairs(m.ds, seen, ds_by_keys);
        round_rows(m.ds, keys, width);
        round_rows(m.p, keys, width);
      }
    } else if constexpr (kPairs) {
      // Rounded as they are made, in place: of a row, strips before this one have been read.
      ds_by_keys = m.slope;
      auto put_rounded = [&](int64_t j, int64_t r,
                             const Weighed& w) __attribute__((always_inline)) {
        store(reinterpret_cast<BFloat16*>(m.p + j * kQueries) + r, w.weight);
        store(reinterpret_cast<BFloat16*>(m.ds + j * kQueries) + r, w.gradient);
      };
      for (int64_t r = 0; r < width; r += kLanes) {
        const int64_t count = seen.by(r);
        for (int64_t j = 0; j < count; j += 2) {
          const Weighed even = weigh(j, r, 1.f);
          Weighed odd = {zero(), zero()};
          if (j + 1 < count) {
            odd = weigh(j + 1, r, 1.f);
            put_rounded(j + 1, r, odd);
          }
          put_rounded(j, r, even);
          store(m.slope + j / 2 * kQueries + r, to_bf16_pairs(even.gradient, odd.gradient));
        }
      }
    } else {
      seen.each_keys([&](int64_t begin, int64_t end, int64_t strip) __attribute__((always_inline)) {
        for (int64_t j = begin; j < end; ++j) {
          for (int64_t r = strip * kStrip; r < width; r += kLanes) put(j, r, weigh(j, r, 1.f));
        }
      });
    }
    const int64_t depth = units_of(t.rows, Dot::kPerUnit);
    seen.each_keys([&](int64_t j, int64_t end, int64_t strip) {
      const int64_t first = strip * kStrip / Dot::kPerUnit;
      auto by_queries = [&](const float* weights, const float* rows, int64_t d, float* to) {
        product<Dot>(end - j, d / kStrip, depth - first,
                     word_panel(weights + j * kQueries + first, kQueries, 1),
                     {rows + first * d, kStrip, d}, to + (j0 + j) * d, d, true);
      };
      by_queries(m.p, m.do_rows, dv_pad, m.dv);
      by_queries(m.ds, m.q_rows, d_pad, m.dk);
    });
    seen.each_strips([&](int64_t begin, int64_t end, int64_t count) {
      product<Dot>(p.D, end - begin, units_of(count, Dot::kPerUnit),
                   from_unit(from.k_columns, j0 / Dot::kPerUnit),
                   from_strip({ds_by_keys, kStrip, kQueries}, begin), m.dq + begin * kStrip,
                   kQueries, true);
    });
  }
  unpack_queries(m.dq, t.rows, p.D, m.ones,
                 static_cast<T*>(b.dq) + t.b * b.dq_strides.batch + t.head * b.dq_strides.head +
                     t.first * b.dq_strides.row,
                 b.dq_strides.row);
}

// rows x padded(d) float sums times factor to rows of d.
template <class T>
FASTNN_INLINE void store_sums(const float* sums, int64_t rows, int64_t d, float factor, T* out,
                              int64_t row_stride) {
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t i = 0; i < d; i += kLanes) {
      store_some(out + j * row_stride + i, load(sums + j * padded_features(d) + i) * factor,
                 d - i < kLanes ? (int)(d - i) : kLanes);
    }
  }
}

// Items [begin, end): (batch entry, key head) pairs. One item adds up all its query heads and tiles
// in order: no sum depends on the number of threads.
template <class Dot, class T, class Operands>
FASTNN_INLINE void attention_bwd_items(const AttentionBwdParams& b, int64_t begin, int64_t end,
                                       float* scratch, Operands operands) {
  const AttentionParams& p = b.a;
  const BackwardMemory m = backward_memory(p, scratch);
  const int64_t group = p.H / p.H_kv;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t batch = item / p.H_kv, kv_head = item % p.H_kv;
    const BackwardOperands from = operands(item, batch, kv_head);
    std::memset(m.dk, 0, (size_t)(p.S_k * padded_features(p.D)) * 4);
    std::memset(m.dv, 0, (size_t)(p.S_k * padded_features(p.D_v)) * 4);
    for (int64_t g = 0; g < group; ++g) {
      for (int64_t tile = 0; tile < query_tiles(p); ++tile)
        attention_bwd_tile<Dot, T>(b, query_tile(p, batch, kv_head * group + g, tile), from, m);
    }
    auto store_head = [&](const float* sums, int64_t d, float factor, void* out,
                          const Strides& by) __attribute__((always_inline)) {
      store_sums(sums, p.S_k, d, factor,
                 static_cast<T*>(out) + batch * by.batch + kv_head * by.head, by.row);
    };
    store_head(m.dk, p.D, p.scale, b.dk, b.dk_strides);
    store_head(m.dv, p.D_v, 1.f, b.dv, b.dv_strides);
  }
}

void attention_bwd(const AttentionBwdParams& b, const float* k, const float* v, int64_t begin,
                   int64_t end, float* scratch) {
  const AttentionParams& p = b.a;
  with_dot(p.dtype, [&](auto dot, auto type) {
    using T = decltype(type);
    if constexpr (decltype(dot)::kPerUnit == 2) {
      if (multiplies_pairs(p, false)) {
        const int64_t stride = prepared_stride(p.D);
        return attention_bwd_items<DotBf16, T>(
            b, begin, end, scratch, [&](int64_t item, int64_t batch, int64_t head) {
              const float* const keys = k + item * attention_key_floats(p, false);
              const float* const values = v + item * attention_value_floats(p, false);
              return BackwardOperands{feature_pairs<T>(p.k, p.D, batch, head, keys),
                                      feature_pairs<T>(p.v, p.D_v, batch, head, values),
                                      word_panel(keys + whole_pairs_floats(p.S_k, p.D), 1, stride)};
            });
      }
    }
    attention_bwd_items<DotF32, T>(
        b, begin, end, scratch, [&](int64_t, int64_t batch, int64_t head) {
          const FloatRows keys = float_rows<T>(p, p.k, p.D, batch, head, k);
          const FloatRows values = float_rows<T>(p, p.v, p.D_v, batch, head, v);
          return BackwardOperands{word_panel(keys.data, keys.row_stride, 1),
                                  word_panel(values.data, values.row_stride, 1),
                                  word_panel(keys.data, 1, keys.row_stride)};
        });
  });
}

}  // namespace
}  // namespace fastnn
