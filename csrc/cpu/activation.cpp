#include "cpu/activation.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work. Also the columns of a block, so that
// one long row is shared out: whole lines, which streaming stores need.
constexpr int64_t kGrain = 16384;

// Whether rows of `out` are written past the caches; a null one does not care, and of a single row
// the rest of a line is stored plainly.
bool streams_rows(const void* out, int64_t rows, int64_t row_bytes, int64_t tensors) {
  return out == nullptr || streams(out, rows, rows == 1 ? row_bytes / 64 * 64 : row_bytes, tensors);
}

// body(block) over the matrix: some rows of it, or some columns of one.
template <class Body>
void each_block(int64_t rows, int64_t columns, Body body) {
  if (columns <= 2 * kGrain) {
    parallel_for(rows, std::max<int64_t>(1, kGrain / columns),
                 [&](int64_t begin, int64_t end) { body(Block{begin, end, 0, columns}); });
    return;
  }
  const int64_t parts = (columns + kGrain - 1) / kGrain;
  parallel_for(rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / parts, first = i % parts * kGrain;
      body(Block{r, r + 1, first, std::min(columns, first + kGrain)});
    }
  });
}

}  // namespace

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
  parallel_for(chunks, std::max<int64_t>(1, kGrain / (rows * n)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::memset(db + c * n, 0, static_cast<size_t>(n) * sizeof(float));
      table.activation_bwd(p, bias, {c * rows, std::min(p.rows, (c + 1) * rows), 0, n}, db + c * n);
    }
  });
  add_chunks(table, db, chunks, n, p.bias_dtype, p.db);
}

}  // namespace fastnn
