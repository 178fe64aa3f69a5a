// How a row kernel is launched: pure functions of shape and machine, for launchers, tests and the
// audit alike.
#pragma once
#include <cstdint>

namespace fastnn {

// Who works on one row.
enum class RowKind {
  kLanes,   // a part of a warp or a whole one, the row in registers
  kBlock,   // a block, the row in registers
  kStream,  // a block, the row read again for each pass (it comes from L1 or L2 then)
  kSplit,   // several blocks, whose partial results meet in a second launch
};

struct RowPlan {
  RowKind kind;
  int lanes;           // threads that share a row
  int values;          // of a row, in each thread's registers
  int threads;         // of a block
  int rows_per_block;  // at a time
  int parts;           // of a row
  int64_t grid;        // blocks; they loop where there are more rows
};

constexpr int64_t kMaxGrid = int64_t{1} << 30;
constexpr int kMaxParts = 64;
constexpr int kSplitThreads = 512;  // of a block that has a part of a row
constexpr int kNeverSplit = 0;      // for `multiprocessors`: rows are never shared out

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks for which the parts of a row are worth a second launch: fewer rows leave multiprocessors
// idle.
constexpr bool few_rows(int64_t rows, int multiprocessors) { return rows < multiprocessors; }

// A row of `columns` (counted from the 16-byte boundary before its first element). `most_values`:
// what a thread has registers for, 8, 16 or 32, in blocks of 1024; 0 for kernels that read a row
// once and keep nothing of it. `lane_values`: the same where a warp has a row.
constexpr RowPlan row_plan(int64_t rows, int64_t columns, int most_values, int multiprocessors,
                           int lane_values = 32) {
  constexpr int kLaneThreads = 128;  // four warps, each with rows of its own
  const int values = most_values == 0 ? 32 : most_values;
  if (columns <= 32 * least(values, lane_values) &&
      (columns <= 512 || !few_rows(4 * rows, multiprocessors))) {
    RowPlan p = {RowKind::kLanes, 32, values, kLaneThreads, kLaneThreads / 32, 1, 0};
    if (columns <= 64) {
      p.lanes = 8;
      p.values = 8;
    } else if (columns <= 256) {
      p.values = 8;
    } else if (columns <= 512) {
      p.values = 16;
    }
    p.rows_per_block = kLaneThreads / p.lanes;
    p.grid = least(kMaxGrid, ceil_div(rows, p.rows_per_block));
    return p;
  }
  // Rows that are long and few are shared out; every part is worth a block's start.
  constexpr int64_t kLeastPart = 8192;
  if (few_rows(rows, multiprocessors) && columns >= 2 * kLeastPart) {
    const auto parts = static_cast<int>(
        least(kMaxParts, least(columns / kLeastPart, ceil_div(2 * multiprocessors, rows))));
    if (parts > 1)
      return {RowKind::kSplit, kSplitThreads, values, kSplitThreads, 1, parts, rows * parts};
  }
  const int held = static_cast<int>(least(values, 16));  // 64 registers a thread in blocks of 1024
  if (most_values != 0 && columns <= int64_t{1024} * held) {
    const auto threads = static_cast<int>(ceil_div(ceil_div(columns, held), 32) * 32);
    return {RowKind::kBlock, threads, held, threads, 1, 1, least(kMaxGrid, rows)};
  }
  // Eight values a thread and step: shorter rows take smaller blocks, more of them at a time.
  const auto threads = static_cast<int>(columns >= 32768  ? 1024
                                        : columns >= 8192 ? 512
                                                          : most(64, ceil_div(columns, 512) * 32));
  return {RowKind::kStream, threads, values, threads, 1, 1, least(kMaxGrid, rows)};
}

// Elementwise kernels: a thread has one chunk of a row at a time.
constexpr int kChunkThreads = 256;
struct ChunkPlan {
  int64_t chunks, grid;  // of a row; blocks, which loop where there are more chunks
};
constexpr ChunkPlan chunk_plan(int64_t rows, int64_t columns, int chunk) {
  const int64_t chunks = ceil_div(columns, chunk);
  return {chunks, least(kMaxGrid, ceil_div(rows * chunks, kChunkThreads))};
}

// Softmax along a dimension that is not the last: `groups` of neighbouring slices, `lanes` of them
// side by side in a block whose other threads share out the columns.
struct ColumnPlan {
  int lanes, threads;
  int64_t grid_x, grid;  // blocks side by side; of all outer indices
};
constexpr ColumnPlan column_plan(int64_t outer, int64_t columns, int64_t groups,
                                 int multiprocessors) {
  int lanes = 1;
  while (lanes < 32 && lanes < groups) lanes *= 2;
  const int64_t side = ceil_div(groups, lanes);
  int threads = 256;
  if (columns * lanes <= 256) {
    threads = columns * lanes <= 32 ? 32 : columns * lanes <= 64 ? 64 : 128;
  } else if (few_rows(side * outer, multiprocessors) && columns * lanes >= 4096) {
    threads = 512;
  }
  return {lanes, threads, side, least(kMaxGrid, side * outer)};
}

// Rows shared out among blocks that each add something up over theirs (gradients of parameters), in
// row order: few enough blocks that their partial sums, 16 bytes a column and block, stay small
// beside the rows.
struct SumPlan {
  int64_t blocks, rows_per_block;
};
constexpr SumPlan sum_plan(int64_t rows, int64_t rows_at_a_time, int multiprocessors,
                           int blocks_per_multiprocessor, int64_t fewest_rows) {
  const int64_t wanted = int64_t{multiprocessors} * blocks_per_multiprocessor;
  const int64_t blocks = most(1, least(wanted, ceil_div(rows, most(rows_at_a_time, fewest_rows))));
  const int64_t each = most(1, ceil_div(ceil_div(rows, blocks), rows_at_a_time) * rows_at_a_time);
  return {most(1, ceil_div(rows, each)), each};
}

}  // namespace fastnn
