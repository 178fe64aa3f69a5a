// Stores that bypass the caches, and the int8 dot: instructions beside vec.h's vector interface.
#pragma once
#include <type_traits>

#include "cpu/simd/vec.h"

namespace fastnn {
namespace {

// Stores v past the caches; p aligned to the vector. Plain where there is no such instruction.
// Memory written so is ordered by stream_fence().
FASTNN_INLINE void stream_store(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
template <class T>
FASTNN_INLINE void stream_store(T* p, Vec v) {
  const Half16 h = narrow(v, T{});
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)h);
#else
  std::memcpy(p, &h, sizeof h);
#endif
}
FASTNN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One name for both kinds of store, and the choice between them at the start of a loop.
template <bool kStream, class T>
FASTNN_INLINE void put(T* p, Vec v) {
  if constexpr (kStream) {
    stream_store(p, v);
  } else {
    store(p, v);
  }
}
template <class F>
FASTNN_INLINE void with_stream(bool stream, F f) {
  if (stream) {
    f(std::true_type{});
    stream_fence();
  } else {
    f(std::false_type{});
  }
}

#if defined(__AVX512VNNI__)
constexpr bool kHasInt8Dot = true;
#else
constexpr bool kHasInt8Dot = false;
#endif

// c + the dot products of neighbouring quads, unsigned bytes of a with signed bytes of b, in int32.
FASTNN_INLINE IVec dot_int8_quads(IVec c, IVec a, IVec b) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  (void)a;
  (void)b;
  return c;  // never called: kHasInt8Dot is false
#endif
}

// A vector by two instructions, for what comes from memory in one long run.
FASTNN_INLINE Vec load_in_halves(const float* p) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(p));
  return (Vec)_mm512_insertf32x8(low, _mm256_loadu_ps(p + kLanes / 2), 1);
#else
  return load(p);
#endif
}

}  // namespace
}  // namespace fastnn
