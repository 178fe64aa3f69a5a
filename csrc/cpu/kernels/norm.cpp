#include "cpu/kernels/norm.h"

#include "cpu/kernel_table.h"
#include "cpu/kernels/norm_bwd.h"

FASTNN_TABLE_PART(Norm, norm) = {
    .norm_order = fastnn::norm_order,
    .norm_fwd = fastnn::norm_fwd,
    .norm_bwd = fastnn::norm_bwd,
};
