#include "cpu/cross_entropy.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Logits worth a thread of their own: about 5 us of work.
constexpr int64_t kGrain = 16384;

int64_t row_grain(int64_t classes) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, classes));
}

}  // namespace

int64_t first_bad_target(const CrossEntropyParams& p) {
  if (p.target == nullptr) return -1;
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t t = p.target[r];
    if ((t < 0 || t >= p.classes) && t != p.ignore_index) return r;
  }
  return -1;
}

void cross_entropy_fwd(const CrossEntropyFwdParams& p) {
  const KernelTable& table = kernels();
  record_run("cross_entropy_fwd", table.isa);
  parallel_for(p.loss.rows, row_grain(p.loss.classes),
               [&](int64_t begin, int64_t end) { table.cross_entropy_fwd(p, begin, end); });
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p) {
  const KernelTable& table = kernels();
  record_run("cross_entropy_bwd", table.isa);
  parallel_for(p.loss.rows, row_grain(p.loss.classes),
               [&](int64_t begin, int64_t end) { table.cross_entropy_bwd(p, begin, end); });
}

}  // namespace fastnn
