// exp, log, tanh, erf, sigmoid on vectors, over the whole float32 range, NaN and infinities
// included.
//
// Coefficients are minimax fits (iteratively reweighted least squares in 40-digit arithmetic,
// rounded to float32); the error of each fit stands beside it. The largest errors measured against
// float64, in ulp, are stated in fastnn/testing/policy.py and tested per instruction set
// (tests/test_vector_math.py).
#pragma once
#include "cpu/simd/vec.h"

namespace fastnn {
namespace {

// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2) / 2; e^r = 1 + r + r^2 q(r), fit 3.1e-9
// relative.
FASTNN_INLINE Vec exp(Vec x) {
  // Outside, e^x rounds to 0 or to infinity anyway, and n stays within what scale_by_power takes.
  // NaN passes.
  x = min(splat(89.f), max(splat(-104.f), x));
  const Vec n = round_even(x * 1.44269504f);
  // ln 2 in two parts, the first with 12 trailing zero bits so that n times it is exact.
  Vec r = fma(n, splat(-0x1.62ep-1f), x);
  r = fma(n, splat(-0x1.0bfbe8p-15f), r);
  Vec q = fma(splat(0x1.6a2448p-10f), r, splat(0x1.1239d4p-7f));
  q = fma(q, r, splat(0x1.5558f2p-5f));
  q = fma(q, r, splat(0x1.555492p-3f));
  q = fma(q, r, splat(0x1.fffffcp-2f));
  return scale_by_power(fma(r * r, q, r) + 1.f, n);
}

// 2^x for x <= 128, 0 from -160 on; 2^r = 1 + r q(r) on [-1/2, 1/2], fit 1.6e-8 relative. Rough:
// 2.8e-6, enough for what is rounded to 16 bits.
template <bool kRough>
FASTNN_INLINE Vec exp2(Vec x) {
#if !defined(__AVX512F__)
  x = max(splat(-160.f), x);  // what scale_by_power takes; NaN passes
#endif
  const Vec n = round_even(x), r = x - n;
  Vec q;
  if constexpr (kRough) {
    q = fma(splat(0x1.3a02c8p-7f), r, splat(0x1.c9fc48p-5f));
    q = fma(q, r, splat(0x1.ec0378p-3f));
    q = fma(q, r, splat(0x1.62e12cp-1f));
  } else {
    q = fma(splat(0x1.41fbbap-13f), r, splat(0x1.5f3e54p-10f));
    q = fma(q, r, splat(0x1.3b2d4cp-7f));
    q = fma(q, r, splat(0x1.c6aee8p-5f));
    q = fma(q, r, splat(0x1.ebfbdcp-3f));
    q = fma(q, r, splat(0x1.62e43p-1f));
  }
  return scale_by_power(fma(q, r, splat(1.f)), n);
}

// ln x = e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f - f^2/2 + f^3 q(f),
// fit 7.5e-10 relative.
FASTNN_INLINE Vec log(Vec x) {
  const IVec tiny = as_int(x) < splat_int(0x00800000);  // subnormal, zero or negative
  const Vec scaled = select(tiny, x * 0x1p24f, x);
  const UVec bits = (UVec)scaled;  // unsigned: a negative x wraps, and its result is replaced below
  const IVec exponent = (IVec)(bits - 0x3f3504f3u) >> 23;  // sqrt(1/2) and up count to the next
  const Vec m = (Vec)(bits - ((UVec)exponent << 23));
  const Vec e = __builtin_convertvector(exponent, Vec) - select(tiny, splat(24.f), zero());
  const Vec f = m - 1.f;
  Vec q = fma(splat(0.067466013f), f, splat(-0.116756409f));
  q = fma(q, f, splat(0.118881747f));
  q = fma(q, f, splat(-0.124055915f));
  q = fma(q, f, splat(0.142195508f));
  q = fma(q, f, splat(-0.166679963f));
  q = fma(q, f, splat(0.200021192f));
  q = fma(q, f, splat(-0.250000089f));
  q = fma(q, f, splat(0.333333135f));
  const Vec f2 = f * f;
  Vec low = fma(f2 * f, q, e * 1.42860677e-6f);
  low = fma(splat(-0.5f), f2, low);
  Vec y = fma(e, splat(0.693145752f), low + f);
  y = select(x == splat(__builtin_inff()), x, y);
  y = select(x == zero(), splat(-__builtin_inff()), y);
  return select(x < zero(), splat(__builtin_nanf("")), select(x != x, x, y));
}

// tanh x = x + x^3 q(x^2) below 0.55 (fit 1.0e-9 relative), 1 - 2 / (e^(2|x|) + 1) above; 1
// from 9.1 on.
FASTNN_INLINE Vec tanh(Vec x) {
  const Vec t = abs(x);
  const Vec s = x * x;
  Vec q = fma(splat(-0.0062742331f), s, splat(0.0210716743f));
  q = fma(q, s, splat(-0.0538523085f));
  q = fma(q, s, splat(0.13332586f));
  q = fma(q, s, splat(-0.333333164f));
  const Vec small = fma(x * s, q, x);
  const Vec large = fma(splat(-2.f), reciprocal(exp(min(splat(9.1f), t) * 2.f) + 1.f), splat(1.f));
  const Vec y = copysign(select(t < splat(0.55f), small, large), x);  // -0 gives -0
  return select(x != x, x, y);
}

// 1 / (1 + e^-x), from e^-|x| so that nothing overflows and small results keep their digits.
FASTNN_INLINE Vec sigmoid(Vec x) {
  const Vec z = exp(-abs(x));
  return select(x >= zero(), splat(1.f), z) * reciprocal(z + 1.f);
}

// erf x = x + x q(x^2) below 0.9 (fit 6.1e-10 relative on [0, 0.95]); 1 - e^-g(x) up to 4
// (fit 1.7e-9 relative), 1 above.
FASTNN_INLINE Vec erf(Vec x) {
  const Vec s = x * x;
  Vec q = fma(splat(8.1850907e-05f), s, splat(-0.00080977025f));
  q = fma(q, s, splat(0.00519695180f));
  q = fma(q, s, splat(-0.0268577058f));
  q = fma(q, s, splat(0.112836637f));
  q = fma(q, s, splat(-0.376126319f));
  q = fma(q, s, splat(0.128379166f));
  const Vec small = fma(x, q, x);
  const Vec t = min(splat(4.f), abs(x));
  Vec g = fma(splat(-0.000198220704f), t, splat(0.0030654997f));
  g = fma(g, t, splat(-0.0223152488f));
  g = fma(g, t, splat(0.104113743f));
  g = fma(g, t, splat(0.636976004f));
  g = fma(g, t, splat(1.12779725f));
  g = fma(g, t, splat(0.000166439087f));
  const Vec large = copysign(1.f - exp(-g), x);
  return select(abs(x) < splat(0.9f), small, select(x != x, x, large));
}

}  // namespace
}  // namespace fastnn
