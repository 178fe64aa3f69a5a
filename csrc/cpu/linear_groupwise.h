// linear with a weight of 4- or 8-bit codes in groups; parameters and layout in
// params/linear_groupwise.h, the rounding in cpu/kernels/linear_groupwise.h, the product in
// cpu/gemm/groups.h.
#pragma once
#include "params/linear_groupwise.h"

namespace fastnn {

void linear_groupwise_fwd(const LinearGroupwiseParams& p);

// The packed copy of a weight (N rows). The same on every instruction set.
int64_t linear_groupwise_packed_bytes(int64_t N, const GroupLayout& layout);
void linear_groupwise_pack(const GroupwiseWeight& w, const GroupLayout& layout, int64_t N,
                           void* packed);

// The values that rows `index` of a weight stand for: y (count x K) of `dtype`, contiguous. Each
// index is in [0, N).
void linear_groupwise_rows(const GroupwiseWeight& w, const GroupLayout& layout,
                           const int64_t* index, int64_t count, DType dtype, void* y);

}  // namespace fastnn
