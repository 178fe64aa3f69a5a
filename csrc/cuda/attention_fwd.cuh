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
  int thread = static_cast<int>(threadIdx.x);
  const Sizes<kFeatures, kGeneral> n(p);
  const Positions range = keys_of_tile(p, q0, kQ);
  const int begin = range.begin / kK * kK;
  // Where the head's keys and values begin: read for each tile rather than kept in registers.
  FASTNN_SHARED(const T*, heads, 2);
  if (threadIdx.x == 0) {
    heads[0] = head_rows<T>(p.k, b, kv_head, 0);
    heads[1] = head_rows<T>(p.v, b, kv_head, 0);
  }
  __syncthreads();
  auto copy_keys = [&](int buffer, int j0) {
    const Shared to = kv_tiles + buffer * 2 * kTileBytes;
    copy_rows<T, kFeatures, kK, !kGeneral>(to, p.k, heads[0], j0, n.s_k, n.d);
    copy_rows<T, kFeatures, kK, !kGeneral>(to + kTileBytes, p.v, heads[1], j0, n.s_k, n.dv);
  };
  copy_rows<T, kFeatures, kQ, !kGeneral>(q_tile, p.q, b, h, q0, n.s_q, n.d);
  if (begin < range.end) copy_keys(0, begin);
  cp_async_commit();

  // Powers of two: general scores, which a mask may bring near the largest float32, take their
  // factor once the maximum is taken away.
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
    renew(thread);  // its places are computed again rather than kept in registers
    const int warp = thread >> 5, lane = thread & 31;
    const int row0 = q0 + warp * 16 * kM + lane / 4;  // the lane's first row; others 8 apart
    const int lane_b = Tile::lane_b(thread);
    const int lane_q = Tile::lane_a(thread) + warp * kM * Tile::kSixteenRows;
    float s[kM][2 * kN][4] = {};
#pragma unroll
    for (int k = 0; k < kD; ++k) {
      if (kGeneral && k >= n.d_steps) break;
      uint32_t fq[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) ldmatrix(fq[i], q_tile + Tile::at(lane_q, i, k));
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        uint32_t fk[4];
        ldmatrix(fk, k_tile + Tile::at(lane_b, j, k));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16816<T>(s[i][2 * j], fq[i], fk[0], fk[1]);
          mma_16816<T>(s[i][2 * j + 1], fq[i], fk[2], fk[3]);
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
          s[i][e / 4][e % 4] = finish_score(p, s[i][e / 4][e % 4], mask_offset(p, b, h, row, key),
                                            row < n.s_q && key < n.s_k, slope);
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
        for (int j = 0; j < 2 * kN; ++j)
          most = fmaxf(most, fmaxf(s[i][j][2 * r], s[i][j][2 * r + 1]) * factor);
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // Nothing seen yet: 0 instead of -inf keeps -inf - -inf out.
        const float base = most == -kInfinity ? 0.f : most;
        const float correction = fast_exp2((top[i][r] - base) * (kGeneral ? kLog2E : 1.f));
        float sum = total[i][r] * correction;
#pragma unroll
        for (int j = 0; j < 2 * kN; ++j) {
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; ++e) {
            s[i][j][e] = fast_exp2(kGeneral ? (s[i][j][e] - base) * kLog2E
                                            : fmaf(s[i][j][e], factor, -base));
            sum += s[i][j][e];
          }
        }
        top[i][r] = most;
        total[i][r] = sum;
#pragma unroll
        for (int j = 0; j < 2 * kD; ++j) {
          o[i][j][2 * r] *= correction;
          o[i][j][2 * r + 1] *= correction;
        }
      }
    }
    if (kGeneral && p.dropout > 0.f) {
      const Dropout dropout(p);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kN; ++j) {
          // Even lanes draw for the first row, odd ones for the second: a group of four keys
          // belongs to two neighbouring lanes.
          const int64_t row =
              (static_cast<int64_t>(b) * p.H + h) * p.S_q + row0 + 16 * i + lane % 2 * 8;
          const uint32_t mine = dropout.kept(row, (j0 + 8 * j) / 4 + lane % 4 / 2);
          const uint32_t theirs = __shfl_xor_sync(0xffffffffu, mine, 1);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t bits = e / 2 == lane % 2 ? mine : theirs;
            s[i][j][e] *= bits >> (lane % 2 * 2 + e % 2) & 1 ? dropout.keep_scale : 0.f;
          }
        }
      }
    }
    renew(thread);
    // Never: a branch, across which the sums above and the products below do not mix, for both of
    // which there are no registers.
    if (thread < 0) break;
    const int lane_a = Tile::lane_a(thread);
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
      for (int j = 0; j < kD; ++j) {
        if (kGeneral && j >= n.dv_steps) break;
        uint32_t fv[4];
        ldmatrix_trans(fv, v_tile + Tile::at(lane_a, k, j));
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          mma_16816<T>(o[i][2 * j], fp[i], fv[0], fv[1]);
          mma_16816<T>(o[i][2 * j + 1], fp[i], fv[2], fv[3]);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // Q is there also where there was no key; the output takes its place
  renew(block);     // the tile's place is computed again rather than kept in registers
  const QueryBlock at = query_block(p, block, kQ);
  const int warp = thread >> 5, lane = thread & 31;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = total[i][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      const int row = warp * 16 * kM + 16 * i + 8 * r + lane / 4;
      if (f.lse != nullptr && lane % 4 == 0 && at.q0 + row < n.s_q) {
        const float found =
            kGeneral ? fmaf(log2f(sum), kLn2, top[i][r]) : (top[i][r] + log2f(sum)) * kLn2;
        store_global(f.lse + (at.b * p.H + at.h) * p.S_q + at.q0 + row,
                     sum == 0.f ? kInfinity : found);
      }
#pragma unroll
      for (int j = 0; j < 2 * kD; ++j) {
        *reinterpret_cast<uint32_t*>(memory + Tile::offset(row, j) + lane % 4 * 4) =
            pack_pair<T>(o[i][j][2 * r] * inverse, o[i][j][2 * r + 1] * inverse);
      }
    }
  }
  __syncwarp();
  write_rows<T, kFeatures, 16 * kM>(memory, warp * 16 * kM, n.s_q - at.q0, n.dv,
                                    static_cast<T*>(f.out) + at.b * f.out_batch_stride +
                                        at.h * f.out_head_stride + at.q0 * f.out_row_stride,
                                    f.out_row_stride);
}

}  // namespace fastnn::cuda
