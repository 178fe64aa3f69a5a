// One vector interface for all instruction sets: compiler vector extensions, and a few helpers
// where the compiler does not find the instruction by itself. The only place where an instruction
// set is named.
//
// Everything is in an anonymous namespace: each cpu/kernels/*.cpp is compiled once per instruction
// set with its flags, and none of it may be visible to the linker (csrc/tools/check_fence.py).
#pragma once
#include <cstdint>
#include <cstring>

#include "params/common.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside g++ 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define FASTNN_INLINE inline __attribute__((always_inline))
#define FASTNN_UNROLL _Pragma("GCC unroll 32")

namespace fastnn {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // 16-byte vectors: SSE2 and the Arm baseline have them
#endif

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

// What the compiler was told, not what somebody calls it: a run that claims another set than it
// used shows up in tests.
#if defined(__AVX512BF16__)
constexpr const char* kIsaName = "avx512_bf16";
#elif defined(__AVX512VNNI__)
constexpr const char* kIsaName = "avx512_vnni";
#elif defined(__AVX512F__)
constexpr const char* kIsaName = "avx512";
#elif defined(__AVX2__)
constexpr const char* kIsaName = "avx2";
#else
constexpr const char* kIsaName = "scalar";
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half16 __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTNN_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}
FASTNN_INLINE IVec splat_int(int32_t x) { return x - IVec{}; }
FASTNN_INLINE Vec zero() { return Vec{}; }
FASTNN_INLINE IVec as_int(Vec x) { return (IVec)x; }
FASTNN_INLINE Vec as_float(IVec x) { return (Vec)x; }
FASTNN_INLINE Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// a * b + c, fused where the instruction set has it. Explicit, because contraction by the compiler
// is off (-ffp-contract=off): what is fused must not depend on the optimiser.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif
FASTNN_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
FASTNN_INLINE Vec fma(Vec a, float b, float c) { return fma(a, splat(b), splat(c)); }

// c + the dot products of neighbouring bfloat16 pairs, float32 sums. Subnormals count as zero.
FASTNN_INLINE Vec dot_bf16_pairs(Vec c, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  (void)a;
  (void)b;
  return c;  // never called: kHasBf16Dot is false
#endif
}

// Sixteen bfloat16 and the sixteen after them as pairs, one of each, the first in the lower half.
FASTNN_INLINE Vec interleave_bf16(Vec both) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)both);
#else
  return both;  // never called: kHasBf16Dot is false
#endif
}

// Pairs of bfloat16, even in the lower half, rounded to nearest even.
FASTNN_INLINE Vec to_bf16_pairs(Vec even, Vec odd) {
#if defined(__AVX512BF16__)
  return interleave_bf16((Vec)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  (void)odd;
  return even;  // never called: kHasBf16Dot is false
#endif
}

// The same on any instruction set, for whole results: NaN stays NaN.
FASTNN_INLINE UVec rounded_bf16_bits(Vec x) {  // in the upper halves; the lower hold rubbish
  const UVec bits = (UVec)x;
  return (UVec)select(x != x, (Vec)(bits | 0x400000u), (Vec)(bits + 0x7fffu + ((bits >> 16) & 1u)));
}
FASTNN_INLINE Vec bf16_pairs(Vec even, Vec odd) {
  if constexpr (kHasBf16Dot) return to_bf16_pairs(even, odd);
  return (Vec)((rounded_bf16_bits(odd) & 0xffff0000u) | (rounded_bf16_bits(even) >> 16));
}

// max(a, b) with b returned where either is NaN: put the value whose NaN must survive second.
FASTNN_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
FASTNN_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
FASTNN_INLINE Vec abs(Vec x) { return as_float(as_int(x) & 0x7fffffff); }
FASTNN_INLINE Vec copysign(Vec magnitude, Vec sign) {
  return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & (int32_t)0x80000000));
}

// Nearest integer, ties to even, for |x| < 2^22; anything goes beyond (callers clamp or do not
// care).
FASTNN_INLINE Vec round_even(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (Vec)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it drops the fraction
  return (x + magic) - magic;
#endif
}

// x * 2^n for integral n, right down to subnormal results; n = -inf gives 0 even where x is NaN
// only with AVX-512, so callers clamp n elsewhere (math.h, exp).
FASTNN_INLINE Vec scale_by_power(Vec x, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // Two factors, because 2^n itself may be out of range where x * 2^n is not.
  const IVec k = __builtin_convertvector(n, IVec);
  const IVec half = k >> 1;
  const Vec first = as_float((half + 127) << 23);
  const Vec second = as_float((k - half + 127) << 23);
  return x * first * second;
#endif
}

FASTNN_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  Vec r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// 1 / x for 2^-100 < |x| < 2^100 and NaN, within 1 ulp: an estimate and a Newton step where that
// beats a division.
FASTNN_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)x);
  return fma(r, fma(-x, r, splat(1.f)), r);
#else
  return 1.f / x;
#endif
}

// The same within 2^-14: enough for what is rounded to 16 bits.
FASTNN_INLINE Vec rough_reciprocal(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)x);
#else
  return 1.f / x;
#endif
}

// ---- memory: whole vectors, and the first n < kLanes lanes (the rest reads as `fill` and is not
// written)

FASTNN_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTNN_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#if defined(__AVX2__) && !defined(__AVX512F__)
FASTNN_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

FASTNN_INLINE Vec load_first(const float* p, int n, float fill) {
#if defined(__AVX512F__)
  return (Vec)_mm512_mask_loadu_ps((__m512)splat(fill), (__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
  const __m256i mask = first_lanes(n);
  return select((IVec)mask, (Vec)_mm256_maskload_ps(p, mask), splat(fill));
#else
  Vec v = splat(fill);
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
FASTNN_INLINE void store_first(float* p, Vec v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, first_lanes(n), (__m256)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// Bytes as unsigned integers. Spelt out: g++ 12 takes bytes apart one by one.
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
FASTNN_INLINE UVec widen(Bytes b) {
#if defined(__AVX512F__)
  return (UVec)_mm512_cvtepu8_epi32((__m128i)b);
#elif defined(__AVX2__)
  int64_t bits;
  std::memcpy(&bits, &b, sizeof bits);
  return (UVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits));
#else
  return UVec{b[0], b[1], b[2], b[3]};
#endif
}

// bfloat16 is the upper half of a float32; rounding is to nearest even, NaN stays NaN.
FASTNN_INLINE Vec widen(Half16 h, BFloat16) {
#if defined(__AVX512F__)  // g++ 12 makes five instructions of the generic conversion
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
  return as_float((IVec)(__builtin_convertvector(h, UVec) << 16));
#endif
}
FASTNN_INLINE Half16 narrow(Vec x, BFloat16) {
#if defined(__AVX512BF16__)
  return (Half16)_mm512_cvtneps_pbh((__m512)x);
#else
  const UVec bits = (UVec)x;
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UVec quiet = (bits >> 16) | 0x40;
  const UVec picked = (UVec)select(x != x, (Vec)quiet, (Vec)rounded);
#if defined(__AVX512F__)
  return (Half16)_mm512_cvtepi32_epi16((__m512i)picked);
#else
  return __builtin_convertvector(picked, Half16);
#endif
#endif
}

FASTNN_INLINE Vec widen(Half16 h, Float16) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa move to float32's places; the bias is corrected by one multiplication,
  // which also makes subnormal halves normal. Infinity and NaN (exponent all ones) are set apart.
  const IVec bits = (IVec) __builtin_convertvector(h, UVec);
  const IVec magnitude = (bits & 0x7fff) << 13;
  const IVec special = magnitude >= splat_int(0x7c00 << 13);
  const Vec scaled = as_float(magnitude) * 0x1p112f;
  const Vec value = select(special, as_float(magnitude | 0x7f800000), scaled);
  return as_float(as_int(value) | ((bits & 0x8000) << 16));
#endif
}
FASTNN_INLINE Half16 narrow(Vec x, Float16) {
#if defined(__AVX512F__)
  return (Half16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Half16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const IVec sign = (as_int(x) >> 16) & 0x8000;
  const IVec magnitude = as_int(x) & 0x7fffffff;
  // Normal results: round the lower 13 bits to even, then correct the exponent's bias.
  // Unsigned, since the bits of a NaN wrap; its result is replaced below.
  const UVec rounded_bits = (UVec)magnitude + (((UVec)magnitude >> 13) & 1u) + 0xfffu;
  const IVec rounded = (IVec)rounded_bits;
  const IVec normal = (IVec)(rounded_bits - ((127u - 15u) << 23)) >> 13;
  // Subnormal results: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded by the
  // addition.
  const IVec subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  IVec half = (IVec)select(magnitude < splat_int(113 << 23), (Vec)subnormal, (Vec)normal);
  half = (IVec)select(rounded >= splat_int((127 + 16) << 23), (Vec)splat_int(0x7c00), (Vec)half);
  half = (IVec)select(magnitude > splat_int(0x7f800000), (Vec)splat_int(0x7e00), (Vec)half);
  return __builtin_convertvector((UVec)(half | sign), Half16);
#endif
}

template <class T>
FASTNN_INLINE Vec load(const T* p) {
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
FASTNN_INLINE void store(T* p, Vec v) {
  const Half16 h = narrow(v, T{});
  std::memcpy(p, &h, sizeof h);
}
template <class T>
FASTNN_INLINE Vec load_first(const T* p, int n, float fill) {
  Half16 h = narrow(splat(fill), T{});
#if defined(__AVX512F__)
  h = (Half16)_mm256_mask_loadu_epi16((__m256i)h, (__mmask16)((1u << n) - 1), p);
#else
  for (int i = 0; i < n; ++i) h[i] = p[i].bits;
#endif
  return widen(h, T{});
}
template <class T>
FASTNN_INLINE void store_first(T* p, Vec v, int n) {
  const Half16 h = narrow(v, T{});
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
  for (int i = 0; i < n; ++i) p[i].bits = h[i];
#endif
}
FASTNN_INLINE float to_float(float x) { return x; }
template <class T>
FASTNN_INLINE float to_float(T x) {
  Half16 h = {};
  h[0] = x.bits;
  return widen(h, T{})[0];
}

// Calls f with a value of the storage type, as a tag.
template <class F>
FASTNN_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace
}  // namespace fastnn
