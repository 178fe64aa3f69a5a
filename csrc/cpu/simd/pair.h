// Two vectors of neighbouring elements at once, for operations that treat every element alone: a
// pair of bfloat16 is two float32 after a shift and a mask, and one again after a shift and a mask,
// so vectors of the even and of the odd elements cost half of what neighbours do.
#pragma once
#include "cpu/simd/lanes.h"
#include "cpu/simd/stream.h"

namespace fastnn {
namespace {

// Whether results of this type may take an activation's rough form (simd/activation.h).
template <class T>
constexpr bool kRoughFor = sizeof(T) == 2;

template <class T>
FASTNN_INLINE const T* row_of(const void* data, int64_t row, int64_t stride) {
  return static_cast<const T*>(data) + row * stride;
}
template <class T>
FASTNN_INLINE T* row_or_null(void* data, int64_t row, int64_t stride) {
  return data == nullptr ? nullptr : static_cast<T*>(data) + row * stride;
}

// 2 kLanes elements of 16 bits as they lie; as many ones of bfloat16, with which dot_bf16_pairs
// adds them up.
template <class T>
FASTNN_INLINE Vec packed(const T* p) {
  return load(reinterpret_cast<const float*>(p));
}
FASTNN_INLINE Vec bf16_ones() { return as_float(splat_int(0x3f803f80)); }

template <class T>
FASTNN_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else {
    return widen(narrow(v, T{}), T{});
  }
}

// Vectors of 2 kLanes elements in an order of their type's own, which put() undoes; in memory's
// order where kOrdered.
template <bool kOrdered>
struct Pair {
  static constexpr int kVectors = 2;

  template <class T>
  FASTNN_INLINE void get(const T* p, Vec (&v)[2]) const {
    v[0] = load(p);
    v[1] = load(p + kLanes);
  }
  FASTNN_INLINE void get(const BFloat16* p, Vec (&v)[2]) const {
    if constexpr (kOrdered) {
      get<BFloat16>(p, v);
    } else {
      IVec both;
      std::memcpy(&both, p, sizeof both);
      unpack(both, v);
    }
  }

  // What put() writes, as get() reads it.
  template <class T>
  FASTNN_INLINE void round(T, Vec (&v)[2]) const {
    v[0] = rounded<T>(v[0]);
    v[1] = rounded<T>(v[1]);
  }
  FASTNN_INLINE void round(BFloat16, Vec (&v)[2]) const {
    if constexpr (kOrdered) {
      v[0] = rounded<BFloat16>(v[0]);
      v[1] = rounded<BFloat16>(v[1]);
    } else {
      unpack((IVec)bf16_pairs(v[0], v[1]), v);
    }
  }
  // Of each vector.
  FASTNN_INLINE int lanes() const { return kLanes; }
  // Zeros where there are no elements.
  FASTNN_INLINE Vec keep(Vec v) const { return v; }

  template <bool kStream, class T>
  FASTNN_INLINE void put(T* p, const Vec (&v)[2]) const {
    fastnn::put<kStream>(p, v[0]);
    fastnn::put<kStream>(p + kLanes, v[1]);
  }
  template <bool kStream>
  FASTNN_INLINE void put(BFloat16* p, const Vec (&v)[2]) const {
    if constexpr (kOrdered) {
      put<kStream, BFloat16>(p, v);
    } else {
      fastnn::put<kStream>(reinterpret_cast<float*>(p), bf16_pairs(v[0], v[1]));
    }
  }

 private:
  static FASTNN_INLINE void unpack(IVec both, Vec (&v)[2]) {
    v[0] = as_float(both << 16);
    v[1] = as_float(both & (int32_t)0xffff0000);
  }
};

// The first `count` lanes of one vector.
struct Some {
  static constexpr int kVectors = 1;
  int count;
  template <class T>
  FASTNN_INLINE void get(const T* p, Vec (&v)[1]) const {
    v[0] = load_some(p, count);
  }
  template <class T>
  FASTNN_INLINE void round(T, Vec (&v)[1]) const {
    v[0] = rounded<T>(v[0]);
  }
  FASTNN_INLINE int lanes() const { return count; }
  FASTNN_INLINE Vec keep(Vec v) const { return keep_first(v, count); }
  template <bool kStream, class T>
  FASTNN_INLINE void put(T* p, const Vec (&v)[1]) const {
    if (count == kLanes) {
      fastnn::put<kStream>(p, v[0]);
    } else {
      store_first(p, v[0], count);
    }
  }
};

// A part written past the caches, or not.
template <class Part, class T, int V>
FASTNN_INLINE void put_part(Part part, bool stream, T* p, const Vec (&v)[V]) {
  if (stream) {
    part.template put<true>(p, v);
  } else {
    part.template put<false>(p, v);
  }
}

// f(i, part) for every part of the columns [begin, end).
template <bool kOrdered, class F>
FASTNN_INLINE void each_part(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) f(i, Pair<kOrdered>{});
  for (; i < end; i += kLanes) f(i, Some{end - i < kLanes ? (int)(end - i) : kLanes});
}

// Float32 values that go with a row of T: from memory's order to the one in which Pair<false> has
// the row's elements, in place; and back.
template <class T>
FASTNN_INLINE void order_pairs(float*, int64_t) {}
template <class T>
FASTNN_INLINE void restore_pairs(float*, int64_t) {}
template <int... I>
FASTNN_INLINE void order_pair(float* p, std::integer_sequence<int, I...>) {
  const Vec a = load(p), b = load(p + kLanes);
  store(p, __builtin_shufflevector(a, b, (2 * I)...));
  store(p + kLanes, __builtin_shufflevector(a, b, (2 * I + 1)...));
}
template <>
inline void order_pairs<BFloat16>(float* values, int64_t n) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int64_t i = 0; i + 2 * kLanes <= n; i += 2 * kLanes) order_pair(values + i, lanes);
}
template <>
inline void restore_pairs<BFloat16>(float* values, int64_t n) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  for (int64_t i = 0; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Vec even = load(values + i), odd = load(values + i + kLanes);
    store(values + i, interleave_low(even, odd, lanes));
    store(values + i + kLanes, interleave_high(even, odd, lanes));
  }
}

// N sums over a row at once, by blocks as row_sum (kernels/rows.h): f(i, part, sums) adds the terms
// of a part to the sums of each of its vectors, nothing for lanes without an element.
template <int N, class F>
FASTNN_INLINE void part_sums(int64_t n, float (&sum)[N], F f) {
  constexpr int64_t kPair = 2 * kLanes, kStep = 2 * kPair, kLeast = 16 * kStep;
  const int64_t block = n <= 64 * kLeast ? kLeast : n / 64 / kStep * kStep;
  Vec total[1][N];
  FASTNN_UNROLL for (int t = 0; t < N; ++t) total[0][t] = zero();
  int64_t i = 0;
  while (i + kPair <= n) {
    const int64_t stop = i + block < n ? i + block : n;
    Vec s[2][2][N];
    FASTNN_UNROLL for (int k = 0; k < 4; ++k) {
      FASTNN_UNROLL for (int t = 0; t < N; ++t) s[k / 2][k % 2][t] = zero();
    }
    for (; i + kStep <= stop; i += kStep) {
      f(i, Pair<false>{}, s[0]);
      f(i + kPair, Pair<false>{}, s[1]);
    }
    if (i + kPair <= stop) {
      f(i, Pair<false>{}, s[0]);
      i += kPair;
    }
    FASTNN_UNROLL for (int t = 0; t < N; ++t) {
      total[0][t] += (s[0][0][t] + s[0][1][t]) + (s[1][0][t] + s[1][1][t]);
    }
  }
  for (; i < n; i += kLanes) f(i, Some{n - i < kLanes ? (int)(n - i) : kLanes}, total);
  FASTNN_UNROLL for (int t = 0; t < N; ++t) sum[t] = sum_lanes(total[0][t]);
}

}  // namespace
}  // namespace fastnn
