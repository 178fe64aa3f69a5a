#include "cpu/kernels/dropout_add.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(DropoutAdd, dropout_add) = {
    .dropout_add = fastnn::dropout_add,
};
