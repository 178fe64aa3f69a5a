// What the machine can do at best: multiply-adds out of registers, and streams of loads and stores.
#pragma once
#include "cpu/simd/lanes.h"
#include "cpu/simd/stream.h"
#include "params/limits.h"

namespace fastnn {
namespace {

// Independent chains: latency 4 at up to two per cycle needs 8; 12 and two operands fit 16
// registers.
constexpr int kPeakChains = 12;

template <class V, class Step>
FASTNN_INLINE void run_chains(int64_t steps, float* sink, V start, Step step) {
  V sums[kPeakChains];
  FASTNN_UNROLL for (int i = 0; i < kPeakChains; ++i) sums[i] =
      start + __builtin_convertvector(splat_int(i), V);
  for (int64_t s = 0; s < steps; ++s) {
    FASTNN_UNROLL for (int i = 0; i < kPeakChains; ++i) sums[i] = step(sums[i]);
  }
  FASTNN_UNROLL for (int i = 1; i < kPeakChains; ++i) sums[0] += sums[i];
  std::memcpy(sink, &sums[0], sizeof sums[0]);
}

// Runs that many rounds of kPeakChains instructions and says how many operations they were, a
// multiply-add counting as two; 0 where the instruction set has no such instruction. sink: one
// vector.
int64_t peak_operations(PeakKind kind, int64_t steps, float* sink) {
  const int64_t lanes = steps * kPeakChains * kLanes;
  switch (kind) {
    case PeakKind::kFloat32Fma: {
      // The sum is a factor, so that no part of the step is the same twice; it tends to 2.
      const Vec factor = splat(0.5f), addend = splat(1.f);
      run_chains(steps, sink, splat(1.f),
                 [=](Vec c) __attribute__((always_inline)) { return fma(c, factor, addend); });
      return 2 * lanes;
    }
    case PeakKind::kBFloat16Dot:
      if constexpr (kHasBf16Dot) {
        const Vec ones = as_float(splat_int(0x3f803f80));
        run_chains(steps, sink, splat(1.f), [=](Vec c) __attribute__((always_inline)) {
          return dot_bf16_pairs(c, ones, ones);
        });
        return 4 * lanes;
      }
      return 0;
    case PeakKind::kInt8Dot:
      if constexpr (kHasInt8Dot) {
        const IVec ones = splat_int(0x01010101);
        run_chains(steps, sink, splat_int(0), [=](IVec c) __attribute__((always_inline)) {
          return dot_int8_quads(c, ones, ones);
        });
        return 8 * lanes;
      }
      return 0;
  }
  return 0;
}

constexpr int kStreamVecs = 8;  // in flight; adds of latency 3 at one load per cycle need 3
static_assert(kStreamBlock % (kStreamVecs * kLanes) == 0);

FASTNN_INLINE Vec read_stream(const float* x, int64_t n) {
  Vec sums[kStreamVecs];
  FASTNN_UNROLL for (int k = 0; k < kStreamVecs; ++k) sums[k] = zero();
  for (int64_t i = 0; i < n; i += kStreamVecs * kLanes) {
    FASTNN_UNROLL for (int k = 0; k < kStreamVecs; ++k) sums[k] += load(x + i + k * kLanes);
  }
  FASTNN_UNROLL for (int k = 1; k < kStreamVecs; ++k) sums[0] += sums[k];
  return sums[0];
}

template <bool kCopying, bool kStreaming>
FASTNN_INLINE void write_stream(const float* x, float* y, int64_t n, Vec value) {
  for (int64_t i = 0; i < n; i += kStreamVecs * kLanes) {
    Vec v[kStreamVecs];
    FASTNN_UNROLL for (int k = 0; k < kStreamVecs; ++k) {
      v[k] = kCopying ? load(x + i + k * kLanes) : value;
    }
    FASTNN_UNROLL for (int k = 0; k < kStreamVecs; ++k) {
      if constexpr (kStreaming) {
        stream_store(y + i + k * kLanes, v[k]);
      } else {
        store(y + i + k * kLanes, v[k]);
      }
    }
  }
  if constexpr (kStreaming) stream_fence();
}

// Runs p.passes over the buffers; returns the sum of what was read, so that it has to be read.
float stream(const StreamParams& p) {
  Vec total = zero();
  for (int64_t pass = 0; pass < p.passes; ++pass) {
    const Vec value = splat((float)pass);
    if (p.kind == StreamKind::kRead) {
      total += read_stream(p.x, p.n);
    } else if (p.kind == StreamKind::kCopy) {
      p.streaming ? write_stream<true, true>(p.x, p.y, p.n, value)
                  : write_stream<true, false>(p.x, p.y, p.n, value);
    } else {
      p.streaming ? write_stream<false, true>(p.x, p.y, p.n, value)
                  : write_stream<false, false>(p.x, p.y, p.n, value);
    }
    asm volatile("" ::: "memory");  // each pass stores for real
  }
  return sum_lanes(total);
}

}  // namespace
}  // namespace fastnn
