#include "cpu/norm.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work.
constexpr int64_t kGrain = 16384;
// Elements whose share in the parameters' gradients is one partial sum, and the fewest and most
// rows of it: few enough to share out among threads, many enough that the sums are a small part of
// the traffic. By shape alone: the bits must not depend on the threads.
constexpr int64_t kChunkElements = 256 * 768, kFewestRows = 16, kMostRows = 256;

int64_t row_grain(int64_t columns) { return std::max<int64_t>(1, kGrain / columns); }

int64_t chunk_rows(int64_t columns) {
  return std::clamp(kChunkElements / columns, kFewestRows, kMostRows);
}

// A parameter as neighbouring float32: itself, or a copy; filled where there is none.
class Parameter {
 public:
  Parameter(const void* data, int64_t stride, DType dtype, int64_t n, float missing,
            const KernelTable& table)
      : in_place_(data != nullptr && dtype == DType::kFloat32 && (stride == 1 || n == 1)),
        memory_(in_place_ ? 0 : n * 4),
        values_(static_cast<const float*>(in_place_ ? data : memory_.get())) {
    if (in_place_) return;
    auto* const copy = static_cast<float*>(memory_.get());
    if (data == nullptr) {
      std::fill(copy, copy + n, missing);
    } else {
      table.to_float32(data, stride, dtype, n, copy);
    }
  }
  const float* get() const { return values_; }

 private:
  bool in_place_;
  Scratch memory_;
  const float* values_;
};

// The chunks' partial sums, n floats each, added in chunk order.
void add_chunks(const float* sums, int64_t chunks, int64_t n, DType dtype, void* result,
                const KernelTable& table) {
  const Scratch memory(n * 4);
  auto* const total = static_cast<float*>(memory.get());
  std::copy(sums, sums + n, total);
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t i = 0; i < n; ++i) total[i] += sums[c * n + i];
  }
  table.from_float32(total, n, dtype, result);
}

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
  const Parameter weight(p.weight, p.weight_stride, p.parameter_dtype, p.columns, 1.f, table);
  const Parameter bias(p.bias, p.bias_stride, p.parameter_dtype, p.rms ? 0 : p.columns, 0.f, table);
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
  const Parameter weight(p.weight, p.weight_stride, p.parameter_dtype, n, 1.f, table);
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
  if (dw != nullptr) add_chunks(dw, chunks, n, p.parameter_dtype, p.dw, table);
  if (db != nullptr) add_chunks(db, chunks, n, p.parameter_dtype, p.db, table);
}

}  // namespace fastnn
