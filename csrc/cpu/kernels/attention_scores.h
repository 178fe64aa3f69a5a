// From products to scores: scale, cap, mask, window; and what dropout does to weights.
#pragma once
#include "cpu/kernels/attention_operands.h"
#include "cpu/kernels/mask.h"
#include "cpu/simd/math.h"
#include "cpu/simd/philox.h"

namespace fastnn {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// e^x of what is rounded to bfloat16, x up to 88: within 3e-6, and what x * log2(e) loses.
FASTNN_INLINE Vec rough_exp(Vec x) { return exp2<true>(x * kLog2E); }

// Where the scale meets the scores: in the queries as they are packed, before what comes in between
// (cap, mask), or inside the exponential. Pairs stay exact, and -inf stays -inf.
struct ScoreScale {
  float queries, first, inside;
  bool base2 = false;  // the exponential's
};
inline bool comes_between(const AttentionParams& p) {
  return p.softcap != 0.f || p.mask_kind != MaskKind::kNone || !(p.scale > 0.f);
}
template <class Dot>
FASTNN_INLINE ScoreScale score_scale(const AttentionParams& p) {
  if (Dot::kPerUnit == 1) return {p.scale, 1.f, 1.f};
  return comes_between(p) ? ScoreScale{1.f, p.scale, 1.f} : ScoreScale{1.f, 1.f, p.scale};
}
// The same for weights of base 2, log2(e) inside the exponential: not in the queries, whose scores
// must be backward's to the bit. Not where something comes in between: masked scores may be as low
// as numbers go, and times log2(e) be -inf.
template <class Dot>
FASTNN_INLINE ScoreScale score_scale_base2(const AttentionParams& p) {
  ScoreScale scale = score_scale<Dot>(p);
  if (!kFusedMultiplyAdd || comes_between(p)) return scale;
  scale.inside *= kLog2E;
  scale.base2 = true;
  return scale;
}
inline void scale_scores(float factor, int64_t keys, int64_t width, float* s) {
  if (factor == 1.f) return;
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t r = 0; r < width; r += kLanes)
      store(s + j * kQueries + r, load(s + j * kQueries + r) * factor);
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

inline IVec lane_numbers() {
  IVec n;
  for (int i = 0; i < kLanes; ++i) n[i] = i;
  return n;
}
inline int32_t lane_bound(int64_t lane) {
  return lane < 0 ? 0 : lane > kLanes ? kLanes : (int32_t)lane;
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
  with_mask(p.mask_kind, p.mask_dtype, p.mask,
            [&](const auto* mask) { add_mask(p, t, j0, keys, mask, s); });
  for (int64_t r = 0; r < width; r += kLanes) {
    const int64_t first = p.position + t.first + r - j0;  // where these queries stand in the block
    // Lane i sees keys first + i - left .. first + i + right: all lanes those in [from, to).
    const int64_t from = p.window_left < 0 ? 0 : first + kLanes - 1 - p.window_left;
    const int64_t to = p.window_right < 0 ? keys : first + p.window_right + 1;
    auto hide = [&](int64_t j) __attribute__((always_inline)) {
      const int64_t after = p.window_left < 0 ? kLanes : j - first + p.window_left + 1;
      const int64_t before = p.window_right < 0 ? 0 : j - first - p.window_right;
      const IVec hidden = (lane_numbers() < splat_int(lane_bound(before))) |
                          (lane_numbers() >= splat_int(lane_bound(after)));
      float* const at = s + j * kQueries + r;
      store(at, select(hidden, splat(-__builtin_inff()), load(at)));
    };
    int64_t j = 0;
    for (; j < from && j < keys; ++j) hide(j);
    for (j = to > j ? to : j; j < keys; ++j) hide(j);
  }
}

// Dropout's counters: one gives four neighbouring keys of a query, by their positions in (B, H,
// S_q, S_k).
inline uint64_t counters_of_query(const AttentionParams& p) { return (uint64_t)(p.S_k + 3) / 4; }
inline uint64_t first_counter(const AttentionParams& p, int64_t b, int64_t head, int64_t query) {
  return p.first_draw + (uint64_t)((b * p.H + head) * p.S_q + query) * counters_of_query(p);
}

// Multiplies the weights x of one query, for keys j0, j0 + 1, ..., by 0 (dropped) or
// 1 / (1 - dropout).
inline void drop_query(const AttentionParams& p, int64_t b, int64_t head, int64_t query, int64_t j0,
                       int64_t keys, float* x) {
  const float keep_scale = 1.f / (1.f - p.dropout);
  const uint64_t threshold = drop_threshold(p.dropout), first = first_counter(p, b, head, query);
  for (int64_t j = 0; j < keys;) {
    const Philox4 random = philox(p.seed, first + (uint64_t)(j0 + j) / 4);
    do {
      x[j] *= random.x[(j0 + j) % 4] < threshold ? 0.f : keep_scale;
      ++j;
    } while (j < keys && (j0 + j) % 4 != 0);
  }
}
// The same factors for a tile, kLanes queries at once: body(j, r, factors of queries r, r + 1, ...)
// for keys j0 + j.
template <class Body>
FASTNN_INLINE void each_keep(const AttentionParams& p, const QueryTile& t, int64_t j0,
                             const SeenKeys& seen, Body body) {
  const Vec keep_scale = splat(1.f / (1.f - p.dropout));
  const UVec threshold = (UVec)splat_int((int32_t)(uint32_t)drop_threshold(p.dropout));
  for (int64_t r = 0; r < t.strips * kStrip; r += kLanes) {
    UVec low, high;
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t counter = first_counter(p, t.b, t.head, t.first + r + i) + (uint64_t)j0 / 4;
      low[i] = (uint32_t)counter;
      high[i] = (uint32_t)(counter >> 32);
    }
    const int64_t keys = seen.by(r);
    for (int64_t j = -(j0 % 4); j < keys; j += 4) {
      const PhiloxWords<UVec> random = philox<UVec>(p.seed, low, high);
      FASTNN_UNROLL for (int i = 0; i < 4; ++i) {
        if (j + i < 0 || j + i >= keys) continue;
        body(j + i, r, select((IVec)(random.x[i] < threshold), zero(), keep_scale));
      }
      low += 1u;
      high += (UVec)(low == UVec{}) & 1u;
    }
  }
}

}  // namespace
}  // namespace fastnn
