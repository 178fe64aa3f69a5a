// Attention of float32 by fused multiply-adds, with every option. 16 x 16 threads have a square
// tile of scores: thread (ty, tx) the rows ty + 16 r and the columns tx + 16 c; of results the same
// rows and four features at a time. All operands lie in shared memory as rows of kFeatures + 4
// floats, so that neighbouring rows begin four banks apart.
#pragma once
#include "cuda/attention_tile.cuh"

namespace fastnn::cuda {

template <int kFeatures, int kRows>
struct FloatTile {
  static constexpr int kStride = kFeatures + 4, kPerThread = kRows / 16, kParts = kFeatures / 64;
  static constexpr int kFloats = kRows * kStride, kWeightStride = kRows + 4;
  using Scores = float[kPerThread][kPerThread];
  using Sums = float[kPerThread][kParts][4];

  // Copies kRows rows of a head from `row` on, of the `rows` that it has, zeros beyond d features.
  static __device__ __forceinline__ void copy(float* to, const Heads& x, int b, int h, int row0,
                                              int rows, int d) {
    const float* const from = head_rows<float>(x, b, h, row0);
    for (int i = threadIdx.x; i < kRows * kFeatures / 4; i += kFloatThreads) {
      const int row = i / (kFeatures / 4), first = i % (kFeatures / 4) * 4;
      float v[4] = {};
      if (row0 + row < rows && first < d) load_chunk(from + row * x.row_stride, first, d, v);
      *reinterpret_cast<float4*>(to + row * kStride + first) = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  // x = a b^T over d features.
  static __device__ __forceinline__ void multiply_rows(Scores& x, const float* a, const float* b,
                                                       int d) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < kPerThread; ++r) {
#pragma unroll
      for (int c = 0; c < kPerThread; ++c) x[r][c] = 0.f;
    }
#pragma unroll 2
    for (int k = 0; k < d; k += 4) {
      float4 fa[kPerThread], fb[kPerThread];
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) {
        fa[r] = *reinterpret_cast<const float4*>(a + (ty + 16 * r) * kStride + k);
        fb[r] = *reinterpret_cast<const float4*>(b + (tx + 16 * r) * kStride + k);
      }
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) {
#pragma unroll
        for (int c = 0; c < kPerThread; ++c) {
          x[r][c] = fmaf(fa[r].x, fb[c].x, x[r][c]);
          x[r][c] = fmaf(fa[r].y, fb[c].y, x[r][c]);
          x[r][c] = fmaf(fa[r].z, fb[c].z, x[r][c]);
          x[r][c] = fmaf(fa[r].w, fb[c].w, x[r][c]);
        }
      }
    }
  }
  // The thread's scores to the tile of weights, [row][column].
  static __device__ __forceinline__ void keep(const Scores& x, float* weights) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < kPerThread; ++r) {
#pragma unroll
      for (int c = 0; c < kPerThread; ++c)
        weights[(ty + 16 * r) * kWeightStride + tx + 16 * c] = x[r][c];
    }
  }
  // sums += weights b, of features below d.
  static __device__ __forceinline__ void multiply_weights(Sums& sums, const float* weights,
                                                          const float* b, int d) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 4
    for (int k = 0; k < kRows; ++k) {
      float w[kPerThread];
#pragma unroll
      for (int r = 0; r < kPerThread; ++r) w[r] = weights[(ty + 16 * r) * kWeightStride + k];
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        if (64 * j >= d) break;
        const float4 v = *reinterpret_cast<const float4*>(b + k * kStride + 64 * j + 4 * tx);
#pragma unroll
        for (int r = 0; r < kPerThread; ++r) {
          sums[r][j][0] = fmaf(w[r], v.x, sums[r][j][0]);
          sums[r][j][1] = fmaf(w[r], v.y, sums[r][j][1]);
          sums[r][j][2] = fmaf(w[r], v.z, sums[r][j][2]);
          sums[r][j][3] = fmaf(w[r], v.w, sums[r][j][3]);
        }
      }
    }
  }
  static __device__ __forceinline__ void write(const Sums& sums, const float (&factor)[kPerThread],
                                               float* to, int64_t stride, int rows, int d) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int r = 0; r < kPerThread; ++r) {
      if (ty + 16 * r >= rows) continue;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int first = 64 * j + 4 * tx;
        float v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = sums[r][j][e] * factor[r];
        if (first < d) store_chunk(to + (ty + 16 * r) * stride, first, d, v);
      }
    }
  }
};

// What dropout makes of one weight.
__device__ __forceinline__ float kept_weight(const AttentionParams& p, int64_t row, int key) {
  if (p.dropout == 0.f) return 1.f;
  const Dropout dropout(p);
  return dropout.kept(row, key / 4) >> key % 4 & 1 ? dropout.keep_scale : 0.f;
}
// As weight_of, of float32: the logsumexp is taken away before the factor log2(e).
__device__ __forceinline__ Weight float_weight(const AttentionParams& p, float product, float dp,
                                               float lse, float delta, int64_t b, int64_t h,
                                               int query, int key) {
  const bool is_seen = query < static_cast<int>(p.S_q) && is_visible(p, query, key);
  float slope;
  const float score = finish_score(p, product, mask_offset(p, b, h, query, key), is_seen, slope);
  const float w = is_seen ? fast_exp2((score - lse) * kLog2E) : 0.f;
  const float keep = kept_weight(p, (b * p.H + h) * p.S_q + query, key);
  return {w * keep, w == 0.f ? 0.f : w * fmaf(dp, keep, -delta) * slope};
}

template <int kFeatures>
__global__ void __launch_bounds__(kFloatThreads, 1) attention_fwd_f32_kernel(AttentionFwdParams f) {
  constexpr int kRows = attention_f32_rows(kFeatures, true);
  using Tile = FloatTile<kFeatures, kRows>;
  constexpr int kPer = Tile::kPerThread;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(float, q_tile);
  float* const kv_tile = q_tile + Tile::kFloats;
  float* const weights = kv_tile + Tile::kFloats;
  const auto [b, h, kv_head, q0] = query_block(p, static_cast<int>(blockIdx.x), kRows);
  const Sizes<kFeatures, true> n(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const Positions range = keys_of_tile(p, q0, kRows);
  Tile::copy(q_tile, p.q, b, h, q0, n.s_q, n.d);
  typename Tile::Sums o = {};
  float top[kPer], total[kPer] = {};
#pragma unroll
  for (int r = 0; r < kPer; ++r) top[r] = -kInfinity;
  for (int j0 = range.begin / kRows * kRows; j0 < range.end; j0 += kRows) {
    __syncthreads();  // V of the step before has been read
    Tile::copy(kv_tile, p.k, b, kv_head, j0, n.s_k, n.d);
    __syncthreads();
    typename Tile::Scores s;
    Tile::multiply_rows(s, q_tile, kv_tile, n.d);
    __syncthreads();
    Tile::copy(kv_tile, p.v, b, kv_head, j0, n.s_k, n.dv);
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
      const int query = q0 + ty + 16 * r;
      float most = top[r];
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        const int key = j0 + tx + 16 * c;
        const bool is_seen = query < n.s_q && is_visible(p, query, key);
        float slope;
        s[r][c] = finish_score(p, s[r][c], mask_offset(p, b, h, query, key), is_seen, slope);
        if (!is_seen) s[r][c] = -kInfinity;
        most = fmaxf(most, s[r][c]);
      }
      most = warp_reduce<16>(most, Max{});
      const float base = most == -kInfinity ? 0.f : most;
      const float correction = fast_exp2((top[r] - base) * kLog2E);
      total[r] *= correction;
      top[r] = most;
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        s[r][c] = fast_exp2((s[r][c] - base) * kLog2E);
        total[r] += s[r][c];
        s[r][c] *= kept_weight(p, (b * p.H + h) * p.S_q + query, j0 + tx + 16 * c);
      }
#pragma unroll
      for (int j = 0; j < Tile::kParts; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[r][j][e] *= correction;
      }
    }
    Tile::keep(s, weights);
    __syncthreads();
    Tile::multiply_weights(o, weights, kv_tile, n.dv);
  }
  float inverse[kPer];
#pragma unroll
  for (int r = 0; r < kPer; ++r) {
    const float sum = warp_reduce<16>(total[r], Add{});
    inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
    const int query = q0 + ty + 16 * r;
    if (f.lse != nullptr && tx == 0 && query < n.s_q) {
      store_global(f.lse + (b * p.H + h) * p.S_q + query,
                   sum == 0.f ? kInfinity : top[r] + logf(sum));
    }
  }
  Tile::write(o, inverse,
              static_cast<float*>(f.out) + b * f.out_batch_stride + h * f.out_head_stride +
                  q0 * f.out_row_stride,
              f.out_row_stride, n.s_q - q0, n.dv);
}

// dk and dv of a tile of keys (rows) over the queries (columns).
template <int kFeatures>
__global__ void __launch_bounds__(kFloatThreads, 1)
    attention_dkv_f32_kernel(AttentionBwdParams f, const float* delta) {
  constexpr int kRows = attention_f32_rows(kFeatures, false);
  using Tile = FloatTile<kFeatures, kRows>;
  constexpr int kPer = Tile::kPerThread;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(float, k_tile);
  float* const v_tile = k_tile + Tile::kFloats;
  float* const q_tile = v_tile + Tile::kFloats;
  float* const do_tile = q_tile + Tile::kFloats;
  float* const weights = do_tile + Tile::kFloats;
  const auto [b, kv_head, group, k0] = key_block(p, static_cast<int>(blockIdx.x), kRows);
  const Sizes<kFeatures, true> n(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const Positions range = queries_of_tile(p, k0, kRows);
  Tile::copy(k_tile, p.k, b, kv_head, k0, n.s_k, n.d);
  Tile::copy(v_tile, p.v, b, kv_head, k0, n.s_k, n.dv);
  typename Tile::Sums dk = {}, dvs = {};
  for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int i0 = range.begin / kRows * kRows; i0 < range.end; i0 += kRows) {
      __syncthreads();
      Tile::copy(q_tile, p.q, b, h, i0, n.s_q, n.d);
      Tile::copy(do_tile, f.d_out, b, h, i0, n.s_q, n.dv);
      __syncthreads();
      typename Tile::Scores s, dp;
      Tile::multiply_rows(s, k_tile, q_tile, n.d);
      Tile::multiply_rows(dp, v_tile, do_tile, n.dv);
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        const int query = i0 + tx + 16 * c;
        const int64_t at = (b * p.H + h) * p.S_q + query;
        const float lse = query < n.s_q ? load_global(f.lse + at) : kInfinity;
        const float its_delta = query < n.s_q ? load_global(delta + at) : 0.f;
#pragma unroll
        for (int r = 0; r < kPer; ++r) {
          const Weight w =
              float_weight(p, s[r][c], dp[r][c], lse, its_delta, b, h, query, k0 + ty + 16 * r);
          s[r][c] = w.p;
          dp[r][c] = w.ds;
        }
      }
      Tile::keep(s, weights);
      __syncthreads();
      Tile::multiply_weights(dvs, weights, do_tile, n.dv);
      __syncthreads();
      Tile::keep(dp, weights);
      __syncthreads();
      Tile::multiply_weights(dk, weights, q_tile, n.d);
    }
  }
  float scale[kPer], one[kPer];
#pragma unroll
  for (int r = 0; r < kPer; ++r) scale[r] = p.scale, one[r] = 1.f;
  const int64_t row = (b * p.H_kv + kv_head) * p.S_k + k0;
  Tile::write(dk, scale, static_cast<float*>(f.dk) + row * p.D, p.D, n.s_k - k0, n.d);
  Tile::write(dvs, one, static_cast<float*>(f.dv) + row * p.D_v, p.D_v, n.s_k - k0, n.dv);
}

// dq of a tile of queries (rows) over the keys (columns).
template <int kFeatures>
__global__ void __launch_bounds__(kFloatThreads, 1)
    attention_dq_f32_kernel(AttentionBwdParams f, const float* delta) {
  constexpr int kRows = attention_f32_rows(kFeatures, false);
  using Tile = FloatTile<kFeatures, kRows>;
  constexpr int kPer = Tile::kPerThread;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(float, q_tile);
  float* const do_tile = q_tile + Tile::kFloats;
  float* const k_tile = do_tile + Tile::kFloats;
  float* const v_tile = k_tile + Tile::kFloats;
  float* const weights = v_tile + Tile::kFloats;
  const auto [b, h, kv_head, q0] = query_block(p, static_cast<int>(blockIdx.x), kRows);
  const Sizes<kFeatures, true> n(p);
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
  const Positions range = keys_of_tile(p, q0, kRows);
  Tile::copy(q_tile, p.q, b, h, q0, n.s_q, n.d);
  Tile::copy(do_tile, f.d_out, b, h, q0, n.s_q, n.dv);
  float lse[kPer], its_delta[kPer], scale[kPer];
#pragma unroll
  for (int r = 0; r < kPer; ++r) {
    const int query = q0 + ty + 16 * r;
    const int64_t at = (b * p.H + h) * p.S_q + query;
    lse[r] = query < n.s_q ? load_global(f.lse + at) : kInfinity;
    its_delta[r] = query < n.s_q ? load_global(delta + at) : 0.f;
    scale[r] = p.scale;
  }
  typename Tile::Sums dq = {};
  for (int j0 = range.begin / kRows * kRows; j0 < range.end; j0 += kRows) {
    __syncthreads();
    Tile::copy(k_tile, p.k, b, kv_head, j0, n.s_k, n.d);
    Tile::copy(v_tile, p.v, b, kv_head, j0, n.s_k, n.dv);
    __syncthreads();
    typename Tile::Scores s, dp;
    Tile::multiply_rows(s, q_tile, k_tile, n.d);
    Tile::multiply_rows(dp, do_tile, v_tile, n.dv);
#pragma unroll
    for (int r = 0; r < kPer; ++r) {
#pragma unroll
      for (int c = 0; c < kPer; ++c) {
        dp[r][c] = float_weight(p, s[r][c], dp[r][c], lse[r], its_delta[r], b, h, q0 + ty + 16 * r,
                                j0 + tx + 16 * c)
                       .ds;
      }
    }
    Tile::keep(dp, weights);
    __syncthreads();
    Tile::multiply_weights(dq, weights, k_tile, n.d);
  }
  Tile::write(dq, scale, static_cast<float*>(f.dq) + ((b * p.H + h) * p.S_q + q0) * p.D, p.D,
              n.s_q - q0, n.d);
}

}  // namespace fastnn::cuda
