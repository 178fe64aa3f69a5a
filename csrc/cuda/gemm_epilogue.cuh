// What happens to a block's result once it stands in shared memory: bias, the stored
// pre-activation, the activation, and stores of 16 bytes. Once for every product kernel.
#pragma once
#include "cuda/activation.cuh"
#include "cuda/policy_matrix.h"

namespace fastnn::cuda {

// An element of global memory, counted; parameters that all blocks read again and again.
template <class T>
__device__ __forceinline__ T load_element(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return load_cached(p);
  } else {
    return T{load_cached(&p->bits)};
  }
}
template <class T>
__device__ __forceinline__ void store_element(T* p, float x) {
  if constexpr (sizeof(T) == 4) {
    store_global(p, x);
  } else {
    store_global(&p->bits, from_float<T>(x).bits);
  }
}

// C (M x N) = A B over a depth K. Operand A has element (m, k) at a[m a_line + k a_step], B element
// (n, k) at b[n b_line + k b_step]; one of line and step is 1 but in the plain kernel.
struct GemmArgs {
  int64_t M, N, K;
  const void* a;
  int64_t a_line, a_step;
  const void* b;
  int64_t b_line, b_step;
  const void* bias;  // of the columns, or null
  int64_t bias_stride;
  Activation activation;
  void* y;         // M x N contiguous
  void* pre;       // likewise, or null
  float* partial;  // splits x M x N sums where the depth is split, else null
  int64_t split_depth;
  int tiles_m, tiles_n;  // tiles times splits is a grid
};

// Which tile of the result, and which part of the depth, a block has.
struct BlockTile {
  int64_t m0, n0, k0, k1;
  int split;
};
// Tiles run down bands of eight rows of tiles, so that blocks that run together share operands in
// L2.
__device__ __forceinline__ BlockTile block_tile(const GemmArgs& p, int block, int bm, int bn) {
  constexpr int kBand = 8;
  const int tiles = p.tiles_m * p.tiles_n, tile = block % tiles;
  const int first = tile / (kBand * p.tiles_n) * kBand;
  const int rows = p.tiles_m - first < kBand ? p.tiles_m - first : kBand;
  const int in_band = tile - first * p.tiles_n;
  BlockTile t;
  t.m0 = static_cast<int64_t>(first + in_band % rows) * bm;
  t.n0 = static_cast<int64_t>(in_band / rows) * bn;
  t.split = block / tiles;
  t.k0 = t.split * p.split_depth;
  t.k1 = t.k0 + p.split_depth < p.K ? t.k0 + p.split_depth : p.K;
  return t;
}

// The result's tile in shared memory: rows of kColumns floats, chunks of 8 permuted by the row so
// that neither the fragments' stores nor the reads by rows meet in a bank.
template <int kColumns>
__device__ __forceinline__ int result_offset(int row, int column) {
  return row * kColumns + (column ^ (row & 3) * 8);
}

// The bias of eight columns; zeros where there is none.
template <class T>
__device__ __forceinline__ void load_bias(const GemmArgs& p, int64_t column, float (&x)[8]) {
  const T* const bias = static_cast<const T*>(p.bias);
  if (bias != nullptr && p.bias_stride == 1) {
    load_chunk<8, true>(bias, column, p.N, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool exists = bias != nullptr && column + i < p.N;
    x[i] = exists ? to_float(load_element(bias + (column + i) * p.bias_stride)) : 0.f;
  }
}
// x = act(x + bias) for eight columns, with the pre-activation stored on the way.
template <class T, Activation A>
__device__ __forceinline__ void finish_eight(const GemmArgs& p, int64_t row, int64_t column,
                                             float (&x)[8], const float (&bias)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] += bias[i];
  if (p.pre != nullptr) store_chunk(static_cast<T*>(p.pre) + row * p.N, column, p.N, x);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = activate<A, T>(x[i]);
  store_chunk(static_cast<T*>(p.y) + row * p.N, column, p.N, x);
}

// Writes the tile that stands in `result` (result_offset) to y, or to the partial sums. A thread
// has the same eight columns of several rows.
template <class T, int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void write_result(const GemmArgs& p, const BlockTile& t,
                                             const float* result) {
  constexpr int kAcross = kColumns / 8, kDown = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && kRows % kDown == 0);
  const int c = static_cast<int>(threadIdx.x) % kAcross * 8;
  const int first = static_cast<int>(threadIdx.x) / kAcross;
  const int64_t column = t.n0 + c;
  const int rows = p.M - t.m0 < kRows ? static_cast<int>(p.M - t.m0) : kRows;
  if (column >= p.N) return;
  auto each = [&](auto f) {
#pragma unroll 2
    for (int r = first; r < rows; r += kDown) {
      const float4* const from =
          reinterpret_cast<const float4*>(result + result_offset<kColumns>(r, c));
      const float4 low = from[0], high = from[1];
      float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      f(t.m0 + r, x);
    }
  };
  if (p.partial != nullptr) {
    float* const out = p.partial + t.split * p.M * p.N;
    each([&](int64_t row, float (&x)[8]) { store_chunk(out + row * p.N, column, p.N, x); });
    return;
  }
  float bias[8];
  load_bias<T>(p, column, bias);
  with_linear_activation(p.activation, [&](auto tag) {
    each([&](int64_t row, float (&x)[8]) {
      finish_eight<T, decltype(tag)::value>(p, row, column, x, bias);
    });
  });
}

// Adds the partial sums in the order of the splits and finishes them; eight columns a thread.
template <class T>
__global__ void __launch_bounds__(256) reduce_splits(GemmArgs p, int splits) {
  const int64_t chunks = div_up(p.N, 8);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.M * chunks) return;
  const int64_t row = i / chunks, column = i % chunks * 8;
  const float* from = p.partial + row * p.N;
  float x[8] = {};
  for (int s = 0; s < splits; ++s, from += p.M * p.N) {
    float part[8];
    load_chunk(from, column, p.N, part);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += part[i];
  }
  float bias[8];
  load_bias<T>(p, column, bias);
  with_linear_activation(p.activation, [&](auto tag) {
    finish_eight<T, decltype(tag)::value>(p, row, column, x, bias);
  });
}

}  // namespace fastnn::cuda
