// Elementwise operations: how the work is shared out, and which results go past the caches.
#pragma once
#include <algorithm>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "params/activation.h"

namespace fastnn {

// Elements worth a thread of their own: about 5 us of work. Also the columns of a block, so that
// one long row is shared out: whole lines, which streaming stores need.
constexpr int64_t kBlockGrain = 16384;

// Whether rows of `out` are written past the caches; a null one does not care, and of a single row
// the rest of a line is stored plainly.
inline bool streams_rows(const void* out, int64_t rows, int64_t row_bytes, int64_t tensors) {
  return out == nullptr || streams(out, rows, rows == 1 ? row_bytes / 64 * 64 : row_bytes, tensors);
}

// body(block) over the matrix: some rows of it, or some columns of one.
template <class Body>
void each_block(int64_t rows, int64_t columns, Body body) {
  if (columns <= 2 * kBlockGrain) {
    parallel_for(rows, std::max<int64_t>(1, kBlockGrain / columns),
                 [&](int64_t begin, int64_t end) { body(Block{begin, end, 0, columns}); });
    return;
  }
  const int64_t parts = (columns + kBlockGrain - 1) / kBlockGrain;
  parallel_for(rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / parts, first = i % parts * kBlockGrain;
      body(Block{r, r + 1, first, std::min(columns, first + kBlockGrain)});
    }
  });
}

}  // namespace fastnn
