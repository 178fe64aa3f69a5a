// Chunks of rows go through three products each, and nothing of rows x classes is ever kept:
//   logits of the chunk, all classes          float32, the only large scratch
//   loss and softmax statistics of its rows   (kernels/cross_entropy.h)
//   by blocks of classes, a block's gradient still in the caches from one step to the next:
//     gradient of the logits -> dx of the chunk, added up over blocks
//                            -> dw of the block, added up over chunks
// A chunk is as many rows as the scratch holds: the weight is read twice, and its gradient read and
// written, once per chunk.
#include "cpu/linear_cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/gemm/params.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/parameters.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Beside the results, a float32 copy of a 16-bit weight's gradient and the products' panels.
constexpr int64_t kScratchBytes = int64_t{56} << 20;
// More rows gain nothing: packing the weight for so many is 6 % of a product, and dw adds up as
// many in one pass (gemm/gemm.h: kGatherUnits).
constexpr int64_t kMostRows = 512;
// Of a block's gradient: what the second-level cache holds beside a panel.
constexpr int64_t kBlockBytes = int64_t{1} << 20;
constexpr int64_t kFewestColumns = 1024;  // of a block: each reads and writes dx of the chunk once
constexpr int64_t kColumnItem = 64;       // classes: whole lines of any type
constexpr int64_t kGrain = 16384;         // logits worth a thread: about 5 us of work

// Rows an odd number of cache lines apart: at multiples of 4 KiB they would share one set.
int64_t row_stride(int64_t columns, int64_t size) {
  const int64_t lines = (columns * size + 63) / 64;
  return (lines | 1) * 64 / size;
}

struct Plan {
  int64_t rows, columns;  // of a chunk; of a block
};

Plan plan(const LinearCrossEntropyParams& p, int64_t counted) {
  const int64_t size = element_bytes(p.x.dtype), classes = std::max<int64_t>(1, p.loss.classes);
  const int64_t fixed = 2 * classes * 4;                   // bias and its gradient
  const int64_t row = classes * 4 + p.K * (4 + size + 4);  // logits, dx, x copied and packed
  Plan found;
  found.rows = (kScratchBytes - fixed - kBlockBytes) / row;
  found.rows = std::clamp<int64_t>(found.rows, 1, kMostRows);
  const int64_t chunks = (counted + found.rows - 1) / found.rows;
  if (chunks > 0) found.rows = (counted + chunks - 1) / chunks;  // alike: no thin last chunk
  found.columns = std::max(kFewestColumns, kBlockBytes / (found.rows * size));
  found.columns = std::min(round_up(found.columns, kColumnItem), round_up(classes, kColumnItem));
  return found;
}

class Loss {
 public:
  Loss(const LinearCrossEntropyParams& p, const KernelTable& table)
      : p_(p),
        table_(table),
        size_(element_bytes(p.x.dtype)),
        gradients_(p.dx != nullptr || p.dw != nullptr || p.db != nullptr),
        counted_(counted_rows(p)),
        plan_(plan(p, static_cast<int64_t>(counted_.size()))),
        chunks_((static_cast<int64_t>(counted_.size()) + plan_.rows - 1) / plan_.rows),
        bias_(table, p.bias, p.bias_stride, p.x.dtype, p.bias ? p.loss.classes : 0,
              p.bias ? round_up(p.loss.classes, kStrip) : 0, 0.f),
        dz_bytes_(gradients_ ? plan_.rows * row_stride(plan_.columns, size_) * size_ : 0),
        memory_(chunks_ > 0 ? dz_bytes_ + plan_.rows * p.loss.classes * 4 : 0),
        x_copy_(chunks_ > 0 ? plan_.rows * p.K * size_ : 0),
        x_packed_(p.dw != nullptr && chunks_ > 0
                      ? table.packed_floats(p.K, plan_.rows, p.x.dtype) * 4
                      : 0),
        dx_sums_(p.dx != nullptr && chunks_ > 0 ? plan_.rows * p.K * 4 : 0),
        dw_sums_(p.dw != nullptr && size_ == 2 && chunks_ > 1 ? p.loss.classes * p.K * 4 : 0),
        db_sums_(p.db != nullptr ? p.loss.classes * 4 : 0) {}

  void run() {
    if (p_.db != nullptr) std::memset(db_sums_.get(), 0, static_cast<size_t>(p_.loss.classes) * 4);
    if (p_.dw != nullptr && chunks_ == 0) {
      std::memset(p_.dw, 0, static_cast<size_t>(p_.loss.classes * p_.K * size_));
    }
    clear_ignored();
    const auto counted = static_cast<int64_t>(counted_.size());
    for (int64_t c = 0; c < chunks_; ++c) {
      take_rows(counted * c / chunks_, counted * (c + 1) / chunks_);
      compute_logits();
      if (p_.forward) compute_loss();
      if (gradients_) compute_gradients(c);
    }
    if (p_.db != nullptr) {
      table_.from_float32(floats(db_sums_), p_.loss.classes, p_.x.dtype, p_.db);
    }
  }

 private:
  float* logits() const { return floats(memory_) + dz_bytes_ / 4; }
  static float* floats(const Scratch& s) { return static_cast<float*>(s.get()); }
  static std::vector<int64_t> counted_rows(const LinearCrossEntropyParams& p) {
    std::vector<int64_t> found;
    found.reserve(static_cast<size_t>(p.loss.rows));
    for (int64_t r = 0; r < p.loss.rows; ++r) {
      if (p.loss.target[r] != p.loss.ignore_index) found.push_back(r);
    }
    return found;
  }

  // Loss and gradient of rows that do not count are zero.
  void clear_ignored() {
    for (int64_t r = 0; r < p_.loss.rows; ++r) {
      if (p_.loss.target[r] != p_.loss.ignore_index) continue;
      if (p_.forward) {
        p_.row_loss[r] = p_.stats[2 * r] = p_.stats[2 * r + 1] = 0.f;
        if (p_.row_z != nullptr) p_.row_z[r] = 0.f;
      }
      if (p_.dx != nullptr) {
        std::memset(static_cast<char*>(p_.dx) + r * p_.K * size_, 0,
                    static_cast<size_t>(p_.K * size_));
      }
    }
  }

  // Rows counted_[begin, end) become the chunk. They are read where they lie if they are
  // neighbours.
  void take_rows(int64_t begin, int64_t end) {
    row_ = counted_.data() + begin;
    rows_ = end - begin;
    x_ = p_.x;
    const auto* const data = static_cast<const char*>(p_.x.data);
    if (row_[rows_ - 1] - row_[0] == rows_ - 1) {
      x_.data = data + row_[0] * p_.x.row_stride * size_;
    } else {
      auto* to = static_cast<char*>(x_copy_.get());
      x_ = {to, p_.K, 1, p_.x.dtype};
      for (int64_t i = 0; i < rows_; ++i) {
        const char* const from = data + row_[i] * p_.x.row_stride * size_;
        const int64_t step = p_.x.col_stride;
        const int64_t run = step == 1 ? p_.K : 1;
        for (int64_t k = 0; k < p_.K; k += run, to += run * size_) {
          std::memcpy(to, from + k * step * size_, static_cast<size_t>(run * size_));
        }
      }
    }
    for (auto* const v : {&row_loss_, &row_z_, &scale_, &z_scale_}) {
      v->resize(static_cast<size_t>(rows_));
    }
    target_.resize(static_cast<size_t>(rows_));
    stats_.resize(static_cast<size_t>(2 * rows_));
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t r = row_[i];
      const auto at = static_cast<size_t>(i);
      target_[at] = p_.loss.target[r];
      if (!p_.forward) std::memcpy(&stats_[2 * at], p_.stats + 2 * r, 8);
      if (!gradients_) continue;
      scale_[at] = p_.scale[r * p_.scale_stride];
      z_scale_[at] = p_.z_scale[r * p_.scale_stride];
    }
  }

  CrossEntropyParams loss_of_chunk() const {
    CrossEntropyParams found = p_.loss;
    found.rows = rows_;
    found.x = logits();
    found.x_row_stride = p_.loss.classes;
    found.dtype = DType::kFloat32;
    found.target = target_.data();
    return found;
  }

  void compute_logits() {
    GemmParams g = {};
    g.M = rows_;
    g.N = p_.loss.classes;
    g.K = p_.K;
    g.a = x_;
    g.b = {p_.w.data, p_.w.col_stride, p_.w.row_stride, p_.w.dtype};  // W^T
    g.c = logits();
    g.c_stride = g.N;
    g.c_dtype = DType::kFloat32;
    if (p_.bias != nullptr) g.epilogue.bias = bias_.get();
    run_gemm(g, table_);
  }

  void compute_loss() {
    const CrossEntropyFwdParams f = {loss_of_chunk(), row_loss_.data(),
                                     p_.row_z != nullptr ? row_z_.data() : nullptr, stats_.data()};
    parallel_for(rows_, std::max<int64_t>(1, kGrain / p_.loss.classes),
                 [&](int64_t begin, int64_t end) { table_.cross_entropy_fwd(f, begin, end); });
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t r = row_[i];
      const auto at = static_cast<size_t>(i);
      p_.row_loss[r] = row_loss_[at];
      if (p_.row_z != nullptr) p_.row_z[r] = row_z_[at];
      std::memcpy(p_.stats + 2 * r, &stats_[2 * at], 8);
    }
  }

  void compute_gradients(int64_t chunk) {
    if (p_.dw != nullptr) {  // once for all blocks
      parallel_for((p_.K + kStrip - 1) / kStrip, 8, [&](int64_t begin, int64_t end) {
        table_.pack(x_, p_.K, rows_, begin, end, floats(x_packed_));
      });
    }
    for (int64_t v0 = 0; v0 < p_.loss.classes; v0 += plan_.columns) {
      const int64_t columns = std::min(plan_.columns, p_.loss.classes - v0);
      const int64_t stride = row_stride(columns, size_);
      const LogitGradientParams g = {
          {loss_of_chunk(), stats_.data(), scale_.data(), z_scale_.data(), 1, memory_.get()},
          v0,
          stride,
          p_.x.dtype,
          p_.db != nullptr ? floats(db_sums_) : nullptr};
      const int64_t items = (columns + kColumnItem - 1) / kColumnItem;
      parallel_for(items, std::max<int64_t>(1, kGrain / (kColumnItem * rows_)),
                   [&](int64_t begin, int64_t end) {
                     table_.logit_gradient(g, v0 + begin * kColumnItem,
                                           v0 + std::min(columns, end * kColumnItem));
                   });
      const Matrix dz = {memory_.get(), stride, 1, p_.x.dtype};
      if (p_.dx != nullptr) add_dx(dz, v0, columns);
      if (p_.dw != nullptr) add_dw(dz, v0, columns, chunk);
    }
    if (p_.dx == nullptr) return;
    for (int64_t i = 0; i < rows_; ++i) {
      table_.from_float32(floats(dx_sums_) + i * p_.K, p_.K, p_.x.dtype,
                          static_cast<char*>(p_.dx) + row_[i] * p_.K * size_);
    }
  }

  void add_dx(const Matrix& dz, int64_t v0, int64_t columns) {
    GemmParams g = {};
    g.M = rows_;
    g.N = p_.K;
    g.K = columns;
    g.a = dz;
    g.b = p_.w;
    g.b.data = static_cast<const char*>(p_.w.data) + v0 * p_.w.row_stride * size_;
    g.c = dx_sums_.get();
    g.c_stride = p_.K;
    g.c_dtype = DType::kFloat32;
    if (v0 > 0) g.epilogue.addend = floats(dx_sums_);
    run_gemm(g, table_);
  }

  // Sums of a 16-bit gradient are kept as float32 until the last chunk rounds them.
  void add_dw(const Matrix& dz, int64_t v0, int64_t columns, int64_t chunk) {
    const bool last = chunk == chunks_ - 1;
    GemmParams g = {};
    g.M = columns;
    g.N = p_.K;
    g.K = rows_;
    g.a = {dz.data, dz.col_stride, dz.row_stride, dz.dtype};
    g.b = x_;
    g.b_packed = floats(x_packed_);
    float* const sums = (size_ == 4 ? static_cast<float*>(p_.dw) : floats(dw_sums_)) + v0 * p_.K;
    g.c = last ? static_cast<char*>(p_.dw) + v0 * p_.K * size_ : static_cast<void*>(sums);
    g.c_stride = p_.K;
    g.c_dtype = last ? p_.x.dtype : DType::kFloat32;
    if (chunk > 0) g.epilogue.addend = sums;
    run_gemm(g, table_);
  }

  const LinearCrossEntropyParams& p_;
  const KernelTable& table_;
  const int64_t size_;
  const bool gradients_;
  const std::vector<int64_t> counted_;  // rows that count
  const Plan plan_;
  const int64_t chunks_;
  const Parameter bias_;
  const int64_t dz_bytes_;  // whole cache lines
  const Scratch memory_;    // dz, then logits: together on huge pages
  const Scratch x_copy_, x_packed_, dx_sums_, dw_sums_, db_sums_;
  // The chunk: its rows' numbers, and what belongs to each.
  const int64_t* row_ = nullptr;
  int64_t rows_ = 0;
  Matrix x_ = {};
  std::vector<int64_t> target_;
  std::vector<float> stats_, row_loss_, row_z_, scale_, z_scale_;
};

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  const KernelTable& table = kernels();
  record_run(p.forward ? "linear_cross_entropy_fwd" : "linear_cross_entropy_bwd", table.isa);
  Loss(p, table).run();
}

}  // namespace fastnn
