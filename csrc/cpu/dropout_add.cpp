#include "cpu/dropout_add.h"

#include "cpu/blocks.h"
#include "cpu/dispatch.h"
#include "cpu/record.h"

namespace fastnn {

void dropout_add(const DropoutAddParams& given, const char* name) {
  DropoutAddParams p = given;
  const int64_t tensors = p.residual == nullptr ? 2 : 3;
  p.stream = streams_rows(p.y, p.rows, p.columns * element_bytes(p.dtype), tensors);
  const KernelTable& table = kernels();
  record_run(name, table.isa);
  if (p.rows == 0 || p.columns == 0) return;
  each_block(p.rows, p.columns, [&](const Block& block) { table.dropout_add(p, block); });
}

}  // namespace fastnn
