// Attention forward on tensor cores: online softmax over tiles of keys (Milakov & Gimelshein 2018;
// Dao et al. 2022).
//
// A block of four warps has a tile of queries of one head, 16 or 32 rows a warp; K and V pass
// through two buffers of shared memory. A warp's scores stay in registers: the fragment of S that a
// lane holds is, rounded, the fragment of P that the second product takes. kGeneral kernels take
// every option and any number of features; the others whole features, a window, and nothing else.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/policy_matrix.h"

namespace fastnn::cuda {

template <class T, int kFeatures, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention_fwd_kernel(AttentionFwdParams f) {
  using Tile = RowTile<T, kFeatures>;
  constexpr AttentionShape kShape = attention_fwd_shape(kFeatures, kGeneral);
  constexpr int kQ = kShape.queries, kK = kShape.keys;
  constexpr int kM = kQ / 64, kN = kK / 16, kD = kFeatures / 16;  // in units of 16 per warp
  constexpr int kTileBytes = kK * Tile::kRowBytes;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(unsigned char, memory);
  const Shared q_tile = shared_address(memory), kv_tiles = q_tile + kQ * Tile::kRowBytes;

  int block = static_cast<int>(blockIdx.x);
  const auto [b, h, kv_head, q0] = query_block(p, block, kQ);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int d = kGeneral ? static_cast<int>(p.D) : kFeatures;
  const int dv = kGeneral ? static_cast<int>(p.D_v) : kFeatures;
  const int d_steps = kGeneral ? (d + 15) / 16 : kD, dv_steps = kGeneral ? (dv + 15) / 16 : kD;
  const bool q_aligned = !kGeneral || rows_aligned<T>(p.q);
  const bool k_aligned = !kGeneral || rows_aligned<T>(p.k);
  const bool v_aligned = !kGeneral || rows_aligned<T>(p.v);
  const int s_q = static_cast<int>(p.S_q), s_k = static_cast<int>(p.S_k);
  const Positions range = visible_keys(p, q0, q0 + kQ < s_q ? q0 + kQ - 1 : s_q - 1);
  const int begin = range.begin / kK * kK;

  const T* k_rows = head_rows<T>(p.k, b, kv_head, begin);
  const T* v_rows = head_rows<T>(p.v, b, kv_head, begin);
  auto copy_keys = [&](int buffer, int j0) {
    const Shared to = kv_tiles + buffer * 2 * kTileBytes;
    Tile::template copy<kK, !kGeneral>(to, k_rows, p.k.row_stride, s_k - j0, d, k_aligned);
    Tile::template copy<kK, !kGeneral>(to + kTileBytes, v_rows, p.v.row_stride, s_k - j0, dv,
                                       v_aligned);
    k_rows += kK * p.k.row_stride;
    v_rows += kK * p.v.row_stride;
  };
  Tile::template copy<kQ, !kGeneral>(q_tile, head_rows<T>(p.q, b, h, q0), p.q.row_stride, s_q - q0,
                                     d, q_aligned);
  if (begin < range.end) copy_keys(0, begin);
  cp_async_commit();

  const int lane_a = Tile::lane_a(), lane_b = Tile::lane_b();
  const Shared q_rows = q_tile + warp * kM * Tile::kSixteenRows;
  const int row0 = q0 + warp * 16 * kM + lane / 4;  // the lane's first row; others 8 apart
  const float factor = kGeneral ? 1.f : p.scale * kLog2E;
  float o[kM][2 * kD][4] = {}, top[kM][2], total[kM][2] = {};
#pragma unroll
  for (int i = 0; i < kM; ++i) top[i][0] = top[i][1] = -kInfinity;

  int buffer = 0;
  for (int j0 = begin; j0 < range.end; j0 += kK, buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, the other buffer has been read
    if (j0 + kK < range.end) {
      copy_keys(buffer ^ 1, j0 + kK);
      cp_async_commit();
    }
    const Shared k_tile = kv_tiles + buffer * 2 * kTileBytes, v_tile = k_tile + kTileBytes;
    float s[kM][2 * kN][4] = {};
#pragma unroll
    for (int k = 0; k < kD; ++k) {
      if (kGeneral && k >= d_steps) break;
      uint32_t fq[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) ldmatrix(fq[i], q_rows + Tile::at(lane_a, i, k));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t fk[4];
        ldmatrix(fk, k_tile + Tile::at(lane_b, n, k));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16816<T>(s[i][2 * n], fq[i], fk[0], fk[1]);
          mma_16816<T>(s[i][2 * n + 1], fq[i], fk[2], fk[3]);
        }
      }
    }
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int e = 0; e < 8 * kN; ++e) {
          const int row = row0 + 16 * i + e % 4 / 2 * 8;
          const int key = j0 + e / 4 * 8 + lane % 4 * 2 + e % 2;
          float slope;
          s[i][e / 4][e % 4] =
              kLog2E * finish_score(p, s[i][e / 4][e % 4],
                                    b * p.mask_strides[0] + h * p.mask_strides[1] +
                                        row * p.mask_strides[2] + key * p.mask_strides[3],
                                    row < s_q && key < s_k, slope);
        }
      }
    }
    if (!all_visible(p, q0 + warp * 16 * kM, 16 * kM, j0, kK)) hide<false, kM, kN>(p, s, row0, j0);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float most = top[i][r];
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n)
          most = fmaxf(most, fmaxf(s[i][n][2 * r], s[i][n][2 * r + 1]) * factor);
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // Nothing seen yet: 0 instead of -inf keeps -inf - -inf out.
        const float base = most == -kInfinity ? 0.f : most;
        const float correction = fast_exp2(top[i][r] - base);
        float sum = total[i][r] * correction;
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s[i][n][e] = fast_exp2(fmaf(s[i][n][e], factor, -base));
            sum += s[i][n][e];
          }
        }
        top[i][r] = most;
        total[i][r] = sum;
#pragma unroll
        for (int n = 0; n < 2 * kD; ++n) {
          o[i][n][2 * r] *= correction;
          o[i][n][2 * r + 1] *= correction;
        }
      }
    }
    if (kGeneral && p.dropout > 0.f) {
      const Dropout dropout(p);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int n = 0; n < 2 * kN; ++n) {
          // Even lanes draw for the first row, odd ones for the second: a group of four keys
          // belongs to two neighbouring lanes.
          const int64_t row =
              (static_cast<int64_t>(b) * p.H + h) * p.S_q + row0 + 16 * i + lane % 2 * 8;
          const uint32_t mine = dropout.kept(row, (j0 + 8 * n) / 4 + lane % 4 / 2);
          const uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, 1);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t bits = e / 2 == lane % 2 ? mine : theirs;
            s[i][n][e] *= bits >> (lane % 2 * 2 + e % 2) & 1 ? dropout.keep_scale : 0.f;
          }
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kN; ++k) {
      uint32_t fp[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        fp[i][0] = pack_pair<T>(s[i][2 * k][0], s[i][2 * k][1]);
        fp[i][1] = pack_pair<T>(s[i][2 * k][2], s[i][2 * k][3]);
        fp[i][2] = pack_pair<T>(s[i][2 * k + 1][0], s[i][2 * k + 1][1]);
        fp[i][3] = pack_pair<T>(s[i][2 * k + 1][2], s[i][2 * k + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < kD; ++n) {
        if (kGeneral && n >= dv_steps) break;
        uint32_t fv[4];
        ldmatrix_trans(fv, v_tile + Tile::at(lane_a, k, n));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16816<T>(o[i][2 * n], fp[i], fv[0], fv[1]);
          mma_16816<T>(o[i][2 * n + 1], fp[i], fv[2], fv[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // Q is there also where there was no key; the output takes its place
  renew(block);     // the tile's place is computed again rather than kept in registers
  const QueryBlock at = query_block(p, block, kQ);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[i][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      const int row = warp * 16 * kM + 16 * i + 8 * r + lane / 4;
      if (f.lse != nullptr && lane % 4 == 0 && at.q0 + row < static_cast<int>(p.S_q)) {
        store_global(f.lse + (at.b * p.H + at.h) * p.S_q + at.q0 + row,
                     sum == 0.f ? kInfinity : (top[i][r] + log2f(sum)) * kLn2);
      }
#pragma unroll
      for (int n = 0; n < 2 * kD; ++n) {
        *reinterpret_cast<uint32_t*>(memory + Tile::offset(row, n) + lane % 4 * 4) =
            pack_pair<T>(o[i][n][2 * r] * inverse, o[i][n][2 * r + 1] * inverse);
      }
    }
  }
  __syncwarp();
  write_rows<T, kFeatures, 16 * kM>(memory, warp * 16 * kM, static_cast<int>(p.S_q) - at.q0, dv,
                                    static_cast<T*>(f.out) + b * f.out_batch_stride +
                                        h * f.out_head_stride + at.q0 * f.out_row_stride,
                                    f.out_row_stride);
}

}  // namespace fastnn::cuda
