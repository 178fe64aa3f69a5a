// Dropout and the sum after it in one pass. The mask is computed where it is used and never stored:
// backward computes it again.
#pragma once
#include "cpu/kernels/rows.h"
#include "cpu/simd/philox.h"
#include "params/activation.h"
#include "params/dropout_add.h"

namespace fastnn {
namespace {

// Elements [begin, end) of a row; keep[i - begin] says which are kept, of all where it is null.
template <class T, bool kStream>
FASTNN_INLINE void dropout_add_part(const T* x, const T* residual, T* y, int64_t begin, int64_t end,
                                    const uint8_t* keep, float scale) {
  const Vec factor = splat(scale);
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = end - i < kLanes ? (int)(end - i) : kLanes;
    Vec v = load_some(x + i, count);
    if (keep != nullptr) {
      Bytes bytes;
      std::memcpy(&bytes, keep + (i - begin), sizeof bytes);
      v = select((IVec)(widen(bytes) != UVec{}), v * factor, zero());
    }
    if (residual != nullptr) v += load_some(residual + i, count);
    put_some<kStream>(y + i, v, count);
  }
}

// The block, whose columns begin at a multiple of kKeepBlock.
template <class T, bool kStream>
void dropout_add_rows(const DropoutAddParams& p, const Block& block) {
  const float scale = 1.f / (1.f - p.p);
  const uint64_t threshold = drop_threshold(p.p), groups = (uint64_t)(p.columns + 3) / 4;
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
    const T* const residual =
        p.residual ? static_cast<const T*>(p.residual) + r * p.residual_row_stride : nullptr;
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    for (int64_t i = block.column_begin; i < block.column_end; i += kKeepBlock) {
      const int64_t end = i + kKeepBlock < block.column_end ? i + kKeepBlock : block.column_end;
      alignas(64) uint8_t keep[kKeepBlock];
      if (p.p != 0.f) {
        keep_block(p.seed, (uint64_t)r * groups + (uint64_t)i / 4, threshold, keep);
        dropout_add_part<T, kStream>(x, residual, y, i, end, keep, scale);
      } else {
        dropout_add_part<T, kStream>(x, residual, y, i, end, nullptr, 1.f);
      }
    }
  }
}

void dropout_add(const DropoutAddParams& p, const Block& block) {
  with_type(p.dtype, [&](auto type) {
    with_stream(p.stream, [&](auto stream) {
      dropout_add_rows<decltype(type), decltype(stream)::value>(p, block);
    });
  });
}

}  // namespace
}  // namespace fastnn
