// The PTX of the sm_80 instruction set that the matrix kernels use, and nothing outside this file:
// tensor-core products, matrix loads from shared memory, asynchronous copies. Each wrapper has a
// twin for the emulator (tests/cuda_emu), with the register layouts of the PTX ISA.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/common.cuh"
#include "cuda/policy_matrix.h"

namespace fastnn::cuda {

#ifndef FASTNN_CUDA_EMU

// An address in shared memory, in bytes.
using Shared = uint32_t;
__device__ __forceinline__ Shared shared_address(const void* p) {
  return static_cast<Shared>(__cvta_generic_to_shared(p));
}

// d (16 x 8) += a (16 x 16) b (16 x 8), float32 sums.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1);
template <>
__device__ __forceinline__ void mma_16816<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16816<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d (16 x 8) += a (16 x 8) b (8 x 8) of float32 rounded to tf32 (10 bits of mantissa).
__device__ __forceinline__ void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], Shared at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], Shared at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// Copies `bytes` (0 .. 16) from global to 16 bytes of shared memory and zeroes the rest.
__device__ __forceinline__ void cp_async16(Shared to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// Copies one word, or zeroes it.
__device__ __forceinline__ void cp_async4(Shared to, const void* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of the calling thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x, subnormal results flushed to zero; relative error 2^-22.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void store_shared(Shared to, const uint4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Makes a number look new: what is derived from it is computed again where it is used and does not
// stay in registers over a loop.
__device__ __forceinline__ void renew(int& x) { asm volatile("" : "+r"(x)); }

inline cudaError_t current_device(Device& d) {
  int device = 0, major = 0, minor = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, device);
  d.arch = 10 * major + minor;
  return cudaDeviceGetAttribute(&d.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

#else

using Shared = uintptr_t;
inline Shared shared_address(const void* p) { return reinterpret_cast<Shared>(p); }

// What a product does with the registers that all lanes handed over: T's pairs for m16n8k16, words
// for m16n8k8.
struct MmaLane {
  uint32_t a[4], b[2];
  float d[4];
};
template <int kPairs, class Widen>
inline void emulate_mma(emu::Slots slots, Widen widen_part) {
  constexpr int kDepth = 8 * kPairs;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  emu::n_mma++;
  for (int lane = 0; lane < 32; ++lane) {
    MmaLane in;
    memcpy(&in, slots[lane], sizeof in);
    const int g = lane / 4, t = lane % 4;
    // Registers of a: rows g, g + 8 of the low half of the depth, then of the high half.
    for (int i = 0; i < 4; ++i) {
      for (int h = 0; h < kPairs; ++h)
        a[g + 8 * (i & 1)][kPairs * t + 4 * kPairs * (i >> 1) + h] = widen_part(in.a[i], h);
      d[g + 8 * (i >> 1)][2 * t + (i & 1)] = in.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      for (int h = 0; h < kPairs; ++h)
        b[kPairs * t + 4 * kPairs * i + h][g] = widen_part(in.b[i], h);
    }
  }
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      for (int c = 0; c < 8; ++c) d[r][c] += a[r][k] * b[k][c];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    MmaLane out;
    memcpy(&out, slots[lane], sizeof out);
    for (int i = 0; i < 4; ++i) out.d[i] = d[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
    memcpy(slots[lane], &out, sizeof out);
  }
}
template <int kPairs, class Widen>
inline void emulated_mma(const char* what, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1, Widen widen_part) {
  MmaLane in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  auto slots =
      emu::collective(~0u, what, in, [&](emu::Slots s) { emulate_mma<kPairs>(s, widen_part); });
  memcpy(&in, slots[emu::cur->lane], sizeof in);
  memcpy(d, in.d, sizeof d);
}
template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<2>("mma.m16n8k16", d, a, b0, b1, [](uint32_t bits, int half) {
    const float2 both = unpack_pair<T>(bits);
    return half == 0 ? both.x : both.y;
  });
}
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7F800000u) != 0x7F800000u) bits += 0x1000u;  // to nearest, ties away
  return bits & ~0x1FFFu;
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated_mma<1>("mma.m16n8k8", d, a, b0, b1, [](uint32_t bits, int) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
  });
}

template <bool kTrans>
inline void emulated_ldmatrix(uint32_t (&r)[4], Shared at) {
  if (at % 16 != 0) emu::die("ldmatrix: a row's address is not a multiple of 16");
  auto slots = emu::collective(~0u, kTrans ? "ldmatrix.trans" : "ldmatrix", at, [](emu::Slots s) {
    for (int m = 0; m < 4; ++m) {  // 8 rows of 16 bytes: one pass where all lie in other banks
      int hits[8] = {}, most = 0;
      for (int i = 0; i < 8; ++i) {
        Shared row;
        memcpy(&row, s[8 * m + i], sizeof row);
        most = std::max(most, ++hits[row / 16 % 8]);
      }
      emu::n_ldsm++;
      emu::n_ldsm_conflicts += most - 1;
    }
  });
  const int g = emu::cur->lane / 4, t = emu::cur->lane % 4;
  for (int m = 0; m < 4; ++m) {
    auto element = [&](int row, int column) {
      Shared address;
      memcpy(&address, slots[8 * m + row], sizeof address);
      return reinterpret_cast<const uint16_t*>(address)[column];
    };
    const uint32_t low = kTrans ? element(2 * t, g) : element(g, 2 * t);
    const uint32_t high = kTrans ? element(2 * t + 1, g) : element(g, 2 * t + 1);
    r[m] = low | high << 16;
  }
  __syncwarp();  // the instruction ends for all lanes at once
}
inline void ldmatrix(uint32_t (&r)[4], Shared at) { emulated_ldmatrix<false>(r, at); }
inline void ldmatrix_trans(uint32_t (&r)[4], Shared at) { emulated_ldmatrix<true>(r, at); }

inline void cp_async16(Shared to, const void* from, int bytes) {
  if (to % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    emu::die("cp.async: an address is not a multiple of 16");
  emu::count_load(bytes);
  emu::copy_async(reinterpret_cast<void*>(to), from, bytes, 16);
}
inline void cp_async4(Shared to, const void* from, bool exists) {
  if (to % 4 != 0 || (exists && reinterpret_cast<uintptr_t>(from) % 4 != 0))
    emu::die("cp.async: an address is not a multiple of 4");
  emu::count_load(exists ? 4 : 0);
  emu::copy_async(reinterpret_cast<void*>(to), from, exists ? 4 : 0, 4);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int N>
inline void cp_async_wait() {
  emu::copy_wait(N);
}
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline void store_shared(Shared to, const uint4& v) { memcpy(reinterpret_cast<void*>(to), &v, 16); }
inline void renew(int&) {}
inline cudaError_t current_device(Device& d) {
  d = {emu::arch, emu::multiprocessors, shared_of_sm(emu::arch) - 1024};
  return cudaSuccess;
}

#endif

// Launches `blocks` blocks with `shared` bytes of dynamic shared memory; none where blocks is 0.
template <class... Args>
inline cudaError_t launch(void (*kernel)(Args...), int64_t blocks, int threads, int shared,
                          void* stream, Args... args) {
  if (blocks == 0) return cudaSuccess;
  const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared);
  if (error != 0) return static_cast<cudaError_t>(error);
  FASTNN_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                static_cast<size_t>(shared), stream, args...);
  return static_cast<cudaError_t>(launch_result());
}

}  // namespace fastnn::cuda
