// linear with a block-sparse weight; parameters in params/block_sparse.h, the products in
// cpu/kernels/block_sparse.h.
#pragma once
#include "params/block_sparse.h"

namespace fastnn {

void block_sparse_fwd(const BlockSparseParams& p);
void block_sparse_bwd(const BlockSparseBwdParams& p);
void block_sparse_int8_fwd(const BlockSparseInt8Params& p);

// What the kernel needs beside the codes, for N outputs: what the shift of the activations' codes
// by 128 adds to the sums of each, and its scale. The same on every instruction set.
int64_t block_sparse_int8_packed_bytes(int64_t N);
// codes, starts and depth of w; scale: N.
void block_sparse_int8_pack(const BlockSparseWeight& w, const float* scale, int64_t scale_stride,
                            int64_t N, void* packed);

}  // namespace fastnn
