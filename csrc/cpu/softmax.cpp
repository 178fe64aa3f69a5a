#include "cpu/softmax.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work, against 3-5 us to wake one.
constexpr int64_t kGrain = 16384;

// A float32 result that stays in the last-level cache (32 MiB) is better not streamed: its rows
// hold their own exponentials, which otherwise go through a buffer.
constexpr int64_t kStreamFloat32FromBytes = int64_t{21} << 20;

int64_t items_per_grain(int64_t elements, int64_t items) {
  return items == 0 ? 1 : std::max<int64_t>(1, kGrain * items / std::max<int64_t>(1, elements));
}

}  // namespace

void softmax_fwd(const SoftmaxParams& given) {
  SoftmaxParams p = given;
  const int64_t row_bytes = p.cols * element_bytes(p.y_dtype);
  p.stream = p.inner == 1 && streams(p.y, p.outer, row_bytes, 2) &&
             (p.y_dtype != DType::kFloat32 || p.outer * row_bytes >= kStreamFloat32FromBytes);
  const KernelTable& table = kernels();
  record_run("softmax_fwd", table.isa);
  if (p.outer == 0 || p.cols == 0 || p.inner == 0) return;
  const int64_t items = table.softmax_items(p.outer, p.inner);
  // The exponentials of a row are kept in float32: in the output itself, where it is float32 and
  // read again from cache.
  const bool buffered = (p.y_dtype != DType::kFloat32 || p.stream) && p.inner == 1 && !p.log;
  parallel_for(
      items, items_per_grain(p.outer * p.cols * p.inner, items), [&](int64_t begin, int64_t end) {
        const Scratch scratch(buffered ? std::min<int64_t>(p.cols, int64_t{1} << 16) * 4 : 0);
        table.softmax_fwd(p, begin, end, static_cast<float*>(scratch.get()));
      });
}

void softmax_bwd(const SoftmaxBwdParams& given, const char* name) {
  SoftmaxBwdParams p = given;
  p.stream = p.inner == 1 && streams(p.dx, p.outer, p.cols * element_bytes(p.dx_dtype), 3);
  const KernelTable& table = kernels();
  record_run(name, table.isa);
  if (p.outer == 0 || p.cols == 0 || p.inner == 0) return;
  const int64_t items = table.softmax_items(p.outer, p.inner);
  parallel_for(items, items_per_grain(p.outer * p.cols * p.inner, items),
               [&](int64_t begin, int64_t end) { table.softmax_bwd(p, begin, end); });
}

}  // namespace fastnn
