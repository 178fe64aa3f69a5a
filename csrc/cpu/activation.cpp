#include "cpu/activation.h"

#include <cstring>

#include "cpu/blocks.h"
#include "cpu/dispatch.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
void activation_fwd(const ActivationParams& given) {
  ActivationParams p = given;
  const KernelTable& table = kernels();
  record_run("activation_fwd", table.isa);
  if (p.rows == 0 || p.columns == 0) return;
  if (p.bias == nullptr && p.x_row_stride == p.columns &&
      (p.factor == nullptr || p.factor_row_stride == p.columns)) {
    p.columns *= p.rows;
    p.rows = 1;
  }
  const int64_t row_bytes = p.columns * element_bytes(p.dtype);
  p.stream = streams_rows(p.y, p.rows, row_bytes, p.factor == nullptr ? 2 : 3);
  const int64_t biases = p.bias == nullptr ? 0 : p.columns;
  const Parameter bias(table, p.bias, p.bias_stride, p.bias_dtype, biases, biases, 0.f);
  each_block(p.rows, p.columns, [&](const Block& block) {
    table.activation_fwd(p, biases == 0 ? nullptr : bias.get(), block);
  });
}

void activation_bwd(const ActivationBwdParams& given) {
  ActivationBwdParams p = given;
  const KernelTable& table = kernels();
  record_run("activation_bwd", table.isa);
  const int64_t n = p.columns;
  if (n == 0) return;
  if (p.bias == nullptr && p.db == nullptr && p.dy_row_stride == n && p.x_row_stride == n &&
      p.d_row_stride == n && (p.factor == nullptr || p.factor_row_stride == n)) {
    p.columns *= p.rows;
    p.rows = p.d_row_stride = 1;
  }
  if (p.columns == 0) return;
  const int64_t row_bytes = p.columns * element_bytes(p.dtype);
  const int64_t tensors = p.factor == nullptr ? 3 : 5;
  p.stream = streams_rows(p.dx, p.rows, row_bytes, tensors) &&
             streams_rows(p.d_factor, p.rows, row_bytes, tensors);
  const int64_t biases = p.bias == nullptr ? 0 : n;
  const Parameter bias_values(table, p.bias, p.bias_stride, p.bias_dtype, biases, biases, 0.f);
  const float* const bias = biases == 0 ? nullptr : bias_values.get();
  if (p.db == nullptr) {
    each_block(p.rows, p.columns,
               [&](const Block& block) { table.activation_bwd(p, bias, block, nullptr); });
    return;
  }
  const int64_t rows = chunk_rows(n), chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);
  const Scratch memory(chunks * n * 4);
  auto* const db = static_cast<float*>(memory.get());
  parallel_for(chunks, std::max<int64_t>(1, kBlockGrain / (rows * n)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   std::memset(db + c * n, 0, static_cast<size_t>(n) * sizeof(float));
                   table.activation_bwd(p, bias, {c * rows, std::min(p.rows, (c + 1) * rows), 0, n},
                                        db + c * n);
                 }
               });
  add_chunks(table, db, chunks, n, p.bias_dtype, p.db);
}

}  // namespace fastnn
