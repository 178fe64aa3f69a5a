// The float32 product: C = A B. Both operands lie in shared memory as [depth][tile], in two
// buffers; the next step's elements wait in registers while the present ones multiply. 256 threads
// compute a tile of kTile x kTile: by fused multiply-adds, 16 x 16 threads each one or four 4 x 4
// parts of it; or, where the caller allows tf32, by mma.sync m16n8k8 on operands rounded to 10 bits
// of mantissa, two warps down and four across.
#pragma once
#include <type_traits>

#include "cuda/gemm_epilogue.cuh"

namespace fastnn::cuda {

// An operand's step of kFloatDepth, four elements of a line per thread and turn. The rows' padding
// keeps fragments (of tf32) and stores (else) out of each other's banks.
template <int kTile, bool kTf32>
struct FloatOperand {
  static constexpr int kThreads = 256, kTurns = kTile * kFloatDepth / 4 / kThreads;
  static constexpr int kStride = kTile + (kTf32 ? 8 : 4);

  const float* data;
  int64_t line, step, depth;  // depth: the end of the split
  int left;                   // lines of the tile that there are
  bool along_depth, vectors;
  float4 held[kTurns];

  __device__ __forceinline__ void begin(const void* from, int64_t line_stride, int64_t k_step,
                                        int64_t w0, int64_t wide, int64_t k1) {
    line = line_stride;
    step = k_step;
    data = static_cast<const float*>(from) + w0 * line;
    left = static_cast<int>(wide - w0 < kTile ? wide - w0 : kTile);
    depth = k1;
    along_depth = step == 1;
    vectors = on_boundary(data) && (along_depth ? line % 4 == 0 : line == 1 && step % 4 == 0);
  }
  // The place of a thread's four elements: lines next to each other or along the depth.
  __device__ __forceinline__ void place(int thread, int turn, int& w, int& k) const {
    const int i = thread + turn * kThreads;
    w = along_depth ? i / (kFloatDepth / 4) : i % (kTile / 4) * 4;
    k = along_depth ? i % (kFloatDepth / 4) * 4 : i / (kTile / 4);
  }
  __device__ __forceinline__ float element(int w, int64_t k) const {
    return w < left && k < depth ? load_global(data + w * line + k * step) : 0.f;
  }
  __device__ __forceinline__ void load(int64_t k0) {
    int thread = static_cast<int>(threadIdx.x);
    renew(thread);  // places are computed again rather than kept in registers from step to step
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int w, deep;
      place(thread, turn, w, deep);
      const int64_t k = k0 + deep;
      const bool whole = along_depth ? w < left && k + 4 <= depth : w + 4 <= left && k < depth;
      if (vectors && whole) {
        held[turn] = load_global(reinterpret_cast<const float4*>(data + w * line + k * step));
      } else if (along_depth) {
        held[turn] =
            make_float4(element(w, k), element(w, k + 1), element(w, k + 2), element(w, k + 3));
      } else {
        held[turn] =
            make_float4(element(w, k), element(w + 1, k), element(w + 2, k), element(w + 3, k));
      }
    }
  }
  static __device__ __forceinline__ float rounded(float x) {
    return kTf32 ? __uint_as_float(to_tf32(x)) : x;
  }
  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      int w, k;
      place(static_cast<int>(threadIdx.x), turn, w, k);
      const float4 v = make_float4(rounded(held[turn].x), rounded(held[turn].y),
                                   rounded(held[turn].z), rounded(held[turn].w));
      if (along_depth) {
        to[k * kStride + w] = v.x;
        to[(k + 1) * kStride + w] = v.y;
        to[(k + 2) * kStride + w] = v.z;
        to[(k + 3) * kStride + w] = v.w;
      } else {
        *reinterpret_cast<float4*>(to + k * kStride + w) = v;
      }
    }
  }
};

// A thread's sums by fused multiply-adds.
template <int kTile>
struct FloatSums {
  static constexpr int kParts = kTile / 64;  // of 4 rows, and of 4 columns
  float sum[kParts * 4][kParts * 4] = {};

  template <int kStride>
  __device__ __forceinline__ void add(const float* a, const float* b) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int k = 0; k < kFloatDepth; ++k) {
      float fa[kParts][4], fb[kParts][4];
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const float4 va = *reinterpret_cast<const float4*>(a + k * kStride + 64 * i + 4 * ty);
        const float4 vb = *reinterpret_cast<const float4*>(b + k * kStride + 64 * i + 4 * tx);
        fa[i][0] = va.x, fa[i][1] = va.y, fa[i][2] = va.z, fa[i][3] = va.w;
        fb[i][0] = vb.x, fb[i][1] = vb.y, fb[i][2] = vb.z, fb[i][3] = vb.w;
      }
#pragma unroll
      for (int r = 0; r < kParts * 4; ++r) {
#pragma unroll
        for (int c = 0; c < kParts * 4; ++c)
          sum[r][c] = fmaf(fa[r / 4][r % 4], fb[c / 4][c % 4], sum[r][c]);
      }
    }
  }
  __device__ __forceinline__ void keep(float* result) const {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < kParts * 4; ++r) {
#pragma unroll
      for (int c = 0; c < kParts; ++c) {
        const int row = r / 4 * 64 + 4 * ty + r % 4, column = 64 * c + 4 * tx;
        *reinterpret_cast<float4*>(result + result_offset<kTile>(row, column)) =
            make_float4(sum[r][4 * c], sum[r][4 * c + 1], sum[r][4 * c + 2], sum[r][4 * c + 3]);
      }
    }
  }
};
// A thread's fragments of sums by tensor cores.
template <int kTile>
struct Tf32Sums {
  static constexpr int kM = kTile / 32, kN = kTile / 32;  // 16 rows and 8 columns each, per warp
  float sum[kM][kN][4] = {};

  template <int kStride>
  __device__ __forceinline__ void add(const float* a, const float* b) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    a += warp % 2 * (kTile / 2) + lane % 4 * kStride + lane / 4;
    b += warp / 2 * (kTile / 4) + lane % 4 * kStride + lane / 4;
#pragma unroll
    for (int k = 0; k < kFloatDepth; k += 8) {
      uint32_t fa[kM][4], fb[kN][2];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          fa[i][e] = __float_as_uint(a[(k + e / 2 * 4) * kStride + 16 * i + e % 2 * 8]);
      }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        fb[j][0] = __float_as_uint(b[k * kStride + 8 * j]);
        fb[j][1] = __float_as_uint(b[(k + 4) * kStride + 8 * j]);
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < kN; ++j) mma_1688_tf32(sum[i][j], fa[i], fb[j][0], fb[j][1]);
      }
    }
  }
  __device__ __forceinline__ void keep(float* result) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp % 2 * (kTile / 2) + 16 * i + 8 * h + lane / 4;
          const int column = warp / 2 * (kTile / 4) + 8 * j + lane % 4 * 2;
          *reinterpret_cast<float2*>(result + result_offset<kTile>(row, column)) =
              make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
        }
      }
    }
  }
};

template <int kTile, bool kTf32>
__global__ void __launch_bounds__(256, 2) gemm_f32_kernel(GemmArgs p) {
  using Operand = FloatOperand<kTile, kTf32>;
  constexpr int kStride = Operand::kStride, kBuffer = kFloatDepth * kStride;
  FASTNN_DYN_SHARED(float, memory);
  const BlockTile t = block_tile(p, static_cast<int>(blockIdx.x), kTile, kTile);
  Operand a, b;
  a.begin(p.a, p.a_line, p.a_step, t.m0, p.M, t.k1);
  b.begin(p.b, p.b_line, p.b_step, t.n0, p.N, t.k1);
  std::conditional_t<kTf32, Tf32Sums<kTile>, FloatSums<kTile>> sums;
  a.load(t.k0);
  b.load(t.k0);
  int buffer = 0;
  for (int64_t k0 = t.k0; k0 < t.k1; k0 += kFloatDepth, buffer ^= 1) {
    float* const sa = memory + buffer * 2 * kBuffer;
    float* const sb = sa + kBuffer;
    a.store(sa);
    b.store(sb);
    __syncthreads();  // the other buffer, written next, was read before this barrier
    a.load(k0 + kFloatDepth);
    b.load(k0 + kFloatDepth);
    sums.template add<kStride>(sa, sb);
  }
  __syncthreads();  // the operands' memory now takes the result
  sums.keep(memory);
  __syncthreads();
  write_result<float, kTile, kTile, 256>(p, t, memory);
}

}  // namespace fastnn::cuda
