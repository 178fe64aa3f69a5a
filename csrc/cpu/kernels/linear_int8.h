// Values to int8 codes, row by row, and a weight's codes to strips. The product is gemm/gemm.h's.
//
// A row's scale is its largest magnitude / 127, its codes are the nearest integers to value /
// scale: in [-127, 127]. Largest magnitudes are compared as integers, so NaN counts as larger than
// infinity and infinity as larger than everything finite. A row with either has the scale NaN and
// codes of 0.
#pragma once
#include "cpu/gemm/pack.h"

namespace fastnn {
namespace {

template <class T>
void quantise_rows_typed(const Matrix& x, int64_t K, int64_t begin, int64_t end, uint8_t flip,
                         uint8_t* codes, int64_t code_stride, float* scale) {
  for (int64_t m = begin; m < end; ++m) {
    const T* const row = static_cast<const T*>(x.data) + m * x.row_stride;
    uint8_t* const out = codes + m * code_stride;
    const int32_t bits = largest_magnitude_bits(row, 0, K, x.col_stride);
    if (bits >= kInfinityBits) {
      scale[m] = __builtin_nanf("");
      std::memset(out, flip, (size_t)K);
      continue;
    }
    scale[m] = code_scale(bits);
    const Vec inverse = splat(1.f / scale[m]);
    int64_t i = 0;
    if (x.col_stride == 1) {
      for (; i + kCodeVecs * kLanes <= K; i += kCodeVecs * kLanes) {
        IVec whole[kCodeVecs];
        FASTNN_UNROLL for (int v = 0; v < kCodeVecs; ++v) {
          __builtin_prefetch(row + x.row_stride + i + v * kLanes);  // the next row
          whole[v] = nearest_int(load(row + i + v * kLanes) * inverse);
        }
        store_code_vecs(out + i, whole, flip);
      }
    }
    for (; i < K; i += kLanes) {
      const int count = K - i < kLanes ? (int)(K - i) : kLanes;
      store_codes(out + i, nearest_int(load_strided(row, i, count, x.col_stride) * inverse), count,
                  flip);
    }
  }
}

void int8_quantise(const Matrix& x, int64_t K, int64_t begin, int64_t end, uint8_t flip,
                   uint8_t* codes, int64_t code_stride, float* scale) {
  with_type(x.dtype, [&](auto type) {
    quantise_rows_typed<decltype(type)>(x, K, begin, end, flip, codes, code_stride, scale);
  });
}

void int8_pack(const Matrix& w, int64_t N, int64_t K, int64_t s0, int64_t s1, float* strips,
               int32_t* offset) {
  const int64_t units = units_of(K, DotInt8::kPerUnit), strip_floats = units * kStrip;
  const Matrix b = {w.data, w.col_stride, w.row_stride, w.dtype};
  pack_panel<DotInt8, Int8>(b, N, K, s0 * kStrip, s1 - s0, 0, units, strips + s0 * strip_floats,
                            strip_floats);
  const auto* const codes = static_cast<const int8_t*>(w.data);
  for (int64_t n = s0 * kStrip; n < s1 * kStrip; ++n) {
    int32_t sum = 0;
    for (int64_t k = 0; n < N && k < K; ++k) sum += codes[n * w.row_stride + k * w.col_stride];
    // Wraps where the sum of the shifted codes does: only the difference of the two matters.
    offset[n] = (int32_t)((uint32_t)sum * 128u);
  }
}

}  // namespace
}  // namespace fastnn
