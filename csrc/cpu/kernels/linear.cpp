#include "cpu/kernels/linear.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Linear, linear) = {
    .linear_slope = fastnn::linear_slope,
};
