#include "cpu/kernels/linear_groupwise.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(LinearGroupwise, linear_groupwise) = {
    .group_digits = fastnn::group_digits,
    .group_pack = fastnn::group_pack,
    .group_row = fastnn::group_row,
};
