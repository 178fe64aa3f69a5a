// Activations to digits, block by block, a weight's codes to strips, and rows of it to values. The
// product is gemm/groups.h's.
//
// Two or three digits: the scale of a block is the least power of two, at least 2^-100, with which
// its values are numbers of so many digits; three of them hold 23 to 24 bits of the largest value.
// One digit: the codes of the whole row, as int8_quantise makes them. A block, or with one digit a
// row, with NaN or an infinity has the scale NaN and digits of 0, so that its row becomes NaN.
#pragma once
#include "cpu/simd/codes.h"
#include "params/linear_groupwise.h"

namespace fastnn {
namespace {

// Of numbers with two and three digits in [-128, 127]. The latter is one less than 127 * 65536 +
// 127 * 256 + 127, below which float32 has halves: a quotient of 1 may have been rounded down.
constexpr float kMostOfTwo = 32639.f, kMostOfThree = 8355710.f;
constexpr float kLeastBlockScale = 0x1p-100f;  // times a scale and a sum it is a normal number
constexpr int32_t kDigitBias = 0x808080;       // makes digits of a number its bytes, plus 128

FASTNN_INLINE float power_scale(int32_t largest_bits, float most) {
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const float one = largest / most;
  int32_t bits;
  std::memcpy(&bits, &one, sizeof bits);
  bits = (bits + 0x7fffff) & 0x7f800000;  // up to a power of two
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale > kLeastBlockScale ? scale : kLeastBlockScale;
}

typedef uint8_t Bytes4 __attribute__((vector_size(kLanes * 4)));
template <int... I>
FASTNN_INLINE Bytes4 turn_quads(Bytes4 v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I / 16 * 16 + I % 4 * 4 + I % 16 / 4)...);
}

// `count` values to kDigits digits each, quads of one digit next to each other: element k's digit d
// is byte (k / 4 * kDigits + d) * 4 + k % 4. Adds the digits to their sums.
template <int kDigits>
FASTNN_INLINE void store_digits(Vec values, int count, uint8_t* out, IVec (&sums)[3]) {
  const IVec number = nearest_int(fill_rest(values, count, 0.f));
  const UVec biased = (UVec)number + (uint32_t)kDigitBias;
  FASTNN_UNROLL for (int d = 0; d < kDigits; ++d) {
    sums[d] += (IVec)((biased >> (8 * d)) & 0xffu) - 128;
  }
  const Bytes4 turned = turn_quads((Bytes4)(biased ^ (uint32_t)kDigitBias),
                                   std::make_integer_sequence<int, kLanes * 4>{});
  alignas(64) uint8_t bytes[kLanes * 4];
  std::memcpy(bytes, &turned, sizeof bytes);
  FASTNN_UNROLL for (int q = 0; q < kLanes / 4; ++q) {
    if (q * 4 < count) std::memcpy(out + q * kDigits * 4, bytes + q * 16, kDigits * 4);
  }
}

template <class T, int kDigits>
void digits_of_rows(const Matrix& x, const GroupLayout& layout, int64_t begin, int64_t end,
                    uint8_t* out, int64_t out_stride, BlockOfRow* of) {
  const int64_t block_bytes = layout.rows * layout.per_row() * kDigits;
  const int64_t blocks = layout.blocks;
  const int32_t zero_code = layout.offsets ? 0 : layout.bits == 4 ? 8 : 128;
  for (int64_t m = begin; m < end; ++m) {
    const T* const row = static_cast<const T*>(x.data) + m * x.row_stride;
    int32_t bits = 0;
    if constexpr (kDigits == 1) bits = largest_magnitude_bits(row, 0, layout.K, x.col_stride);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = layout.first(b), size = layout.size(b);
      uint8_t* const to = out + m * out_stride + b * block_bytes;
      BlockOfRow& found = of[m * blocks + b];
      if constexpr (kDigits > 1) bits = largest_magnitude_bits(row, first, size, x.col_stride);
      std::memset(to, 0, (size_t)block_bytes);
      if (bits >= kInfinityBits) {
        found = {{0, 0, 0}, __builtin_nanf(""), __builtin_nanf("")};
        continue;
      }
      found.scale = kDigits == 1 ? code_scale(bits)
                                 : power_scale(bits, kDigits == 2 ? kMostOfTwo : kMostOfThree);
      const Vec inverse = splat(1.f / found.scale);
      IVec sums[3] = {};
      for (int64_t k = 0; k < size; k += kLanes) {
        const int count = size - k < kLanes ? (int)(size - k) : kLanes;
        store_digits<kDigits>(load_strided(row, first + k, count, x.col_stride) * inverse, count,
                              to + k * kDigits, sums);
      }
      float number = 0.f;
      for (int d = kDigits - 1; d >= 0; --d) {
        const float sum = sum_lanes(__builtin_convertvector(sums[d], Vec));  // exact: below 2^24
        found.correction[d] = -zero_code * (int32_t)sum;
        number = number * 256.f + sum;
      }
      found.sum = kDigits == 1 ? number : number * found.scale;
    }
  }
}

void group_digits(const Matrix& x, const GroupLayout& layout, int digits, int64_t begin,
                  int64_t end, uint8_t* out, int64_t out_stride, BlockOfRow* of) {
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    auto* const run = digits == 1   ? digits_of_rows<T, 1>
                      : digits == 2 ? digits_of_rows<T, 2>
                                    : digits_of_rows<T, 3>;
    run(x, layout, begin, end, out, out_stride, of);
  });
}

// Element k of a row of codes, as an unsigned number.
FASTNN_INLINE uint32_t code_at(const uint8_t* row, int64_t k, int bits) {
  if (bits == 8) return row[k] ^ 0x80u;
  return (row[k / 2] >> (k % 2 * 4)) & 0xfu;
}

void group_pack(const GroupwiseWeight& w, const GroupLayout& layout, int64_t N, int64_t s0,
                int64_t s1, char* packed) {
  const int64_t per_row = layout.per_row();
  const int half = (int)per_row / 2;
  for (int64_t strip = s0; strip < s1; ++strip) {
    char* const to = packed + strip * layout.strip_bytes();
    std::memset(to, 0, (size_t)layout.strip_bytes());
    for (int64_t i = 0; i < 16 && strip * 16 + i < N; ++i) {
      const int64_t n = strip * 16 + i;
      const uint8_t* const row = w.codes + n * w.row_stride;
      for (int64_t b = 0; b < layout.blocks; ++b) {
        const int64_t at = n * layout.groups + layout.group_of(b);
        char* const scales = to + layout.scales_at(b) + i * 2;
        std::memcpy(scales, static_cast<const uint16_t*>(w.scale) + at, 2);
        if (layout.offsets) {
          std::memcpy(scales + GroupLayout::kLine / 2, static_cast<const uint16_t*>(w.offset) + at,
                      2);
        }
        char* const codes = to + layout.codes_at(b) + i * 4;
        const int64_t first = layout.first(b), size = layout.size(b);
        for (int64_t r = 0; r * per_row < size; ++r) {
          uint32_t dword = 0;
          for (int64_t j = 0; j < per_row && r * per_row + j < size; ++j) {
            const uint32_t code = code_at(row, first + r * per_row + j, layout.bits);
            // Bits 4: byte j holds k = j low and k = 4 + j high.
            const int shift =
                layout.bits == 8 ? (int)j * 8 : (int)(j % half) * 8 + (j >= half ? 4 : 0);
            dword |= code << shift;
          }
          std::memcpy(codes + r * GroupLayout::kLine, &dword, 4);
        }
      }
    }
  }
}

// The values that row `n` of a weight stands for: each product is exact, with an offset the sum
// rounds once, then to T.
template <class T>
void group_row_typed(const GroupwiseWeight& w, const GroupLayout& layout, int64_t n, T* y) {
  const auto* const scale = static_cast<const Float16*>(w.scale) + n * layout.groups;
  const auto* const offset = static_cast<const Float16*>(w.offset) + n * layout.groups;
  const uint8_t* const row = w.codes + n * w.row_stride;
  const int32_t zero_code = layout.offsets ? 0 : layout.bits == 4 ? 8 : 128;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const Vec s = splat(to_float(scale[g]));
    const Vec o = splat(layout.offsets ? to_float(offset[g]) : 0.f);
    const int64_t end = (g + 1) * layout.group < layout.K ? (g + 1) * layout.group : layout.K;
    for (int64_t k = g * layout.group; k < end; k += kLanes) {
      const int count = end - k < kLanes ? (int)(end - k) : kLanes;
      Bytes bytes = {};
      for (int i = 0; i < count; ++i) bytes[i] = (uint8_t)code_at(row, k + i, layout.bits);
      const Vec code = __builtin_convertvector((IVec)widen(bytes) - zero_code, Vec);
      store_some(y + k, layout.offsets ? fma(code, s, o) : code * s, count);
    }
  }
}

void group_row(const GroupwiseWeight& w, const GroupLayout& layout, int64_t n, DType dtype,
               void* y) {
  with_type(dtype,
            [&](auto type) { group_row_typed(w, layout, n, static_cast<decltype(type)*>(y)); });
}

}  // namespace
}  // namespace fastnn
