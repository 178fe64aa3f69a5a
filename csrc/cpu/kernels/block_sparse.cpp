#include "cpu/kernels/block_sparse.h"

#include "cpu/kernel_table.h"
#include "cpu/kernels/block_sparse_bwd.h"

FASTNN_TABLE_PART(BlockSparse, block_sparse) = {
    .sparse_tile_rows = fastnn::sparse_tile_rows,
    .sparse_units = fastnn::sparse_units,
    .sparse_pack = fastnn::sparse_pack,
    .sparse_fwd = fastnn::sparse_fwd,
    .sparse_dx = fastnn::sparse_dx,
    .sparse_dw = fastnn::sparse_dw,
};
