#include "cpu/linear_groupwise.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/gemm/params.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kGrainElements = 8192;  // about 4 us of one core
// Digits of the activations that are held at once; more rows than that come in parts.
constexpr int64_t kDigitBytes = int64_t{8} << 20;
constexpr int64_t kLeastPartRows = 128;

// Digits of an activation: with three a float32 keeps 23 to 24 bits below the largest of its block,
// with two a 16-bit type keeps 15 to 16, more than its results are rounded to.
int digits_of(const LinearGroupwiseParams& p) {
  if (p.int8_input) return 1;
  return p.x.dtype == DType::kFloat32 ? 3 : 2;
}

int64_t grain_rows(int64_t K) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, K));
}

}  // namespace

void linear_groupwise_fwd(const LinearGroupwiseParams& p) {
  const KernelTable& table = kernels();
  record_run("linear_groupwise_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.bias_dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  const GroupLayout layout(p.K, p.group, p.bits, p.offsets);
  const int digits = digits_of(p);
  // A line more than the digits need: rows a multiple of 4 KiB apart would share one set of L1.
  const int64_t stride =
      round_up(layout.blocks * layout.rows * layout.per_row() * digits, kLine) + kLine;
  const int64_t most = std::max(kLeastPartRows, kDigitBytes / stride);
  const int64_t part = std::min(p.M, most);
  const Scratch memory(part * stride + part * layout.blocks * (int64_t)sizeof(BlockOfRow));
  auto* const codes = static_cast<uint8_t*>(memory.get());
  auto* const of = reinterpret_cast<BlockOfRow*>(codes + part * stride);
  const GroupedProduct product = {layout, digits, of};
  const int64_t size = element_bytes(p.x.dtype);
  for (int64_t m0 = 0; m0 < p.M; m0 += part) {
    const int64_t rows = std::min(part, p.M - m0);
    const Matrix x = {static_cast<const char*>(p.x.data) + m0 * p.x.row_stride * size,
                      p.x.row_stride, p.x.col_stride, p.x.dtype};
    parallel_for(rows, grain_rows(p.K), [&](int64_t begin, int64_t end) {
      table.group_digits(x, layout, digits, begin, end, codes, stride, of);
    });
    GemmParams g = {};
    g.M = rows;
    g.N = p.N;
    g.K = p.K;
    g.a = {codes, stride, 1, p.x.dtype};
    g.b_packed = static_cast<const float*>(p.packed);
    g.c = static_cast<char*>(p.y) + m0 * p.N * size;
    g.c_stride = p.N;
    g.c_dtype = p.x.dtype;
    g.groups = &product;
    g.epilogue.bias = biased ? bias.get() : nullptr;
    g.epilogue.activation = p.activation;
    run_gemm(g, table);
  }
}

int64_t linear_groupwise_packed_bytes(int64_t N, const GroupLayout& layout) {
  return round_up(N, kStrip) / kStrip * layout.strip_bytes();
}

void linear_groupwise_pack(const GroupwiseWeight& w, const GroupLayout& layout, int64_t N,
                           void* packed) {
  const KernelTable& table = kernels();
  record_run("linear_groupwise_pack", table.isa);
  parallel_for(round_up(N, kStrip) / kStrip, 1, [&](int64_t begin, int64_t end) {
    table.group_pack(w, layout, N, begin, end, static_cast<char*>(packed));
  });
}

void linear_groupwise_rows(const GroupwiseWeight& w, const GroupLayout& layout,
                           const int64_t* index, int64_t count, DType dtype, void* y) {
  const KernelTable& table = kernels();
  record_run("linear_groupwise_rows", table.isa);
  const int64_t row_bytes = layout.K * element_bytes(dtype);
  parallel_for(count, grain_rows(layout.K), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      table.group_row(w, layout, index[i], dtype, static_cast<char*>(y) + i * row_bytes);
    }
  });
}

}  // namespace fastnn
