#include "cpu/kernels/masked_softmax.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(MaskedSoftmax, masked_softmax) = {
    .masked_softmax_fwd = fastnn::masked_softmax_fwd,
};
