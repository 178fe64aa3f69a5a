#include "cpu/kernels/mlp.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Mlp, mlp) = {
    .mlp_middle = fastnn::mlp_middle,
};
