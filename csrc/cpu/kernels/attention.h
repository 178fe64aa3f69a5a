// Scaled dot-product attention on the register tile of the matrix product.
//
// Queries lie in lanes: a tile is up to 48 queries, and S^T [key][query] and O^T [feature][query]
// are products whose broadcast operand (K, V) is read from its own rows. Softmax is then per lane:
// no operation across lanes, no tails in the keys. Backward recomputes P from the saved logsumexp.
// Nothing of size S_q x S_k exists.
//
// Arithmetic is float32; half-precision K and V are widened once per call, Q, the output and the
// gradients as they are read and written. Where there are dot products of bfloat16 pairs, forward
// uses them: K is then read in place (odd D: from a copy with whole pairs), V interleaved by pairs
// of keys once per call, and P rounded to bfloat16 as torch rounds it; sums, maxima and P's own sum
// stay float32.
#pragma once
#include "cpu/kernels/attention_scores.h"

namespace fastnn {
namespace {

int64_t attention_fwd_scratch(const AttentionParams& p) {
  return kQueries * (p.D + p.D_v + kForwardKeys) + 3 * kQueries + 4 * kStrip;
}

// Of x[0], x[kQueries], ... (count of them), per lane; NaN is left out. Four chains: one is bound
// by its latency.
FASTNN_INLINE Vec column_max(const float* x, int64_t count) {
  const Vec lowest = splat(-__builtin_inff());
  Vec m[4] = {lowest, lowest, lowest, lowest};
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    FASTNN_UNROLL for (int i = 0; i < 4; ++i) m[i] = max(load(x + (j + i) * kQueries), m[i]);
  }
  for (; j < count; ++j) m[0] = max(load(x + j * kQueries), m[0]);
  return max(max(m[0], m[1]), max(m[2], m[3]));
}

// The operands of forward's two products as `Dot` takes them: keys by features, values by keys.
struct KeysValues {
  RowPanel k, v;
};

template <class Dot, class T>
FASTNN_INLINE void attention_tile(const AttentionFwdParams& f, const QueryTile& t,
                                  const KeysValues& from, float* scratch) {
  const AttentionParams& p = f.a;
  float* const o = scratch + kQueries * p.D;
  float* const s = o + kQueries * p.D_v;
  float* const running_max = s + kQueries * kForwardKeys;
  float* const sum = running_max + kQueries;
  float* const factor = sum + kQueries;
  const int64_t width = t.strips * kStrip;
  const ScoreScale scale = score_scale_base2<Dot>(p);
  const Strips q = queries_in_lanes<Dot>(head_data<T>(p.q, t.b, t.head) + t.first * p.q.row_stride,
                                         p.q.row_stride, t, p.D, scale.queries, scratch);
  constexpr bool kPairs = Dot::kPerUnit == 2;
  const Vec inside = splat(scale.inside);  // positive
  const bool round_at_once = kPairs && !(p.dropout > 0.f);
  const int64_t key_begin = first_key<Dot>(t);
  if (key_begin == t.key_end) {
    for (int64_t i = 0; i < p.D_v * kQueries; i += kLanes) store(o + i, zero());
  }
  for (int64_t r = 0; r < width; r += kLanes) {
    store(running_max + r, splat(-__builtin_inff()));
    store(sum + r, zero());
  }
  for (int64_t j0 = key_begin; j0 < t.key_end; j0 += kForwardKeys) {
    const int64_t keys = t.key_end - j0 < kForwardKeys ? t.key_end - j0 : kForwardKeys;
    const SeenKeys seen = seen_keys(p, t, j0, keys);
    seen.each_keys([&](int64_t j, int64_t end, int64_t strip) {
      product<Dot>(end - j, t.strips - strip, units_of(p.D, Dot::kPerUnit),
                   from_row(from.k, j0 + j), from_strip(q, strip),
                   s + j * kQueries + strip * kStrip, kQueries, false);
    });
    scale_scores(scale.first, keys, width, s);
    finish_scores(p, t, j0, keys, s, nullptr);
    bool rescale = false;
    // Scores of base 2, or natural ones, which become that as differences.
    auto weigh_all = [&](auto natural) __attribute__((always_inline)) {
      const auto power = [](Vec x) __attribute__((always_inline)) {
        return decltype(natural)::value ? x * kLog2E : x;
      };
      for (int64_t r = 0; r < width; r += kLanes) {
        const int64_t count = seen.by(r);
        const Vec before = load(running_max + r);
        const Vec after = max(column_max(s + r, count) * inside, before);
        // Nothing seen yet: 0 instead of -inf keeps -inf - -inf out; every e^(-inf - 0) is 0.
        const Vec top = select(after == splat(-__builtin_inff()), zero(), after);
        const Vec correction = exp2<false>(power(before - top));
        Vec total[2] = {load(sum + r) * correction, zero()};
        auto weigh = [&](int64_t j, Vec& to) __attribute__((always_inline)) {
          const Vec x = load(s + j * kQueries + r);
          const Vec e = exp2<kPairs>(power(fma(x, inside, -top)));
          to += e;
          return e;
        };
        int64_t j = 0;
        if (round_at_once) {  // in place: rows 2 i and 2 i + 1 have been read when row i is written
          for (; j + 1 < count; j += 2) {
            const Vec even = weigh(j, total[0]), odd = weigh(j + 1, total[1]);
            store(s + j / 2 * kQueries + r, to_bf16_pairs(even, odd));
          }
          if (j < count) store(s + j / 2 * kQueries + r, to_bf16_pairs(weigh(j, total[0]), zero()));
        } else {
          for (; j + 1 < count; j += 2) {
            store(s + j * kQueries + r, weigh(j, total[0]));
            store(s + (j + 1) * kQueries + r, weigh(j + 1, total[1]));
          }
          if (j < count) store(s + j * kQueries + r, weigh(j, total[0]));
        }
        store(sum + r, total[0] + total[1]);
        store(running_max + r, after);
        store(factor + r, correction);
        rescale = rescale || (j0 > key_begin && any_differs(before, after));
      }
    };
    scale.base2 ? weigh_all(std::false_type{}) : weigh_all(std::true_type{});
    if (rescale) {
      for (int64_t d = 0; d < p.D_v; ++d) {
        for (int64_t r = 0; r < width; r += kLanes)
          store(o + d * kQueries + r, load(o + d * kQueries + r) * load(factor + r));
      }
    }
    if (p.dropout > 0.f) {
      each_keep(p, t, j0, seen, [&](int64_t j, int64_t r, Vec keep) __attribute__((always_inline)) {
        store(s + j * kQueries + r, load(s + j * kQueries + r) * keep);
      });
      if constexpr (kPairs) round_to_pairs(s, seen, s);
    }
    seen.each_strips([&](int64_t begin, int64_t end, int64_t count) {
      product<Dot>(p.D_v, end - begin, units_of(count, Dot::kPerUnit),
                   from_unit(from.v, j0 / Dot::kPerUnit), from_strip({s, kStrip, kQueries}, begin),
                   o + begin * kStrip, kQueries, j0 > key_begin);
    });
  }
  for (int64_t r = 0; r < width; r += kLanes) {
    const Vec total = load(sum + r);
    const Vec none = total;
    store(factor + r, select(none == zero(), zero(), 1.f / total));
    const Vec lse = fma(load(running_max + r), splat(scale.base2 ? kLn2 : 1.f), log(total));
    store(sum + r, select(none == zero(), splat(__builtin_inff()), lse));
  }
  unpack_queries(o, t.rows, p.D_v, factor,
                 static_cast<T*>(f.out) + t.b * f.out_batch_stride + t.head * f.out_head_stride +
                     t.first * f.out_row_stride,
                 f.out_row_stride);
  if (f.lse != nullptr)
    std::memcpy(f.lse + (t.b * p.H + t.head) * p.lse_head_stride + t.first, sum,
                (size_t)t.rows * 4);
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
          const int64_t of = t.b * p.H_kv + t.kv_head;
          const float* const values = v + of * units_of(p.S_k, 2) * stride;
          const float* const completed = k + of * whole_pairs_floats(p.S_k, p.D);
          attention_tile<Dot, T>(f, t,
                                 {feature_pairs<T>(p.k, p.D, t.b, t.kv_head, completed),
                                  word_panel(values, 1, stride)},
                                 scratch);
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
