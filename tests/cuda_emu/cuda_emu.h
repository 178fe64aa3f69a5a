// CUDA C++ on the CPU: what kernel source sees instead of the toolkit's headers. A kernel file is
// compiled as C++ with -DFASTNN_CUDA_EMU and this folder among the includes; no toolkit is needed.
// Not modelled: weak memory order, divergence inside a warp, time.
#pragma once
#include <cmath>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int warpSize = 32;

#define EMU_VECTOR2(name, type)                            \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define EMU_VECTOR4(name, type)                    \
  struct alignas(16) name##4 { type x, y, z, w; }; \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR2(float, float)
EMU_VECTOR2(int, int)
EMU_VECTOR2(uint, unsigned)
EMU_VECTOR4(float, float)
EMU_VECTOR4(int, int)
EMU_VECTOR4(uint, unsigned)

#define FASTNN_SHARED(T, name, count) \
  static const char name##_key = 0;   \
  T* const name = static_cast<T*>(emu::shared_memory(&name##_key, sizeof(T) * (count)))
#define FASTNN_DYN_SHARED(T, name) \
  T* const name = static_cast<T*>(emu::shared_memory(&emu::dynamic_key, emu::block->dynamic))
#define FASTNN_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  ((void)(stream), emu::launch(grid, threads, bytes, [=] { (kernel)(__VA_ARGS__); }))

inline void __syncthreads() { emu::barrier(0, "__syncthreads"); }
inline int __syncthreads_or(int p) { return emu::barrier(p != 0, "__syncthreads_or") != 0; }
inline int __syncthreads_count(int p) { return emu::barrier(p != 0, "__syncthreads_count"); }
inline void __syncwarp(unsigned mask = ~0u) {
  emu::collective(mask, "__syncwarp", 0, [](emu::Slots) {});
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  return emu::shuffle(mask, "__shfl_sync", v,
                      (emu::cur->lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  const int lane = emu::cur->lane, source = lane ^ x;
  return emu::shuffle(mask, "__shfl_xor_sync", v,
                      ((source ^ lane) & ~(width - 1)) != 0 ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by, int width = 32) {
  const int lane = emu::cur->lane, source = lane + by;
  return emu::shuffle(mask, "__shfl_down_sync", v,
                      ((source ^ lane) & ~(width - 1)) != 0 ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int by, int width = 32) {
  const int lane = emu::cur->lane, source = lane - by;
  return emu::shuffle(mask, "__shfl_up_sync", v, source < (lane & ~(width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const emu::Slots slots = emu::collective(mask, "__ballot_sync", p, [](emu::Slots) {});
  const emu::Quiet quiet;
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l) {
    int vote;
    std::memcpy(&vote, slots[l], sizeof vote);
    if ((mask >> l & 1) != 0 && vote != 0) votes |= 1u << l;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x != 0 ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __float_as_uint(float x) {
  unsigned r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline float __uint_as_float(unsigned x) {
  float r;
  std::memcpy(&r, &x, sizeof r);
  return r;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
using std::max;
using std::min;
