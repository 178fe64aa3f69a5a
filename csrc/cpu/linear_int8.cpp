#include "cpu/linear_int8.h"

#include "cpu/dispatch.h"
#include "cpu/gemm/params.h"
#include "cpu/int8_rows.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kUnitCodes = 4;

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

}  // namespace

void linear_int8_fwd(const LinearInt8Params& p) {
  const KernelTable& table = kernels();
  record_run("linear_int8_fwd", table.isa);
  if (p.M == 0 || p.N == 0) return;
  const bool biased = p.bias != nullptr;
  const Parameter bias(table, p.bias, p.bias_stride, p.bias_dtype, biased ? p.N : 0,
                       biased ? round_up(p.N, kStrip) : 0, 0.f);
  const int64_t padded = round_up(p.K, kUnitCodes);
  const Int8Rows rounded(p.x, p.M, p.K, padded);
  const Packed layout(p.N, p.K);
  rounded.each_part(table, [&](int64_t m0, int64_t rows, const Matrix& codes, const float* scale) {
    GemmParams g = {};
    g.M = rows;
    g.N = p.N;
    g.K = padded;
    g.a = codes;
    g.b_packed = static_cast<const float*>(p.packed);
    g.c = static_cast<char*>(p.y) + m0 * p.N * element_bytes(p.x.dtype);
    g.c_stride = p.N;
    g.c_dtype = p.x.dtype;
    g.is_int8 = true;
    g.int8 = {scale, layout.scale(p.packed), layout.offset(p.packed)};
    g.tile_bias = biased ? bias.get() : nullptr;
    g.epilogue.activation = p.activation;
    run_gemm(g, table);
  });
}

void linear_int8_quantize(const Matrix& x, int64_t M, int64_t K, void* codes, float* scale) {
  const KernelTable& table = kernels();
  record_run("linear_int8_quantize", table.isa);
  parallel_for(M, Int8Rows::grain(K), [&](int64_t begin, int64_t end) {
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
