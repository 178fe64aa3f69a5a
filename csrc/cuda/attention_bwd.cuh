// Attention backward on tensor cores: the weights are recomputed tile by tile from the saved
// logsumexp. One kernel adds up dk and dv of a tile of keys over the queries, one dq of a tile of
// queries over the keys: no sum is shared between blocks, so that results do not depend on their
// order; the price is that the two products that give the weights are computed twice.
#pragma once
#include "cuda/attention_tile.cuh"
#include "cuda/policy_matrix.h"

namespace fastnn::cuda {

// delta = dO . O of every query; a warp each.
template <class T>
__global__ void __launch_bounds__(256) attention_delta_kernel(AttentionBwdParams f, float* delta) {
  const AttentionParams& p = f.a;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  float sum = 0.f;
  if (row < p.B * p.H * p.S_q) {
    const int64_t head = row / p.S_q, query = row % p.S_q;
    const T* const out = head_rows<T>(f.out, head / p.H, head % p.H, query);
    const T* const d_out = head_rows<T>(f.d_out, head / p.H, head % p.H, query);
    for (int64_t i = lane * 8; i < p.D_v; i += 256) {
      float x[8], y[8];
      load_chunk(out, i, p.D_v, x);
      load_chunk(d_out, i, p.D_v, y);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = fmaf(x[e], y[e], sum);
    }
  }
  sum = warp_reduce(sum, Add{});
  if (lane == 0 && row < p.B * p.H * p.S_q) store_global(delta + row, sum);
}

// Products of 16 kM rows (A) with 16 kN rows (B) along their features: x += a b^T.
template <class T, class Tile, int kM, int kN, int kSteps>
__device__ __forceinline__ void multiply_rows(float (&x)[kM][2 * kN][4], Shared a, int lane_a,
                                              Shared b, int lane_b, int steps) {
#pragma unroll 4
  for (int k = 0; k < kSteps; ++k) {
    if (k >= steps) break;
    uint32_t fa[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix(fa[i], a + Tile::at(lane_a, i, k));
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      uint32_t fb[4];
      ldmatrix(fb, b + Tile::at(lane_b, n, k));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16816<T>(x[i][2 * n], fa[i], fb[0], fb[1]);
        mma_16816<T>(x[i][2 * n + 1], fa[i], fb[2], fb[3]);
      }
    }
  }
}
// Products of 16 kM rows held as a fragment of sums, rounded, with 16 kK rows of b: x += w b, of
// features from 16 first on, as long as they are below 16 steps.
template <class T, class Tile, int kM, int kK, int kN>
__device__ __forceinline__ void multiply_sums(float (&x)[kM][2 * kN][4],
                                              const float (&w)[kM][2 * kK][4], Shared b,
                                              int lane_trans, int first, int steps) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t fw[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      fw[i][0] = pack_pair<T>(w[i][2 * k][0], w[i][2 * k][1]);
      fw[i][1] = pack_pair<T>(w[i][2 * k][2], w[i][2 * k][3]);
      fw[i][2] = pack_pair<T>(w[i][2 * k + 1][0], w[i][2 * k + 1][1]);
      fw[i][3] = pack_pair<T>(w[i][2 * k + 1][2], w[i][2 * k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (first + n >= steps) break;
      uint32_t fb[4];
      ldmatrix_trans(fb, b + Tile::at(lane_trans, k, first + n));
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma_16816<T>(x[i][2 * n], fw[i], fb[0], fb[1]);
        mma_16816<T>(x[i][2 * n + 1], fw[i], fb[2], fb[3]);
      }
    }
  }
}
// Sums times a factor, rounded, to the warp's rows of a tile in shared memory.
template <class T, class Tile, int kM, int kN>
__device__ __forceinline__ void sums_to_tile(const float (&x)[kM][2 * kN][4], float factor,
                                             unsigned char* tile, int row0, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<uint32_t*>(
            tile + Tile::offset(row0 + 16 * i + 8 * r + lane / 4, 2 * first + n) + lane % 4 * 4) =
            pack_pair<T>(x[i][n][2 * r] * factor, x[i][n][2 * r + 1] * factor);
      }
    }
  }
}

// dk and dv of a tile of keys, 16 or 32 a warp; of 256 features a block has half of the results'
// features.
template <class T, int kFeatures, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_dkv_kernel(AttentionBwdParams f, const float* delta) {
  using Tile = RowTile<T, kFeatures>;
  constexpr AttentionShape kShape = attention_dkv_shape(kFeatures, kGeneral);
  constexpr int kQ = kShape.queries, kK = kShape.keys, kBuffers = kShape.buffers;
  constexpr int kWidth = kFeatures < 128 ? kFeatures : 128, kParts = kFeatures / kWidth;
  constexpr int kM = kK / 64, kN = kQ / 16, kD = kFeatures / 16, kOut = kWidth / 16;
  constexpr int kKeyBytes = kK * Tile::kRowBytes, kQueryBytes = kQ * Tile::kRowBytes;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(unsigned char, memory);
  const Shared k_tile = shared_address(memory), v_tile = k_tile + kKeyBytes;
  const Shared queries = v_tile + kKeyBytes;
  float* const stats =
      reinterpret_cast<float*>(memory + 2 * kKeyBytes + 2 * kBuffers * kQueryBytes);

  const int part = blockIdx.x % kParts, block = blockIdx.x / kParts;
  const auto [b, kv_head, group, k0] = key_block(p, block, kK);
  int thread = static_cast<int>(threadIdx.x);
  const Sizes<kFeatures, kGeneral> n(p);
  copy_rows<T, kFeatures, kK, !kGeneral>(k_tile, p.k, b, kv_head, k0, n.s_k, n.d);
  copy_rows<T, kFeatures, kK, !kGeneral>(v_tile, p.v, b, kv_head, k0, n.s_k, n.dv);
  const Positions range = queries_of_tile(p, k0, kK);
  const int begin = range.begin / kQ * kQ;
  const int per_head = range.begin < range.end ? (range.end - begin + kQ - 1) / kQ : 0;
  auto copy_queries = [&, b = b](int buffer, int h, int i0) {
    const Shared to = queries + buffer * 2 * kQueryBytes;
    copy_rows<T, kFeatures, kQ, !kGeneral>(to, p.q, b, h, i0, n.s_q, n.d);
    copy_rows<T, kFeatures, kQ, !kGeneral>(to + kQueryBytes, f.d_out, b, h, i0, n.s_q, n.dv);
    if (threadIdx.x < kQ) {
      const int query = i0 + static_cast<int>(threadIdx.x);
      const int64_t at = (b * p.H + h) * p.S_q + query;
      const bool exists = query < n.s_q;
      const Shared stat = shared_address(stats + buffer * 2 * kQ + threadIdx.x);
      cp_async4(stat, f.lse + at, exists);
      cp_async4(stat + kQ * 4, delta + at, exists);
    }
  };
  int h = kv_head * group;
  int i0 = begin;
  const int steps = per_head * group;
  if (steps > 0) copy_queries(0, h, i0);
  cp_async_commit();

  float dk[kM][2 * kOut][4] = {}, dvs[kM][2 * kOut][4] = {};
  int buffer = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is there, the other buffer has been read
    int next_h = h;
    int next_i0 = i0 + kQ;
    if (next_i0 >= range.end) next_h = h + 1, next_i0 = begin;
    if (kBuffers == 2 && step + 1 < steps) {
      copy_queries(buffer ^ 1, next_h, next_i0);
      cp_async_commit();
    }
    const Shared q_tile = queries + buffer * 2 * kQueryBytes, do_tile = q_tile + kQueryBytes;
    renew(thread);  // its places are computed again rather than kept in registers
    const int warp = thread >> 5, lane = thread & 31, key0 = k0 + warp * 16 * kM;
    const int own = Tile::lane_a(thread) + warp * kM * Tile::kSixteenRows;
    const int lane_b = Tile::lane_b(thread);
    float s[kM][2 * kN][4] = {}, dp[kM][2 * kN][4] = {};
    multiply_rows<T, Tile, kM, kN, kD>(s, k_tile, own, q_tile, lane_b, n.d_steps);
    multiply_rows<T, Tile, kM, kN, kD>(dp, v_tile, own, do_tile, lane_b, n.dv_steps);
    const bool all = i0 + kQ <= n.s_q && all_visible(p, i0, kQ, key0, 16 * kM);
    // General kernels mask as they finish a score, which may turn -inf round.
    if (!kGeneral && !all) hide<true, kM, kN>(p, s, key0 + lane / 4, i0);
    const float* const lses = stats + buffer * 2 * kQ;
#pragma unroll
    for (int j = 0; j < 2 * kN; ++j) {
      const int column = j * 8 + lane % 4 * 2;
      const float2 lse = *reinterpret_cast<const float2*>(lses + column);
      const float2 its_delta = *reinterpret_cast<const float2*>(lses + kQ + column);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        uint32_t kept = 0;
        float keep_scale = 1.f;
        const bool drops = kGeneral && p.dropout > 0.f;
        if (drops) {
          // Four lanes, keys 0 .. 3 of a group, draw for one query and group each of the two and
          // two that they share.
          const Dropout dropout(p);
          const int mine = lane / 4 % 4;
          const uint32_t bits = dropout.kept((b * p.H + h) * p.S_q + i0 + column + mine % 2,
                                             (key0 + 16 * i) / 4 + mine / 2 * 2 + lane / 16);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const uint32_t its = __shfl_sync(0xffffffffu, bits, (lane & 19) | e << 2);
            kept |= (its >> mine & 1) << e;
          }
          keep_scale = dropout.keep_scale;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = i0 + column + e % 2, key = key0 + 16 * i + lane / 4 + e / 2 * 8;
          const float keep = !drops ? 1.f : kept >> e & 1 ? keep_scale : 0.f;
          const Weight w = weight_of<kGeneral>(
              p, s[i][j][e], dp[i][j][e], (e % 2 == 0 ? lse.x : lse.y) * kLseUnit<kGeneral>,
              e % 2 == 0 ? its_delta.x : its_delta.y, keep,
              !kGeneral || all || (query < n.s_q && is_visible(p, query, key)),
              mask_offset(p, b, h, query, key));
          s[i][j][e] = w.p;
          dp[i][j][e] = w.ds;
        }
      }
    }
    renew(thread);
    const int lane_a = Tile::lane_a(thread);
    multiply_sums<T, Tile, kM, kN, kOut>(dvs, s, do_tile, lane_a, part * kOut, n.dv_steps);
    multiply_sums<T, Tile, kM, kN, kOut>(dk, dp, q_tile, lane_a, part * kOut, n.d_steps);
    if (kBuffers == 1 && step + 1 < steps) {
      __syncthreads();
      copy_queries(0, next_h, next_i0);
      cp_async_commit();
    }
    if (kBuffers == 2) buffer ^= 1;
    h = next_h;
    i0 = next_i0;
  }
  cp_async_wait<0>();
  __syncthreads();  // K and V are there also where there was no query; the results take their place
  const int warp = thread >> 5;
  sums_to_tile<T, Tile, kM, kOut>(dk, p.scale, memory, warp * 16 * kM, part * kOut);
  sums_to_tile<T, Tile, kM, kOut>(dvs, 1.f, memory + kKeyBytes, warp * 16 * kM, part * kOut);
  __syncwarp();
  const int64_t row = (b * p.H_kv + kv_head) * p.S_k + k0;
  write_rows<T, kFeatures, 16 * kM, kWidth>(memory, warp * 16 * kM, n.s_k - k0, n.d,
                                            static_cast<T*>(f.dk) + row * p.D, p.D, part * kWidth);
  write_rows<T, kFeatures, 16 * kM, kWidth>(memory + kKeyBytes, warp * 16 * kM, n.s_k - k0, n.dv,
                                            static_cast<T*>(f.dv) + row * p.D_v, p.D_v,
                                            part * kWidth);
}

// dq of a tile of queries, 16 or 32 rows a warp.
template <class T, int kFeatures, bool kGeneral>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_dq_kernel(AttentionBwdParams f, const float* delta) {
  using Tile = RowTile<T, kFeatures>;
  constexpr AttentionShape kShape = attention_dq_shape(kFeatures, kGeneral);
  constexpr int kQ = kShape.queries, kK = kShape.keys, kBuffers = kShape.buffers;
  constexpr int kM = kQ / 64, kN = kK / 16, kD = kFeatures / 16;
  constexpr int kQueryBytes = kQ * Tile::kRowBytes, kKeyBytes = kK * Tile::kRowBytes;
  const AttentionParams& p = f.a;
  FASTNN_DYN_SHARED(unsigned char, memory);
  const Shared q_tile = shared_address(memory), do_tile = q_tile + kQueryBytes;
  const Shared keys = do_tile + kQueryBytes;

  int block = static_cast<int>(blockIdx.x);
  const auto [b, h, kv_head, q0] = query_block(p, block, kQ);
  int thread = static_cast<int>(threadIdx.x);
  const Sizes<kFeatures, kGeneral> n(p);
  const Positions range = keys_of_tile(p, q0, kQ);
  const int begin = range.begin / kK * kK;
  FASTNN_SHARED(const T*, heads, 2);  // as in forward
  if (threadIdx.x == 0) {
    heads[0] = head_rows<T>(p.k, b, kv_head, 0);
    heads[1] = head_rows<T>(p.v, b, kv_head, 0);
  }
  __syncthreads();
  auto copy_keys = [&](int buffer, int j0) {
    const Shared to = keys + buffer * 2 * kKeyBytes;
    copy_rows<T, kFeatures, kK, !kGeneral>(to, p.k, heads[0], j0, n.s_k, n.d);
    copy_rows<T, kFeatures, kK, !kGeneral>(to + kKeyBytes, p.v, heads[1], j0, n.s_k, n.dv);
  };
  copy_rows<T, kFeatures, kQ, !kGeneral>(q_tile, p.q, b, h, q0, n.s_q, n.d);
  copy_rows<T, kFeatures, kQ, !kGeneral>(do_tile, f.d_out, b, h, q0, n.s_q, n.dv);
  if (begin < range.end) copy_keys(0, begin);
  cp_async_commit();

  float lse[kM][2], its_delta[kM][2];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = q0 + (thread >> 5) * 16 * kM + (thread & 31) / 4 + 8 * i;
    const int64_t at = (b * p.H + h) * p.S_q + row;
    lse[i / 2][i % 2] = row < n.s_q ? load_global(f.lse + at) * kLseUnit<kGeneral> : kInfinity;
    its_delta[i / 2][i % 2] = row < n.s_q ? load_global(delta + at) : 0.f;
  }
  float dq[kM][2 * kD][4] = {};
  int buffer = 0;
  for (int j0 = begin; j0 < range.end; j0 += kK) {
    cp_async_wait<0>();
    __syncthreads();
    if (kBuffers == 2 && j0 + kK < range.end) {
      copy_keys(buffer ^ 1, j0 + kK);
      cp_async_commit();
    }
    const Shared k_tile = keys + buffer * 2 * kKeyBytes, v_tile = k_tile + kKeyBytes;
    renew(thread);
    const int warp = thread >> 5, lane = thread & 31, row0 = q0 + warp * 16 * kM + lane / 4;
    const int own = Tile::lane_a(thread) + warp * kM * Tile::kSixteenRows;
    const int lane_b = Tile::lane_b(thread);
    float s[kM][2 * kN][4] = {}, dp[kM][2 * kN][4] = {};
    multiply_rows<T, Tile, kM, kN, kD>(s, q_tile, own, k_tile, lane_b, n.d_steps);
    multiply_rows<T, Tile, kM, kN, kD>(dp, do_tile, own, v_tile, lane_b, n.dv_steps);
    const bool all = q0 + kQ <= n.s_q && all_visible(p, q0 + warp * 16 * kM, 16 * kM, j0, kK);
    if (!kGeneral && !all) hide<false, kM, kN>(p, s, row0, j0);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kN; ++j) {
        uint32_t mine = 0, theirs = 0;
        float keep_scale = 1.f;
        const bool drops = kGeneral && p.dropout > 0.f;
        if (drops) {  // as in forward
          const Dropout dropout(p);
          mine = dropout.kept((b * p.H + h) * p.S_q + row0 + 16 * i + lane % 2 * 8,
                              (j0 + 8 * j) / 4 + lane % 4 / 2);
          theirs = __shfl_xor_sync(0xffffffffu, mine, 1);
          keep_scale = dropout.keep_scale;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = row0 + 16 * i + e / 2 * 8, key = j0 + j * 8 + lane % 4 * 2 + e % 2;
          const uint32_t bits = e / 2 == lane % 2 ? mine : theirs;
          const float keep = !drops ? 1.f : bits >> (lane % 2 * 2 + e % 2) & 1 ? keep_scale : 0.f;
          dp[i][j][e] = weight_of<kGeneral>(
                            p, s[i][j][e], dp[i][j][e], lse[i][e / 2], its_delta[i][e / 2], keep,
                            !kGeneral || all || (query < n.s_q && is_visible(p, query, key)),
                            mask_offset(p, b, h, query, key))
                            .ds;
        }
      }
    }
    renew(thread);
    multiply_sums<T, Tile, kM, kN, kD>(dq, dp, k_tile, Tile::lane_a(thread), 0, n.d_steps);
    if (kBuffers == 1 && j0 + kK < range.end) {
      __syncthreads();
      copy_keys(0, j0 + kK);
      cp_async_commit();
    }
    if (kBuffers == 2) buffer ^= 1;
  }
  cp_async_wait<0>();
  __syncthreads();
  const int warp = thread >> 5;
  sums_to_tile<T, Tile, kM, kD>(dq, p.scale, memory, warp * 16 * kM, 0);
  __syncwarp();
  renew(block);  // the tile's place is computed again rather than kept in registers
  const QueryBlock at = query_block(p, block, kQ);
  write_rows<T, kFeatures, 16 * kM>(
      memory, warp * 16 * kM, n.s_q - at.q0, n.d,
      static_cast<T*>(f.dq) + ((at.b * p.H + at.h) * p.S_q + at.q0) * p.D, p.D);
}

}  // namespace fastnn::cuda
