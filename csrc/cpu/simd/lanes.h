// Operations across the lanes of a vector: comparisons, sums, maxima, the transpose.
#pragma once
#include <utility>

#include "cpu/simd/vec.h"

namespace fastnn {
namespace {

// The first `count` lanes from memory, the rest 0; whole vectors by a plain load.
template <class T>
FASTNN_INLINE Vec load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load_first(p, count, 0.f);
}
// The first n < 2 kLanes elements of 16 bits as they lie, zeros behind them.
FASTNN_INLINE Vec load_first_halves(const void* p, int n) {
#if defined(__AVX512BW__)
  return (Vec)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p);
#else
  Vec v = zero();
  std::memcpy(&v, p, (size_t)n * 2);
  return v;
#endif
}
// The first n <= 2 kLanes elements of 16 bits to memory.
FASTNN_INLINE void store_first_halves(void* p, Vec v, int n) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(p, n >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << n) - 1, (__m512i)v);
#else
  std::memcpy(p, &v, (size_t)n * 2);
#endif
}
// The first `count` lanes to memory.
template <class T>
FASTNN_INLINE void store_some(T* p, Vec v, int count) {
  if (count == kLanes) {
    store(p, v);
  } else {
    store_first(p, v, count);
  }
}

// Element columns [n, n + count) of one row; columns may be apart (an expanded gradient has stride
// 0).
template <class T>
FASTNN_INLINE Vec load_strided(const T* row, int64_t n, int count, int64_t stride) {
  if (stride == 1) return load_some(row + n, count);
  Vec v = zero();
  for (int i = 0; i < count; ++i) v[i] = to_float(row[(n + i) * stride]);
  return v;
}

// Whether any lane of a and b differs (NaN differs from everything).
FASTNN_INLINE bool any_differs(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NEQ_UQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NEQ_UQ)) != 0;
#else
  const IVec differs = a != b;
  return (differs[0] | differs[1] | differs[2] | differs[3]) != 0;
#endif
}

// Neighbouring lanes as one number, the even one its lower half; that half times m, all 64 bits.
typedef uint64_t LanePairs __attribute__((vector_size(kLanes * 4)));
FASTNN_INLINE LanePairs multiply_low(LanePairs a, uint32_t m) {
#if defined(__AVX512F__)
  return (LanePairs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (LanePairs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * (uint64_t)m;
#endif
}

// Neighbouring lanes (0, 1), (2, 3), ... exchanged; the even ones negated.
FASTNN_INLINE Vec swap_neighbours(Vec v) {
  const LanePairs pairs = (LanePairs)v;
  return (Vec)((pairs << 32) | (pairs >> 32));
}
FASTNN_INLINE Vec negate_even(Vec v) {
  return (Vec)((LanePairs)v ^ (uint64_t)0x80000000u);  // the low half is the even lane
}

template <int... I>
FASTNN_INLINE IVec lane_numbers(std::integer_sequence<int, I...>) {
  return IVec{I...};
}
// The first n lanes; the others become `fill`.
FASTNN_INLINE Vec fill_rest(Vec v, int n, float fill) {
  if (n == kLanes) return v;
  return select(lane_numbers(std::make_integer_sequence<int, kLanes>{}) < splat_int(n), v,
                splat(fill));
}
FASTNN_INLINE Vec keep_first(Vec v, int n) { return fill_rest(v, n, 0.f); }

template <int N>
struct Narrower {
  typedef float Type __attribute__((vector_size(N * 4)));
};
// Folds halves onto each other with `op`, which must accept float vectors of any width and floats.
template <int N, int... I>
FASTNN_INLINE typename Narrower<N / 2>::Type half_of(typename Narrower<N>::Type v, bool high,
                                                     std::integer_sequence<int, I...>) {
  return high ? __builtin_shufflevector(v, v, (N / 2 + I)...) : __builtin_shufflevector(v, v, I...);
}
template <int N, class Op>
FASTNN_INLINE float fold(typename Narrower<N>::Type v, Op op) {
  if constexpr (N == 2) {
    return op(v[0], v[1]);
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, N / 2>{};
    return fold<N / 2>(op(half_of<N>(v, false, lanes), half_of<N>(v, true, lanes)), op);
  }
}
template <>
struct Narrower<1> {
  typedef float Type __attribute__((vector_size(4)));
};
FASTNN_INLINE float sum_lanes(Vec v) {
  return fold<kLanes>(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}
// NaN lanes may be dropped.
FASTNN_INLINE float max_lanes(Vec v) {
  return fold<kLanes>(v,
                      [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

template <int... I>
FASTNN_INLINE Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * kLanes)...);
}
template <int... I>
FASTNN_INLINE Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + (I % 2) * kLanes)...);
}
// r[i][j] becomes r[j][i]: log2(kLanes) rounds of interleaving row i with row i + kLanes / 2.
FASTNN_INLINE void transpose(Vec (&r)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  FASTNN_UNROLL for (int round = 1; round < kLanes; round *= 2) {
    Vec t[kLanes];
    FASTNN_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      t[2 * i] = interleave_low(r[i], r[i + kLanes / 2], lanes);
      t[2 * i + 1] = interleave_high(r[i], r[i + kLanes / 2], lanes);
    }
    FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) r[i] = t[i];
  }
}

// Pairs (even[i], odd[i]) of 16-bit halves for half of the i: of each 16 bytes the first four
// (kHigh: the last), which takes one instruction; separate_halves puts one number for each pair of
// both results back in the order of i.
typedef uint16_t Halves __attribute__((vector_size(kLanes * 4)));
template <bool kHigh, int... I>
FASTNN_INLINE Vec interleave_halves(Vec even, Vec odd, std::integer_sequence<int, I...>) {
  return (Vec)__builtin_shufflevector(
      (Halves)even, (Halves)odd,
      (I / 8 * 8 + I % 8 / 2 + (kHigh ? 4 : 0) + (I % 2) * 2 * kLanes)...);
}
template <bool kHigh>
FASTNN_INLINE Vec interleave_halves(Vec even, Vec odd) {
  return interleave_halves<kHigh>(even, odd, std::make_integer_sequence<int, 2 * kLanes>{});
}
template <bool kSecond, int... I>
FASTNN_INLINE Vec separate_halves(Vec low, Vec high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      low, high, ((kSecond ? kLanes / 2 : 0) + I / 8 * 4 + I % 4 + (I / 4 % 2) * kLanes)...);
}
template <bool kSecond>
FASTNN_INLINE Vec separate_halves(Vec low, Vec high) {
  return separate_halves<kSecond>(low, high, std::make_integer_sequence<int, kLanes>{});
}

// Lane i of the result: the sum of r[i]'s lanes. Each round adds halves of vectors while
// interleaving two, 2 (kLanes - 1) shuffles in all. Uses r up.
FASTNN_INLINE Vec sum_each(Vec (&r)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  FASTNN_UNROLL for (int n = kLanes / 2; n > 0; n /= 2) {
    FASTNN_UNROLL for (int i = 0; i < n; ++i) {
      r[i] = interleave_low(r[i], r[i + n], lanes) + interleave_high(r[i], r[i + n], lanes);
    }
  }
  return r[0];
}

}  // namespace
}  // namespace fastnn
