// Guarded memory for elements of a storage type known at run time, read and written as double.
#pragma once
#include "tests/guarded.h"
#include "tests/reference.h"

namespace fastnn::test {

struct Buffer {
  DType type;
  Guarded<char> memory;
  Buffer(int64_t n, DType t, Flush flush, int64_t offset)
      : type(t), memory(n * element_bytes(t), flush, offset * element_bytes(t)) {}
  double at(int64_t i) const { return get(memory.data(), i, type); }
  void set(int64_t i, double x) { put(memory.data(), i, x, type); }
  void fill(int64_t n, Random& random) {
    for (int64_t i = 0; i < n; ++i) set(i, random.value());
  }
};

}  // namespace fastnn::test
