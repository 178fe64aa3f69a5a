// Elements of masks: boolean ones say what takes part, additive ones are added to the scores.
#pragma once
#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

// An element of a boolean mask: what it adds to a score is 0 where it is set, else -inf.
struct MaskByte {
  uint8_t set;
};
FASTNN_INLINE float to_float(MaskByte m) { return m.set != 0 ? 0.f : -__builtin_inff(); }

template <class M>
FASTNN_INLINE Vec load_mask(const M* m, int count) {
  if constexpr (__is_same(M, MaskByte)) {
    Bytes bytes = {};
    if (count == kLanes) {
      std::memcpy(&bytes, m, sizeof bytes);
    } else {
      std::memcpy(&bytes, m, (size_t)count);
    }
    return select((IVec)(widen(bytes) == UVec{}), splat(-__builtin_inff()), zero());
  } else {
    return load_some(m, count);
  }
}

// Scores with their mask: a boolean one hides even NaN.
template <class M>
FASTNN_INLINE Vec masked(Vec score, Vec mask) {
  if constexpr (__is_same(M, MaskByte)) return select(mask == zero(), score, mask);
  return score + mask;
}

// Calls f(elements) where there is a mask.
template <class F>
FASTNN_INLINE void with_mask(MaskKind kind, DType dtype, const void* mask, F f) {
  if (kind == MaskKind::kBool) {
    f(static_cast<const MaskByte*>(mask));
  } else if (kind == MaskKind::kAdditive) {
    with_type(dtype, [&](auto type) { f(static_cast<const decltype(type)*>(mask)); });
  }
}

}  // namespace
}  // namespace fastnn
