#include "cpu/kernels/vector_math.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(VectorMath, vector_math) = {
    .to_float32 = fastnn::to_float32,
    .from_float32 = fastnn::from_float32,
    .vector_math = fastnn::vector_math,
};
