// Attention of a few queries on many keys: decoding. The queries that share a key head (its group's
// heads, and the positions of each) are the rows of one item, and share every load of K and V;
// features lie in lanes, since queries would leave most of them empty. K and V are read once, in
// address order, in their own type. Where there are dot products of bfloat16 pairs, weights are
// rounded to bfloat16 for them, as in the tiles. The keys may be split into parts, each with its
// own maximum, sum and output, merged by attention_decode_merge: where they are split depends on
// the sizes alone, so that the bits do not depend on the number of threads.
#pragma once
#include "cpu/kernels/attention.h"

namespace fastnn {
namespace {

// Keys of a block: long runs of K, then of V, keep the hardware's prefetching streams alive.
constexpr int64_t kDecodeKeys = 1024;
constexpr int64_t kScoreStride = kDecodeKeys + kStrip;  // of a row's; no multiple of 4 KiB
constexpr int kDecodeRows = 8;                          // that share a load at most
// From so many rows on that share a load, arithmetic takes as long as memory does.
constexpr int kDecodeShared = 4;
constexpr int64_t kDecodeAhead = 32768;     // bytes that are then fetched ahead
constexpr int64_t kDecodeSharedKeys = 256;  // of a block then: 1024 lose up to 10 %
// Keys after which float32 sums of other rows take their turn: short enough for V to stay in L1.
constexpr int64_t kDecodeTurnKeys = 16;

int64_t attention_decode_rows(const AttentionParams& p) {
  return is_decoding(p) ? p.H / p.H_kv * p.S_q : 0;
}
inline int64_t decode_features(const AttentionParams& p) { return round_up(p.D_v, 2 * kStrip); }
// Of one row of one part: its output, maximum and sum.
int64_t attention_decode_floats(const AttentionParams& p) { return decode_features(p) + kStrip; }
int64_t attention_decode_scratch(const AttentionParams& p) {
  return kDecodeRows * (padded_features(p.D) + kScoreStride + kLanes);
}

// A row's head and position.
struct DecodeRow {
  int64_t head, query;
};
// Rows are taken by the largest powers of two that are left, so the last ones share a load less.
inline bool shares_loads(int64_t row, int64_t rows) {
  return row < rows / kDecodeShared * kDecodeShared;
}
inline DecodeRow decode_row(const AttentionParams& p, int64_t kv_head, int64_t row) {
  return {kv_head * (p.H / p.H_kv) + row / p.S_q, row % p.S_q};
}

// What products with keys (for so many rows) and with values take: bfloat16 pairs where there are
// dot products of them, any other type as float32.
template <class T>
using ValueDot = std::conditional_t<kHasBf16Dot && std::is_same_v<T, BFloat16>, DotBf16, DotF32>;
template <int kRows, class T>
using KeyDot = std::conditional_t<(kRows >= kDecodeShared), ValueDot<T>, DotF32>;

// A vector of a row of K or V: float32 in halves, and bfloat16 keys in float32 vectors where few
// rows share them. Both read half lines, which the prefetchers of the Zen 4 it was measured on
// follow better: 84-90 % and 91-97 % of the read bandwidth, 68-75 % and 80-90 % with whole lines.
template <class Dot, class T>
FASTNN_INLINE Vec load_row(const T* at) {
  if constexpr (std::is_same_v<T, float>) {
    return load_in_halves(at);
  } else {
    return load_units<Dot>(at);
  }
}

// Fetches ahead into L2 where arithmetic and loads compete.
template <int kRows, class T>
FASTNN_INLINE void fetch_ahead(const T* row, int64_t d) {
  if constexpr (kRows >= kDecodeShared) {
    const char* const from = reinterpret_cast<const char*>(row) + kDecodeAhead;
    for (int64_t i = 0; i < d * (int64_t)sizeof(T); i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

// A query as decode_scores takes it.
template <class Dot, class T>
FASTNN_INLINE void pack_decode_query(const T* x, int64_t d, float* out) {
  constexpr int64_t kWide = kLanes * Dot::kPerUnit;
  int64_t f = 0;
  for (; d - f >= kWide; f += kWide, out += kLanes) store(out, load_units<Dot>(x + f));
  if (f < d) store(out, load_units_first<Dot>(x + f, d - f));
}

// Scores s [row][kScoreStride] of `keys` keys, times scale: keys in the lanes, kLanes / kRows keys
// at once. A score is the same sum whatever kRows is.
template <class Dot, int kRows, class T>
FASTNN_INLINE void decode_scores(const float* q, int64_t q_stride, const T* k, int64_t row_stride,
                                 int64_t d, int64_t keys, float scale, float* s) {
  constexpr int kGroup = kLanes >= kRows ? kLanes / kRows : 1;
  constexpr int64_t kWide = kLanes * Dot::kPerUnit;
  // Loads of the queries count too where they are shared by few keys: then all keys of the group
  // meet a vector of them. A key at a time otherwise, in the order of addresses.
  constexpr int kTogether = kRows >= kDecodeShared ? kGroup : 1;
  const int64_t whole = d / kWide * kWide;
  for (int64_t j = 0; j < keys; j += kGroup) {
    Vec sums[kRows * kGroup];
    FASTNN_UNROLL for (int i = 0; i < kRows * kGroup; ++i) sums[i] = zero();
    FASTNN_UNROLL for (int i = 0; i < kGroup; i += kTogether) {
      const T* rows[kTogether];
      FASTNN_UNROLL for (int n = 0; n < kTogether; ++n) {
        rows[n] = k + (j + i + n < keys ? j + i + n : keys - 1) * row_stride;
        fetch_ahead<kRows>(rows[n], d);
      }
      auto add = [&](int64_t f, auto get) __attribute__((always_inline)) {
        Vec x[kTogether];
        FASTNN_UNROLL for (int n = 0; n < kTogether; ++n) x[n] = get(rows[n] + f);
        FASTNN_UNROLL for (int g = 0; g < kRows; ++g) {
          const Vec y = load(q + g * q_stride + f / Dot::kPerUnit);
          FASTNN_UNROLL for (int n = 0; n < kTogether; ++n) {
            Vec& sum = sums[g * kGroup + i + n];
            sum = Dot::dot(sum, x[n], y);
          }
        }
      };
      for (int64_t f = 0; f < whole; f += kWide)
        add(f, [](const T* at) __attribute__((always_inline)) { return load_row<Dot>(at); });
      if (whole < d) {
        add(whole, [=](const T* at) __attribute__((always_inline)) {
          return load_units_first<Dot>(at, d - whole);
        });
      }
    }
    if constexpr (kRows * kGroup == kLanes) {
      const Vec total = sum_each(sums) * scale;
      FASTNN_UNROLL for (int g = 0; g < kRows; ++g) {
        std::memcpy(s + g * kScoreStride + j, reinterpret_cast<const float*>(&total) + g * kGroup,
                    kGroup * 4);
      }
    } else {
      FASTNN_UNROLL for (int g = 0; g < kRows; ++g) s[g * kScoreStride + j] =
          sum_lanes(sums[g]) * scale;
    }
  }
}

// o [row][o_stride] += weights [row][kScoreStride] (in pairs of keys where products take pairs)
// times V, for kVecs vectors of features; of the last ones, kWide together, `count` exist. Pairs
// leave the features in interleave_halves' order. `fetch` features of each row are fetched ahead.
template <int kRows, int kVecs, class T>
FASTNN_INLINE void decode_output(const float* weights, const T* v, int64_t row_stride, int64_t keys,
                                 int count, int64_t fetch, float* o, int64_t o_stride) {
  using Dot = ValueDot<T>;
  constexpr int kUnit = Dot::kPerUnit;
  constexpr int kWide = kLanes * kUnit;
  Vec sums[kRows][kVecs];
  FASTNN_UNROLL for (int g = 0; g < kRows; ++g) {
    FASTNN_UNROLL for (int i = 0; i < kVecs; ++i) sums[g][i] = load(o + g * o_stride + i * kLanes);
  }
  auto add = [&](int64_t j, auto get, auto last) __attribute__((always_inline)) {
    const T* const row = v + j * row_stride;
    FASTNN_UNROLL for (int n = 0; n < kUnit; ++n) fetch_ahead<kRows>(row + n * row_stride, fetch);
    FASTNN_UNROLL for (int i = 0; i < kVecs; i += kUnit) {
      const T* const at = row + i * kLanes;
      auto of = [&](const T* from) __attribute__((always_inline)) {
        return i == kVecs - kUnit ? get(from) : load_row<Dot>(from);
      };
      Vec x[kUnit] = {of(at)};
      if constexpr (kUnit == 2) {
        const Vec odd = last ? zero() : of(at + row_stride);
        x[1] = interleave_halves<true>(x[0], odd);
        x[0] = interleave_halves<false>(x[0], odd);
      }
      FASTNN_UNROLL for (int g = 0; g < kRows; ++g) {
        const Vec w = splat(weights[g * kScoreStride + j / kUnit]);
        FASTNN_UNROLL for (int n = 0; n < kUnit; ++n) sums[g][i + n] =
            Dot::dot(sums[g][i + n], x[n], w);
      }
    }
  };
  auto add_all = [&](auto get) __attribute__((always_inline)) {
    const int64_t whole = keys / kUnit * kUnit;
    for (int64_t j = 0; j < whole; j += kUnit) add(j, get, std::false_type{});
    if (whole < keys) add(whole, get, std::true_type{});
  };
  if (count == kWide) {
    add_all([](const T* at) __attribute__((always_inline)) { return load_row<Dot>(at); });
  } else {
    add_all([=](const T* at)
                __attribute__((always_inline)) { return load_units_first<Dot>(at, count); });
  }
  FASTNN_UNROLL for (int g = 0; g < kRows; ++g) {
    FASTNN_UNROLL for (int i = 0; i < kVecs; ++i) store(o + g * o_stride + i * kLanes, sums[g][i]);
  }
}

template <int kRows, int kVecs, class T>
FASTNN_INLINE void decode_turn(const float* weights, const T* v, int64_t row_stride, int64_t keys,
                               int64_t d, int64_t fetch, float* o, int64_t o_stride) {
  constexpr int kWide = kLanes * ValueDot<T>::kPerUnit;
  int64_t f = 0;
  for (; d - f >= kVecs * kLanes; f += kVecs * kLanes, fetch = 0) {
    decode_output<kRows, kVecs>(weights, v + f, row_stride, keys, kWide, fetch, o + f, o_stride);
  }
  if (f == d) return;
  if constexpr (kVecs * kLanes > kWide) {
    decode_turn<kRows, kVecs / 2>(weights, v + f, row_stride, keys, d - f, fetch, o + f, o_stride);
  } else {
    decode_output<kRows, kVecs>(weights, v + f, row_stride, keys, (int)(d - f), fetch, o + f,
                                o_stride);
  }
}

// o += weights times V, all its features. As many rows at once as fill the registers with sums of
// few features of V would read it in pieces that no prefetcher follows: from memory, 15 GB/s of 30.
// So two rows at once sum up 8 vectors of features, in the order of addresses, and what they read
// is in L1 when it is the next ones' turn. Pairs of bfloat16 have half as much to read.
template <int kRows, class T>
FASTNN_INLINE void decode_outputs(const float* weights, const T* v, int64_t row_stride,
                                  int64_t keys, int64_t d, float* o, int64_t o_stride) {
  constexpr bool kTurns = kRows >= kDecodeShared && ValueDot<T>::kPerUnit == 1;
  constexpr int kTogether = kTurns ? 2 : kRows;
  constexpr int64_t kTurnKeys = kTurns ? kDecodeTurnKeys : kDecodeKeys;
  constexpr int kSums = (kLanes == 16 ? 16 : 8) / kTogether;
  for (int64_t j = 0; j < keys; j += kTurnKeys) {
    const int64_t count = keys - j < kTurnKeys ? keys - j : kTurnKeys;
    for (int g = 0; g < kRows; g += kTogether) {
      decode_turn<kTogether, (kSums > 8 ? 8 : kSums)>(weights + g * kScoreStride + j,
                                                      v + j * row_stride, row_stride, count, d, d,
                                                      o + g * o_stride, o_stride);
    }
  }
}

// The scores of one row, keys next to each other, become capped, masked scores.
inline void finish_row(const AttentionParams& p, int64_t b, DecodeRow row, int64_t j0, int64_t keys,
                       float* s) {
  if (p.softcap != 0.f) {
    for (int64_t j = 0; j < keys; j += kLanes)
      store(s + j, tanh(load(s + j) * (1.f / p.softcap)) * p.softcap);
  }
  with_mask(p.mask_kind, p.mask_dtype, p.mask, [&](const auto* mask) {
    const int64_t stride = p.mask_strides[3];
    mask += b * p.mask_strides[0] + row.head * p.mask_strides[1] + row.query * p.mask_strides[2] +
            j0 * stride;
    for (int64_t j = 0; j < keys; ++j) s[j] += to_float(mask[j * stride]);
  });
  const int64_t stands = p.position + row.query - j0;
  const int64_t from = p.window_left >= 0 ? stands - p.window_left : 0;
  const int64_t to = p.window_right >= 0 ? stands + p.window_right + 1 : keys;
  for (int64_t j = 0; j < from && j < keys; ++j) s[j] = -__builtin_inff();
  for (int64_t j = to < 0 ? 0 : to; j < keys; ++j) s[j] = -__builtin_inff();
}

// Scores become weights e^(s - max), up to a multiple of kLanes keys, and are added to the row's
// sum. Returns what the output so far is to be multiplied by.
FASTNN_INLINE float decode_weights(float* s, int64_t keys, float* row_max, float* sum) {
  for (int64_t j = keys; j % kLanes != 0; ++j) s[j] = -__builtin_inff();
  const Vec before = splat(*row_max);
  Vec m[2] = {before, before};
  for (int64_t j = 0; j < keys; j += kLanes)
    m[j / kLanes & 1] = max(load(s + j), m[j / kLanes & 1]);
  // max_lanes may drop NaN, which the sum then keeps: every weight of a NaN score is NaN.
  const float after = max_lanes(max(m[0], m[1]));
  const float top = after == -__builtin_inff() ? 0.f : after;
  Vec total = zero();
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vec e = exp(load(s + j) - splat(top));
    store(s + j, e);
    total += e;
  }
  const float correction = exp(splat(*row_max - top))[0];
  *sum = *sum * correction + sum_lanes(total);
  *row_max = after;
  return correction;
}

// Rows [row, row + kRows) of (b, kv_head) on keys [begin, end): out is kRows times
// attention_decode_floats: output, maximum, sum.
template <int kRows, class T>
FASTNN_INLINE void decode_rows(const AttentionParams& p, int64_t b, int64_t kv_head, int64_t row,
                               int64_t begin, int64_t end, float* out, float* scratch) {
  const int64_t stride = attention_decode_floats(p), q_stride = padded_features(p.D);
  float* const q = scratch;
  float* const s = q + kRows * q_stride;
  DecodeRow rows[kRows];
  int64_t first = 0, last = 0;
  for (int g = 0; g < kRows; ++g) {
    rows[g] = decode_row(p, kv_head, row + g);
    const int64_t stands = p.position + rows[g].query;
    first = g == 0 || stands < first ? stands : first;
    last = g == 0 || stands > last ? stands : last;
    const T* const x = head_data<T>(p.q, b, rows[g].head) + rows[g].query * p.q.row_stride;
    pack_decode_query<KeyDot<kRows, T>>(x, p.D, q + g * q_stride);
    float* const o = out + g * stride;
    for (int64_t f = 0; f < stride; f += kLanes) store(o + f, zero());
    o[stride - kStrip] = -__builtin_inff();
  }
  // What none of the rows sees need not be read.
  if (p.window_left >= 0 && first - p.window_left > begin) begin = first - p.window_left;
  if (p.window_right >= 0 && last + p.window_right + 1 < end) end = last + p.window_right + 1;
  const T* const k = head_data<T>(p.k, b, kv_head);
  const T* const v = head_data<T>(p.v, b, kv_head);
  constexpr bool kPairs = ValueDot<T>::kPerUnit == 2;
  constexpr int64_t kBlock = kRows >= kDecodeShared ? kDecodeSharedKeys : kDecodeKeys;
  for (int64_t j0 = begin; j0 < end; j0 += kBlock) {
    const int64_t keys = end - j0 < kBlock ? end - j0 : kBlock;
    decode_scores<KeyDot<kRows, T>, kRows>(q, q_stride, k + j0 * p.k.row_stride, p.k.row_stride,
                                           p.D, keys, p.scale, s);
    for (int g = 0; g < kRows; ++g) {
      float* const o = out + g * stride;
      float* const row_scores = s + g * kScoreStride;
      finish_row(p, b, rows[g], j0, keys, row_scores);
      float* const row_max = o + stride - kStrip;
      const float correction = decode_weights(row_scores, keys, row_max, row_max + 1);
      if (correction != 1.f) {
        for (int64_t f = 0; f < decode_features(p); f += kLanes)
          store(o + f, load(o + f) * correction);
      }
      if (p.dropout > 0.f) drop_query(p, b, rows[g].head, rows[g].query, j0, keys, row_scores);
      if constexpr (kPairs) {  // in place: what is written has been read
        auto* const rounded = reinterpret_cast<BFloat16*>(row_scores);
        for (int64_t j = 0; j < keys; j += kLanes) store(rounded + j, load(row_scores + j));
      }
    }
    decode_outputs<kRows>(s, v + j0 * p.v.row_stride, p.v.row_stride, keys, p.D_v, out, stride);
  }
  if constexpr (kPairs) {
    for (int g = 0; g < kRows; ++g) {
      for (float* o = out + g * stride; o < out + g * stride + decode_features(p);
           o += 2 * kLanes) {
        const Vec low = load(o), high = load(o + kLanes);
        store(o, separate_halves<false>(low, high));
        store(o + kLanes, separate_halves<true>(low, high));
      }
    }
  }
}

// Keys [begin, end) of item (batch entry, key head): all its rows.
void attention_decode(const AttentionParams& p, int64_t item, int64_t begin, int64_t end,
                      float* out, float* scratch) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t b = item / p.H_kv, kv_head = item % p.H_kv;
    const int64_t rows = attention_decode_rows(p), floats = attention_decode_floats(p);
    int64_t row = 0;
    auto take = [&](auto count) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      for (; rows - row >= kRows; row += kRows)
        decode_rows<kRows, T>(p, b, kv_head, row, begin, end, out + row * floats, scratch);
    };
    take(std::integral_constant<int, kDecodeRows>{});
    take(std::integral_constant<int, 4>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
  });
}

// The parts of an item, each rows x attention_decode_floats and next to each other, to the output.
// The first one is used up.
void attention_decode_merge(const AttentionFwdParams& f, int64_t item, int64_t parts,
                            float* partial) {
  const AttentionParams& p = f.a;
  const int64_t rows = attention_decode_rows(p), floats = attention_decode_floats(p);
  const int64_t features = decode_features(p);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t b = item / p.H_kv, kv_head = item % p.H_kv;
    for (int64_t row = 0; row < rows; ++row) {
      float* const o = partial + row * floats;
      float max = o[features], sum = o[features + 1];
      for (int64_t part = 1; part < parts; ++part) {
        const float* const other = partial + (part * rows + row) * floats;
        const float other_max = other[features];
        const float after = other_max > max ? other_max : max;
        const float top = after == -__builtin_inff() ? 0.f : after;
        const float mine = exp(splat(max - top))[0], theirs = exp(splat(other_max - top))[0];
        for (int64_t i = 0; i < features; i += kLanes)
          store(o + i, fma(load(other + i), splat(theirs), load(o + i) * mine));
        sum = sum * mine + other[features + 1] * theirs;
        max = after;
      }
      const DecodeRow r = decode_row(p, kv_head, row);
      const bool none = sum == 0.f;
      const float factor = none ? 0.f : 1.f / sum;
      T* const out = static_cast<T*>(f.out) + b * f.out_batch_stride + r.head * f.out_head_stride +
                     r.query * f.out_row_stride;
      for (int64_t i = 0; i < p.D_v; i += kLanes)
        store_some(out + i, load(o + i) * factor, p.D_v - i < kLanes ? (int)(p.D_v - i) : kLanes);
      if (f.lse != nullptr) {
        f.lse[(b * p.H + r.head) * p.lse_head_stride + r.query] =
            none ? __builtin_inff() : max + log(splat(sum))[0];
      }
    }
  });
}

}  // namespace
}  // namespace fastnn
