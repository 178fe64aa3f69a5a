// Rotary embedding, forward and inverse, against double: all numbers of features around the vector
// width, misaligned, at page ends; heads apart and side by side, tables of every form, positions,
// results written past the caches, several threads.
#include "cpu/rope.h"

#include <cstring>
#include <vector>

#include "cpu/memory.h"
#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Where {
  const char* isa;
  DType dtype, table_dtype;
  bool interleaved, half_tables;
  int64_t B = 2, heads[2] = {3, 1}, S = 5, D = 16, rotary = 16;
  bool inside = false;     // heads of a position side by side
  bool positions = false;  // backwards
  int64_t width() const { return half_tables ? rotary / 2 : rotary; }
  int64_t elements(int i) const { return B * heads[i] * S * D; }
};

struct Call {
  Buffer x[2], y[2], cos, sin;
  std::vector<int64_t> positions;
  Call(const Where& w, Flush flush, int64_t offset)
      : x{{w.elements(0), w.dtype, flush, offset}, {w.elements(1), w.dtype, flush, offset}},
        y{{w.elements(0), w.dtype, flush, offset}, {w.elements(1), w.dtype, flush, offset}},
        cos(w.S * w.width(), w.table_dtype, flush, offset),
        sin(w.S * w.width(), w.table_dtype, flush, offset) {
    Random random(static_cast<uint64_t>(w.D * 131 + w.rotary));
    for (int i = 0; i < 2; ++i) x[i].fill(w.elements(i), random);
    cos.fill(w.S * w.width(), random);
    sin.fill(w.S * w.width(), random);
    for (int64_t s = 0; s < w.S; ++s) positions.push_back(w.S - 1 - s);
  }

  RopeParams params(const Where& w, bool inverse) {
    RopeParams p = {};
    p.B = w.B;
    p.S = w.S;
    p.D = w.D;
    p.rotary = w.rotary;
    for (int i = 0; i < 2; ++i) {
      const int64_t H = w.heads[i], head = w.inside ? w.D : w.S * w.D,
                    row = w.inside ? H * w.D : w.D;
      p.operands[p.count++] = {x[i].memory.data(),
                               y[i].memory.data(),
                               H,
                               H * w.S * w.D,
                               head,
                               row,
                               H * w.S * w.D,
                               head,
                               row};
    }
    p.cos = {cos.memory.data(), 0, w.width()};
    p.sin = {sin.memory.data(), 0, w.width()};
    p.table_width = w.width();
    p.positions = w.positions ? positions.data() : nullptr;
    p.dtype = w.dtype;
    p.table_dtype = w.table_dtype;
    p.interleaved = w.interleaved;
    p.inverse = inverse;
    return p;
  }
  bool intact() const {
    return x[0].memory.intact() && x[1].memory.intact() && y[0].memory.intact() &&
           y[1].memory.intact() && cos.memory.intact() && sin.memory.intact();
  }
};

void check_row(const Where& w, const Call& call, int i, int64_t at, int64_t s, bool inverse) {
  const int64_t row = (w.positions ? w.S - 1 - s : s) * w.width(), pairs = w.rotary / 2;
  for (int64_t c = 0; c < w.D; ++c) {
    const double got = call.y[i].at(at + c);
    if (c >= w.rotary) {
      CHECK(got == call.x[i].at(at + c), "%s: feature %ld changed", w.isa, static_cast<long>(c));
      continue;
    }
    const bool second = w.interleaved ? c % 2 == 1 : c >= pairs;
    const int64_t partner = w.interleaved ? c ^ 1 : second ? c - pairs : c + pairs;
    const auto entry = [&](int64_t feature) {
      if (!w.half_tables) return row + feature;
      return row + (w.interleaved ? feature / 2 : feature % pairs);
    };
    // The transpose takes the partner's sine.
    const double sine = call.sin.at(entry(inverse ? partner : c));
    const double a = call.x[i].at(at + c) * call.cos.at(entry(c));
    const double b = call.x[i].at(at + partner) * sine * (second != inverse ? 1 : -1);
    const double bound = (std::abs(a) + std::abs(b)) * 0x1p-22 + storing_bound(a + b, w.dtype);
    CHECK(std::abs(got - (a + b)) <= bound, "%s %s %s [%ld of %ld] at %ld: %.9g, truth %.9g", w.isa,
          type_name(w.dtype), w.interleaved ? "neighbours" : "halves", static_cast<long>(w.rotary),
          static_cast<long>(w.D), static_cast<long>(c), got, a + b);
  }
}

void check_call(const Where& w, Flush flush = Flush::kEnd, int64_t offset = 0) {
  for (const bool inverse : {false, true}) {
    Call call(w, flush, offset);
    rope(call.params(w, inverse));
    for (int i = 0; i < 2; ++i) {
      for (int64_t r = 0; r < w.B * w.heads[i] * w.S; ++r) {
        const int64_t s = w.inside ? r / w.heads[i] % w.S : r % w.S;
        check_row(w, call, i, r * w.D, s, inverse);
      }
    }
    CHECK(call.intact(), "%s wrote outside, features %ld", w.isa, static_cast<long>(w.D));
  }
}

template <class F>
void for_each_kind(F f) {
  for_each_isa([&](const char* isa) {
    for (const DType dtype : kAllTypes) {
      for (const bool interleaved : {false, true}) {
        for (const bool half : {false, true}) {
          f(Where{isa, dtype, half ? DType::kFloat32 : dtype, interleaved, half});
        }
      }
    }
  });
}

TEST(every_number_of_features_and_misalignment) {
  // Two vectors of the widest set are a step: every half up to two steps and one more.
  for_each_kind([](Where w) {
    w.B = 1;
    for (w.rotary = 0; w.rotary <= 2 * (2 * 32 + 1); w.rotary += 2) {
      w.D = w.rotary + w.rotary % 3;
      check_call(w, w.rotary % 4 == 0 ? Flush::kStart : Flush::kEnd, w.rotary / 2 % 4);
    }
  });
}

TEST(heads_side_by_side_positions_and_blocks) {
  for_each_kind([](Where w) {
    for (w.S = 0; w.S <= 2 * kRopePositions + 1; w.S += w.S < 3 ? 1 : 5) {
      w.inside = w.S % 2 == 1;
      w.positions = w.S % 3 != 0;
      check_call(w);
    }
    w.heads[0] = 0;
    check_call(w);
  });
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_kind([](Where w) {
    w.S = 700;
    w.D = w.rotary = 64;
    Call one(w, Flush::kEnd, 0), four(w, Flush::kEnd, 0);
    rope(one.params(w, false));
    const PoolGuard pool(4);
    rope(four.params(w, false));
    CHECK(pool.runs() > 0, "%s: the pool was not used", w.isa);
    for (int i = 0; i < 2; ++i) {
      CHECK(std::memcmp(one.y[i].memory.data(), four.y[i].memory.data(),
                        static_cast<size_t>(w.elements(i) * element_bytes(w.dtype))) == 0,
            "%s: the results differ", w.isa);
    }
  });
}

// Rows alone are small and written through the caches.
TEST(results_written_past_the_caches) {
  for_each_kind([](Where w) {
    const int64_t D = 160, bytes = D * element_bytes(w.dtype);
    const int64_t rows = kStreamFromBytes / (2 * bytes) + 1;
    const Scratch memory((2 * rows + 3) * bytes);
    char* const x = static_cast<char*>(memory.get());
    char* const y = x + rows * bytes;
    char* const alone = y + rows * bytes;
    Random random(5);
    for (int64_t i = 0; i < rows * D; ++i) put(x, i, random.value(), w.dtype);
    w.B = 1;
    w.S = 1;
    w.D = D;
    w.rotary = 128;
    Call call(w, Flush::kEnd, 0);
    RopeParams p = call.params(w, false);
    p.count = 1;
    p.operands[0] = {x, y, rows, 0, D, D, 0, D, D};
    CHECK(streams(y, 2 * rows, bytes / 5, 5), "%s: not large enough", w.isa);
    rope(p);
    bool same = true;
    for (int64_t r = 0; r < rows; ++r) {
      p.operands[0] = {x + r * bytes, alone, 1, 0, D, D, 0, D, D};
      rope(p);
      same &= std::memcmp(y + r * bytes, alone, static_cast<size_t>(bytes)) == 0;
    }
    CHECK(same, "%s %s: differs past the caches", w.isa, type_name(w.dtype));
  });
}

}  // namespace
