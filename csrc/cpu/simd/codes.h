// Codes of 8 bits: their dot products, and how values become codes.
#pragma once
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

FASTNN_INLINE IVec load_ints(const int32_t* p) {
  IVec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTNN_INLINE IVec max_ints(IVec a, IVec b) { return a > b ? a : b; }

#if defined(__AVX512VNNI__)
constexpr bool kHasCodeDot = true;
#else
constexpr bool kHasCodeDot = false;
#endif

// c + the dot products of neighbouring quads: a's bytes unsigned, b's signed, sums int32. Exact on
// every instruction set: where there is no such instruction, bytes are widened to 16 bits, because
// the product of bytes that saturates at 16 (vpmaddubsw) loses up to half of a sum.
FASTNN_INLINE Vec dot_code_quads(Vec c, Vec a, Vec b) {
#if defined(__AVX512VNNI__)
  return (Vec)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  const __m512i x = (__m512i)a, w = (__m512i)b;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(x, _mm512_set1_epi16(0xff)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(x, 8), _mm512_srai_epi16(w, 8));
  return (Vec)_mm512_add_epi32(_mm512_add_epi32((__m512i)c, even), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, w = (__m256i)b;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
  return (Vec)_mm256_add_epi32(_mm256_add_epi32((__m256i)c, even), odd);
#elif defined(__SSE2__)
  const __m128i x = (__m128i)a, w = (__m128i)b;
  const __m128i even = _mm_madd_epi16(_mm_and_si128(x, _mm_set1_epi16(0xff)),
                                      _mm_srai_epi16(_mm_slli_epi16(w, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(w, 8));
  return (Vec)_mm_add_epi32(_mm_add_epi32((__m128i)c, even), odd);
#else
  const UVec x = (UVec)a, w = (UVec)b;
  UVec sum = (UVec)c;
  FASTNN_UNROLL for (int byte = 0; byte < 4; ++byte) {
    const IVec value = (IVec)(w << (24 - 8 * byte)) >> 24;
    sum += ((x >> (8 * byte)) & 0xffu) * (UVec)value;
  }
  return (Vec)sum;
#endif
}

// The nearest integer, ties to even, for |x| < 2^23.
FASTNN_INLINE IVec nearest_int(Vec x) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (IVec)_mm_cvtps_epi32((__m128)x);
#else
  const Vec magic = splat(0x1p23f);  // adding it to a magnitude drops the fraction
  return __builtin_convertvector(copysign((abs(x) + magic) - magic, x), IVec);
#endif
}

// The first `count` codes of v, each in [-128, 127], as bytes with the bits of `flip` flipped: 0x80
// adds 128.
FASTNN_INLINE void store_codes(uint8_t* p, IVec v, int count, uint8_t flip) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8((__m512i)v), _mm_set1_epi8((char)flip));
  _mm_mask_storeu_epi8(p, (__mmask16)((1u << count) - 1), bytes);
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)v;
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i bytes = _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8((char)flip));
  if (count == kLanes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  } else {
    std::memcpy(p, &bytes, (size_t)count);
  }
#else
  for (int i = 0; i < count; ++i) p[i] = (uint8_t)((uint8_t)v[i] ^ flip);
#endif
}

// As store_codes, all codes of v[0], v[1] and so on next to each other.
constexpr int kCodeVecs = 4;
FASTNN_INLINE void store_code_vecs(uint8_t* p, const IVec (&v)[kCodeVecs], uint8_t flip) {
#if defined(__AVX512BW__)
  const __m512i low = _mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]);
  const __m512i high = _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
  _mm512_storeu_si512(p, _mm512_xor_si512(bytes, _mm512_set1_epi8((char)flip)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_xor_si256(bytes, _mm256_set1_epi8((char)flip)));
#else
  for (int i = 0; i < kCodeVecs; ++i) store_codes(p + i * kLanes, v[i], kLanes, flip);
#endif
}

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr float kLeastScale = 0x1p-126f;  // its reciprocal is finite; a row of zeros has this one
constexpr float kMaxCode = 127.f;

// The bits of the largest magnitude of row[first .. first + n), which are in its order; at least
// those of infinity where one is infinite or NaN.
template <class T>
FASTNN_INLINE int32_t largest_magnitude_bits(const T* row, int64_t first, int64_t n,
                                             int64_t stride) {
  constexpr int kWide = 4;
  IVec top[kWide] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kWide * kLanes <= n; i += kWide * kLanes) {
      FASTNN_UNROLL for (int v = 0; v < kWide; ++v) {
        top[v] = max_ints(top[v], as_int(abs(load(row + first + i + v * kLanes))));
      }
    }
  }
  for (; i < n; i += kLanes) {
    const int count = n - i < kLanes ? (int)(n - i) : kLanes;
    top[0] = max_ints(top[0], as_int(abs(load_strided(row, first + i, count, stride))));
  }
  const IVec all = max_ints(max_ints(top[0], top[1]), max_ints(top[2], top[3]));
  const Vec values = as_float(all);
  if (any_differs(values - values, zero())) return kInfinityBits;
  const float largest = max_lanes(values);
  int32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  return bits;
}

// The scale of values up to `bits` (as largest_magnitude_bits gives them, finite) as codes of 8
// bits.
FASTNN_INLINE float code_scale(int32_t bits) {
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float one = largest / kMaxCode;
  return one > kLeastScale ? one : kLeastScale;
}

}  // namespace
}  // namespace fastnn
