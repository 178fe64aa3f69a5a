// Arguments of rotary position embedding. Strides in elements.
#pragma once
#include "params/common.h"

namespace fastnn {

// (B, heads, S, D) and its rotated copy; features are next to each other.
struct RopeOperand {
  const void* x;
  void* y;
  int64_t heads;
  int64_t x_batch_stride, x_head_stride, x_row_stride;
  int64_t y_batch_stride, y_head_stride, y_row_stride;
  bool stream = false;  // y is written past the caches: whole aligned lines
};

// (batch or 1, rows, width); neighbours along the width.
struct RopeTable {
  const void* data;
  int64_t batch_stride, row_stride;
};

// Each pair (a, b) of the first `rotary` features becomes (a c_a - b s_a, b c_b + a s_b): of
// features i and i + rotary / 2, or interleaved of neighbours. Inverse is the transpose of that,
// which for tables with c_a = c_b and s_a = s_b is the rotation back.
struct RopeParams {
  int64_t B, S, D, rotary;
  RopeOperand operands[2];
  int32_t count;  // of operands
  RopeTable cos, sin;
  int64_t table_width;       // rotary, or rotary / 2 where both of a pair share an entry
  const int64_t* positions;  // rows of the tables, by batch entry and row; null: row s for row s
  int64_t positions_batch_stride;
  DType dtype, table_dtype;
  bool interleaved, inverse;
  bool by_heads = false;  // how the work is dealt out: rope_items
};

// A block of neighbouring positions: what the tables hold for them stays in the first cache.
constexpr int64_t kRopePositions = 16;
constexpr int64_t rope_heads(const RopeParams& p) {
  return p.operands[0].heads + (p.count > 1 ? p.operands[1].heads : 0);
}
// Work goes as rows lie in memory: heads side by side block by block, with the tables read once;
// heads apart head by head, with the tables read for each. Memory is streamed from end to end then:
// a block of each of 32 heads in turns took 1.4 times as long.
constexpr int64_t rope_items(const RopeParams& p) {
  return p.B * (p.by_heads ? rope_heads(p) : (p.S + kRopePositions - 1) / kRopePositions);
}

// A block's tables are copied, as float32, where the kernel cannot read them in place: where they
// are of another 16-bit type than the rows, and when interleaved with an entry for each feature.
constexpr bool rope_copies_tables(const RopeParams& p) {
  return (p.table_dtype != DType::kFloat32 && p.table_dtype != p.dtype) ||
         (p.interleaved && p.table_width != p.rotary);
}
constexpr int64_t rope_scratch_floats(const RopeParams& p) {
  return rope_copies_tables(p) ? 2 * kRopePositions * p.rotary : 0;
}

}  // namespace fastnn
