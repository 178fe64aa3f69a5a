#include "cpu/kernels/rope.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Rope, rope) = {
    .rope = fastnn::rope,
};
