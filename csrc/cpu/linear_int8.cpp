#include "cpu/linear_int8.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kUnitCodes = 4;
constexpr int64_t kLine = 64;
constexpr int64_t kGrainElements = 16384;  // about 4 us of one core
constexpr uint8_t kShift = 0x80;           // of the activations' codes: adds 128
// Codes of the activations that are held at once; more rows than that come in parts.
constexpr int64_t kCodeBytes = int64_t{8} << 20;
constexpr int64_t kLeastPartRows = 512;

struct Packed {
  int64_t strip_floats, columns;
  Packed(int64_t N, int64_t K)
      : strip_floats(round_up(N, kStrip) * ((K + kUnitCodes - 1) / kUnitCodes)),
        columns(round_up(N, kStrip)) {}
  int64_t bytes() const { return (strip_floats + 2 * columns) * 4; }
  const int32_t* offset(const void* p) const {
    return static_cast<const int32_t*>(p) + strip_floats;
  }
  const float* scale(const void* p) const {
    return static_cast<const float*>(p) + strip_floats + columns;
  }
};

int64_t grain_rows(int64_t K) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, K));
}

// Rows [m0, m0 + rows) of the product.
void run_rows(const LinearInt8Params& p, const KernelTable& table, int64_t m0, int64_t rows,
              uint8_t* codes, int64_t stride, float* scale, const float* bias) {
  const Matrix x = {
      static_cast<const char*>(p.x.data) + m0 * p.x.row_stride * element_bytes(p.x.dtype),
      p.x.row_stride, p.x.col_stride, p.x.dtype};
  const int64_t padded = round_up(p.K, kUnitCodes);
  parallel_for(rows, grain_rows(p.K), [&](int64_t begin, int64_t end) {
    table.int8_quantise(x, p.K, begin, end, kShift, codes, stride, scale);
    for (int64_t m = begin; m < end; ++m)
      std::fill(codes + m * stride + p.K, codes + m * stride + padded, kShift);
  });
  const Packed layout(p.N, p.K);
  GemmParams g = {};
  g.M = rows;
  g.N = p.N;
  g.K = padded;
  g.a = {codes, stride, 1, p.x.dtype};
  g.b_packed = static_cast<const float*>(p.packed);
  g.c = static_cast<char*>(p.y) + m0 * p.N * element_bytes(p.x.dtype);
  g.c_stride = p.N;
  g.c_dtype = p.x.dtype;
  g.is_int8 = true;
  g.int8 = {scale, layout.scale(p.packed), layout.offset(p.packed)};
  g.epilogue.bias = bias;
  g.epilogue.activation = p.activation;
  run_gemm(g, table);
}

}  // namespace

void linear_int8_fwd(const LinearInt8Params& p) {
  const KernelTable& table = kernels();
  record_run("linear_int8_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.bias_dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  // A line more than the codes need: rows a multiple of 4 KiB apart would share one set of L1.
  const int64_t stride = round_up(p.K, kLine) + kLine;
  const int64_t most = std::max(kLeastPartRows, kCodeBytes / stride);
  const int64_t part = std::min(p.M, most);
  const Scratch memory(part * stride + round_up(part, kStrip) * 4);
  auto* const codes = static_cast<uint8_t*>(memory.get());
  auto* const scale = reinterpret_cast<float*>(codes + part * stride);
  for (int64_t m0 = 0; m0 < p.M; m0 += part) {
    run_rows(p, table, m0, std::min(part, p.M - m0), codes, stride, scale,
             biased ? bias.get() : nullptr);
  }
}

void linear_int8_quantize(const Matrix& x, int64_t M, int64_t K, void* codes, float* scale) {
  const KernelTable& table = kernels();
  record_run("linear_int8_quantize", table.isa);
  parallel_for(M, grain_rows(K), [&](int64_t begin, int64_t end) {
    table.int8_quantise(x, K, begin, end, 0, static_cast<uint8_t*>(codes), K, scale);
  });
}

int64_t linear_int8_packed_bytes(int64_t N, int64_t K) { return Packed(N, K).bytes(); }

void linear_int8_pack(const Matrix& codes, const float* scale, int64_t scale_stride, int64_t N,
                      int64_t K, void* packed) {
  const KernelTable& table = kernels();
  record_run("linear_int8_pack", table.isa);
  const Packed layout(N, K);
  auto* const offset = const_cast<int32_t*>(layout.offset(packed));
  auto* const scales = const_cast<float*>(layout.scale(packed));
  parallel_for(layout.columns / kStrip, 8, [&](int64_t begin, int64_t end) {
    table.int8_pack(codes, N, K, begin, end, static_cast<float*>(packed), offset);
  });
  for (int64_t n = 0; n < layout.columns; ++n) scales[n] = n < N ? scale[n * scale_stride] : 0.f;
}

}  // namespace fastnn
