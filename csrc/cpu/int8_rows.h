// The rows of a product's input as int8 codes plus 128, with a scale each: rounded here for every
// kind of weight that is codes, too (the rounding: cpu/kernels/linear_int8.h).
#pragma once
#include <algorithm>

#include "cpu/gemm/params.h"
#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace fastnn {

class Int8Rows {
 public:
  static constexpr uint8_t kShift = 0x80;  // adds 128

  // Rows of at least `columns` codes, K of them a row's own, the others those of zeros.
  Int8Rows(const Matrix& x, int64_t M, int64_t K, int64_t columns)
      : x_(x),
        M_(M),
        K_(K),
        columns_(columns),
        stride_(round_up(columns, kLine) + kLine),
        part_(std::min(M, std::max(kLeastPartRows, kCodeBytes / stride_))),
        memory_(part_ * stride_ + (round_up(part_, kStrip) + kStrip) * 4),
        codes_(static_cast<uint8_t*>(memory_.get())),
        scale_(reinterpret_cast<float*>(codes_ + part_ * stride_)) {}

  // Calls f(m0, rows, codes, scale) for parts of the rows, rounded, one after the other.
  template <class F>
  void each_part(const KernelTable& table, F f) const {
    for (int64_t m0 = 0; m0 < M_; m0 += part_) {
      const int64_t rows = std::min(part_, M_ - m0);
      const Matrix x = {
          static_cast<const char*>(x_.data) + m0 * x_.row_stride * element_bytes(x_.dtype),
          x_.row_stride, x_.col_stride, x_.dtype};
      parallel_for(rows, grain(K_), [&](int64_t begin, int64_t end) {
        table.int8_quantise(x, K_, begin, end, kShift, codes_, stride_, scale_);
        for (int64_t m = begin; m < end; ++m) {
          std::fill(codes_ + m * stride_ + K_, codes_ + m * stride_ + columns_, kShift);
        }
      });
      f(m0, rows, Matrix{codes_, stride_, 1, x_.dtype}, scale_);
    }
  }

  static int64_t grain(int64_t K) {
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, K));
  }

 private:
  // A line more than the codes need: rows a multiple of 4 KiB apart would share one set of L1.
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kGrainElements = 16384;  // about 4 us of one core
  // Codes that are held at once; more rows than that come in parts.
  static constexpr int64_t kCodeBytes = int64_t{8} << 20;
  static constexpr int64_t kLeastPartRows = 512;

  Matrix x_;
  int64_t M_, K_, columns_, stride_, part_;
  Scratch memory_;
  uint8_t* codes_;
  float* scale_;
};

}  // namespace fastnn
