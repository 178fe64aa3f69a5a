// What the tests of the emulated matrix kernels set and read, beside the launchers themselves.
#include "cuda/common.cuh"
#include "cuda/policy_matrix.h"

extern "C" {

void emu_device(int arch, int multiprocessors) {
  emu::arch = arch;
  emu::multiprocessors = multiprocessors;
}
// order: forward, reverse or random:seed; copies that land at once, or as late as they may.
void emu_schedule(const char* order, int copies_early) {
  emu::set_order(order);
  emu::copies_early = copies_early != 0;
}
// Bytes loaded, tensor-core products, matrix loads and those that bank conflicts added; since the
// last call.
void emu_counted(uint64_t* found) {
  found[0] = emu::counters.loaded;
  found[1] = emu::counters.mma;
  found[2] = emu::counters.ldsm;
  found[3] = emu::counters.ldsm_conflicts;
  found[4] = emu::counters.loaded_wide;
  emu::counters = {};
}

// tile, splits, bm, bn, threads, shared, blocks, traffic, depth of a split.
void matrix_plan(int64_t M, int64_t N, int64_t K, int is_float32, int aligned, int arch, int sms,
                 int64_t* found) {
  const fastnn::cuda::Device d = {arch, sms, fastnn::cuda::shared_of_sm(arch) - 1024};
  const auto p = fastnn::cuda::plan_gemm(M, N, K, is_float32 != 0, aligned != 0, d);
  const int64_t values[] = {
      static_cast<int64_t>(p.tile), p.splits,     p.bm, p.bn, p.threads, p.shared, p.blocks(),
      gemm_traffic(p, M, N, K),     p.split_depth};
  for (int i = 0; i < 9; ++i) found[i] = values[i];
}
int64_t attention_traffic(int64_t heads, int64_t S_q, int64_t S_k, int64_t D, int64_t D_v,
                          int causal, int general) {
  return fastnn::cuda::attention_fwd_traffic(heads, S_q, S_k, D, D_v, causal != 0, general != 0);
}
// Shared memory of the attention kernels, forward, dk and dv, dq, then of float32.
void attention_shared(int features, int general, int64_t* found) {
  using namespace fastnn::cuda;
  found[0] = attention_fwd_shared(features, general != 0);
  found[1] = attention_dkv_shared(features, general != 0);
  found[2] = attention_dq_shared(features, general != 0);
  found[3] = attention_f32_shared(features, true);
  found[4] = attention_f32_shared(features, false);
}
}
