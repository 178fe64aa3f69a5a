// What is measured of the machine itself, to hold kernels against.
#pragma once
#include <cstdint>

namespace fastnn {

enum class PeakKind : int32_t { kFloat32Fma, kBFloat16Dot, kInt8Dot };
enum class StreamKind : int32_t { kRead, kCopy, kWrite };

// One thread's work of a bandwidth measurement. Buffers are 64-byte aligned, n is a multiple of
// kStreamBlock. kRead reads x; kWrite writes y; kCopy does both, n floats each.
struct StreamParams {
  const float* x;
  float* y;
  int64_t n;
  int64_t passes;
  StreamKind kind;
  bool streaming;  // stores that bypass the caches, where the instruction set has them
};
constexpr int64_t kStreamBlock = 256;  // floats: 1 KiB

}  // namespace fastnn
