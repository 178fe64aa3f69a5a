// Softmax of scaled, masked rows against double: masks of every kind that broadcast in every way,
// causal rows, rows in which nothing takes part, all lengths around the vector width, misaligned,
// at page ends, written past the caches, several threads. Backward is softmax's: softmax_test.cpp.
#include "cpu/masked_softmax.h"

#include <cstring>
#include <vector>

#include "cpu/memory.h"
#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

enum class Walk { kFull, kColumns, kRows, kOne };  // what the mask has of (rows, columns)

struct Where {
  const char* isa;
  DType dtype;
  MaskKind kind;
  Walk walk = Walk::kFull;
  int64_t rows = 6, columns = 33, padding = 0;
  int64_t queries = 0;
  DType mask_dtype = DType::kFloat32;
  int64_t mask_rows() const { return walk == Walk::kFull || walk == Walk::kRows ? rows : 1; }
  int64_t mask_columns() const {
    return walk == Walk::kFull || walk == Walk::kColumns ? columns : 1;
  }
};
constexpr float kScale = 0.3f;

struct Call {
  Buffer x, mask, y;
  Guarded<uint8_t> visible;
  Call(const Where& w, Flush flush, int64_t offset)
      : x(w.rows * (w.columns + w.padding), w.dtype, flush, offset),
        mask(w.mask_rows() * w.mask_columns(), w.mask_dtype, flush, offset),
        y(w.rows * w.columns, w.dtype, flush, offset),
        visible(w.mask_rows() * w.mask_columns(), flush, offset) {
    Random random(static_cast<uint64_t>(w.columns * 131 + w.rows));
    x.fill(w.rows * (w.columns + w.padding), random);
    mask.fill(w.mask_rows() * w.mask_columns(), random);
    for (int64_t i = 0; i < w.mask_rows() * w.mask_columns(); ++i) {
      const bool second = w.mask_rows() > 1 && i / w.mask_columns() == 1;  // a row of nothing
      visible[i] = !second && random.bits() % 3 != 0;
      if (second || random.bits() % 8 == 0) mask.set(i, -INFINITY);
    }
  }
  MaskedSoftmaxParams params(const Where& w) {
    MaskedSoftmaxParams p = {};
    p.rows = w.rows;
    p.columns = w.columns;
    p.x = x.memory.data();
    p.x_row_stride = w.columns + w.padding;
    p.y = y.memory.data();
    p.dtype = w.dtype;
    p.scale = kScale;
    p.mask_kind = w.kind;
    p.mask_dtype = w.mask_dtype;
    p.mask =
        w.kind == MaskKind::kBool ? static_cast<const void*>(visible.data()) : mask.memory.data();
    p.mask_column_stride = w.mask_columns() == w.columns && w.columns > 1 ? 1 : 0;
    p.dims = 1;
    p.sizes[0] = w.rows;
    p.mask_strides[0] = w.mask_rows() == w.rows ? w.mask_columns() : 0;
    p.queries = w.queries;
    return p;
  }
  double score(const Where& w, int64_t r, int64_t c) const {
    if (w.queries != 0 && c > r % w.queries) return -INFINITY;
    const int64_t at =
        (w.mask_rows() == 1 ? 0 : r * w.mask_columns()) + (w.mask_columns() == 1 ? 0 : c);
    const double s = static_cast<double>(kScale) * x.at(r * (w.columns + w.padding) + c);
    if (w.kind == MaskKind::kNone) return s;
    if (w.kind == MaskKind::kBool) return visible.data()[at] != 0 ? s : -INFINITY;
    return s + mask.at(at);
  }
};

void check_call(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  Call call(w, flush, offset);
  masked_softmax_fwd(call.params(w));
  for (int64_t r = 0; r < w.rows; ++r) {
    double top = -INFINITY, sum = 0;
    for (int64_t c = 0; c < w.columns; ++c) top = std::max(top, call.score(w, r, c));
    for (int64_t c = 0; c < w.columns; ++c)
      sum += top == -INFINITY ? 0 : std::exp(call.score(w, r, c) - top);
    for (int64_t c = 0; c < w.columns; ++c) {
      const double s = call.score(w, r, c), truth = sum == 0 ? 0 : std::exp(s - top) / sum;
      const double doubt = std::isinf(s) ? 0 : (std::abs(s) + std::abs(top)) * 0x1p-22;
      const double bound = truth * (0x1p-19 + doubt) + storing_bound(truth, w.dtype) + 0x1p-126;
      const double got = call.y.at(r * w.columns + c);
      CHECK(std::abs(got - truth) <= bound,
            "%s %s mask %d walk %d [%ld %ld] at (%ld, %ld): %.9g, truth %.9g", w.isa,
            type_name(w.dtype), static_cast<int>(w.kind), static_cast<int>(w.walk),
            static_cast<long>(w.rows), static_cast<long>(w.columns), static_cast<long>(r),
            static_cast<long>(c), got, truth);
    }
  }
  CHECK(call.x.memory.intact() && call.mask.memory.intact() && call.y.memory.intact() &&
            call.visible.intact(),
        "%s wrote outside, columns %ld", w.isa, static_cast<long>(w.columns));
}

template <class F>
void for_each_kind(F f) {
  for_each_isa([&](const char* isa) {
    for (const DType dtype : kAllTypes) {
      for (const MaskKind kind : {MaskKind::kNone, MaskKind::kBool, MaskKind::kAdditive}) {
        f(Where{isa, dtype, kind});
      }
    }
  });
}

TEST(every_row_length_and_misalignment) {
  for_each_kind([](Where w) {
    for (w.columns = 1; w.columns <= 2 * 32 + 1; ++w.columns) {
      w.padding = w.columns % 2 == 0 ? 0 : 3;
      w.queries = w.columns % 3 == 0 ? 3 : 0;
      w.mask_dtype = w.columns % 2 == 0 ? w.dtype : DType::kFloat32;
      check_call(w, w.columns % 3 == 0 ? Flush::kStart : Flush::kEnd, w.columns % 4);
    }
  });
}

TEST(masks_that_broadcast) {
  for_each_kind([](Where w) {
    for (const Walk walk : {Walk::kFull, Walk::kColumns, Walk::kRows, Walk::kOne}) {
      w.walk = walk;
      for (const DType dtype : kAllTypes) {
        w.mask_dtype = dtype;
        check_call(w);
      }
    }
  });
}

TEST(causal_rows) {
  for_each_kind([](Where w) {
    for (w.queries = 1; w.queries <= 40; w.queries += 13) {
      w.rows = 2 * w.queries;
      check_call(w);
    }
  });
}

TEST(same_bits_with_any_number_of_threads_and_past_the_caches) {
  for_each_kind([](Where w) {
    w.columns = 1024;
    w.rows = kStreamFromBytes / (2 * w.columns * element_bytes(w.dtype)) + 1;
    w.walk = Walk::kColumns;
    const int64_t bytes = w.rows * w.columns * element_bytes(w.dtype);
    const Scratch memory(2 * bytes + 128);
    Call call(w, Flush::kEnd, 0);
    MaskedSoftmaxParams p = call.params(w);
    p.y = memory.get();
    CHECK(streams(p.y, w.rows, bytes / w.rows, 2), "%s: not large enough", w.isa);
    masked_softmax_fwd(p);
    p.y = static_cast<char*>(memory.get()) + bytes + 4;  // not aligned: stored plainly
    const PoolGuard pool(4);
    masked_softmax_fwd(p);
    CHECK(pool.runs() > 0, "%s: the pool was not used", w.isa);
    CHECK(std::memcmp(memory.get(), p.y, static_cast<size_t>(bytes)) == 0, "%s: the results differ",
          w.isa);
  });
}

}  // namespace
