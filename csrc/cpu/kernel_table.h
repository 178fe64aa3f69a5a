// What an instruction set supplies: plain functions, all serial, none of which throws or allocates.
// Each csrc/cpu/kernels/<part>.cpp, compiled once per instruction set, defines one part of the
// table; cpu/<op>.cpp splits the work over threads and calls them.
#pragma once
#include "params/common.h"

namespace fastnn {

// Declared only, so that a change of one op's arguments compiles that op again.
struct ActivationBwdParams;
struct ActivationParams;
struct AttentionBwdParams;
struct AttentionFwdParams;
struct AttentionParams;
struct Block;
struct BlockOfRow;
struct BlockSparseWeight;
struct CrossEntropyBwdParams;
struct CrossEntropyFwdParams;
struct DropoutAddParams;
struct GemmParams;
struct GroupLayout;
struct GroupwiseWeight;
struct LinearBwdParams;
struct LogitGradientParams;
struct MaskedSoftmaxParams;
struct Matrix;
struct MlpMiddle;
struct NormBwdParams;
struct NormParams;
struct RopeParams;
struct SoftmaxBwdParams;
struct SoftmaxParams;
struct SparseGradients;
struct StreamParams;
enum class PeakKind : int32_t;
enum class SparseUnits : int32_t;

struct ActivationKernels {
  // The block; bias as neighbouring float32, or null. Its columns' sums of dx are added to db,
  // where not null.
  void (*activation_fwd)(const ActivationParams& p, const float* bias, const Block& block);
  void (*activation_bwd)(const ActivationBwdParams& p, const float* bias, const Block& block,
                         float* db);
};

struct AttentionKernels {
  // (Batch entry, key head) pairs as the products take them: attention_key_floats and
  // attention_value_floats of each, 0 where they are read in place.
  int64_t (*attention_key_floats)(const AttentionParams& p, bool forward);
  int64_t (*attention_value_floats)(const AttentionParams& p, bool forward);
  void (*attention_prepare)(const AttentionParams& p, bool forward, int64_t item, float* k,
                            float* v);
  // Items [begin, end) of attention_fwd_items; (batch entry, key head) pairs [begin, end).
  int64_t (*attention_fwd_items)(const AttentionParams& p);
  int64_t (*attention_fwd_scratch)(const AttentionParams& p);
  void (*attention_fwd)(const AttentionFwdParams& p, const float* k, const float* v, int64_t begin,
                        int64_t end, float* scratch);
  // Few queries: rows that share a key head, 0 where attention_fwd is the quicker; floats of one
  // row's part. Keys [begin, end) of (batch entry, key head) `item`; then its parts to the output.
  int64_t (*attention_decode_rows)(const AttentionParams& p);
  int64_t (*attention_decode_floats)(const AttentionParams& p);
  int64_t (*attention_decode_scratch)(const AttentionParams& p);
  void (*attention_decode)(const AttentionParams& p, int64_t item, int64_t begin, int64_t end,
                           float* out, float* scratch);
  void (*attention_decode_merge)(const AttentionFwdParams& p, int64_t item, int64_t parts,
                                 float* partial);
  int64_t (*attention_bwd_scratch)(const AttentionParams& p);
  void (*attention_bwd)(const AttentionBwdParams& p, const float* k, const float* v, int64_t begin,
                        int64_t end, float* scratch);
};

struct BlockSparseKernels {
  // Rows of a tile of the input at most, and what so many are padded to; units of a block.
  int64_t (*sparse_tile_rows)(int64_t rows);
  int64_t (*sparse_units)(int64_t depth, DType dtype, SparseUnits units);
  // Rows [begin, end) of x, columns of blocks [c0, c1), as units of `tile_rows` rows each.
  void (*sparse_pack)(const Matrix& x, int64_t K, int64_t depth, int64_t begin, int64_t end,
                      int64_t tile_rows, int64_t c0, int64_t c1, SparseUnits units, float* out);
  // Rows [begin, end) of a packed tile times strips [s0, s1): those rows and columns of p.c. Of
  // codes, the rows' scales are readable up to 4 more.
  void (*sparse_fwd)(const GemmParams& p, const BlockSparseWeight& w, const float* panel,
                     int64_t begin, int64_t end, int64_t s0, int64_t s1);
  // Rows [begin, end) and columns of blocks [c0, c1) of dx; blocks [b0, b1) of the gradient of the
  // values, all of strip s.
  void (*sparse_dx)(const SparseGradients& p, int64_t begin, int64_t end, int64_t c0, int64_t c1);
  void (*sparse_dw)(const SparseGradients& p, int64_t s, int64_t b0, int64_t b1);
};

struct CrossEntropyKernels {
  // Rows [begin, end).
  void (*cross_entropy_fwd)(const CrossEntropyFwdParams& p, int64_t begin, int64_t end);
  void (*cross_entropy_bwd)(const CrossEntropyBwdParams& p, int64_t begin, int64_t end);
};

struct DropoutAddKernels {
  // The block, whose columns begin at a multiple of 64.
  void (*dropout_add)(const DropoutAddParams& p, const Block& block);
};

struct GemmKernels {
  // Rows [m0, m1) and columns [n0, n1) of c; n0 a multiple of kStrip. scratch:
  // gemm_scratch_floats(p).
  void (*gemm)(const GemmParams& p, int64_t m0, int64_t m1, int64_t n0, int64_t n1, float* scratch);
  int64_t (*gemm_scratch_floats)(const GemmParams& p);
  // Floats of the packed copy of a K x N operand of this type, and strips [s0, s1) of it.
  int64_t (*packed_floats)(int64_t N, int64_t K, DType dtype);
  void (*pack)(const Matrix& b, int64_t N, int64_t K, int64_t s0, int64_t s1, float* out);
};

// Of the machine, not of an op (cpu/limits.cpp).
struct LimitsKernels {
  const char* isa;  // as the compiler saw it (simd/vec.h)
  int64_t (*peak_operations)(PeakKind kind, int64_t steps, float* sink);
  float (*stream)(const StreamParams& p);
};

struct LinearKernels {
  // dz of rows [begin, end) where dz is not null, and their column sums where sums is not null.
  void (*linear_slope)(const LinearBwdParams& p, int64_t begin, int64_t end, void* dz, float* sums);
};

struct LinearCrossEntropyKernels {
  // All rows, classes [first, last).
  void (*logit_gradient)(const LogitGradientParams& p, int64_t first, int64_t last);
};

struct LinearGroupwiseKernels {
  // Digits of rows [begin, end), rows out_stride bytes apart, and what goes with them, a row's
  // blocks next to each other; strips [s0, s1) of a weight with N rows; one row of it.
  void (*group_digits)(const Matrix& x, const GroupLayout& layout, int digits, int64_t begin,
                       int64_t end, uint8_t* out, int64_t out_stride, BlockOfRow* of);
  void (*group_pack)(const GroupwiseWeight& w, const GroupLayout& layout, int64_t N, int64_t s0,
                     int64_t s1, char* packed);
  void (*group_row)(const GroupwiseWeight& w, const GroupLayout& layout, int64_t n, DType dtype,
                    void* y);
};

struct LinearInt8Kernels {
  // Codes of rows [begin, end), their bits flipped by `flip`, rows code_stride bytes apart, and the
  // rows' scales; strips [s0, s1) of a weight's codes (N x K bytes) and, for each of their columns,
  // 128 times the sum of its codes.
  void (*int8_quantise)(const Matrix& x, int64_t K, int64_t begin, int64_t end, uint8_t flip,
                        uint8_t* codes, int64_t code_stride, float* scale);
  void (*int8_pack)(const Matrix& codes, int64_t N, int64_t K, int64_t s0, int64_t s1,
                    float* strips, int32_t* offset);
};

struct MaskedSoftmaxKernels {
  // Rows [begin, end); kept: a row of floats where y cannot hold them (MaskedSoftmaxParams).
  void (*masked_softmax_fwd)(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* kept);
};

struct MlpKernels {
  // Rows [begin, end) of the middle of a feed-forward block; its gradient's columns' sums are added
  // to sums, where not null.
  void (*mlp_middle)(const MlpMiddle& p, int64_t begin, int64_t end, float* sums);
};

struct NormKernels {
  // n neighbouring parameters to the order in which rows of this type take them, in place.
  void (*norm_order)(DType dtype, float* values, int64_t n);
  // Rows [begin, end); weight and bias as float32 in that order. The rows' sums for the gradients
  // of weight and bias go to dw and db, neighbours again, where not null.
  void (*norm_fwd)(const NormParams& p, const float* weight, const float* bias, int64_t begin,
                   int64_t end);
  void (*norm_bwd)(const NormBwdParams& p, const float* weight, int64_t begin, int64_t end,
                   float* dw, float* db);
};

struct RopeKernels {
  // Blocks [begin, end) of rope_items(p); scratch: rope_scratch_floats(p).
  void (*rope)(const RopeParams& p, int64_t begin, int64_t end, float* scratch);
};

struct SoftmaxKernels {
  // Slices [begin, end) of softmax_items(p); scratch: softmax_scratch_floats(p).
  int64_t (*softmax_items)(int64_t outer, int64_t inner);
  void (*softmax_fwd)(const SoftmaxParams& p, int64_t begin, int64_t end, float* scratch);
  void (*softmax_bwd)(const SoftmaxBwdParams& p, int64_t begin, int64_t end);
};

enum class MathFunction : int32_t { kExp, kLog, kTanh, kErf, kSigmoid };

struct VectorMathKernels {
  // n elements of any type to float32 and back.
  void (*to_float32)(const void* x, int64_t stride, DType dtype, int64_t n, float* y);
  void (*from_float32)(const float* x, int64_t n, DType dtype, void* y);
  void (*vector_math)(MathFunction f, const float* x, float* y, int64_t n);
};

// Every part, in the order of its name: PART(Softmax, softmax, isa) stands for the struct
// SoftmaxKernels and the file kernels/softmax.cpp.
#define FASTNN_KERNEL_PARTS(PART, isa)                \
  PART(Activation, activation, isa)                   \
  PART(Attention, attention, isa)                     \
  PART(BlockSparse, block_sparse, isa)                \
  PART(CrossEntropy, cross_entropy, isa)              \
  PART(DropoutAdd, dropout_add, isa)                  \
  PART(Gemm, gemm, isa)                               \
  PART(Limits, limits, isa)                           \
  PART(Linear, linear, isa)                           \
  PART(LinearCrossEntropy, linear_cross_entropy, isa) \
  PART(LinearGroupwise, linear_groupwise, isa)        \
  PART(LinearInt8, linear_int8, isa)                  \
  PART(MaskedSoftmax, masked_softmax, isa)            \
  PART(Mlp, mlp, isa)                                 \
  PART(Norm, norm, isa)                               \
  PART(Rope, rope, isa)                               \
  PART(Softmax, softmax, isa)                         \
  PART(VectorMath, vector_math, isa)

struct KernelTable : ActivationKernels,
                     AttentionKernels,
                     BlockSparseKernels,
                     CrossEntropyKernels,
                     DropoutAddKernels,
                     GemmKernels,
                     LimitsKernels,
                     LinearKernels,
                     LinearCrossEntropyKernels,
                     LinearGroupwiseKernels,
                     LinearInt8Kernels,
                     MaskedSoftmaxKernels,
                     MlpKernels,
                     NormKernels,
                     RopeKernels,
                     SoftmaxKernels,
                     VectorMathKernels {};  // in the order of FASTNN_KERNEL_PARTS

}  // namespace fastnn

// A part's table for the instruction set FASTNN_ISA_NAME, the only symbol that its object defines.
#define FASTNN_TABLE_NAME_(part, isa) fastnn_table_##part##_##isa
#define FASTNN_TABLE_NAME(part, isa) FASTNN_TABLE_NAME_(part, isa)
#define FASTNN_DECLARE_TABLE(Part, part, isa)      \
  extern "C" __attribute__((visibility("hidden"))) \
  const fastnn::Part##Kernels FASTNN_TABLE_NAME(part, isa);
#define FASTNN_TABLE_PART(Part, part)               \
  FASTNN_DECLARE_TABLE(Part, part, FASTNN_ISA_NAME) \
  extern "C" const fastnn::Part##Kernels FASTNN_TABLE_NAME(part, FASTNN_ISA_NAME)
