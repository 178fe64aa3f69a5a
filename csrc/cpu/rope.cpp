#include "cpu/rope.h"

#include <algorithm>
#include <numeric>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Elements worth a thread of their own: about 5 us of work.
constexpr int64_t kGrain = 16384;

// Rows are written in parts: the halves and the rest, or the rotated part and the rest.
bool streams_rows(const RopeParams& p, const RopeOperand& o) {
  const int64_t part = std::gcd(p.interleaved ? p.rotary : p.rotary / 2, p.D);
  return part > 0 &&
         streams(o.y, p.B * o.heads * p.S * p.D / part, part * element_bytes(p.dtype), 2);
}

}  // namespace

void rope(const RopeParams& given) {
  RopeParams p = given;
  const KernelTable& table = kernels();
  record_run(p.inverse ? "rope_bwd" : "rope_fwd", table.isa);
  for (int32_t i = 0; i < p.count; ++i) {
    p.operands[i].stream = streams_rows(p, p.operands[i]);
  }
  const int64_t heads = rope_heads(p);
  if (p.D == 0 || heads == 0) return;
  const RopeOperand& o = p.operands[0];
  p.by_heads =
      o.x_head_stride > o.x_row_stride && p.S > kRopePositions && p.B * heads >= 4 * thread_count();
  const int64_t elements = p.by_heads ? p.S * p.D : kRopePositions * heads * p.D;
  parallel_for(rope_items(p), std::max<int64_t>(1, kGrain / elements),
               [&](int64_t begin, int64_t end) {
                 const Scratch scratch(rope_scratch_floats(p) * 4);
                 table.rope(p, begin, end, static_cast<float*>(scratch.get()));
               });
}

}  // namespace fastnn
