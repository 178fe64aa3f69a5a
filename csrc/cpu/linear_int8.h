// linear with a weight of int8 codes; parameters in params/linear_int8.h, the rounding in
// cpu/kernels/linear_int8.h, the product in cpu/gemm/.
#pragma once
#include "params/linear_int8.h"

namespace fastnn {

void linear_int8_fwd(const LinearInt8Params& p);

// Codes (M x K bytes, contiguous, signed) and scale (M) of x's rows.
void linear_int8_quantize(const Matrix& x, int64_t M, int64_t K, void* codes, float* scale);

// The packed copy of a weight: strips of codes, for each column what the shift of the activations'
// codes by 128 adds to its sums, and its scale. The same on every instruction set.
int64_t linear_int8_packed_bytes(int64_t N, int64_t K);
// codes: N x K, signed bytes; scale: N.
void linear_int8_pack(const Matrix& codes, const float* scale, int64_t scale_stride, int64_t N,
                      int64_t K, void* packed);

}  // namespace fastnn
