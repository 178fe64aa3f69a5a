// The packed layout, unit by unit: strips of 16 columns, zeros past N and K, from any orientation,
// in parts.
#include <bit>
#include <cstring>
#include <vector>

#include "cpu/gemm/params.h"
#include "cpu/linear.h"
#include "tests/buffer.h"
#include "tests/isa.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

enum class Layout { kAlongK, kAlongN, kStrided };

// A K x N operand in guarded memory; k and n strides by layout.
struct Operand {
  Matrix matrix;
  Buffer memory;
  static int64_t k_stride(Layout l, int64_t N) {
    return l == Layout::kAlongK ? 1 : l == Layout::kAlongN ? N + 3 : 2 * N + 5;
  }
  static int64_t n_stride(Layout l, int64_t K) {
    return l == Layout::kAlongK ? K + 5 : l == Layout::kAlongN ? 1 : 2;
  }
  static int64_t elements(Layout l, int64_t N, int64_t K) {
    return N == 0 || K == 0 ? 0 : (K - 1) * k_stride(l, N) + (N - 1) * n_stride(l, K) + 1;
  }
  Operand(Layout layout, int64_t N, int64_t K, DType type, Flush flush)
      : matrix{nullptr, k_stride(layout, N), n_stride(layout, K), type},
        memory(elements(layout, N, K), type, flush, 1) {
    Random random(static_cast<uint64_t>(N * 1000 + K));
    memory.fill(elements(layout, N, K), random);
    matrix.data = memory.memory.data();
  }
  uint32_t bits(int64_t k, int64_t n) const {
    return encode(memory.at(k * matrix.row_stride + n * matrix.col_stride), matrix.dtype);
  }
};

bool pairs(const char* isa, DType type) {
  return type == DType::kBFloat16 && std::strcmp(isa, "avx512_bf16") == 0;
}

// What unit u of column n must hold: a float32, or two bfloat16 with the earlier one below.
uint32_t expected_unit(const Operand& b, bool in_pairs, int64_t u, int64_t n, int64_t N,
                       int64_t K) {
  if (n >= N) return 0;
  if (!in_pairs)
    return std::bit_cast<uint32_t>(static_cast<float>(decode(b.bits(u, n), b.matrix.dtype)));
  return b.bits(2 * u, n) | (2 * u + 1 < K ? b.bits(2 * u + 1, n) << 16 : 0);
}

void check_pack(const char* isa, Layout layout, int64_t N, int64_t K, DType type) {
  const bool in_pairs = pairs(isa, type);
  const int64_t units = in_pairs ? (K + 1) / 2 : K, strips = (N + kStrip - 1) / kStrip;
  const int64_t floats = kernels().packed_floats(N, K, type);
  CHECK(floats == units * strips * kStrip, "%s %s (%ld, %ld): %ld floats", isa, type_name(type),
        static_cast<long>(N), static_cast<long>(K), static_cast<long>(floats));
  for (const Flush flush : {Flush::kStart, Flush::kEnd}) {
    const Operand b(layout, N, K, type, flush);
    Guarded<uint32_t> packed(floats, flush);
    auto* const out = reinterpret_cast<float*>(packed.data());
    for (int64_t s = 0; s < strips; ++s)
      kernels().pack(b.matrix, N, K, s, s + 1, out);  // strips in parts
    for (int64_t i = 0; i < floats; ++i) {
      const int64_t s = i / (units * kStrip), u = i / kStrip % units, n = s * kStrip + i % kStrip;
      const uint32_t want = expected_unit(b, in_pairs, u, n, N, K);
      CHECK(packed[i] == want,
            "%s %s layout %d (%ld, %ld): unit %ld of column %ld is %08x, not %08x", isa,
            type_name(type), static_cast<int>(layout), static_cast<long>(N), static_cast<long>(K),
            static_cast<long>(u), static_cast<long>(n), packed[i], want);
    }
    CHECK(packed.intact() && b.memory.memory.intact(), "%s wrote outside", isa);
  }
}

TEST(layout_of_every_small_shape) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Layout layout : {Layout::kAlongK, Layout::kAlongN, Layout::kStrided}) {
        for (const int64_t N : {1, 2, 15, 16, 17, 31, 33}) {
          for (const int64_t K : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 65})
            check_pack(isa, layout, N, K, type);
        }
      }
    }
  });
}

TEST(driver_packs_what_the_kernel_packs) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      constexpr int64_t kN = 83, kK = 45;
      // The driver takes the weight, N x K; the kernel the operand, K x N.
      const Operand b(Layout::kAlongK, kN, kK, type, Flush::kEnd);
      const Matrix w = {b.matrix.data, b.matrix.col_stride, b.matrix.row_stride, type};
      const int64_t bytes = linear_packed_bytes(kN, kK, type);
      Guarded<char> by_driver(bytes), by_kernel(bytes);
      linear_pack(w, kN, kK, by_driver.data());
      kernels().pack(b.matrix, kN, kK, 0, (kN + kStrip - 1) / kStrip,
                     reinterpret_cast<float*>(by_kernel.data()));
      CHECK(std::memcmp(by_driver.data(), by_kernel.data(), static_cast<size_t>(bytes)) == 0,
            "%s %s", isa, type_name(type));
    }
  });
}

}  // namespace
