// Activations of a sum with a bias, and products with an activation (GLU). Memory is what they
// take, so the loops do nothing twice: whether there is a bias and how results are stored is asked
// per vector, where the answer is always the same, instead of compiled in.
#pragma once
#include "cpu/kernels/rows.h"
#include "cpu/simd/activation.h"

namespace fastnn {
namespace {

// f(i, count) for every vector of the columns [begin, end).
template <class F>
FASTNN_INLINE void each_vector(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
    f(i, kLanes);
    f(i + kLanes, kLanes);
  }
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, (int)(end - i));
}

template <class T>
FASTNN_INLINE void put_some(bool stream, T* p, Vec v, int count) {
  if (stream) {
    put_some<true>(p, v, count);
  } else {
    put_some<false>(p, v, count);
  }
}

template <class T>
FASTNN_INLINE Vec load_biased(const T* x, const float* bias, int64_t i, int count) {
  const Vec v = load_some(x + i, count);
  return bias == nullptr ? v : v + load_some(bias + i, count);
}

template <class T, Activation A>
void activation_fwd_typed(const ActivationParams& p, const float* bias, const Block& block) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
    const T* const factor =
        p.factor == nullptr ? nullptr : static_cast<const T*>(p.factor) + r * p.factor_row_stride;
    T* const y = static_cast<T*>(p.y) + r * p.columns;
    each_vector(block.column_begin, block.column_end,
                [=, stream = p.stream](int64_t i, int count) __attribute__((always_inline)) {
                  Vec v = activate<A>(load_biased(x, bias, i, count));
                  if (factor) v = v * load_some(factor + i, count);
                  put_some(stream, y + i, v, count);
                });
  }
}

void activation_fwd(const ActivationParams& p, const float* bias, const Block& block) {
  with_type(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto tag) {
      activation_fwd_typed<decltype(type), decltype(tag)::value>(p, bias, block);
    });
  });
  if (p.stream) stream_fence();
}

template <class T, Activation A>
void activation_bwd_typed(const ActivationBwdParams& p, const float* bias, const Block& block,
                          float* db) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const dy = static_cast<const T*>(p.dy) + r * p.dy_row_stride;
    const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
    T* const dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + r * p.d_row_stride;
    each_vector(block.column_begin, block.column_end,
                [=, stream = p.stream](int64_t i, int count) __attribute__((always_inline)) {
                  const Vec z = load_biased(x, bias, i, count);
                  const Vec g = through<A>(load_some(dy + i, count), z, activated<A>(z).slope);
                  if (db) store_some(db + i, load_some(db + i, count) + g, count);
                  if (dx) put_some(stream, dx + i, g, count);
                });
  }
}

template <class T, Activation A>
void activation_product_bwd_typed(const ActivationBwdParams& p, const Block& block) {
  for (int64_t r = block.row_begin; r < block.row_end; ++r) {
    const T* const dy = static_cast<const T*>(p.dy) + r * p.dy_row_stride;
    const T* const x = static_cast<const T*>(p.x) + r * p.x_row_stride;
    const T* const factor = static_cast<const T*>(p.factor) + r * p.factor_row_stride;
    T* const dx = p.dx == nullptr ? nullptr : static_cast<T*>(p.dx) + r * p.d_row_stride;
    T* const d_factor =
        p.d_factor == nullptr ? nullptr : static_cast<T*>(p.d_factor) + r * p.d_row_stride;
    each_vector(block.column_begin, block.column_end,
                [=, stream = p.stream](int64_t i, int count) __attribute__((always_inline)) {
                  const Vec g = load_some(dy + i, count);
                  const Vec z = load_some(x + i, count), f = load_some(factor + i, count);
                  const Activated a = activated<A>(z);
                  if (dx) put_some(stream, dx + i, through<A>(g * f, z, a.slope), count);
                  if (d_factor) put_some(stream, d_factor + i, g * a.value, count);
                });
  }
}

// db: the block's columns' sums are added to it, where not null.
void activation_bwd(const ActivationBwdParams& p, const float* bias, const Block& block,
                    float* db) {
  with_type(p.dtype, [&](auto type) {
    with_activation(p.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      if (p.factor == nullptr) {
        activation_bwd_typed<decltype(type), kActivation>(p, bias, block, db);
      } else {
        activation_product_bwd_typed<decltype(type), kActivation>(p, block);
      }
    });
  });
  if (p.stream) stream_fence();
}

}  // namespace
}  // namespace fastnn
