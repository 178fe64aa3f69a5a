// linear with a block-sparse weight; parameters in params/block_sparse.h, the products in
// cpu/kernels/block_sparse.h.
#pragma once
#include "params/block_sparse.h"

namespace fastnn {

void block_sparse_fwd(const BlockSparseParams& p);
void block_sparse_bwd(const BlockSparseBwdParams& p);

}  // namespace fastnn
