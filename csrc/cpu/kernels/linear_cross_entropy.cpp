#include "cpu/kernels/linear_cross_entropy.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(LinearCrossEntropy, linear_cross_entropy) = {
    .logit_gradient = fastnn::logit_gradient,
};
