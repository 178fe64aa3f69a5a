#include "cpu/norm.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work.
constexpr int64_t kGrain = 16384;
int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / columns); }

// A parameter in the order in which the kernels have rows of this type: another than memory's for
// bfloat16.
class OrderedParameter : public Parameter {
 public:
  OrderedParameter(const KernelTable& table, DType rows, const void* data, int64_t stride,
                   DType dtype, int64_t n, float missing)
      : Parameter(table, data, stride, dtype, n, n, missing, rows == DType::kBFloat16) {
    if (rows == DType::kBFloat16) table.norm_order(rows, copy(), n);
  }
};

}  // namespace

void norm_fwd(const NormParams& given) {
  NormParams p = given;
  const int64_t row_bytes = p.columns * element_bytes(p.dtype);
  const int64_t tensors = p.total == nullptr ? 2 : 4;
  p.stream = streams(p.y, p.rows, row_bytes, tensors) &&
             (p.total == nullptr || streams(p.total, p.rows, row_bytes, tensors));
  const KernelTable& table = kernels();
  record_run("norm_fwd", table.isa);
  if (p.rows == 0 || p.columns == 0) return;
  const int64_t n = p.columns, biases = p.rms ? 0 : n;
  const OrderedParameter weight(table, p.dtype, p.weight, p.weight_stride, p.parameter_dtype, n,
                                1.f);
  const OrderedParameter bias(table, p.dtype, p.bias, p.bias_stride, p.parameter_dtype, biases,
                              0.f);
  parallel_for(p.rows, row_grain(p.columns), [&](int64_t begin, int64_t end) {
    table.norm_fwd(p, weight.get(), bias.get(), begin, end);
  });
}

void norm_bwd(const NormBwdParams& given) {
  NormBwdParams p = given;
  p.stream = p.dx != nullptr && streams(p.dx, p.rows, p.columns * element_bytes(p.dtype),
                                        p.d_total == nullptr ? 3 : 4);
  const KernelTable& table = kernels();
  record_run("norm_bwd", table.isa);
  const int64_t n = p.columns;
  if (n == 0) return;
  const OrderedParameter weight(table, p.dtype, p.weight, p.weight_stride, p.parameter_dtype, n,
                                1.f);
  if (p.dw == nullptr && p.db == nullptr) {
    parallel_for(p.rows, row_grain(n), [&](int64_t begin, int64_t end) {
      table.norm_bwd(p, weight.get(), begin, end, nullptr, nullptr);
    });
    return;
  }
  const int64_t rows = chunk_rows(n), chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);
  const Scratch dw_memory(p.dw ? chunks * n * 4 : 0), db_memory(p.db ? chunks * n * 4 : 0);
  auto* const dw = static_cast<float*>(p.dw ? dw_memory.get() : nullptr);
  auto* const db = static_cast<float*>(p.db ? db_memory.get() : nullptr);
  parallel_for(chunks, std::max<int64_t>(1, row_grain(n) / rows), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      table.norm_bwd(p, weight.get(), c * rows, std::min(p.rows, (c + 1) * rows),
                     dw ? dw + c * n : nullptr, db ? db + c * n : nullptr);
    }
  });
  if (dw != nullptr) add_chunks(table, dw, chunks, n, p.parameter_dtype, p.dw);
  if (db != nullptr) add_chunks(table, db, chunks, n, p.parameter_dtype, p.db);
}

}  // namespace fastnn
