#include "cpu/kernels/softmax.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Softmax, softmax) = {
    .softmax_items = fastnn::softmax_items,
    .softmax_fwd = fastnn::softmax_fwd,
    .softmax_bwd = fastnn::softmax_bwd,
};
