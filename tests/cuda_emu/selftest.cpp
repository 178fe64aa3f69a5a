// Small kernels, each right and with one fault planted: ./selftest KERNEL FAULT. Prints what the
// kernel gave as "right" or "wrong"; the emulator or a sanitizer may end the process first.
// tests/test_cuda_emu_faults.py says which checker must catch which fault.
#include <cstdio>
#include <vector>

#include "cuda/common.cuh"

namespace fastnn {
namespace {

// Sum of neighbours through shared memory.
__global__ void neighbours(const float* x, float* y, int n, bool no_barrier, bool past_shared,
                           bool past_global, bool half_barrier) {
  FASTNN_SHARED(float, row, 64);
  const int i = static_cast<int>(threadIdx.x);
  row[i] = load_global(x + (past_global && i == 63 ? 64 : i));
  if (past_shared && i == 5) row[64 + i] = 1.f;
  if (half_barrier) {
    if (i < 32) __syncthreads();
  } else if (!no_barrier) {
    __syncthreads();
  }
  if (i < n) store_global(y + i, row[i] + row[(i + 1) % 64]);
}

// Sums of 32 lanes, with a shuffle that some lanes do not reach or a mask that lacks one.
__global__ void lanes(const float* x, float* y, bool diverges, bool wrong_lane) {
  const int i = static_cast<int>(threadIdx.x);
  float v = load_global(x + i);
  for (int o = 16; o > 0; o /= 2) {
    if (diverges && o == 4 && i < 16) continue;
    const unsigned mask = wrong_lane && o == 2 ? 0xfffffffeu : 0xffffffffu;
    v += __shfl_xor_sync(mask, v, o);
  }
  if (i == 0) store_global(y, v);
}

// Two buffers in turn, filled by copies that land later.
__global__ void pipeline(const float4* x, float* y, int tiles, bool no_wait, bool early_reuse) {
  FASTNN_DYN_SHARED(float4, buffer);
  const int i = static_cast<int>(threadIdx.x);
  float sum = 0.f;
  emu::copy_async(&buffer[i], x + i, 16, 16);
  emu::copy_commit();
  for (int t = 0; t < tiles; ++t) {
    if (!early_reuse) __syncthreads();
    if (t + 1 < tiles) emu::copy_async(&buffer[(t + 1) % 2 * 64 + i], x + (t + 1) * 64 + i, 16, 16);
    emu::copy_commit();
    if (!no_wait) emu::copy_wait(1);
    __syncthreads();
    const float4 v = buffer[t % 2 * 64 + (i + 17) % 64];
    sum += v.x + v.y + v.z + v.w;
  }
  store_global(y + i, sum);
}

// The last element of the second of two rows that lie 2^31 + 8 elements apart.
__global__ void far_row(const float* x, float* y, int64_t stride, bool int32_offset) {
  const int64_t offset = int32_offset ? static_cast<int>(1 * stride) : 1 * stride;
  store_global(y, load_global(x + offset + 7));
}

int report(const float* got, const std::vector<float>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (got[i] != want[i]) {
      std::printf("wrong\n");
      return 0;
    }
  }
  std::printf("right\n");
  return 0;
}

int run(const std::string& kernel, const std::string& fault) {
  const auto is = [&](const char* name) { return fault == name; };
  std::vector<float> want(64);
  float* const x = new float[4 * 64 * 4];  // of exact size where it matters, for AddressSanitizer
  float* const y = new float[64];
  float* const row = new float[64];
  for (int i = 0; i < 4 * 64 * 4; ++i) x[i] = static_cast<float>(i % 97);
  for (int i = 0; i < 64; ++i) row[i] = x[i];
  if (kernel == "neighbours") {
    for (size_t i = 0; i < 64; ++i) want[i] = row[i] + row[(i + 1) % 64];
    const bool a = is("no_barrier"), b = is("past_shared"), c = is("past_global"),
               d = is("half_barrier");
    FASTNN_LAUNCH(neighbours, dim3(1), dim3(64), 0, nullptr, row, y, 64, a, b, c, d);
  } else if (kernel == "lanes") {
    want.assign(1, 0.f);
    for (int i = 0; i < 32; ++i) want[0] += row[i];
    const bool a = is("diverges"), b = is("wrong_lane");
    FASTNN_LAUNCH(lanes, dim3(1), dim3(32), 0, nullptr, row, y, a, b);
  } else if (kernel == "pipeline") {
    for (size_t i = 0; i < 64; ++i) {
      want[i] = 0.f;
      for (size_t t = 0; t < 4; ++t) {
        const float* const v = x + (t * 64 + (i + 17) % 64) * 4;
        want[i] += v[0] + v[1] + v[2] + v[3];
      }
    }
    const bool a = is("no_wait"), b = is("early_reuse");
    const auto* const tiles = reinterpret_cast<const float4*>(x);
    FASTNN_LAUNCH(pipeline, dim3(1), dim3(64), 2048, nullptr, tiles, y, 4, a, b);
  } else if (kernel == "far_row") {
    const int64_t stride = (int64_t{1} << 31) + 8;
    auto* const far = reinterpret_cast<float*>(
        emu::fresh_pages(nullptr, static_cast<size_t>(2 * stride + 4096) * 4));
    float* const middle = far + stride;  // what a wrapped offset reaches is mapped: zero
    far[2 * stride + 7] = 3.f;
    want.assign(1, 3.f);
    const bool a = is("int32_offset");
    FASTNN_LAUNCH(far_row, dim3(1), dim3(1), 0, nullptr, middle, y, stride, a);
  } else {
    return 2;
  }
  return report(y, want);
}

}  // namespace
}  // namespace fastnn

int main(int argc, char** argv) { return argc == 3 ? fastnn::run(argv[1], argv[2]) : 2; }
