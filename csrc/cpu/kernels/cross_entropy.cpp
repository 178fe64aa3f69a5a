#include "cpu/kernels/cross_entropy.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(CrossEntropy, cross_entropy) = {
    .cross_entropy_fwd = fastnn::cross_entropy_fwd,
    .cross_entropy_bwd = fastnn::cross_entropy_bwd,
};
