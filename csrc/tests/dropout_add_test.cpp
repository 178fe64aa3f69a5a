// Dropout and sum against Philox written out once more: all row lengths around a block, misaligned,
// at page ends, rows apart and expanded, one long row, counters past 2^32, several threads.
#include "cpu/dropout_add.h"

#include <cstring>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/memory.h"
#include "params/activation.h"
#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Words {
  uint32_t x[4];
};
Words philox_words(uint64_t seed, uint64_t counter) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  Words c = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c.x[0], p1 = uint64_t{0xCD9E8D57} * c.x[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ key[0], static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ key[1], static_cast<uint32_t>(p0)}};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return c;
}

TEST(the_words_are_those_that_its_authors_publish) {
  const Words zero = philox_words(0, 0);
  const uint32_t known[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  for (int i = 0; i < 4; ++i) CHECK(zero.x[i] == known[i], "word %d is %08x", i, zero.x[i]);
}

struct Where {
  const char* isa;
  DType dtype;
  int64_t rows, columns;
  float p = 0.3f;
  int64_t padding = 0;
  bool expanded = false, residual = true;
  int64_t first_row = 0;  // the number of the first row that is computed
  uint64_t seed = 0x123456789abcdefu;
  int64_t stride() const { return expanded ? 0 : columns + padding; }
};

struct Call {
  Buffer x, r, y;
  Call(const Where& w, Flush flush, int64_t offset)
      : x(w.rows * (w.columns + w.padding), w.dtype, flush, offset),
        r(w.rows * (w.columns + w.padding), w.dtype, flush, offset),
        y(w.rows * w.columns, w.dtype, flush, offset) {
    Random random(static_cast<uint64_t>(w.columns * 131 + w.rows));
    x.fill(w.rows * (w.columns + w.padding), random);
    r.fill(w.rows * (w.columns + w.padding), random);
  }
  DropoutAddParams params(const Where& w) {
    return {w.rows,
            w.columns,
            x.memory.data(),
            w.stride(),
            w.residual ? r.memory.data() : nullptr,
            w.stride(),
            y.memory.data(),
            w.dtype,
            w.p,
            w.seed};
  }
};

void check_results(const Where& w, const Call& call) {
  const auto threshold = static_cast<uint64_t>(static_cast<double>(w.p) * 4294967296.0);
  const int64_t groups = (w.columns + 3) / 4;
  for (int64_t i = 0; i < w.rows; ++i) {
    for (int64_t c = 0; c < w.columns; ++c) {
      const auto counter = static_cast<uint64_t>((w.first_row + i) * groups + c / 4);
      const bool kept = w.p == 0 || philox_words(w.seed, counter).x[c % 4] >= threshold;
      const int64_t at = i * w.stride() + c;
      const double scaled = kept ? call.x.at(at) / (1.0 - static_cast<double>(w.p)) : 0;
      const double truth = scaled + (w.residual ? call.r.at(at) : 0);
      const double bound =
          (std::abs(scaled) + std::abs(truth)) * 0x1p-22 + storing_bound(truth, w.dtype);
      const double got = call.y.at(i * w.columns + c);
      CHECK(std::abs(got - truth) <= bound, "%s %s [%ld %ld] p %g at (%ld, %ld): %.9g, truth %.9g",
            w.isa, type_name(w.dtype), static_cast<long>(w.rows), static_cast<long>(w.columns),
            static_cast<double>(w.p), static_cast<long>(i), static_cast<long>(c), got, truth);
    }
  }
  CHECK(call.x.memory.intact() && call.r.memory.intact() && call.y.memory.intact(),
        "%s wrote outside, columns %ld", w.isa, static_cast<long>(w.columns));
}

void check_call(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  Call call(w, flush, offset);
  dropout_add(call.params(w), "dropout_add_fwd");
  check_results(w, call);
}

template <class F>
void for_each_type(F f) {
  for_each_isa([&](const char* isa) {
    for (const DType dtype : kAllTypes) f(Where{isa, dtype, 3, 33});
  });
}

TEST(every_row_length_and_misalignment) {
  // A block of the widest set is 64 elements: every length up to one and a bit more.
  for_each_type([](Where w) {
    for (w.columns = 0; w.columns <= 64 + 33; ++w.columns) {
      w.padding = w.columns % 2 == 0 ? 0 : 3;
      w.residual = w.columns % 3 != 0;
      check_call(w, w.columns % 3 == 0 ? Flush::kStart : Flush::kEnd, w.columns % 4);
    }
  });
}

TEST(probabilities_and_expanded_rows) {
  for_each_type([](Where w) {
    for (const float p : {0.f, 1e-9f, 0.5f, 0.999f}) {
      w.p = p;
      check_call(w);
    }
    w.p = 0.3f;
    w.expanded = true;
    check_call(w);
    w.rows = 0;
    check_call(w);
  });
}

TEST(one_long_row) {
  for_each_type([](Where w) {
    w.rows = 2;
    w.columns = 2 * 16384 + 7;  // blocks of columns
    w.padding = 1;
    check_call(w);
  });
}

TEST(counters_past_32_bits) {
  for_each_type([](Where w) {
    w.rows = 1;
    w.columns = 64;
    w.expanded = true;
    for (w.first_row = (int64_t{1} << 28) - 1; w.first_row <= int64_t{1} << 28; ++w.first_row) {
      w.columns += 4;  // 17 and 18 counters for a row: a block crosses the border
      Call call(w, Flush::kEnd, 0);
      DropoutAddParams p = call.params(w);
      const int64_t bytes = w.first_row * w.columns * element_bytes(w.dtype);
      p.y =
          reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p.y) - static_cast<uintptr_t>(bytes));
      p.rows = w.first_row + 1;
      kernels().dropout_add(p, {w.first_row, w.first_row + 1, 0, w.columns});
      check_results(w, call);
    }
    w.columns = 64;
    w.first_row = (int64_t{1} << 28) - 1;  // the last block below
    Call call(w, Flush::kEnd, 0);
    DropoutAddParams p = call.params(w);
    const int64_t bytes = w.first_row * w.columns * element_bytes(w.dtype);
    p.y = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(p.y) - static_cast<uintptr_t>(bytes));
    kernels().dropout_add(p, {w.first_row, w.first_row + 1, 0, w.columns});
    check_results(w, call);
  });
}

TEST(same_bits_with_any_number_of_threads_and_past_the_caches) {
  for_each_type([](Where w) {
    w.columns = 2048;
    w.rows = kStreamFromBytes / (3 * w.columns * element_bytes(w.dtype)) + 1;
    const int64_t row = w.columns * element_bytes(w.dtype), all = w.rows * row;
    const Scratch memory(3 * all + row + 64);
    char* const x = static_cast<char*>(memory.get());
    char* const y = x + all;
    char* const other = y + all;
    Random random(5);
    for (int64_t i = 0; i < w.rows * w.columns; ++i) put(x, i, random.value(), w.dtype);
    DropoutAddParams p = {w.rows, w.columns, x, w.columns, x, w.columns, y, w.dtype, w.p, w.seed};
    CHECK(streams(y, w.rows, row, 3), "%s: not large enough", w.isa);
    dropout_add(p, "dropout_add_fwd");
    p.y = other + 2;  // not aligned: stored plainly
    const PoolGuard pool(4);
    dropout_add(p, "dropout_add_fwd");
    CHECK(pool.runs() > 0, "%s: the pool was not used", w.isa);
    CHECK(std::memcmp(y, other + 2, static_cast<size_t>(all)) == 0, "%s: the results differ",
          w.isa);
  });
}

}  // namespace
