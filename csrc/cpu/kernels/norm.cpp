#include "cpu/kernels/norm.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Norm, norm) = {
    .norm_fwd = fastnn::norm_fwd,
    .norm_bwd = fastnn::norm_bwd,
};
