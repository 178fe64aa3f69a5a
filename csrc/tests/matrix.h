// Matrices in guarded memory and their products in double, for the tests of everything that
// multiplies.
#pragma once
#include <cmath>
#include <vector>

#include "params/linear.h"
#include "tests/buffer.h"

namespace fastnn::test {

enum class Order {
  kRows,
  kPadded,
  kColumns,
  kStrided
};  // row-major, with a gap between rows, column-major, both apart
inline constexpr Order kOrders[] = {Order::kRows, Order::kPadded, Order::kColumns, Order::kStrided};

struct Operand {
  int64_t rows, cols;
  Matrix matrix;
  Buffer buffer;

  static int64_t row_stride(Order o, int64_t cols) {
    return o == Order::kRows      ? cols
           : o == Order::kPadded  ? cols + 3
           : o == Order::kColumns ? 1
                                  : 2 * cols + 1;
  }
  static int64_t col_stride(Order o, int64_t rows) {
    return o == Order::kColumns ? rows + 1 : o == Order::kStrided ? 2 : 1;
  }
  static int64_t elements(int64_t rows, int64_t cols, Order o) {
    return rows * cols == 0
               ? 0
               : (rows - 1) * row_stride(o, cols) + (cols - 1) * col_stride(o, rows) + 1;
  }

  Operand(int64_t r, int64_t c, Order order, DType type, Flush flush, uint64_t seed)
      : rows(r),
        cols(c),
        matrix{nullptr, row_stride(order, c), col_stride(order, r), type},
        buffer(elements(r, c, order), type, flush, 1) {
    Random random(seed * 7919 + static_cast<uint64_t>(r * 1009 + c));
    buffer.fill(elements(r, c, order), random);
    matrix.data = buffer.memory.data();
  }
  double at(int64_t i, int64_t j) const {
    return buffer.at(i * matrix.row_stride + j * matrix.col_stride);
  }
  Matrix turned() const {
    return {matrix.data, matrix.col_stride, matrix.row_stride, matrix.dtype};
  }
};

// Row-major copies in double: decoding once instead of once per product.
inline std::vector<double> dense(const Operand& m) {
  std::vector<double> d;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j) d.push_back(m.at(i, j));
  }
  return d;
}
inline std::vector<double> turned(const std::vector<double>& m, int64_t rows, int64_t cols) {
  std::vector<double> t(m.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      t[static_cast<size_t>(j * rows + i)] = m[static_cast<size_t>(i * cols + j)];
  }
  return t;
}

// a (M x K) times b^T (b: N x K), and the sums of absolute products, which the rounding of the sum
// is measured by.
struct Product {
  std::vector<double> value, size;
};
inline Product multiply(const std::vector<double>& a, const std::vector<double>& b, int64_t M,
                        int64_t N, int64_t K) {
  Product p;
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      double value = 0, size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double term = a[static_cast<size_t>(i * K + k)] * b[static_cast<size_t>(j * K + k)];
        value += term;
        size += std::abs(term);
      }
      p.value.push_back(value);
      p.size.push_back(size);
    }
  }
  return p;
}

// Rounding of K additions in float32: K half-ulp steps at worst, about sqrt(K) of them as they
// come.
inline double sum_bound(double size, int64_t K) {
  const double steps = static_cast<double>(K);
  return 0x1p-24 * size * (4 + std::min(steps, 8 * std::sqrt(steps)));
}

}  // namespace fastnn::test
