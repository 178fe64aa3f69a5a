#include "cpu/kernels/linear_int8.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(LinearInt8, linear_int8) = {
    .int8_quantise = fastnn::int8_quantise,
    .int8_pack = fastnn::int8_pack,
};
