// The machine's measurements: every instruction set, every stream, plausible and well-behaved
// rates.
#include "cpu/limits.h"

#include <cmath>
#include <string>

#include "cpu/dispatch.h"
#include "tests/check.h"
#include "tests/isa.h"

using namespace fastnn;
using fastnn::test::for_each_isa;

namespace {

TEST(peak_counts_operations) {
  for_each_isa([](const char* isa) {
    alignas(64) float sink[16];
    const int64_t one = kernels().peak_operations(PeakKind::kFloat32Fma, 1, sink);
    CHECK(one > 0 && kernels().peak_operations(PeakKind::kFloat32Fma, 1000, sink) == 1000 * one,
          "%s: operations must grow with the steps", isa);
    for (const float x : sink) CHECK(std::isfinite(x), "%s: sums must stay finite", isa);
  });
}

TEST(peak_is_zero_only_without_the_instruction) {
  for_each_isa([](const char* isa) {
    const std::string name = isa;
    CHECK(measure_peak(PeakKind::kFloat32Fma, 1, 0.01) > 1e7, "%s: float32", isa);
    const double bf16 = measure_peak(PeakKind::kBFloat16Dot, 1, 0.01);
    CHECK((bf16 > 0) == (name == "avx512_bf16"), "%s: bfloat16 %g", isa, bf16);
    const double int8 = measure_peak(PeakKind::kInt8Dot, 1, 0.01);
    CHECK((int8 > 0) == (name == "avx512_vnni" || name == "avx512_bf16"), "%s: int8 %g", isa, int8);
  });
}

TEST(streams_write_what_they_say) {
  for_each_isa([](const char* isa) {
    for (const bool streaming : {false, true}) {
      alignas(64) float x[2 * kStreamBlock], y[3 * kStreamBlock];
      for (int i = 0; i < 2 * kStreamBlock; ++i) x[i] = static_cast<float>(i % 7);
      for (float& v : y) v = -1.f;
      StreamParams p{x, y, 2 * kStreamBlock, 3, StreamKind::kCopy, streaming};
      kernels().stream(p);
      for (int i = 0; i < 2 * kStreamBlock; ++i) CHECK(y[i] == x[i], "%s copy: %d", isa, i);
      CHECK(y[2 * kStreamBlock] == -1.f, "%s copy: past the end", isa);
      p.kind = StreamKind::kWrite;
      kernels().stream(p);
      CHECK(y[0] == 2.f && y[2 * kStreamBlock - 1] == 2.f, "%s write: the last pass's number", isa);
      CHECK(y[2 * kStreamBlock] == -1.f, "%s write: past the end", isa);
      p.kind = StreamKind::kRead;
      float expected = 0;
      for (int i = 0; i < 2 * kStreamBlock; ++i) expected += 3 * x[i];
      CHECK(kernels().stream(p) == expected, "%s read: the sum of three passes", isa);
    }
  });
}

TEST(streams_have_a_rate) {
  for (const Pages pages : {Pages::kSmall, Pages::kHuge}) {
    for (const StreamKind kind : {StreamKind::kRead, StreamKind::kCopy, StreamKind::kWrite}) {
      for (const int64_t threads : {int64_t{1}, int64_t{3}}) {
        const double rate = measure_stream(kind, 1 << 20, pages, false, threads, 0.01);
        CHECK(rate > 1e7 && rate < 1e14, "%g bytes per second", rate);
      }
    }
  }
  CHECK(measure_stream(StreamKind::kRead, 1, Pages::kSmall, false, 1, 0.001) > 0, "one byte");
}

}  // namespace
