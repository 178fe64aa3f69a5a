// The product kernel on tensor cores: C = A B with mma.sync m16n8k16, bf16 or fp16 operands and
// float32 sums.
//
// A block computes a tile of C. Tiles of both operands pass through shared memory in a pipeline of
// kStages cp.async groups, one barrier per step; 16-byte chunks are permuted within a row so that
// ldmatrix meets no bank twice. An operand is stored as it lies in memory: with the depth running
// fastest (ldmatrix) or the other index (ldmatrix.trans), so that no gradient needs a transposed
// copy. Fragments of the next 16 of the depth are loaded while the present ones multiply, across
// the steps' boundary too.
#pragma once
#include "cuda/gemm_epilogue.cuh"
#include "cuda/policy_matrix.h"

namespace fastnn::cuda {

// How an operand's elements lie: next to each other along the depth, along its other index (rows
// of A, columns of B), or anyhow (copied one by one).
enum class Lies { kAlongDepth, kAcross, kAnyhow };

// One operand's way from global to shared memory and to fragments. kWide: its rows (A) or columns
// (B) in a block's tile.
template <class T, Lies kLies, int kWide, int kDepth, int kThreads>
struct OperandTile {
  static constexpr bool kAcross = kLies == Lies::kAcross;
  static constexpr int kRowBytes = 2 * (kAcross ? kWide : kDepth);
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kBytes = 2 * kWide * kDepth;
  static constexpr int kCopies = kBytes / 16 / kThreads;  // chunks per thread
  static constexpr int kStep = kThreads / kRowChunks;     // rows between a thread's chunks
  static_assert(kThreads % kRowChunks == 0 && kBytes % (16 * kThreads) == 0 && kStep % 8 == 0);

  static __device__ __forceinline__ int swizzle(int row) {
    return kRowChunks >= 8 ? row & 7 : row >> 1 & 3;
  }

  const T* from;   // of the thread's first chunk in the present step of the depth
  int64_t stride;  // elements between rows of the tile
  int64_t step;    // elements between elements of a row, of kAnyhow
  int first_row, first, offset;
  int bound;  // elements of the first chunk that exist across, or rows that exist

  __device__ __forceinline__ void begin(const void* data, int64_t line, int64_t k_step, int64_t w0,
                                        int64_t wide, int64_t k0) {
    first_row = threadIdx.x / kRowChunks;
    const int chunk = threadIdx.x % kRowChunks;
    first = chunk * 8;
    offset = first_row * kRowBytes + ((chunk ^ swizzle(first_row)) << 4);
    const int64_t left = wide - w0;
    if constexpr (kAcross) {
      stride = k_step;
      from = static_cast<const T*>(data) + (k0 + first_row) * stride + w0 + first;
      bound = clamp_count(left - first);
    } else {
      stride = line;
      step = k_step;
      from = static_cast<const T*>(data) + (w0 + first_row) * stride + (k0 + first) * step;
      bound = left < kWide ? static_cast<int>(left) : kWide;
    }
  }
  static __device__ __forceinline__ int clamp_count(int64_t n) {
    return n <= 0 ? 0 : n < 8 ? static_cast<int>(n) : 8;
  }

  // Copies the present step's tile, of which `depth` exist, and moves on to the next.
  __device__ __forceinline__ void copy(Shared to, int depth) {
    to += offset;
    if constexpr (kAcross) {
#pragma unroll 4
      for (int i = 0; i < kCopies; ++i) {
        const int bytes = first_row + i * kStep < depth ? 2 * bound : 0;
        cp_async16(to + i * kStep * kRowBytes, from + i * kStep * stride, bytes);
      }
      from += kDepth * stride;
    } else if constexpr (kLies == Lies::kAlongDepth) {
      const int bytes = 2 * clamp_count(depth - first);
#pragma unroll 4
      for (int i = 0; i < kCopies; ++i) {
        cp_async16(to + i * kStep * kRowBytes, from + i * kStep * stride,
                   first_row + i * kStep < bound ? bytes : 0);
      }
      from += kDepth;
    } else {
      const int count = clamp_count(depth - first);
#pragma unroll 1
      for (int i = 0; i < kCopies; ++i) {
        const bool row_exists = first_row + i * kStep < bound;
        uint32_t words[4];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          uint16_t bits = 0;
          if (row_exists && e < count)
            bits = load_global(&from[i * kStep * stride + e * step].bits);
          words[e / 2] = e % 2 == 0 ? bits : words[e / 2] | static_cast<uint32_t>(bits) << 16;
        }
        store_shared(to + i * kStep * kRowBytes,
                     make_uint4(words[0], words[1], words[2], words[3]));
      }
      from += kDepth * step;
    }
  }
};

// Where a lane reads its rows of an operand's fragments: of A, 16 x 16 per load in the order of the
// product's registers; of B, two 16 x 8.
template <class Tile, bool kIsA>
__device__ __forceinline__ int fragment_offset(int w0) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
  const int half = kIsA ? matrix % 2 : matrix / 2;  // across
  const int deep = kIsA ? matrix / 2 : matrix % 2;  // along the depth
  const int row = Tile::kAcross ? deep * 8 + r : w0 + half * 8 + r;
  const int chunk = Tile::kAcross ? w0 / 8 + half : deep;
  return row * Tile::kRowBytes + ((chunk ^ Tile::swizzle(row)) << 4);
}
// The fragment of the i-th 16 across at depth k of the step; i and k are constants where it is
// used, and what lies whole rows away is part of the instruction.
template <class Tile>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], Shared tile, int offset, int i,
                                              int k) {
  if constexpr (Tile::kAcross) {
    ldmatrix_trans(r, tile + (offset ^ i << 5) + k * Tile::kRowBytes);
  } else {
    ldmatrix(r, tile + (offset ^ k << 1) + 16 * i * Tile::kRowBytes);
  }
}

template <class T, class Config, Lies kLiesA, Lies kLiesB>
__global__ void __launch_bounds__(Config::kShape.threads()) gemm_kernel(GemmArgs p) {
  constexpr TileShape kShape = Config::kShape;
  constexpr int kThreads = kShape.threads(), kStages = kShape.stages, kDepth = kShape.bk;
  constexpr int kM = kShape.wm / 16, kN = kShape.wn / 16, kSteps = kDepth / 16;
  using TileA = OperandTile<T, kLiesA, kShape.bm, kDepth, kThreads>;
  using TileB = OperandTile<T, kLiesB, kShape.bn, kDepth, kThreads>;
  constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  FASTNN_DYN_SHARED(unsigned char, memory);
  const Shared pipeline = shared_address(memory);
  int block = static_cast<int>(blockIdx.x);
  const BlockTile t = block_tile(p, block, kShape.bm, kShape.bn);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % (kShape.bm / kShape.wm) * kShape.wm;
  const int warp_n = warp / (kShape.bm / kShape.wm) * kShape.wn;

  TileA a;
  TileB b;
  a.begin(p.a, p.a_line, p.a_step, t.m0, p.M, t.k0);
  b.begin(p.b, p.b_line, p.b_step, t.n0, p.N, t.k0);
  const int steps = static_cast<int>(div_up(t.k1 - t.k0, kDepth));
  const int tail = static_cast<int>(t.k1 - t.k0 - static_cast<int64_t>(steps - 1) * kDepth);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) {
      a.copy(pipeline + s * kStageBytes, s + 1 < steps ? kDepth : tail);
      b.copy(pipeline + s * kStageBytes + TileA::kBytes, s + 1 < steps ? kDepth : tail);
    }
    cp_async_commit();
  }
  int offset_a = fragment_offset<TileA, true>(warp_m);
  int offset_b = fragment_offset<TileB, false>(warp_n);
  float sum[kM][2 * kN][4] = {};
  uint32_t fa[2][kM][4], fb[2][kN][4];
  auto load = [&](int buffer, Shared stage, int k) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_fragment<TileA>(fa[buffer][i], stage, offset_a, i, k);
#pragma unroll
    for (int i = 0; i < kN; ++i)
      load_fragment<TileB>(fb[buffer][i], stage + TileA::kBytes, offset_b, i, k);
  };
  cp_async_wait<kStages - 2>();
  __syncthreads();
  load(0, pipeline, 0);
  int stage = 0, fill = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    renew(offset_a);
    renew(offset_b);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k == kSteps - 1) {  // every warp has read this stage's last fragments
        cp_async_wait<kStages - 2>();
        __syncthreads();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      load((k + 1) % 2, pipeline + stage * kStageBytes, (k + 1) % kSteps * 16);
      if (k == 0) {  // into the stage that was read before the last barrier
        if (step + kStages - 1 < steps) {
          const int depth = step + kStages < steps ? kDepth : tail;
          a.copy(pipeline + fill * kStageBytes, depth);
          b.copy(pipeline + fill * kStageBytes + TileA::kBytes, depth);
        }
        cp_async_commit();
        fill = fill + 1 == kStages ? 0 : fill + 1;
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kN; ++j) {
          const int column = i % 2 == 0 ? j : 2 * kN - 1 - j;  // back and forth: B's register stays
          mma_16816<T>(sum[i][column], fa[k % 2][i], fb[k % 2][column / 2][column % 2 * 2],
                       fb[k % 2][column / 2][column % 2 * 2 + 1]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory now takes the result
  float* const result = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kN; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_m + 16 * i + 8 * h + lane / 4, column = warp_n + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(result + result_offset<kShape.bn>(row, column)) =
            make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
      }
    }
  }
  __syncthreads();
  renew(block);  // the tile's place is computed again rather than kept in registers
  write_result<T, kShape.bm, kShape.bn, kThreads>(p, block_tile(p, block, kShape.bm, kShape.bn),
                                                  result);
}

}  // namespace fastnn::cuda
