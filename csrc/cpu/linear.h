// linear + activation over the thread pool; parameters in params/linear.h, the algorithm in
// cpu/gemm/.
#pragma once
#include "params/linear.h"

namespace fastnn {

struct GemmParams;
struct KernelTable;

void linear_fwd(const LinearParams& p);
void linear_bwd(const LinearBwdParams& p);

// The packed copy of a weight (N x K): what linear_fwd reads when LinearParams.packed is set. It
// depends on the type and the instruction set in force; whoever keeps one must rebuild it when
// either changes.
int64_t linear_packed_bytes(int64_t N, int64_t K, DType dtype);
void linear_pack(const Matrix& w, int64_t N, int64_t K, void* packed);

// dz, where not null, and the gradient of the bias, where wanted. Chunks of rows have their own
// partial sums.
void run_slope(const LinearBwdParams& p, void* dz, const KernelTable& table);

// The product of cpu/gemm/, split over the threads.
void run_gemm(const GemmParams& p, const KernelTable& table);

}  // namespace fastnn
