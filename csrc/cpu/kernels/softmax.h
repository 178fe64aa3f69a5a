// Softmax and log-softmax. Three passes over a slice that is in cache after the first: maximum,
// exponentials and their sum, result. All arithmetic in float32, whatever the storage type.
//
// inner == 1: a slice is a row, lanes run along it. inner > 1: lanes run across neighbouring
// slices, which needs no operation across lanes; a work item is a group of kGroup * kLanes slices.
#pragma once
#include "cpu/kernels/rows.h"
#include "cpu/simd/math.h"
#include "cpu/simd/pair.h"
#include "params/softmax.h"

namespace fastnn {
namespace {

constexpr int kGroup = 4;  // vectors per column group: 256 bytes of each line of slices
// Rows up to this length keep their exponentials in a float32 buffer that stays in L2; longer ones
// compute them twice.
constexpr int64_t kMaxBufferedCols = 65536;

inline int64_t softmax_items(int64_t outer, int64_t inner) {
  constexpr int64_t width = kGroup * kLanes;
  return inner == 1 ? outer : outer * ((inner + width - 1) / width);
}

template <class T>
FASTNN_INLINE float row_max(const T* x, int64_t n) {
  const Vec lowest = splat(-__builtin_inff());
  Vec m[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    FASTNN_UNROLL for (int k = 0; k < 4; ++k) m[k] = max(m[k], load(x + i + k * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) m[0] = max(m[0], load(x + i));
  if (i < n) m[1] = max(m[1], load_first(x + i, (int)(n - i), -__builtin_inff()));
  return max_lanes(max(max(m[0], m[1]), max(m[2], m[3])));
}

// Sum of e^(x - m) over a row; with kKeep the exponentials go to `kept`. A NaN anywhere, an
// infinite maximum or a row of -inf make the sum NaN, and with it the whole row, as torch has it.
//
// What is kept will be divided by the sum, so that the rounding of m log2(e), which all share, does
// not matter: fused, 2^(x log2(e) - m log2(e)) takes 5 of 16 instructions less. Not for m so large
// that the rounding comes near 1.
template <bool kKeep, class T>
FASTNN_INLINE float row_exp_sum(const T* x, float m, float* kept, int64_t n) {
  auto sum = [=](auto power) __attribute__((always_inline)) {
    return row_sum(n, [=](int64_t i, int count) __attribute__((always_inline)) {
      const Vec e = power(load_some(x + i, count));
      if constexpr (kKeep) {
        store_some(kept + i, e, count);
      }
      return e;
    });
  };
  if constexpr (kKeep && kFusedMultiplyAdd) {
    if (__builtin_fabsf(m) < 0x1p20f) {
      const Vec factor = splat(1.44269504f), top = splat(m) * factor;
      return sum([=](Vec v)
                     __attribute__((always_inline)) { return exp2<false>(fma(v, factor, -top)); });
    }
  }
  const Vec top = splat(m);
  return sum([=](Vec v) __attribute__((always_inline)) { return exp(v - top); });
}

// Exponentials that were kept, divided by their sum.
template <bool kStream, class T>
FASTNN_INLINE void row_scale(const float* kept, float sum, T* y, int64_t n) {
  const Vec scale = splat(1.f / sum);
  row_map<kStream>(y, n, [=](int64_t i, int count) __attribute__((always_inline)) {
    return load_some(kept + i, count) * scale;
  });
}

template <bool kStream, class TX, class TY>
FASTNN_INLINE void softmax_row(const TX* x, TY* y, int64_t n, bool log, float* scratch) {
  const float m = row_max(x, n);
  const Vec top = splat(m);
  if (log) {
    // (x - m) - log(sum), not x - (m + log(sum)): the latter loses what distinguishes large inputs.
    const Vec shift = fastnn::log(splat(row_exp_sum<false>(x, m, scratch, n)));
    row_map<kStream>(y, n, [=](int64_t i, int count) __attribute__((always_inline)) {
      const Vec v = load_some(x + i, count);
      return (v - top) - shift;
    });
  } else if (sizeof(TY) == 4 && !kStream) {
    float* const kept = reinterpret_cast<float*>(y);
    row_scale<false>(kept, row_exp_sum<true>(x, m, kept, n), kept, n);
  } else if (n <= kMaxBufferedCols) {
    row_scale<kStream>(scratch, row_exp_sum<true>(x, m, scratch, n), y, n);
  } else {
    const Vec scale = splat(1.f / row_exp_sum<false>(x, m, scratch, n));
    row_map<kStream>(y, n, [=](int64_t i, int count) __attribute__((always_inline)) {
      const Vec v = load_some(x + i, count);
      return exp(v - top) * scale;
    });
  }
}

// Up to kGroup vectors of neighbouring slices, the last one with `tail` lanes (kLanes: whole).
template <int V>
struct Columns {
  int tail;
  template <class T>
  FASTNN_INLINE Vec at(const T* p, int v) const {
    return v < V - 1 || tail == kLanes ? load(p + v * kLanes)
                                       : load_first(p + v * kLanes, tail, 0.f);
  }
  template <class T>
  FASTNN_INLINE void put(T* p, int v, Vec x) const {
    if (v < V - 1 || tail == kLanes) {
      store(p + v * kLanes, x);
    } else {
      store_first(p + v * kLanes, x, tail);
    }
  }
};

template <int V, class TX, class TY>
FASTNN_INLINE void softmax_columns(const TX* x, TY* y, int64_t n, int64_t inner, Columns<V> columns,
                                   bool log) {
  Vec m[V], s[V];
  FASTNN_UNROLL for (int v = 0; v < V; ++v) {
    m[v] = splat(-__builtin_inff());
    s[v] = zero();
  }
  for (int64_t i = 0; i < n; ++i) {
    FASTNN_UNROLL for (int v = 0; v < V; ++v) m[v] = max(m[v], columns.at(x + i * inner, v));
  }
  for (int64_t i = 0; i < n; ++i) {
    FASTNN_UNROLL for (int v = 0; v < V; ++v) s[v] += exp(columns.at(x + i * inner, v) - m[v]);
  }
  FASTNN_UNROLL for (int v = 0; v < V; ++v) s[v] = log ? fastnn::log(s[v]) : 1.f / s[v];
  for (int64_t i = 0; i < n; ++i) {
    FASTNN_UNROLL for (int v = 0; v < V; ++v) {
      const Vec shifted = columns.at(x + i * inner, v) - m[v];
      columns.put(y + i * inner, v, log ? shifted - s[v] : exp(shifted) * s[v]);
    }
  }
}

// Calls f(Columns<V>, offset of the group's first slice in the tensor) for item `item` of
// softmax_items.
template <class F>
FASTNN_INLINE void with_columns(int64_t item, int64_t cols, int64_t inner, F f) {
  constexpr int64_t width = kGroup * kLanes;
  const int64_t groups = (inner + width - 1) / width;
  const int64_t first = item % groups * width;
  int64_t offset = item / groups * cols * inner + first;
  int64_t left = inner - first < width ? inner - first : width;
  if (left > kLanes * (kGroup - 1)) {
    f(Columns<kGroup>{(int)(left - kLanes * (kGroup - 1))}, offset);
    return;
  }
  for (; left > 0; left -= kLanes, offset += kLanes) {
    f(Columns<1>{(int)(left < kLanes ? left : kLanes)}, offset);
  }
}

template <class TX, class TY>
void softmax_fwd_typed(const SoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  const TX* const x = static_cast<const TX*>(p.x);
  TY* const y = static_cast<TY*>(p.y);
  if (p.inner == 1) {
    with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
      for (int64_t r = begin; r < end; ++r) {
        softmax_row<decltype(stream)::value>(x + r * p.x_row_stride, y + r * p.cols, p.cols, p.log,
                                             scratch);
      }
    });
    return;
  }
  for (int64_t item = begin; item < end; ++item) {
    with_columns(item, p.cols, p.inner,
                 [&](auto columns, int64_t offset) __attribute__((always_inline)) {
                   softmax_columns(x + offset, y + offset, p.cols, p.inner, columns, p.log);
                 });
  }
}

// The types of a pair: equal, or half precision on one side and float32 on the other.
template <class F>
FASTNN_INLINE void with_type_pair(DType half_side, DType other, F f) {
  with_type(half_side, [&](auto a) __attribute__((always_inline)) {
    if (other == half_side) {
      f(a, a);
    } else {
      f(a, float{});
    }
  });
}

inline void softmax_fwd(const SoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  with_type_pair(p.x_dtype, p.y_dtype, [&](auto x, auto y) {
    softmax_fwd_typed<decltype(x), decltype(y)>(p, begin, end, scratch);
  });
}

// dx = y (dy - sum(dy y)) or, of the logarithm, dx = dy - e^y sum(dy).
FASTNN_INLINE Vec softmax_slope(Vec dy, Vec y, Vec sum, bool log) {
  return log ? dy - exp(y) * sum : (dy - sum) * y;
}

// Rows up to this length are fetched into L2: of the result for writing during the first pass,
// which waits for memory anyway (1.1 times as fast in float32, 1.2 in bfloat16, where they come
// from memory), and the next row's operands during the second, which does not (1.05 to 1.13 times
// in bfloat16, from L3).
constexpr int64_t kFetchedBytes = 256 << 10;

template <class Part, class T>
FASTNN_INLINE void fetch_part(Part, const T* p) {
  constexpr int kBytes = Part::kVectors * kLanes * (int)sizeof(T);
  FASTNN_UNROLL for (int at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + at, 0, 2);
  }
}

template <bool kStream, bool kLog, class TY, class TX>
FASTNN_INLINE void softmax_bwd_row(const TY* dy, const TY* y, TX* dx, int64_t n, float scale,
                                   const TY* next_dy, const TY* next_y) {
  constexpr bool kDots = kHasBf16Dot && std::is_same_v<TY, BFloat16>;
  const bool fetch = !kStream && n * (int64_t)sizeof(TX) <= kFetchedBytes;
  const bool fetch_next = n * (int64_t)sizeof(TY) <= kFetchedBytes;
  float found[1];
  part_sums<1>(n, found, [=](int64_t i, auto part, auto& s) __attribute__((always_inline)) {
    if (fetch) {
      FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
        __builtin_prefetch(dx + i + v * kLanes, 1, 2);
      }
    }
    if constexpr (kDots && part.kVectors == 2) {
      s[0][0] = dot_bf16_pairs(s[0][0], packed(dy + i), kLog ? bf16_ones() : packed(y + i));
      return;
    }
    Vec g[part.kVectors], w[part.kVectors];
    part.get(dy + i, g);
    part.get(y + i, w);
    FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
      s[v][0] = kLog ? s[v][0] + g[v] : fma(g[v], w[v], s[v][0]);
    }
  });
  const Vec sum = splat(found[0]), factor = splat(scale);
  each_part<!std::is_same_v<TY, TX>>(0, n,
                                     [=](int64_t i, auto part) __attribute__((always_inline)) {
                                       if (fetch_next) {
                                         fetch_part(part, next_dy + i);
                                         fetch_part(part, next_y + i);
                                       }
                                       Vec g[part.kVectors], w[part.kVectors];
                                       part.get(dy + i, g);
                                       part.get(y + i, w);
                                       FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
                                         g[v] = softmax_slope(g[v], w[v], sum, kLog) * factor;
                                       }
                                       part.template put<kStream>(dx + i, g);
                                     });
}

template <int V, class TY, class TX>
FASTNN_INLINE void softmax_bwd_columns(const TY* dy, const TY* y, TX* dx, int64_t n, int64_t inner,
                                       Columns<V> columns, bool log) {
  Vec s[V];
  FASTNN_UNROLL for (int v = 0; v < V; ++v) s[v] = zero();
  for (int64_t i = 0; i < n; ++i) {
    FASTNN_UNROLL for (int v = 0; v < V; ++v) {
      const Vec g = columns.at(dy + i * inner, v);
      s[v] = log ? s[v] + g : fma(g, columns.at(y + i * inner, v), s[v]);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    FASTNN_UNROLL for (int v = 0; v < V; ++v) {
      const Vec g = columns.at(dy + i * inner, v), w = columns.at(y + i * inner, v);
      columns.put(dx + i * inner, v, softmax_slope(g, w, s[v], log));
    }
  }
}

template <class TY, class TX>
void softmax_bwd_typed(const SoftmaxBwdParams& p, int64_t begin, int64_t end) {
  const TY* const dy = static_cast<const TY*>(p.dy);
  const TY* const y = static_cast<const TY*>(p.y);
  TX* const dx = static_cast<TX*>(p.dx);
  if (p.inner == 1) {
    auto rows = [&](auto stream, auto log) __attribute__((always_inline)) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t next = r + 1 < end ? r + 1 : r;
        softmax_bwd_row<decltype(stream)::value, decltype(log)::value>(
            dy + r * p.dy_row_stride, y + r * p.cols, dx + r * p.cols, p.cols, p.scale,
            dy + next * p.dy_row_stride, y + next * p.cols);
      }
    };
    with_stream(p.stream, [&](auto stream) __attribute__((always_inline)) {
      p.log ? rows(stream, std::true_type{}) : rows(stream, std::false_type{});
    });
    return;
  }
  for (int64_t item = begin; item < end; ++item) {
    with_columns(item, p.cols, p.inner,
                 [&](auto columns, int64_t offset) __attribute__((always_inline)) {
                   softmax_bwd_columns(dy + offset, y + offset, dx + offset, p.cols, p.inner,
                                       columns, p.log);
                 });
  }
}

inline void softmax_bwd(const SoftmaxBwdParams& p, int64_t begin, int64_t end) {
  with_type_pair(p.dx_dtype, p.y_dtype, [&](auto dx, auto y) {
    softmax_bwd_typed<decltype(y), decltype(dx)>(p, begin, end);
  });
}

}  // namespace
}  // namespace fastnn
