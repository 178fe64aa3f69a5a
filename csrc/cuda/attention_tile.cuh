// What forward and backward of attention share on tensor cores: tiles of rows of a head in shared
// memory, their fragments, and the way from products to scores.
#pragma once
#include "cuda/gemm_epilogue.cuh"
#include "cuda/policy_matrix.h"
#include "cuda/ptx.cuh"
#include "params/attention.h"

namespace fastnn::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();
constexpr int kAttentionThreads = 128;

template <class T>
__device__ __forceinline__ const T* head_rows(const Heads& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<const T*>(x.data) + b * x.batch_stride + h * x.head_stride +
         row * x.row_stride;
}
// Whether every row of every head can be copied by 16 bytes.
template <class T>
__device__ __forceinline__ bool rows_aligned(const Heads& x) {
  constexpr int kChunk = 16 / sizeof(T);
  return on_boundary(static_cast<const T*>(x.data)) && x.batch_stride % kChunk == 0 &&
         x.head_stride % kChunk == 0 && x.row_stride % kChunk == 0;
}

// Rows of kFeatures 16-bit elements in shared memory, 16-byte chunks permuted by the row so that
// ldmatrix meets no bank twice.
template <class T, int kFeatures>
struct RowTile {
  static constexpr int kRowBytes = 2 * kFeatures, kChunks = kFeatures / 8;
  static constexpr int kStep = kAttentionThreads / kChunks;  // rows between a thread's chunks

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // Copies kRows rows `stride` apart, zeros for rows from `rows` on and features from d on.
  // kWhole: d is kFeatures and rows are aligned.
  template <int kRows, bool kWhole>
  static __device__ __forceinline__ void copy(Shared to, const T* from, int64_t stride, int rows,
                                              int d, bool aligned) {
    static_assert(kRows % kStep == 0);
    int thread = static_cast<int>(threadIdx.x);
    renew(thread);  // places are computed again rather than kept in registers from tile to tile
    const int first = thread / kChunks, chunk = thread & (kChunks - 1);
    const int count = kWhole || d - chunk * 8 >= 8 ? 8 : d - chunk * 8 <= 0 ? 0 : d - chunk * 8;
    from += first * stride + chunk * 8;
    if (kWhole || aligned) {
#pragma unroll 2  // all at once would take the registers of the sums
      for (int i = 0; i < kRows / kStep; ++i, from += kStep * stride)
        cp_async16(to + offset(first + i * kStep, chunk), from,
                   first + i * kStep < rows ? 2 * count : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / kStep; ++i, from += kStep * stride) {
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (first + i * kStep < rows && e < count)
            words[e / 2] |= static_cast<uint32_t>(load_global(&from[e].bits)) << e % 2 * 16;
        }
        store_shared(to + offset(first + i * kStep, chunk),
                     make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }

  // Where a thread reads: fragments of A (rows as they are, features along the depth) and of B
  // where the rows are the depth and the features lie across; and of B with the features along the
  // depth.
  static __device__ __forceinline__ int lane_a(int thread) {
    return offset(thread & 15, thread >> 4 & 1);
  }
  static __device__ __forceinline__ int lane_b(int thread) {
    return offset((thread >> 4 & 1) * 8 + (thread & 7), thread >> 3 & 1);
  }
  static constexpr int kSixteenRows = 16 * kRowBytes;
  // 16 rows down and 16 features along from there. Features stay within a row: the rows can be
  // part of the instruction that reads.
  static __device__ __forceinline__ int at(int lane_offset, int rows16, int features16) {
    return (lane_offset ^ features16 << 5) + rows16 * kSixteenRows;
  }
};

// Copies kRows rows of a head from `row` on, of the `rows` that it has; `head`: its first row.
template <class T, int kFeatures, int kRows, bool kWhole>
__device__ __forceinline__ void copy_rows(Shared to, const Heads& x, const T* head, int row,
                                          int rows, int d) {
  RowTile<T, kFeatures>::template copy<kRows, kWhole>(to, head + row * x.row_stride, x.row_stride,
                                                      rows - row, d, kWhole || rows_aligned<T>(x));
}
template <class T, int kFeatures, int kRows, bool kWhole>
__device__ __forceinline__ void copy_rows(Shared to, const Heads& x, int b, int h, int row,
                                          int rows, int d) {
  copy_rows<T, kFeatures, kRows, kWhole>(to, x, head_rows<T>(x, b, h, 0), row, rows, d);
}

// Writes kRows rows of a tile, of which `rows` from the tile's first on exist and d features, to
// rows `stride` apart; by one warp, whose rows begin at row0. Of the features only kWidth from
// `first` on.
template <class T, int kFeatures, int kRows, int kWidth = kFeatures>
__device__ __forceinline__ void write_rows(const unsigned char* tile, int row0, int rows, int d,
                                           T* to, int64_t stride, int first = 0) {
  using Tile = RowTile<T, kFeatures>;
  constexpr int kChunks = kWidth / 8;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < kRows * kChunks; i += 32) {
    const int row = row0 + i / kChunks, chunk = first / 8 + i % kChunks;
    if (row >= rows || chunk * 8 >= d) continue;
    const uint4 v = *reinterpret_cast<const uint4*>(tile + Tile::offset(row, chunk));
    T* const at = to + row * stride + chunk * 8;
    if (chunk * 8 + 8 <= d && on_boundary(at)) {
      store_global(reinterpret_cast<uint4*>(at), v);
    } else {
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (chunk * 8 + e < d)
          store_global(&at[e].bits, static_cast<uint16_t>(words[e / 2] >> e % 2 * 16));
      }
    }
  }
}

// The sizes of a call, those of features constants where kGeneral is false. Positions are ints: the
// launchers take no longer sequences, and give windows that are no limit as -1.
template <int kFeatures, bool kGeneral>
struct Sizes {
  int s_q, s_k, d, dv, d_steps, dv_steps;  // steps: of 16 features
  __device__ __forceinline__ explicit Sizes(const AttentionParams& p)
      : s_q(static_cast<int>(p.S_q)),
        s_k(static_cast<int>(p.S_k)),
        d(kGeneral ? static_cast<int>(p.D) : kFeatures),
        dv(kGeneral ? static_cast<int>(p.D_v) : kFeatures),
        d_steps((d + 15) / 16),
        dv_steps((dv + 15) / 16) {}
};

// The tile of queries that a block has: those that see most of a causal head run first.
struct QueryBlock {
  int b, h, kv_head, q0;
};
__device__ __forceinline__ QueryBlock query_block(const AttentionParams& p, int block,
                                                  int queries) {
  const int tiles = (static_cast<int>(p.S_q) + queries - 1) / queries,
            heads = static_cast<int>(p.H);
  const int item = block / tiles, h = item % heads;
  return {item / heads, h, h / (heads / static_cast<int>(p.H_kv)),
          (tiles - 1 - block % tiles) * queries};
}

// The tile of keys that a block has; `group` queries' heads share them.
struct KeyBlock {
  int b, kv_head, group, k0;
};
__device__ __forceinline__ KeyBlock key_block(const AttentionParams& p, int block, int keys) {
  const int tiles = (static_cast<int>(p.S_k) + keys - 1) / keys, item = block / tiles,
            heads = static_cast<int>(p.H_kv);
  return {item / heads, item % heads, static_cast<int>(p.H) / heads, block % tiles * keys};
}

// From begin on, before end.
struct Positions {
  int begin, end;
};
// The keys that the queries [first, last] may see.
__device__ __forceinline__ Positions visible_keys(const AttentionParams& p, int first, int last) {
  const int left = static_cast<int>(p.window_left), right = static_cast<int>(p.window_right);
  Positions r = {0, static_cast<int>(p.S_k)};
  if (left >= 0 && first > left) r.begin = first - left;
  if (right >= 0 && last + right + 1 < r.end) r.end = last + right + 1;
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
// The queries that may see any of the keys [first, last].
__device__ __forceinline__ Positions seeing_queries(const AttentionParams& p, int first, int last) {
  const int left = static_cast<int>(p.window_left), right = static_cast<int>(p.window_right);
  Positions r = {0, static_cast<int>(p.S_q)};
  if (right >= 0 && first > right) r.begin = first - right;
  if (left >= 0 && last + left + 1 < r.end) r.end = last + left + 1;
  if (r.end < r.begin) r.end = r.begin;
  return r;
}
// Of a tile of so many queries, or of keys, of which the last may not be there.
__device__ __forceinline__ Positions keys_of_tile(const AttentionParams& p, int q0, int queries) {
  const int end = static_cast<int>(p.S_q);
  return visible_keys(p, q0, (q0 + queries < end ? q0 + queries : end) - 1);
}
__device__ __forceinline__ Positions queries_of_tile(const AttentionParams& p, int k0, int keys) {
  const int end = static_cast<int>(p.S_k);
  return seeing_queries(p, k0, (k0 + keys < end ? k0 + keys : end) - 1);
}
__device__ __forceinline__ bool is_visible(const AttentionParams& p, int query, int key) {
  const int left = static_cast<int>(p.window_left), right = static_cast<int>(p.window_right);
  return key < static_cast<int>(p.S_k) && (right < 0 || key <= query + right) &&
         (left < 0 || key >= query - left);
}
// Whether all keys [k0, k0 + keys) are there and visible to all queries [q0, q0 + queries).
__device__ __forceinline__ bool all_visible(const AttentionParams& p, int q0, int queries, int k0,
                                            int keys) {
  const int left = static_cast<int>(p.window_left), right = static_cast<int>(p.window_right);
  return k0 + keys <= static_cast<int>(p.S_k) && (right < 0 || k0 + keys - 1 <= q0 + right) &&
         (left < 0 || k0 >= q0 + queries - 1 - left);
}

// Sets the scores that are not to be seen to -inf, in a lane's fragments: rows row0, row0 + 8, ...
// of queries and columns of keys from column0 on, or, where kOfKeys, rows of keys and columns of
// queries.
template <bool kOfKeys, int kM, int kN>
__device__ __forceinline__ void hide(const AttentionParams& p, float (&s)[kM][2 * kN][4], int row0,
                                     int column0) {
  const int first = column0 + static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int row = row0 + 8 * i;
    const Positions seen = kOfKeys ? seeing_queries(p, row, row) : visible_keys(p, row, row);
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = first + 8 * n + e;
        if (column < seen.begin || column >= seen.end) s[i / 2][n][i % 2 * 2 + e] = -kInfinity;
      }
    }
  }
}

__device__ __forceinline__ int64_t mask_offset(const AttentionParams& p, int64_t b, int64_t h,
                                               int query, int key) {
  return b * p.mask_strides[0] + h * p.mask_strides[1] + query * p.mask_strides[2] +
         key * p.mask_strides[3];
}
// What the mask adds to a score.
__device__ __forceinline__ float mask_value(const AttentionParams& p, int64_t at) {
  if (p.mask_kind == MaskKind::kBool)
    return load_global(static_cast<const uint8_t*>(p.mask) + at) != 0 ? 0.f : -kInfinity;
  if (p.mask_dtype == DType::kFloat32) return load_global(static_cast<const float*>(p.mask) + at);
  const uint16_t bits = load_global(static_cast<const uint16_t*>(p.mask) + at);
  return p.mask_dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
}
// tanh with an absolute error of 2e-7.
__device__ __forceinline__ float cap_tanh(float x) {
  return 1.f - __fdividef(2.f, 1.f + __expf(2.f * x));
}

// From a product to a score, with everything a call may ask for; slope: d cap(s) / ds.
__device__ __forceinline__ float finish_score(const AttentionParams& p, float product,
                                              int64_t mask_at, bool exists, float& slope) {
  float s = product * p.scale;
  slope = 1.f;
  if (p.softcap != 0.f) {
    const float h = cap_tanh(s / p.softcap);
    s = h * p.softcap;
    slope = fmaf(-h, h, 1.f);
  }
  if (p.mask_kind != MaskKind::kNone && exists) s += mask_value(p, mask_at);
  return s;
}

// One weight and its gradient, given the product of query and key, that of dO and the value, and
// the query's logsumexp (times kLseUnit) and delta = dO . O. keep: what dropout makes of the
// weight.
struct Weight {
  float p, ds;
};
// Powers of two where scores are near 0; what a mask adds may be near the largest float32, and
// takes its factor once the logsumexp is taken away.
template <bool kGeneral>
constexpr float kLseUnit = kGeneral ? 1.f : kLog2E;
template <bool kGeneral>
__device__ __forceinline__ Weight weight_of(const AttentionParams& p, float product, float dp,
                                            float lse, float delta, float keep, bool is_seen,
                                            int64_t mask_at) {
  float slope = 1.f, power;
  if constexpr (kGeneral) {
    power = (finish_score(p, product, mask_at, is_seen, slope) - lse) * kLog2E;
  } else {
    power = product * (p.scale * kLog2E) - lse;
  }
  const float w = is_seen ? fast_exp2(power) : 0.f;
  Weight r = {w, w * (dp - delta)};
  if constexpr (kGeneral) r = {w * keep, w * fmaf(dp, keep, -delta) * slope};
  // A weight of 0 has gradient 0 even where dP is infinite or NaN: the key was not seen.
  if (w == 0.f) r.ds = 0.f;
  return r;
}

// Philox4x32-10 (Salmon et al., SC 2011), as cpu/simd/philox.h.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint4 c = make_uint4(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.x, p1 = uint64_t{0xCD9E8D57u} * c.z;
    c = make_uint4(static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
                   static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Which weights stay: a function of their position in (B, H, S_q, S_k); one counter gives four
// neighbouring keys.
struct Dropout {
  uint64_t seed, groups;
  uint32_t threshold;
  float keep_scale;
  __device__ __forceinline__ explicit Dropout(const AttentionParams& p)
      : seed(p.seed),
        groups(static_cast<uint64_t>(p.S_k + 3) / 4),
        threshold(static_cast<uint32_t>(
            static_cast<uint64_t>(static_cast<double>(p.dropout) * 4294967296.0))),
        keep_scale(1.f / (1.f - p.dropout)) {}
  // Bits 0 .. 3: keys 4 group .. 4 group + 3 of the row ((b H + h) S_q + query) are kept.
  __device__ __forceinline__ uint32_t kept(int64_t row, int64_t group) const {
    const uint4 r =
        philox(seed, static_cast<uint64_t>(row) * groups + static_cast<uint64_t>(group));
    return (r.x >= threshold) | (r.y >= threshold) << 1 | (r.z >= threshold) << 2 |
           (r.w >= threshold) << 3;
  }
};

// --- host side

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int64_t kMostPositions = 1 << 30;
// A window that limits nothing as -1.
inline AttentionParams normal_window(AttentionParams p) {
  if (p.window_left >= p.S_q) p.window_left = -1;
  if (p.window_right >= p.S_k) p.window_right = -1;
  return p;
}
// Why the kernels cannot take a call: a cudaError_t.
inline int check(const AttentionParams& p) {
  return p.D > kMostFeatures || p.D_v > kMostFeatures || p.S_q > kMostPositions ||
                 p.S_k > kMostPositions
             ? kInvalidValue
             : 0;
}

inline bool is_aligned(const Heads& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.batch_stride % 8 == 0 &&
         x.head_stride % 8 == 0 && x.row_stride % 8 == 0;
}
// Whether the quick kernel takes the call: whole aligned features, no option but a window.
inline bool is_plain(const AttentionParams& p, int features) {
  return p.D == features && p.D_v == features && p.scale > 0.f && p.softcap == 0.f &&
         p.mask_kind == MaskKind::kNone && p.dropout == 0.f && is_aligned(p.q) && is_aligned(p.k) &&
         is_aligned(p.v);
}

}  // namespace fastnn::cuda
