// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random
// bits as a function of (seed, position), so that a dropout mask is the same on every backend and
// for any number of threads.
#pragma once
#include <cstdint>

#include "cpu/simd/lanes.h"

namespace fastnn {
namespace {

// Four words for each counter: one, or one per lane.
template <class Word>
struct PhiloxWords {
  Word x[4];
};
using Philox4 = PhiloxWords<uint32_t>;

// Both halves of a 64-bit product.
FASTNN_INLINE void multiply(uint32_t m, uint32_t a, uint32_t& high, uint32_t& low) {
  const uint64_t product = (uint64_t)m * a;
  high = (uint32_t)(product >> 32);
  low = (uint32_t)product;
}
FASTNN_INLINE void multiply(uint32_t m, UVec a, UVec& high, UVec& low) {
  constexpr uint64_t kLow = 0xffffffffu;
  const LanePairs even = multiply_low((LanePairs)a, m), odd = multiply_low((LanePairs)a >> 32, m);
  high = (UVec)((even >> 32) | (odd & ~kLow));
  low = (UVec)((even & kLow) | (odd << 32));
}

// The counter in two halves.
template <class Word>
FASTNN_INLINE PhiloxWords<Word> philox(uint64_t seed, Word c0, Word c1) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  Word c2 = {}, c3 = {};
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    multiply(0xD2511F53u, c0, high0, low0);
    multiply(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
FASTNN_INLINE Philox4 philox(uint64_t seed, uint64_t counter) {
  return philox<uint32_t>(seed, (uint32_t)counter, (uint32_t)(counter >> 32));
}

// What is dropped: a word below the threshold.
FASTNN_INLINE uint64_t drop_threshold(float probability) {
  return (uint64_t)((double)probability * 4294967296.0);
}

// Which of 4 kLanes elements are kept, 1 or 0 in a byte each: those of kLanes counters, four
// neighbours of each.
constexpr int kKeepBlock = 4 * kLanes;
FASTNN_INLINE void keep_block(uint64_t seed, uint64_t counter, uint64_t threshold, uint8_t* keep) {
  const uint32_t low = (uint32_t)counter;
  const UVec c0 = low + (UVec)lane_numbers(std::make_integer_sequence<int, kLanes>{});
  const UVec carry = (UVec)(c0 < low) & 1u;
  const PhiloxWords<UVec> random = philox<UVec>(seed, c0, (uint32_t)(counter >> 32) + carry);
  UVec bytes = {};
  for (int k = 0; k < 4; ++k) {
    bytes |= (UVec)(random.x[k] >= (uint32_t)threshold) & (1u << (8 * k));
  }
  if (threshold >> 32 != 0) bytes = UVec{};
  std::memcpy(keep, &bytes, sizeof bytes);
}

}  // namespace
}  // namespace fastnn
