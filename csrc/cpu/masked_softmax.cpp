#include "cpu/masked_softmax.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work.
constexpr int64_t kGrain = 16384;

}  // namespace

void masked_softmax_fwd(const MaskedSoftmaxParams& given) {
  MaskedSoftmaxParams p = given;
  p.stream = streams(p.y, p.rows, p.columns * element_bytes(p.dtype), 2);
  const KernelTable& table = kernels();
  record_run("masked_softmax_fwd", table.isa);
  if (p.rows == 0 || p.columns == 0) return;
  const int64_t kept = p.keeps_in_place() ? 0 : p.columns;
  parallel_for(p.rows, std::max<int64_t>(1, kGrain / p.columns), [&](int64_t begin, int64_t end) {
    const Scratch scratch(kept * 4);
    table.masked_softmax_fwd(p, begin, end, static_cast<float*>(scratch.get()));
  });
}

}  // namespace fastnn
