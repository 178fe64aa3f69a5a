// Activations of a sum with a bias, and products with an activation (GLU). Memory is what they
// take, so the loops do nothing twice: whether results go past the caches, and which gradients are
// wanted, is asked per pair of vectors, where the answer is always the same, instead of compiled
// in.
#pragma once
#include "cpu/simd/activation.h"
#include "cpu/simd/pair.h"
#include "params/activation.h"

namespace fastnn {
namespace {

template <class T, Activation A, bool kBias>
void activation_fwd_rows(const ActivationParams& p, const float* bias, const Block& block) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const x = row_of<T>(p.x, r, p.x_row_stride);
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    each_part<kBias>(block.column_begin, block.column_end,
                     [=, stream = p.stream](int64_t i, auto part) __attribute__((always_inline)) {
                       Vec z[part.kVectors], b[part.kVectors];
                       part.get(x + i, z);
                       if constexpr (kBias) part.get(bias + i, b);
                       FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
                         z[v] = activate<A, kRoughFor<T>>(kBias ? z[v] + b[v] : z[v]);
                       }
                       put_part(part, stream, y + i, z);
                     });
  }
}

template <class T, Activation A>
void activation_fwd_product(const ActivationParams& p, const Block& block) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const x = row_of<T>(p.x, r, p.x_row_stride);
    const T* const factor = row_of<T>(p.factor, r, p.factor_row_stride);
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    each_part<false>(block.column_begin, block.column_end,
                     [=, stream = p.stream](int64_t i, auto part) __attribute__((always_inline)) {
                       Vec z[part.kVectors], f[part.kVectors];
                       part.get(x + i, z);
                       part.get(factor + i, f);
                       FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
                         z[v] = activate<A, kRoughFor<T>>(z[v]) * f[v];
                       }
                       put_part(part, stream, y + i, z);
                     });
  }
}

void activation_fwd(const ActivationParams& p, const float* bias, const Block& block) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_activation(p.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      if (p.factor != nullptr) {
        activation_fwd_product<T, kActivation>(p, block);
      } else if (bias != nullptr) {
        activation_fwd_rows<T, kActivation, true>(p, bias, block);
      } else {
        activation_fwd_rows<T, kActivation, false>(p, bias, block);
      }
    });
  });
  if (p.stream) stream_fence();
}

template <class T, Activation A, bool kBias>
void activation_bwd_rows(const ActivationBwdParams& p, const float* bias, const Block& block,
                         float* db) {
  constexpr bool kRough = kRoughFor<T> && !kBias;  // the bias's gradient may be float32
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const dy = row_of<T>(p.dy, r, p.dy_row_stride);
    const T* const x = row_of<T>(p.x, r, p.x_row_stride);
    T* const dx = row_or_null<T>(p.dx, r, p.d_row_stride);
    each_part<kBias>(block.column_begin, block.column_end,
                     [=, stream = p.stream](int64_t i, auto part) __attribute__((always_inline)) {
                       Vec z[part.kVectors], b[part.kVectors], g[part.kVectors];
                       part.get(x + i, z);
                       part.get(dy + i, g);
                       if constexpr (kBias) part.get(bias + i, b);
                       FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
                         if constexpr (kBias) z[v] += b[v];
                         g[v] = through<A>(g[v], z[v], activated<A, kRough>(z[v]).slope);
                       }
                       if (kBias && db) {
                         part.get(db + i, b);
                         FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) b[v] += g[v];
                         part.template put<false>(db + i, b);
                       }
                       if (dx) put_part(part, stream, dx + i, g);
                     });
  }
}

template <class T, Activation A>
void activation_bwd_product(const ActivationBwdParams& p, const Block& block) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const dy = row_of<T>(p.dy, r, p.dy_row_stride);
    const T* const x = row_of<T>(p.x, r, p.x_row_stride);
    const T* const factor = row_of<T>(p.factor, r, p.factor_row_stride);
    T* const dx = row_or_null<T>(p.dx, r, p.d_row_stride);
    T* const d_factor = row_or_null<T>(p.d_factor, r, p.d_row_stride);
    each_part<false>(block.column_begin, block.column_end,
                     [=, stream = p.stream](int64_t i, auto part) __attribute__((always_inline)) {
                       Vec z[part.kVectors], f[part.kVectors], g[part.kVectors];
                       part.get(x + i, z);
                       part.get(factor + i, f);
                       part.get(dy + i, g);
                       FASTNN_UNROLL for (int v = 0; v < part.kVectors; ++v) {
                         const Activated a = activated<A, kRoughFor<T>>(z[v]);
                         f[v] = through<A>(g[v] * f[v], z[v], a.slope);
                         g[v] = g[v] * a.value;
                       }
                       if (dx) put_part(part, stream, dx + i, f);
                       if (d_factor) put_part(part, stream, d_factor + i, g);
                     });
  }
}

// db: the block's columns' sums are added to it, where not null; there is a bias then.
void activation_bwd(const ActivationBwdParams& p, const float* bias, const Block& block,
                    float* db) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_activation(p.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      if (p.factor != nullptr) {
        activation_bwd_product<T, kActivation>(p, block);
      } else if (bias != nullptr) {
        activation_bwd_rows<T, kActivation, true>(p, bias, block, db);
      } else {
        activation_bwd_rows<T, kActivation, false>(p, bias, block, db);
      }
    });
  });
  if (p.stream) stream_fence();
}

}  // namespace
}  // namespace fastnn
