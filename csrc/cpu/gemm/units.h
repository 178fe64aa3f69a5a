// A unit is 4 bytes along K: one float32, two neighbouring bfloat16 or four int8 codes. Packing,
// strips, tiles and loops are the same code for all; only the dot instruction and the addition of
// sums differ. Types without a dot instruction become float32 units when packed.
#pragma once
#include "cpu/gemm/params.h"
#include "cpu/simd/codes.h"
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Units summed in one go before they are added to the running sum: rounding errors then grow with
// 192, not with K. torch's library does the same: the worst error is equal to its to two digits, on
// random numbers and on equal ones, which all round the same way; 256 units are up to 1.9 times it,
// one sum over K = 2500 is 7 to 12 times. Costs 1 %.
constexpr int64_t kFloatSumUnits = 192;

// Adds to each lane of c the dot product of its pair of a and the pair at p, the same for all. In
// assembler: the compiler broadcasts first.
FASTNN_INLINE void add_bf16_pairs(Vec& c, Vec a, const void* p) {
#if defined(__AVX512BF16__)
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(a), "m"(*static_cast<const uint32_t*>(p)));
#else
  (void)c;
  (void)a;
  (void)p;  // never called: kHasBf16Dot is false
#endif
}

// Adds to each lane of c the dot product of its quad of codes of a (unsigned) and of b (signed). In
// assembler: of dot_code_quads the compiler makes copies of 24 sums, and stores of them.
FASTNN_INLINE void add_code_quads(Vec& c, Vec a, Vec b) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
#else
  c = dot_code_quads(c, a, b);
#endif
}

struct DotF32 {
  static constexpr int kPerUnit = 1;
  static constexpr bool kExact = false;
  static constexpr int64_t kSumUnits = kFloatSumUnits;
  static FASTNN_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static FASTNN_INLINE Vec dot(Vec c, Vec a, Vec b) { return fma(a, b, c); }
};
struct DotBf16 {
  static constexpr int kPerUnit = 2;
  static constexpr bool kExact = false;
  static constexpr int64_t kSumUnits = kFloatSumUnits;
  static FASTNN_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static FASTNN_INLINE Vec dot(Vec c, Vec a, Vec b) { return dot_bf16_pairs(c, a, b); }
};
// A code of 8 bits: of the activations plus 128 (unsigned), of the weight as it is (signed).
struct Int8 {
  uint8_t bits;
};
// Sums are int32 in the lanes of a Vec, exact whatever their order, so they are never cut.
struct DotInt8 {
  static constexpr int kPerUnit = 4;
  static constexpr bool kExact = true;
  static constexpr int64_t kSumUnits = 0;  // never cut
  static FASTNN_INLINE Vec add(Vec a, Vec b) { return (Vec)((UVec)a + (UVec)b); }
  static FASTNN_INLINE Vec dot(Vec c, Vec a, Vec b) { return dot_code_quads(c, a, b); }
};

FASTNN_INLINE int64_t units_of(int64_t K, int per_unit) { return (K + per_unit - 1) / per_unit; }

// The unit at p in all lanes. As an integer where it holds several values: the dot product of int8
// codes waits for a float broadcast, which takes a quarter of its speed.
template <class Dot>
FASTNN_INLINE Vec splat_unit(const char* p) {
  if constexpr (Dot::kPerUnit == 1) {
    float unit;
    std::memcpy(&unit, p, sizeof unit);
    return splat(unit);
  } else {
    int32_t unit;
    std::memcpy(&unit, p, sizeof unit);
    return (Vec)splat_int(unit);
  }
}

// Adds to sum the products of the unit at p, the same for all lanes, with those of b.
template <class Dot>
FASTNN_INLINE void add_product(Vec& sum, Vec b, const char* p) {
  if constexpr (Dot::kPerUnit == 2) {
    add_bf16_pairs(sum, b, p);
  } else if constexpr (Dot::kExact) {
    add_code_quads(sum, splat_unit<Dot>(p), b);
  } else {
    sum = Dot::dot(sum, splat_unit<Dot>(p), b);
  }
}

// kLanes units from p on, elements of type T next to each other along K.
template <class Dot, class T>
FASTNN_INLINE Vec load_units(const T* p) {
  if constexpr (Dot::kPerUnit == 1) {
    return load(p);
  } else {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}
// The same with only `elements` of them readable, 0 < elements < kLanes * kPerUnit; the others are
// zero.
template <class Dot, class T>
FASTNN_INLINE Vec load_units_first(const T* p, int64_t elements) {
  if constexpr (Dot::kPerUnit == 1) {
    return load_first(p, (int)elements, 0.f);
  } else if constexpr (Dot::kPerUnit == 2) {
    return load_first_halves(p, (int)elements);
  } else {
    Vec v = zero();
    std::memcpy(&v, p, (size_t)elements * sizeof(T));
    return v;
  }
}
// A square of kLanes units of kLanes rows, `stride` apart, turned: r[u] holds unit u of every row.
// Rows from `rows` on and elements from `left` on are not read, and count as zeros.
template <class Dot, class T>
FASTNN_INLINE void load_turned(const T* p, int64_t stride, int64_t rows, int64_t left,
                               Vec (&r)[kLanes]) {
  FASTNN_UNROLL for (int i = 0; i < kLanes; ++i) {
    if (i >= rows || left <= 0) {
      r[i] = zero();
    } else if (left >= kLanes * Dot::kPerUnit) {
      r[i] = load_units<Dot>(p + i * stride);
    } else {
      r[i] = load_units_first<Dot>(p + i * stride, left);
    }
  }
  transpose(r);
}
// Units of bfloat16 pairs from two rows that were widened: that leaves a value's bits in the upper
// half, so the even row moves down and the odd row stays.
FASTNN_INLINE Vec interleave_pairs(Vec even, Vec odd) {
  return (Vec)(((UVec)even >> 16) | (UVec)odd);
}
// One unit from elements that are `stride` apart; what lies beyond `elements` counts as zero.
template <class Dot, class T>
FASTNN_INLINE float gather_unit(const T* p, int64_t stride, int64_t elements) {
  if constexpr (Dot::kPerUnit == 1) {
    return to_float(*p);
  } else {
    constexpr int kBits = 32 / Dot::kPerUnit;
    uint32_t bits = p->bits;
    FASTNN_UNROLL for (int i = 1; i < Dot::kPerUnit; ++i) {
      if (elements > i) bits |= (uint32_t)p[i * stride].bits << (i * kBits);
    }
    float unit;
    std::memcpy(&unit, &bits, sizeof unit);
    return unit;
  }
}

}  // namespace
}  // namespace fastnn
