// The wide middle of a block is never held whole, unless it is saved for backward: a part of it
// goes from the first products to the last while it is in cache. Parts are some of its columns,
// whose products are then added up in float32; or, of packed weights, some rows: those cost nothing
// to read again.
#include "cpu/mlp.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/gemm/params.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kPartElements = int64_t{1} << 20;  // 4 MiB of float32: what caches hold
// The last product's depth in a part of columns: below 1024 adding the parts up costs 2-5 %.
constexpr int64_t kFewestColumns = 1024;
constexpr int64_t kFewestRows = 512;    // of a packed part: 256 for each of two threads
constexpr int64_t kMiddleRows = 64;     // rows whose sums are one term of the bias's gradient
constexpr int64_t kMiddleGrain = 8192;  // elements worth a thread of their own

// Balanced parts of [0, n), at least one, whose edges are multiples of a strip.
class Parts {
 public:
  Parts(int64_t n, int64_t most)
      : n_(n), count_(std::max<int64_t>(1, (n + most - 1) / std::max<int64_t>(1, most))) {
    size_ = round_up((n + count_ - 1) / count_, kStrip);
    if (size_ > 0) count_ = std::max<int64_t>(1, (n + size_ - 1) / size_);
  }
  int64_t count() const { return count_; }
  int64_t largest() const { return std::min(size_, n_); }
  int64_t begin(int64_t i) const { return i * size_; }
  int64_t size(int64_t i) const { return std::min(size_, n_ - begin(i)); }

 private:
  int64_t n_, count_, size_;
};

int64_t columns_of_part(const MlpOperands& p) {
  return std::max(kFewestColumns, kPartElements / std::max<int64_t>(1, p.M));
}
int64_t rows_of_part(const MlpOperands& p) {
  return std::max(kFewestRows, kPartElements / std::max<int64_t>(1, p.hidden));
}

const void* at(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_bytes(dtype);
}
void* at(void* data, int64_t elements, DType dtype) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + elements * element_bytes(dtype);
}
Matrix part_of(const Matrix& m, int64_t row, int64_t column) {
  if (m.data == nullptr) return m;
  return {at(m.data, row * m.row_stride + column * m.col_stride, m.dtype), m.row_stride,
          m.col_stride, m.dtype};
}
Matrix turned(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype}; }

GemmParams product(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, void* c,
                   int64_t c_stride) {
  GemmParams g = {};
  g.M = M;
  g.N = N;
  g.K = K;
  g.a = a;
  g.b = b;
  g.c = c;
  g.c_stride = c_stride;
  g.c_dtype = a.dtype;
  return g;
}

// A sum of `terms` products in c, all rows next to each other: float32 until the last one.
class Sum {
 public:
  Sum(int64_t rows, int64_t columns, int64_t terms, DType dtype)
      : left_(terms),
        apart_(terms > 1 && dtype != DType::kFloat32),
        memory_(apart_ ? rows * columns * 4 : 0) {}
  void add(GemmParams g, const KernelTable& table) {
    float* const sums = static_cast<float*>(apart_ ? memory_.get() : g.c);
    if (started_) g.epilogue.addend = sums;
    started_ = true;
    if (--left_ > 0) {
      g.c = sums;
      g.c_dtype = DType::kFloat32;
    }
    run_gemm(g, table);
  }

 private:
  int64_t left_;
  bool apart_, started_ = false;
  Scratch memory_;
};

// The middle of the rows of x, columns [i, i + columns), in h.
void run_middle(const MlpParams& p, const KernelTable& table, const float* b_in, int64_t m,
                int64_t rows, int64_t i, int64_t columns, void* h) {
  const DType dtype = p.x.dtype;
  const Matrix x = part_of(p.x, m, 0);
  void* const z = at(p.z, m * p.hidden + i, dtype);
  GemmParams g = product(rows, columns, p.K, x, turned(part_of(p.w_in, i, 0)), h, columns);
  g.b_packed = static_cast<const float*>(p.packed_in);
  g.epilogue.bias = b_in == nullptr ? nullptr : b_in + i;
  if (!p.gated) {
    g.epilogue.pre = z;
    g.epilogue.pre_stride = p.hidden;
    g.epilogue.activation = p.activation;
    run_gemm(g, table);
    return;
  }
  if (z != nullptr) {
    g.c = z;
    g.c_stride = p.hidden;
  }
  run_gemm(g, table);
  GemmParams f = product(rows, columns, p.K, x, turned(part_of(p.w_factor, i, 0)), h, columns);
  f.b_packed = static_cast<const float*>(p.packed_factor);
  f.epilogue.gate = g.c;
  f.epilogue.gate_stride = g.c_stride;
  f.epilogue.activation = p.activation;
  f.epilogue.pre = at(p.factor, m * p.hidden + i, dtype);
  f.epilogue.pre_stride = p.hidden;
  run_gemm(f, table);
}

// A bias as the products take it.
Parameter bias_of(const KernelTable& table, const void* data, int64_t stride, DType dtype,
                  int64_t n) {
  const int64_t size = data == nullptr ? 0 : n;
  return {table, data, stride, dtype, size, round_up(size, kStrip), 0.f};
}

// Of columns [0, p.columns) of the middle, all rows. db: the gradient of b_in there, or null.
void run_middle_bwd(const MlpMiddle& p, const KernelTable& table, int64_t rows, void* db) {
  const int64_t chunks = std::max<int64_t>(1, (rows + kMiddleRows - 1) / kMiddleRows);
  const int64_t n = db == nullptr ? 0 : p.columns;
  const Scratch memory(chunks * n * 4);
  auto* const sums = static_cast<float*>(memory.get());
  const int64_t grain = kMiddleGrain / std::max<int64_t>(1, kMiddleRows * p.columns);
  parallel_for(chunks, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::memset(sums + c * n, 0, static_cast<size_t>(n) * sizeof(float));
      table.mlp_middle(p, c * kMiddleRows, std::min(rows, (c + 1) * kMiddleRows),
                       n == 0 ? nullptr : sums + c * n);
    }
  });
  if (db != nullptr) add_chunks(table, sums, chunks, n, p.dtype, db);
}

}  // namespace

void mlp_fwd(const MlpParams& p) {
  const KernelTable& table = kernels();
  record_run(p.is_packed ? "mlp_packed_fwd" : "mlp_fwd", table.isa);
  if (p.M == 0) return;
  const DType dtype = p.x.dtype;
  const Parameter b_in = bias_of(table, p.b_in, p.b_in_stride, dtype, p.hidden);
  const Parameter b_out = bias_of(table, p.b_out, p.b_out_stride, dtype, p.N);
  const Parts rows(p.M, p.is_packed ? rows_of_part(p) : p.M);
  const Parts columns(p.hidden, p.is_packed ? p.hidden : columns_of_part(p));
  const Scratch h(rows.largest() * columns.largest() * element_bytes(dtype));
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t m = rows.begin(r);
    Sum y(rows.size(r), p.N, columns.count(), dtype);
    for (int64_t c = 0; c < columns.count(); ++c) {
      const int64_t i = columns.begin(c), width = columns.size(c);
      run_middle(p, table, p.b_in ? b_in.get() : nullptr, m, rows.size(r), i, width, h.get());
      GemmParams g = product(rows.size(r), p.N, width, {h.get(), width, 1, dtype},
                             turned(part_of(p.w_out, 0, i)), at(p.y, m * p.N, dtype), p.N);
      g.b_packed = static_cast<const float*>(p.packed_out);
      if (c == 0 && p.b_out != nullptr) g.epilogue.bias = b_out.get();
      y.add(g, table);
    }
  }
}

void mlp_bwd(const MlpBwdParams& p) {
  const KernelTable& table = kernels();
  record_run("mlp_bwd", table.isa);
  const DType dtype = p.dy.dtype;
  if (p.db_out != nullptr) {
    LinearBwdParams sums = {};
    sums.M = p.M;
    sums.N = p.N;
    sums.dy = p.dy;
    sums.db = p.db_out;
    run_slope(sums, nullptr, table);
  }
  const bool reaches_in = p.dx || p.dw_in || p.db_in || p.dw_factor;
  if (!reaches_in && p.dw_out == nullptr) return;
  const Parameter b_in = bias_of(table, p.b_in, p.b_in_stride, dtype, p.hidden);
  const Parts columns(p.hidden, columns_of_part(p));
  const int64_t part_bytes = round_up(p.M * columns.largest() * element_bytes(dtype), 64);
  const Scratch memory((1 + reaches_in + p.gated) * part_bytes);
  auto* const h = static_cast<char*>(memory.get());
  void* const f = p.gated ? h + part_bytes : nullptr;
  void* const dh = reaches_in ? h + (1 + p.gated) * part_bytes : nullptr;
  Sum dx(p.dx ? p.M : 0, p.K, columns.count() * (p.gated ? 2 : 1), dtype);
  for (int64_t c = 0; c < columns.count(); ++c) {
    const int64_t i = columns.begin(c), width = columns.size(c);
    const Matrix w_in = part_of(p.w_in, i, 0), w_factor = part_of(p.w_factor, i, 0);
    MlpMiddle middle = {};
    middle.columns = width;
    middle.z = p.z == nullptr ? h : at(p.z, i, dtype);
    middle.z_stride = p.z == nullptr ? width : p.hidden;
    if (p.gated) middle.f = p.z == nullptr ? f : at(p.factor, i, dtype);
    middle.h = h;
    middle.dh = dh;
    middle.df = f;
    middle.dtype = dtype;
    middle.activation = p.activation;
    if (p.z == nullptr) {
      GemmParams g = product(p.M, width, p.K, p.x, turned(w_in), h, width);
      g.epilogue.bias = p.b_in == nullptr ? nullptr : b_in.get() + i;
      run_gemm(g, table);
      if (p.gated) run_gemm(product(p.M, width, p.K, p.x, turned(w_factor), f, width), table);
    }
    if (reaches_in)
      run_gemm(product(p.M, width, p.N, p.dy, part_of(p.w_out, 0, i), dh, width), table);
    run_middle_bwd(middle, table, p.M, at(p.db_in, i, dtype));
    const Matrix dz = {dh, width, 1, dtype}, df = {f, width, 1, dtype};
    if (p.dw_out != nullptr) {
      run_gemm(product(p.N, width, p.M, turned(p.dy), {h, width, 1, dtype}, at(p.dw_out, i, dtype),
                       p.hidden),
               table);
    }
    if (p.dw_in != nullptr) {
      run_gemm(product(width, p.K, p.M, turned(dz), p.x, at(p.dw_in, i * p.K, dtype), p.K), table);
    }
    if (p.dw_factor != nullptr) {
      run_gemm(product(width, p.K, p.M, turned(df), p.x, at(p.dw_factor, i * p.K, dtype), p.K),
               table);
    }
    if (p.dx == nullptr) continue;
    dx.add(product(p.M, p.K, width, dz, w_in, p.dx, p.K), table);
    if (p.gated) dx.add(product(p.M, p.K, width, df, w_factor, p.dx, p.K), table);
  }
}

}  // namespace fastnn
