// What every CUDA kernel is made of: the three macros that nvcc and the CPU emulator
// (tests/cuda_emu) fill in differently, 16-bit types, counted accesses to global memory,
// reductions. Here and in ptx.cuh are the only conditionals of csrc/cuda: everything else is one
// body for both.
#pragma once
#include <cfloat>
#include <cstdint>

#include "params/common.h"

#if defined(FASTNN_CUDA_EMU)
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// A shared array of a kernel; all its dynamic shared memory; a launch.
#define FASTNN_SHARED(T, name, count) __shared__ __align__(128) T name[count]
#define FASTNN_DYN_SHARED(T, name)                                  \
  extern __shared__ __align__(128) unsigned char fastnn_dynamic_[]; \
  T* const name = reinterpret_cast<T*>(fastnn_dynamic_)
// clang-format off
#define FASTNN_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  ((kernel)<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__))
// clang-format on
#endif
#define FASTNN_DEVICE __device__ __forceinline__

namespace fastnn {

// ---- 16-bit types: bits only; all arithmetic is float32

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct IsHalf16 {
  static constexpr bool value = sizeof(T) == 2;
};

#if defined(FASTNN_CUDA_EMU)
inline uint32_t emu_bf16(float f) {
  const uint32_t u = __float_as_uint(f);
  return f != f ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1)) >> 16;
}
inline uint32_t emu_half(float f) {
  const uint32_t u = __float_as_uint(f), sign = u >> 16 & 0x8000u;
  if (f != f) return 0x7fffu;
  const float a = fabsf(f);
  if (a >= 65520.f) return sign | 0x7c00u;
  // Below the smallest normal the step is 2^-24; above, 2^(exponent - 10). Adding and taking away
  // a large number with that step rounds to nearest even.
  if (a < 0x1p-14f) return sign | static_cast<uint32_t>(__float_as_uint(a + 0.5f) & 0x7fffu);
  const uint32_t v = u & 0x7fffffffu;
  return sign | (v + 0xfffu + (v >> 13 & 1) - (112u << 23)) >> 13;
}
FASTNN_DEVICE uint32_t pack_bits(float lo, float hi, BFloat16) {
  return emu_bf16(lo) | emu_bf16(hi) << 16;
}
FASTNN_DEVICE uint32_t pack_bits(float lo, float hi, Half) {
  return emu_half(lo) | emu_half(hi) << 16;
}
inline float emu_from_half(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  const float a = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f
                                : __uint_as_float((rest << 13) + (112u << 23));
  return sign != 0 ? -a : a;
}
FASTNN_DEVICE float2 unpack_bits(uint32_t u, Half) {
  return {emu_from_half(u & 0xffffu), emu_from_half(u >> 16)};
}
#else
FASTNN_DEVICE uint32_t pack_bits(float lo, float hi, BFloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(v);
}
FASTNN_DEVICE uint32_t pack_bits(float lo, float hi, Half) {
  const __half2 v = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(v);
}
FASTNN_DEVICE float2 unpack_bits(uint32_t u, Half) {
  return __half22float2(reinterpret_cast<const __half2&>(u));
}
#endif
FASTNN_DEVICE float2 unpack_bits(uint32_t u, BFloat16) {
  return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}

// Two numbers of a 16-bit type in one register, the first in the low half; rounded to nearest even.
template <class T>
FASTNN_DEVICE uint32_t pack_pair(float lo, float hi) {
  return pack_bits(lo, hi, T{});
}
template <class T>
FASTNN_DEVICE float2 unpack_pair(uint32_t pair) {
  return unpack_bits(pair, T{});
}

FASTNN_DEVICE float to_float(float x) { return x; }
template <class T>
FASTNN_DEVICE float to_float(T x) {
  return unpack_pair<T>(x.bits).x;
}
template <class T>
FASTNN_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack_pair<T>(x, 0.f))};
  }
}

// ---- global memory, every access of which goes through here: the emulator counts them

// V: a built-in type or vector of 2 to 16 bytes.
template <class V>
FASTNN_DEVICE V load_global(const V* p) {
#if defined(FASTNN_CUDA_EMU)
  emu::count_load(sizeof(V));
  emu::trace_global(p, sizeof(V));
  if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0) emu::die("a load that is not aligned");
#endif
  return *p;
}
template <class V>
FASTNN_DEVICE void store_global(V* p, V v) {
#if defined(FASTNN_CUDA_EMU)
  emu::count_store(sizeof(V));
  emu::trace_global(p, sizeof(V));
  if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0) emu::die("a store that is not aligned");
#endif
  *p = v;
}
// Of parameters that every row reads again: the caches serve them, they are counted apart.
template <class V>
FASTNN_DEVICE V load_cached(const V* p) {
#if defined(FASTNN_CUDA_EMU)
  emu::count_cached(sizeof(V));
  if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0) emu::die("a load that is not aligned");
  return *p;
#else
  return __ldg(p);
#endif
}

// ---- N neighbouring elements of a row in registers

template <class T, int N>
struct Chunk {
  static constexpr int kWords = N * static_cast<int>(sizeof(T)) / 4;
  uint32_t word[kWords];

  FASTNN_DEVICE float2 pair(int i) const {  // elements 2 i and 2 i + 1
    if constexpr (sizeof(T) == 4) {
      return make_float2(__uint_as_float(word[2 * i]), __uint_as_float(word[2 * i + 1]));
    } else {
      return unpack_pair<T>(word[i]);
    }
  }
  FASTNN_DEVICE void unpack(float (&v)[N]) const {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 two = pair(i);
      v[2 * i] = two.x;
      v[2 * i + 1] = two.y;
    }
  }
  FASTNN_DEVICE void pack(const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if constexpr (sizeof(T) == 4) {
        word[2 * i] = __float_as_uint(v[2 * i]);
        word[2 * i + 1] = __float_as_uint(v[2 * i + 1]);
      } else {
        word[i] = pack_pair<T>(v[2 * i], v[2 * i + 1]);
      }
    }
  }
};

// A row of n elements that start anywhere. `Cached`: parameters, see load_cached.
//
// A chunk that lies inside the row and on a 16-byte boundary is one access of 16 bytes (two of
// 8 float32), any other goes element by element; elements outside the row read as `outside` and
// are not written.
template <class T>
FASTNN_DEVICE bool on_boundary(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T, int N>
constexpr bool kWide = N * sizeof(T) % 16 == 0;

template <bool Cached, class V>
FASTNN_DEVICE V load_as(const V* p) {
  if constexpr (Cached) {
    return load_cached(p);
  } else {
    return load_global(p);
  }
}

template <int N, bool Cached = false, class T>
FASTNN_DEVICE void load_chunk(const T* row, int64_t first, int64_t n, float (&v)[N],
                              float outside = 0.f) {
  const T* const p = row + first;
  if constexpr (kWide<T, N>) {
    if (first >= 0 && first + N <= n && on_boundary(p)) {
      Chunk<T, N> c;
#pragma unroll
      for (int q = 0; q < Chunk<T, N>::kWords / 4; ++q) {
        const uint4 u = load_as<Cached>(reinterpret_cast<const uint4*>(p) + q);
        c.word[4 * q] = u.x;
        c.word[4 * q + 1] = u.y;
        c.word[4 * q + 2] = u.z;
        c.word[4 * q + 3] = u.w;
      }
      c.unpack(v);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool inside = first + i >= 0 && first + i < n;
    if constexpr (sizeof(T) == 4) {
      v[i] = outside;
      if (inside) v[i] = load_as<Cached>(p + i);
    } else {
      uint16_t bits = 0;  // selected, not branched on: fewer places where a warp must meet again
      if (inside) bits = load_as<Cached>(&p[i].bits);
      v[i] = inside ? to_float(T{bits}) : outside;
    }
  }
}

template <int N, class T>
FASTNN_DEVICE void store_chunk(T* row, int64_t first, int64_t n, const float (&v)[N]) {
  T* const p = row + first;
  if constexpr (kWide<T, N>) {
    if (first >= 0 && first + N <= n && on_boundary(p)) {
      Chunk<T, N> c;
      c.pack(v);
#pragma unroll
      for (int q = 0; q < Chunk<T, N>::kWords / 4; ++q) {
        const uint4 u =
            make_uint4(c.word[4 * q], c.word[4 * q + 1], c.word[4 * q + 2], c.word[4 * q + 3]);
        store_global(reinterpret_cast<uint4*>(p) + q, u);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (first + i < 0 || first + i >= n) continue;
    if constexpr (sizeof(T) == 4) {
      store_global(p + i, v[i]);
    } else {
      store_global(&p[i].bits, from_float<T>(v[i]).bits);
    }
  }
}

// ---- reductions: every thread of the group gets the same bits

struct Add {
  static constexpr float kStart = 0.f;
  FASTNN_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  static constexpr float kStart = -FLT_MAX;
  FASTNN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over groups of Width neighbouring lanes, all of the warp's lanes taking part.
template <int Width = 32, class Op>
FASTNN_DEVICE float warp_reduce(float v, Op op) {
#pragma unroll
  for (int o = Width / 2; o > 0; o /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// Over a block of whole warps along x, K values at a time, one barrier each. `spare` is
// kReduceSpare floats of shared memory, whose halves the calls of a kernel take in turn (`turn`, 0
// at first): nobody writes a half that others may still read.
constexpr int kMostReduced = 4, kReduceSpare = 2 * 32 * kMostReduced;
template <int K, class Op>
FASTNN_DEVICE void block_reduce(float (&v)[K], Op op, float* spare, int& turn) {
  static_assert(K <= kMostReduced);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  float* const slots = spare + turn * (kReduceSpare / 2);
  turn ^= 1;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    v[k] = warp_reduce(v[k], op);
    if (lane == 0) slots[k * 32 + warp] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    v[k] = warp_reduce(lane < warps ? slots[k * 32 + lane] : Op::kStart, op);
  }
}

// ---- host side

// Calls f(T{}) with the type of that name.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}
// Calls f with the types of a pair: equal, or a 16-bit type and float32.
template <class F>
int with_type_pair(DType narrow, DType other, F f) {
  return with_type(narrow, [&](auto a) {
    if (other == narrow) return f(a, a);
    return f(a, float{});
  });
}

#if defined(FASTNN_CUDA_EMU)
inline int launch_result() { return 0; }
inline int multiprocessors() { return emu::multiprocessors; }
inline int allow_shared_memory(const void*, size_t) { return 0; }
#else
// What went wrong with the launches since the last call: a cudaError_t, 0 where nothing did.
inline int launch_result() { return static_cast<int>(cudaGetLastError()); }
// Of the current device; asked once for each.
inline int multiprocessors() {
  static int known[64];
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return 132;
  if (known[device] != 0) return known[device];
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return known[device] = count;
}
// Lets a kernel have more than 48 KB of dynamic shared memory.
inline int allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  return static_cast<int>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                               static_cast<int>(bytes)));
}
#endif

}  // namespace fastnn
