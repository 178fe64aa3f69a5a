// The launch policy of the matrix kernels: pure functions from a shape and a device to a tile, a
// grid and shared memory. No CUDA header: tests and the audit call the same functions.
#pragma once
#include <cstdint>

namespace fastnn::cuda {

// What the policy knows of a device.
struct Device {
  int arch;          // 10 * major + minor
  int sms;           // multiprocessors
  int shared_block;  // bytes of shared memory that a block may take
};

// Bytes of shared memory of a multiprocessor, by architecture (CUDA programming guide, table of
// technical specifications).
constexpr int shared_of_sm(int arch) {
  return arch == 80 || arch == 87            ? 164 << 10
         : arch / 10 == 9 || arch / 10 == 10 ? 228 << 10
                                             : 100 << 10;
}

#ifdef __CUDACC__
#define FASTNN_HOST_DEVICE __host__ __device__
#else
#define FASTNN_HOST_DEVICE
#endif
FASTNN_HOST_DEVICE constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- products ------------------------------------------------------------------------------------

// A block's tile of the result (bm x bn), its step in the depth (bk), a warp's part (wm x wn) and
// the pipeline's stages. Floats have no warp part but a thread's: 16 x 16 threads.
struct TileShape {
  int bm, bn, bk, wm, wn, stages;
  FASTNN_HOST_DEVICE constexpr int threads() const { return bm / wm * (bn / wn) * 32; }
};

enum class GemmTile : int32_t { kLarge, kMedium, kSmall, kPlain, kFloatLarge, kFloatSmall };
constexpr TileShape kLargeTile = {128, 256, 64, 64, 64, 3};
constexpr TileShape kMediumTile = {128, 128, 64, 64, 64, 3};
constexpr TileShape kSmallTile = {64, 64, 64, 32, 32, 3};
constexpr int kFloatDepth = 16;

constexpr int gemm_shared(const TileShape& t) {
  const int pipeline = t.stages * (t.bm + t.bn) * t.bk * 2, result = t.bm * t.bn * 4;
  return pipeline > result ? pipeline : result;  // the result passes through the same memory
}
// A block of float32: two buffers of both operands, [depth][tile + at most pad], and the result.
constexpr int kFloatPad = 8;
constexpr int gemm_shared_f32(int tile) {
  const int pipeline = 2 * 2 * kFloatDepth * (tile + kFloatPad) * 4, result = tile * tile * 4;
  return pipeline > result ? pipeline : result;
}

struct GemmPlan {
  GemmTile tile;
  int bm, bn, threads, shared;
  int tiles_m, tiles_n;
  int splits;           // of the depth; partial sums of each go to the workspace
  int64_t split_depth;  // of one split, a multiple of the tile's depth
  constexpr int64_t blocks() const { return int64_t{tiles_m} * tiles_n * splits; }
};
constexpr int64_t gemm_workspace(const GemmPlan& p, int64_t M, int64_t N) {
  return p.splits > 1 ? p.splits * M * N * 4 : 0;
}

namespace policy {

// What a tile reaches: multiply-adds per clock of a multiprocessor when full, the share of that
// which one block alone reaches, and the clocks that a round of blocks takes beside (epilogue and
// filling the pipeline). Of the 16-bit tiles fitted to times on an H100 80GB: 512 to 8192 rows,
// 4096 columns, depths of 4096 and 8192.
struct TileRate {
  GemmTile tile;
  int bm, bn, bk, threads, shared, registers;
  double full, alone, start;
};
constexpr TileRate kHalfRates[] = {
    {GemmTile::kLarge, 128, 256, 64, 256, gemm_shared(kLargeTile), 255, 1100, 1.0, 10000},
    {GemmTile::kMedium, 128, 128, 64, 128, gemm_shared(kMediumTile), 255, 940, 0.87, 2000},
    {GemmTile::kSmall, 64, 64, 64, 128, gemm_shared(kSmallTile), 128, 650, 0.6, 1500},
};
constexpr TileRate kPlainRate = {GemmTile::kPlain,        64,  64,  64,  128,
                                 gemm_shared(kSmallTile), 128, 300, 0.4, 1500};
constexpr TileRate kFloatRates[] = {
    {GemmTile::kFloatLarge, 128, 128, kFloatDepth, 256, gemm_shared_f32(128), 128, 75, 0.6, 1500},
    {GemmTile::kFloatSmall, 64, 64, kFloatDepth, 256, gemm_shared_f32(64), 64, 50, 0.5, 1500},
};

constexpr double kReduceClocks = 12000;  // one more launch
constexpr double kReduceBytes = 1200;    // per clock
constexpr int64_t kLeastSplitDepth = 256;

// Clocks that `blocks` of a tile over a depth take.
constexpr double clocks(const TileRate& r, const Device& d, int64_t blocks, int64_t depth) {
  const int by_shared = shared_of_sm(d.arch) / (r.shared + 1024);
  const int by_registers = 65536 / (r.registers * r.threads);
  const int resident = by_shared < by_registers ? by_shared : by_registers;
  const int64_t most = div_up(blocks, d.sms);  // blocks of the busiest multiprocessor
  const int64_t rounds = most / resident, rest = most % resident;
  const double work = double(r.bm) * r.bn * double(div_up(depth, r.bk) * r.bk) / r.full;
  const double alone = work / r.alone;
  double t = double(rounds) * (resident * work > alone ? resident * work : alone);
  if (rest > 0) t += rest * work > alone ? rest * work : alone;
  return t + double(rounds + (rest > 0)) * r.start;
}

constexpr GemmPlan best_split(const TileRate& r, const Device& d, int64_t M, int64_t N, int64_t K,
                              double& cost) {
  GemmPlan best = {r.tile,
                   r.bm,
                   r.bn,
                   r.threads,
                   r.shared,
                   static_cast<int>(div_up(M, r.bm)),
                   static_cast<int>(div_up(N, r.bn)),
                   1,
                   div_up(K, r.bk) * r.bk};
  const int64_t tiles = int64_t{best.tiles_m} * best.tiles_n;
  cost = clocks(r, d, tiles, K);
  for (int splits = 2; splits <= 32 && K / splits >= kLeastSplitDepth; ++splits) {
    const int64_t depth = div_up(div_up(K, splits), r.bk) * r.bk;
    if (div_up(K, depth) != splits) continue;
    const double t = clocks(r, d, tiles * splits, depth) + kReduceClocks +
                     2.0 * splits * double(M) * double(N) * 4 / kReduceBytes;
    if (t < cost) {
      cost = t;
      best.splits = splits;
      best.split_depth = depth;
    }
  }
  return best;
}

}  // namespace policy

// The plan of a product M x N over a depth K. `aligned`: rows of both operands can be copied by 16
// bytes; else elements are copied one by one.
constexpr GemmPlan plan_gemm(int64_t M, int64_t N, int64_t K, bool is_float32, bool aligned,
                             const Device& d) {
  double least = 0;
  if (!is_float32 && !aligned) return policy::best_split(policy::kPlainRate, d, M, N, K, least);
  GemmPlan best = {};
  const policy::TileRate* rates = is_float32 ? policy::kFloatRates : policy::kHalfRates;
  const int count = is_float32 ? 2 : 3;
  for (int i = 0; i < count; ++i) {
    if (rates[i].shared > d.shared_block) continue;
    double cost = 0;
    const GemmPlan plan = policy::best_split(rates[i], d, M, N, K, cost);
    if (best.threads == 0 || cost < least) {
      best = plan;
      least = cost;
    }
  }
  return best;
}

// Bytes that the tensor-core kernels copy from global to shared memory: each tile reads its rows of
// both operands once.
constexpr int64_t gemm_traffic(const GemmPlan& p, int64_t M, int64_t N, int64_t K) {
  return 2 * K * (M * p.tiles_n + N * p.tiles_m);
}

// Rows whose bias gradient one block adds up.
constexpr int64_t kSlopeRows = 64;
constexpr int kSlopeColumns = 256;
constexpr int kSlopeThreads = 256;

// --- attention
// ------------------------------------------------------------------------------------

// Features per row of the kernels' tiles: that of a call is the next one.
constexpr int attention_features(int64_t d, int64_t d_v) {
  const int64_t most = d > d_v ? d : d_v;
  return most <= 64 ? 64 : most <= 128 ? 128 : 256;
}
constexpr int64_t kMostFeatures = 256;

// Queries and keys of a step; buffers of what passes through shared memory. General kernels take
// every option and need registers for it.
struct AttentionShape {
  int queries, keys, buffers;
};
FASTNN_HOST_DEVICE constexpr AttentionShape attention_fwd_shape(int features, bool general) {
  if (features == 256) return {64, 32, 2};
  return general && features == 128 ? AttentionShape{64, 64, 2} : AttentionShape{128, 64, 2};
}
// The kernel that adds up dk and dv: its keys stay, queries pass.
FASTNN_HOST_DEVICE constexpr AttentionShape attention_dkv_shape(int features, bool general) {
  if (features == 256) return {32, 64, 1};
  if (general) return {32, 64, 2};
  return features == 64 ? AttentionShape{32, 128, 2} : AttentionShape{64, 64, 2};
}
// The kernel that adds up dq: its queries stay, keys pass.
FASTNN_HOST_DEVICE constexpr AttentionShape attention_dq_shape(int features, bool general) {
  if (features == 256) return {64, 32, 1};
  return general ? AttentionShape{64, 64, features == 64 ? 2 : 1} : AttentionShape{128, 32, 2};
}
// Rows of two operands that stay and two that pass, 16-bit.
constexpr int attention_fwd_shared(int features, bool general) {
  const AttentionShape s = attention_fwd_shape(features, general);
  return 2 * features * (s.queries + 2 * s.buffers * s.keys);
}
constexpr int attention_dkv_shared(int features, bool general) {
  const AttentionShape s = attention_dkv_shape(features, general);
  return 2 * features * (2 * s.keys + 2 * s.buffers * s.queries) + s.buffers * 2 * s.queries * 4;
}
constexpr int attention_dq_shared(int features, bool general) {
  const AttentionShape s = attention_dq_shape(features, general);
  return 2 * features * (2 * s.queries + 2 * s.buffers * s.keys);
}

// Bytes that forward copies from global to shared memory, without a window but for causal: each
// tile of queries reads its rows once and every visible tile of keys and values.
constexpr int64_t attention_fwd_traffic(int64_t heads, int64_t S_q, int64_t S_k, int64_t D,
                                        int64_t D_v, bool causal, bool general) {
  const AttentionShape s = attention_fwd_shape(attention_features(D, D_v), general);
  int64_t keys = 0;
  for (int64_t q0 = 0; q0 < S_q; q0 += s.queries) {
    const int64_t last = q0 + s.queries < S_q ? q0 + s.queries : S_q;
    const int64_t seen = causal && last < S_k ? div_up(last, s.keys) * s.keys : S_k;
    keys += seen < S_k ? seen : S_k;
  }
  return 2 * heads * (S_q * D + keys * (D + D_v));
}

// float32: as many queries as keys, 16 x 16 threads; rows of `features` + 4 floats. Forward keeps
// queries and weights, keys and values take turns; backward keeps four operands and the weights.
constexpr int kFloatThreads = 256;
FASTNN_HOST_DEVICE constexpr int attention_f32_rows(int features, bool forward) {
  return forward ? (features == 256 ? 32 : 64) : 4096 / features;
}
constexpr int attention_f32_shared(int features, bool forward) {
  const int rows = attention_f32_rows(features, forward);
  return 4 * rows * ((forward ? 2 : 4) * (features + 4) + rows + 4);
}

}  // namespace fastnn::cuda
