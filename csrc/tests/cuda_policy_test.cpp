// The launch policy of the CUDA row kernels: whatever the shape, every element has somebody to work
// on it, and nothing is asked for that a GPU does not have.
#include "cuda/policy.h"

#include <initializer_list>

#include "tests/check.h"

using namespace fastnn;

namespace {

constexpr int64_t kRows[] = {1, 2, 3, 31, 131, 132, 133, 1000, 65536, int64_t{1} << 31};
constexpr int64_t kColumns[] = {1,     4,     8,     33,    64,    65,     256,
                                257,   512,   513,   1024,  1025,  4096,   8192,
                                16384, 16385, 32768, 50264, 65536, 131072, int64_t{1} << 32};

TEST(rows_have_room) {
  for (const int values : {0, 8, 16, 32}) {
    for (const int multi : {kNeverSplit, 1, 46, 132}) {
      for (const int64_t rows : kRows) {
        for (const int64_t columns : kColumns) {
          const RowPlan p = row_plan(rows, columns, values, multi, values == 16 ? 8 : 32);
          const auto kind = static_cast<int>(p.kind);
          const long long r = rows, c = columns;
          CHECK(p.threads >= 32 && p.threads <= 1024 && p.threads % 32 == 0,
                "%lld x %lld: %d threads", r, c, p.threads);
          CHECK(p.grid >= 1 && p.grid <= kMaxGrid, "%lld x %lld: %lld blocks", r, c,
                static_cast<long long>(p.grid));
          if (p.kind == RowKind::kLanes) {
            CHECK(32 % p.lanes == 0 && p.rows_per_block * p.lanes == p.threads, "%d lanes",
                  p.lanes);
            CHECK(values == 0 || int64_t{p.lanes} * p.values >= columns, "%lld columns", c);
            CHECK(p.grid == kMaxGrid || p.grid * p.rows_per_block >= rows, "%lld rows", r);
          } else if (p.kind == RowKind::kBlock) {
            CHECK(int64_t{p.threads} * p.values >= columns, "%lld columns in %d threads", c,
                  p.threads);
          } else if (p.kind == RowKind::kSplit) {
            CHECK(multi != kNeverSplit && p.parts > 1 && p.parts <= kMaxParts &&
                      p.grid == rows * p.parts,
                  "%lld x %lld in %d parts", r, c, p.parts);
          }
          CHECK(p.parts >= 1, "kind %d", kind);
        }
      }
    }
  }
}

TEST(columns_have_room) {
  for (const int64_t outer : kRows) {
    for (const int64_t columns : {1, 7, 1000, 100000}) {
      for (const int64_t groups : {1, 2, 3, 31, 32, 33, 5000}) {
        const ColumnPlan p = column_plan(outer, columns, groups, 132);
        CHECK(p.lanes >= 1 && p.lanes <= 32 && p.threads % p.lanes == 0 && p.threads <= 512,
              "%d lanes of %d threads", p.lanes, p.threads);
        CHECK(p.grid_x * p.lanes >= groups && p.grid >= 1, "%lld groups",
              static_cast<long long>(groups));
      }
    }
  }
}

TEST(chunks_cover_rows) {
  for (const int64_t rows : kRows) {
    for (const int64_t columns : kColumns) {
      for (const int chunk : {4, 8}) {
        const ChunkPlan p = chunk_plan(rows, columns, chunk);
        CHECK(p.chunks * chunk >= columns && (p.chunks - 1) * chunk < columns, "%lld chunks",
              static_cast<long long>(p.chunks));
        CHECK(p.grid >= 1 && (p.grid == kMaxGrid || p.grid * kChunkThreads >= rows * p.chunks),
              "%lld blocks", static_cast<long long>(p.grid));
      }
    }
  }
}

TEST(sums_take_each_row_once) {
  for (const int64_t rows :
       {int64_t{0}, int64_t{1}, int64_t{16}, int64_t{17}, int64_t{8192}, int64_t{1} << 33}) {
    for (const int together : {1, 8}) {
      for (const int64_t fewest : {1, 16, 4096}) {
        const SumPlan p = sum_plan(rows, together, 132, 2, fewest);
        CHECK(p.blocks >= 1 && p.blocks * p.rows_per_block >= rows, "%lld rows",
              static_cast<long long>(rows));
        CHECK(rows == 0 || (p.blocks - 1) * p.rows_per_block < rows, "a block without rows of %lld",
              static_cast<long long>(rows));
      }
    }
  }
}

}  // namespace
