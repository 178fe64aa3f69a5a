// What linear + cross-entropy needs beside the matrix product (gemm/gemm.h) and the loss of rows of
// logits (kernels/cross_entropy.h): the gradient of some classes' logits, in the type that the
// products of backward take, and its column sums.
#pragma once
#include "cpu/kernels/cross_entropy.h"
#include "params/linear_cross_entropy.h"

namespace fastnn {
namespace {

template <class D, bool kCap, TargetKind kKind>
void logit_gradient_rows(const LogitGradientParams& p, int64_t first, int64_t last) {
  for (int64_t r = 0; r < p.loss.loss.rows; ++r) {
    D* const dx = static_cast<D*>(p.loss.dx) + r * p.dx_row_stride + (first - p.first);
    cross_entropy_bwd_row<float, kCap, kKind>(p.loss, r, first, last, dx);
    if (p.sums == nullptr) continue;
    for (int64_t i = first; i < last; i += kLanes) {  // of what the products see, rounded
      const int count = last - i < kLanes ? (int)(last - i) : kLanes;
      float* const sums = p.sums + i;
      store_some(sums, load_some(sums, count) + load_some(dx + (i - first), count), count);
    }
  }
}

// All rows, classes [first, last).
void logit_gradient(const LogitGradientParams& p, int64_t first, int64_t last) {
  with_type(p.dtype, [&](auto type) {
    using D = decltype(type);
    with_kind_and_cap(p.loss.loss, [&](auto cap, auto kind) {
      logit_gradient_rows<D, decltype(cap)::value, decltype(kind)::value>(p, first, last);
    });
  });
}

}  // namespace
}  // namespace fastnn
