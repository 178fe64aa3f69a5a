#include "cpu/gemm/gemm.h"

#include "cpu/kernel_table.h"

FASTNN_TABLE_PART(Gemm, gemm) = {
    .gemm = fastnn::gemm,
    .gemm_scratch_floats = fastnn::gemm_scratch_floats,
    .packed_floats = fastnn::packed_floats,
    .pack = fastnn::pack,
};
