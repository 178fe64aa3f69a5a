// Softmax of scaled, masked rows. What is read from memory is read once: scores and their maximum
// in the first pass, exponentials and their sum, and the result come from the row that is kept.
#pragma once
#include "cpu/kernels/mask.h"
#include "cpu/kernels/softmax.h"
#include "params/masked_softmax.h"

namespace fastnn {
namespace {

// kept[i] = scale x[i], masked; the maximum of them but for NaN. at(i, count): the mask.
template <class M, class T, class Mask>
FASTNN_INLINE float masked_scores(const T* x, float scale, float* kept, int64_t n, Mask at) {
  const Vec lowest = splat(-__builtin_inff()), factor = splat(scale);
  Vec top[2] = {lowest, lowest};
  const auto score = [=](int64_t i, int count) __attribute__((always_inline)) {
    const Vec v = masked<M>(load_some(x + i, count) * factor, at(i, count));
    store_some(kept + i, v, count);
    return fill_rest(v, count, -__builtin_inff());
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    top[0] = max(top[0], score(i, kLanes));
    top[1] = max(top[1], score(i + kLanes, kLanes));
  }
  for (; i < n; i += kLanes) {
    top[0] = max(top[0], score(i, n - i < kLanes ? (int)(n - i) : kLanes));
  }
  return max_lanes(max(top[0], top[1]));
}

// Row after row: where its mask lies, and which of the causal queries it is. Counted on, since a
// division for each dimension takes as long as a short row.
class MaskedRow {
 public:
  FASTNN_INLINE MaskedRow(const MaskedSoftmaxParams& p, int64_t row)
      : p_(p), query_(p.queries == 0 ? 0 : row % p.queries) {
    for (int32_t d = p.dims - 1; d >= 0; --d) {
      at_[d] = row % p.sizes[d];
      offset_ += at_[d] * p.mask_strides[d];
      row /= p.sizes[d];
    }
  }
  FASTNN_INLINE void next() {
    if (++query_ == p_.queries) query_ = 0;
    for (int32_t d = p_.dims - 1; d >= 0; --d) {
      offset_ += p_.mask_strides[d];
      if (++at_[d] < p_.sizes[d]) return;
      offset_ -= p_.sizes[d] * p_.mask_strides[d];
      at_[d] = 0;
    }
  }
  FASTNN_INLINE int64_t mask_offset() const { return offset_; }
  FASTNN_INLINE int64_t seen() const {  // columns
    return p_.queries == 0 || query_ + 1 > p_.columns ? p_.columns : query_ + 1;
  }

 private:
  const MaskedSoftmaxParams& p_;
  int64_t query_, offset_ = 0, at_[kMaskDims] = {};
};

template <class T>
FASTNN_INLINE float scores_of(const MaskedSoftmaxParams& p, const T* x, int64_t mask_offset,
                              float* kept, int64_t n) {
  float top = 0.f;
  if (p.mask_kind == MaskKind::kNone) {
    return masked_scores<float>(x, p.scale, kept, n,
                                [](int64_t, int) __attribute__((always_inline)) { return zero(); });
  }
  with_mask(p.mask_kind, p.mask_dtype, p.mask, [&](const auto* first) {
    using M = std::remove_cv_t<std::remove_pointer_t<decltype(first)>>;
    const M* const mask = first + mask_offset;
    if (p.mask_column_stride == 0) {
      const Vec all = splat(to_float(*mask));
      top = masked_scores<M>(x, p.scale, kept, n,
                             [=](int64_t, int) __attribute__((always_inline)) { return all; });
    } else {
      top = masked_scores<M>(x, p.scale, kept, n,
                             [=](int64_t i, int count) __attribute__((always_inline)) {
                               return load_mask(mask + i, count);
                             });
    }
  });
  return top;
}

template <class T, bool kStream>
void masked_softmax_rows(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  MaskedRow row(p, begin);
  for (int64_t r = begin; r < end; ++r, row.next()) {
    const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    float* const kept = p.keeps_in_place() ? reinterpret_cast<float*>(y) : scratch;
    const int64_t n = row.seen();
    const float top = scores_of(p, x, row.mask_offset(), kept, n);
    // Nothing takes part: exponentials about 0 are 0, and so is their sum, unless there is a NaN.
    const float sum = row_exp_sum<true>(kept, top == -__builtin_inff() ? 0.f : top, kept, n);
    std::memset(kept + n, 0, (size_t)(p.columns - n) * sizeof(float));
    row_scale<kStream>(kept, sum == 0.f ? 1.f : sum, y, p.columns);
  }
}

void masked_softmax_fwd(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* kept) {
  with_type(p.dtype, [&](auto type) {
    with_stream(p.stream, [&](auto stream) {
      masked_softmax_rows<decltype(type), decltype(stream)::value>(p, begin, end, kept);
    });
  });
}

}  // namespace
}  // namespace fastnn
