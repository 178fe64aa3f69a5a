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
      v[0] = as_float(both << 16);
      v[1] = as_float(both & (int32_t)0xffff0000);
    }
  }

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
};

// The first `count` lanes of one vector.
struct Some {
  static constexpr int kVectors = 1;
  int count;
  template <class T>
  FASTNN_INLINE void get(const T* p, Vec (&v)[1]) const {
    v[0] = load_some(p, count);
  }
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

}  // namespace
}  // namespace fastnn
