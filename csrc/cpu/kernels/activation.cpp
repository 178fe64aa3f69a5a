#include "cpu/kernels/activation.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Activation, activation) = {
    .activation_fwd = fastnn::activation_fwd,
    .activation_bwd = fastnn::activation_bwd,
};
