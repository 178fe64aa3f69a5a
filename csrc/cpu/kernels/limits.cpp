#include "cpu/kernels/limits.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Limits, limits) = {
    .isa = fastnn::kIsaName,
    .peak_operations = fastnn::peak_operations,
    .stream = fastnn::stream,
};
