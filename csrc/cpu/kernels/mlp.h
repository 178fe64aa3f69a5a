// What backward of a feed-forward block does between its products (cpu/mlp.cpp): from z and f,
// saved or computed again, the hidden values and the gradients, in one pass.
#pragma once
#include "cpu/simd/activation.h"
#include "cpu/simd/pair.h"
#include "params/mlp.h"

namespace fastnn {
namespace {

template <class T, Activation A, bool kGated>
void mlp_middle_rows(const MlpMiddle& p, int64_t begin, int64_t end, float* sums) {
  for (int64_t r = begin; r < end; ++r) {
    const T* const z = row_of<T>(p.z, r, p.z_stride);
    const T* const f = kGated ? row_of<T>(p.f, r, p.z_stride) : nullptr;
    T* const h = row_or_null<T>(p.h, r, p.columns);
    T* const dh = row_or_null<T>(p.dh, r, p.columns);
    T* const df = row_or_null<T>(p.df, r, p.columns);
    each_part<true>(0, p.columns, [=](int64_t i, auto part) __attribute__((always_inline)) {
      Vec x[part.kVectors], factor[part.kVectors], g[part.kVectors], total[part.kVectors];
      FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) g[v] = total[v] = zero();
      part.get(z + i, x);
      if constexpr (kGated) part.get(f + i, factor);
      if (dh) part.get(dh + i, g);
      if (sums) part.get(sums + i, total);
      FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
        const Activated a = activated<A, kRoughFor<T>>(x[v]);
        const Vec h_grad = g[v];
        g[v] = through<A>(kGated ? h_grad * factor[v] : h_grad, x[v], a.slope);
        total[v] += g[v];
        x[v] = kGated ? a.value * factor[v] : a.value;
        if constexpr (kGated) factor[v] = h_grad * a.value;
      }
      part.template put<false>(h + i, x);
      if (dh) part.template put<false>(dh + i, g);
      if (kGated && dh) part.template put<false>(df + i, factor);
      if (sums) part.template put<false>(sums + i, total);
    });
  }
}

// Rows [begin, end); the columns' sums of the gradient of z are added to sums, where not null.
void mlp_middle(const MlpMiddle& p, int64_t begin, int64_t end, float* sums) {
  with_type(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto tag) {
      if (p.f != nullptr) {
        mlp_middle_rows<decltype(type), decltype(tag)::value, true>(p, begin, end, nullptr);
      } else {
        mlp_middle_rows<decltype(type), decltype(tag)::value, false>(p, begin, end, sums);
      }
    });
  });
}

}  // namespace
}  // namespace fastnn
