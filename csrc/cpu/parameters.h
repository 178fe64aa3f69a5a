// A layer's parameters (bias, norm weight) as the kernels take them, and their gradients.
#pragma once
#include <algorithm>

#include "cpu/kernel_table.h"
#include "cpu/memory.h"

namespace fastnn {

// A parameter as neighbouring float32: itself, or a copy, always where `own`. `padded` elements,
// those past n are zero; `missing` everywhere where there is no data.
class Parameter {
 public:
  Parameter(const KernelTable& table, const void* data, int64_t stride, DType dtype, int64_t n,
            int64_t padded, float missing, bool own = false)
      : in_place_(!own && data != nullptr && dtype == DType::kFloat32 && (stride == 1 || n == 1) &&
                  padded == n),
        memory_(in_place_ ? 0 : padded * 4),
        values_(static_cast<const float*>(in_place_ ? data : memory_.get())) {
    if (in_place_) return;
    auto* const copy = static_cast<float*>(memory_.get());
    if (data == nullptr) {
      std::fill(copy, copy + n, missing);
    } else {
      table.to_float32(data, stride, dtype, n, copy);
    }
    std::fill(copy + n, copy + padded, 0.f);
  }
  const float* get() const { return values_; }
  // The copy; null where there is none.
  float* copy() const { return in_place_ ? nullptr : static_cast<float*>(memory_.get()); }

 private:
  bool in_place_;
  Scratch memory_;
  const float* values_;
};

// Elements whose share in the parameters' gradients is one partial sum, and the fewest and most
// rows of it: few enough to share out among threads, many enough that the sums are a small part of
// the traffic. By shape alone: the bits must not depend on the threads.
constexpr int64_t kChunkElements = 256 * 768, kFewestRows = 16, kMostRows = 256;

inline int64_t chunk_rows(int64_t columns) {
  return std::clamp(kChunkElements / columns, kFewestRows, kMostRows);
}

// The chunks' partial sums, n floats each, added in chunk order into the first: the same bits for
// any number of threads.
inline void add_chunks(const KernelTable& table, float* sums, int64_t chunks, int64_t n,
                       DType dtype, void* result) {
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[c * n + i];
  }
  table.from_float32(sums, n, dtype, result);
}

}  // namespace fastnn
