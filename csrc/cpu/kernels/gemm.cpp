#include "cpu/gemm/gemm.h"

#include "cpu/gemm/groups.h"
#include "cpu/kernel_table.h"

namespace fastnn {
namespace {

void product(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* scratch) {
  (p.groups != nullptr ? gemm_groups : gemm)(p, m0, m1, n0, n1, scratch);
}
int64_t product_scratch_floats(const GemmParams& p) {
  return p.groups != nullptr ? group_scratch_floats() : gemm_scratch_floats(p);
}

}  // namespace
}  // namespace fastnn

FASTNN_TABLE_PART(Gemm, gemm) = {
    .gemm = fastnn::product,
    .gemm_scratch_floats = fastnn::product_scratch_floats,
    .packed_floats = fastnn::packed_floats,
    .pack = fastnn::pack,
};
