// linear + cross-entropy through its driver, against double: loss, statistics and every gradient,
// in one pass and recomputed, over chunks of rows and blocks of classes, strided operands, several
// threads.
#include "cpu/linear_cross_entropy.h"

#include <cstring>
#include <vector>

#include "tests/isa.h"
#include "tests/matrix.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

constexpr double kEps = 0x1p-23;
constexpr int64_t kIgnored = -100;

struct Options {
  bool bias, weight;
  int64_t ignored_every;  // 0: none, 1: all
  double smoothing, z_loss, softcap;
};
constexpr Options kPlain = {true, false, 0, 0, 0, 0};
constexpr Options kOptions[] = {kPlain,
                                {false, false, 3, 0, 0, 0},
                                {true, true, 2, 0.25, 0, 0},
                                {true, true, 4, 0.25, 0.125, 2},
                                {true, false, 1, 0, 0.25, 0}};

struct Shape {
  int64_t rows, classes, K;
  DType type;
};

size_t at(int64_t i) { return static_cast<size_t>(i); }

// A call's operands in guarded memory, its results, and the same in double.
class Loss {
 public:
  Loss(const Shape& s, const Options& o, Order x_order, Order w_order, Flush flush)
      : s_(s),
        o_(o),
        x_(s.rows, s.K, x_order, s.type, flush, 3),
        w_(s.classes, s.K, w_order, s.type, flush, 4),
        bias_(o.bias ? 2 * s.classes - 1 : 0, s.type, flush, 1),
        weight_(o.weight ? s.classes : 0, flush, 0),
        target_(s.rows, flush),
        scale_(s.rows, flush, 0),
        z_scale_(s.rows, flush, 0),
        row_loss(s.rows, flush, 0),
        row_z(s.rows, flush, 0),
        stats(2 * s.rows, flush, 0),
        dx(s.rows * s.K, s.type, flush, 1),
        dw(s.classes * s.K, s.type, flush, 1),
        db(s.classes, s.type, flush, 1) {
    Random random(static_cast<uint64_t>(s.classes * 31 + s.rows));
    if (o.bias) bias_.fill(2 * s.classes - 1, random);
    for (int64_t c = 0; o.weight && c < s.classes; ++c) {
      weight_[c] = static_cast<float>(0.5 + random.uniform());
      weight_sum_ += weight_[c];
    }
    if (!o.weight) weight_sum_ = static_cast<double>(s.classes);
    for (int64_t r = 0; r < s.rows; ++r) {
      const bool out = o.ignored_every > 0 && r % o.ignored_every == o.ignored_every - 1;
      target_[r] = out ? kIgnored : (r * 7 + 1) % s.classes;
      scale_[r] = static_cast<float>(0.25 + random.uniform());
      z_scale_[r] = static_cast<float>(0.25 + random.uniform());
    }
    compute();
  }

  LinearCrossEntropyParams params(bool forward, bool gradients) {
    LinearCrossEntropyParams p = {};
    p.K = s_.K;
    p.x = x_.matrix;
    p.w = w_.matrix;
    p.bias = o_.bias ? bias_.memory.data() : nullptr;
    p.bias_stride = 2;
    p.loss.rows = s_.rows;
    p.loss.classes = s_.classes;
    p.loss.target = target_.data();
    p.loss.weight = o_.weight ? weight_.data() : nullptr;
    p.loss.weight_sum = static_cast<float>(weight_sum_);
    p.loss.ignore_index = kIgnored;
    p.loss.label_smoothing = static_cast<float>(o_.smoothing);
    p.loss.z_loss = static_cast<float>(o_.z_loss);
    p.loss.softcap = static_cast<float>(o_.softcap);
    p.forward = forward;
    p.row_loss = forward ? row_loss.data() : nullptr;
    p.row_z = forward && o_.z_loss != 0 ? row_z.data() : nullptr;
    p.stats = stats.data();
    if (!gradients) return p;
    p.scale = scale_.data();
    p.z_scale = z_scale_.data();
    p.scale_stride = 1;
    p.dx = dx.memory.data();
    p.dw = dw.memory.data();
    p.db = db.memory.data();
    return p;
  }

  void check_loss(const char* isa) const {
    for (int64_t r = 0; r < s_.rows; ++r) {
      const double size = logit_error_[at(r)] + kEps * (64 + static_cast<double>(s_.classes));
      const double bound =
          4 * size * (1 + std::abs(loss_[at(r)])) * (1 + weight_sum_ * o_.smoothing);
      close(isa, "loss", row_loss[r], loss_[at(r)], bound, r);
      if (o_.z_loss != 0) close(isa, "z", row_z[r], z_[at(r)], 8 * size * (1 + z_[at(r)]), r);
    }
  }
  void check_gradients(const char* isa) const {
    for (int64_t r = 0; r < s_.rows; ++r) {
      for (int64_t k = 0; k < s_.K; ++k) {
        double truth = 0, error = 0;
        for (int64_t c = 0; c < s_.classes; ++c) {
          truth += dz_[at(r * s_.classes + c)] * w_.at(c, k);
          error += dz_error_[at(r * s_.classes + c)] * std::abs(w_.at(c, k));
        }
        close(isa, "dx", dx.at(r * s_.K + k), truth, error + storing_bound(truth, s_.type),
              r * s_.K + k);
      }
    }
    for (int64_t c = 0; c < s_.classes; ++c) {
      double sum = 0, sum_error = 0;
      for (int64_t r = 0; r < s_.rows; ++r) {
        sum += dz_[at(r * s_.classes + c)];
        sum_error += dz_error_[at(r * s_.classes + c)];
      }
      close(isa, "db", db.at(c), sum, sum_error + storing_bound(sum, s_.type), c);
      for (int64_t k = 0; k < s_.K; ++k) {
        double truth = 0, error = 0;
        for (int64_t r = 0; r < s_.rows; ++r) {
          truth += dz_[at(r * s_.classes + c)] * x_.at(r, k);
          error += dz_error_[at(r * s_.classes + c)] * std::abs(x_.at(r, k));
        }
        close(isa, "dw", dw.at(c * s_.K + k), truth, error + storing_bound(truth, s_.type),
              c * s_.K + k);
      }
    }
  }
  void check_intact(const char* isa) const {
    const bool intact = x_.buffer.memory.intact() && w_.buffer.memory.intact() &&
                        bias_.memory.intact() && weight_.intact() && target_.intact() &&
                        scale_.intact() && z_scale_.intact() && row_loss.intact() &&
                        row_z.intact() && stats.intact() && dx.memory.intact() &&
                        dw.memory.intact() && db.memory.intact();
    CHECK(intact, "%s linear_cross_entropy wrote outside", isa);
  }
  void clear() {
    for (Buffer* b : {&dx, &dw, &db}) {
      std::memset(b->memory.data(), 0xff, at(b->memory.bytes()));
    }
  }

 private:
  void close(const char* isa, const char* what, double got, double truth, double bound,
             int64_t i) const {
    CHECK(std::abs(got - truth) <= bound,
          "%s linear_cross_entropy %s %s (%ld, %ld, %ld): element %ld is %.9g, not %.9g within "
          "%.2g",
          isa, what, type_name(s_.type), static_cast<long>(s_.rows), static_cast<long>(s_.classes),
          static_cast<long>(s_.K), static_cast<long>(i), got, truth, bound);
  }

  void compute() {
    const Product product = multiply(dense(x_), dense(w_), s_.rows, s_.classes, s_.K);
    for (int64_t r = 0; r < s_.rows; ++r) compute_row(r, product);
  }
  void compute_row(int64_t r, const Product& product) {
    const int64_t C = s_.classes;
    std::vector<double> logit(at(C)), slope(at(C), 1.0);
    double top = -INFINITY, sum = 0, error = 0;
    for (int64_t c = 0; c < C; ++c) {
      double& z = logit[at(c)];
      const double b = o_.bias ? bias_.at(2 * c) : 0;
      z = product.value[at(r * C + c)] + b;
      error = std::max(error, sum_bound(product.size[at(r * C + c)] + std::abs(b), s_.K));
      if (o_.softcap != 0) {
        const double h = std::tanh(z / o_.softcap);
        z = o_.softcap * h;
        slope[at(c)] = 1 - h * h;
      }
      top = std::max(top, z);
    }
    for (const double z : logit) sum += std::exp(z - top);
    const double lse = top + std::log(sum);
    const bool out = target_[r] == kIgnored;
    double loss = 0, shares = 0;
    std::vector<double> share(at(C));
    for (int64_t c = 0; c < C; ++c) {
      share[at(c)] =
          ((1 - o_.smoothing) * (c == target_[r] ? 1 : 0) + o_.smoothing / static_cast<double>(C)) *
          (o_.weight ? weight_[c] : 1.0);
      shares += share[at(c)];
      loss += share[at(c)] * (lse - logit[at(c)]);
    }
    loss_.push_back(out ? 0 : loss);
    z_.push_back(out ? 0 : o_.z_loss * lse * lse);
    logit_error_.push_back(error + kEps * 16 * (1 + std::abs(lse)));
    for (int64_t c = 0; c < C; ++c) {
      const double p = std::exp(logit[at(c)] - lse);
      const double z = 2 * o_.z_loss * lse * z_scale_[r];
      const double size = p * (shares * scale_[r] + std::abs(z)) + share[at(c)] * scale_[r];
      const double g = slope[at(c)] * (p * (shares * scale_[r] + z) - share[at(c)] * scale_[r]);
      dz_.push_back(out ? 0 : g);
      dz_error_.push_back(
          out ? 0 : size * (4 * logit_error_.back() + 64 * kEps) + storing_bound(g, s_.type));
    }
  }

  const Shape s_;
  const Options o_;
  Operand x_, w_;
  Buffer bias_;
  Guarded<float> weight_;
  Guarded<int64_t> target_;
  Guarded<float> scale_, z_scale_;
  double weight_sum_ = 0;
  std::vector<double> loss_, z_, logit_error_, dz_, dz_error_;

 public:
  Guarded<float> row_loss, row_z, stats;
  Buffer dx, dw, db;
};

void check(const char* isa, const Shape& s, const Options& o, Order x_order = Order::kRows,
           Order w_order = Order::kRows) {
  Loss loss(s, o, x_order, w_order, s.rows % 2 == 0 ? Flush::kStart : Flush::kEnd);
  linear_cross_entropy(loss.params(true, true));
  loss.check_loss(isa);
  loss.check_gradients(isa);
  loss.clear();
  linear_cross_entropy(loss.params(false, true));  // from the statistics
  loss.check_gradients(isa);
  linear_cross_entropy(loss.params(true, false));
  loss.check_loss(isa);
  loss.check_intact(isa);
}

TEST(every_option_and_type) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Options& o : kOptions) {
        check(isa, {7, 37, 19, type}, o);
        check(isa, {4, 16, 8, type}, o);
      }
    }
  });
}

TEST(orders_of_operands) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const Order x : kOrders) {
        for (const Order w : kOrders) check(isa, {6, 21, 11, type}, kOptions[3], x, w);
      }
    }
  });
}

// Every way of the product that makes the logits: dots, roles swapped, tiles.
TEST(numbers_of_rows_classes_and_features) {
  for_each_isa([](const char* isa) {
    for (const DType type : kAllTypes) {
      for (const int64_t rows : {0, 1, 2, 5, 16, 130}) check(isa, {rows, 17, 9, type}, kPlain);
      for (const int64_t classes : {1, 2, 15, 33, 97}) check(isa, {5, classes, 9, type}, kPlain);
      for (const int64_t K : {0, 1, 2, 3, 47}) check(isa, {5, 20, K, type}, kPlain);
    }
  });
}

// More rows than a chunk takes, more classes than a block: in float32 and bfloat16 sums go on.
TEST(chunks_and_blocks) {
  for (const DType type : kAllTypes) {
    check("best", {515, 40, 3, type}, kOptions[3]);
    check("best", {515, 40, 3, type}, kPlain);
    check("best", {6, 2100, 3, type}, kOptions[3]);
    check("best", {300, 1800, 2, type}, kOptions[1]);
  }
}

TEST(threads_change_no_bit) {
  for (const DType type : kAllTypes) {
    const Shape s = {150, 1100, 24, type};
    Loss one(s, kOptions[3], Order::kRows, Order::kRows, Flush::kStart);
    linear_cross_entropy(one.params(true, true));
    for (const int64_t threads : {2, 3, 8}) {
      Loss many(s, kOptions[3], Order::kRows, Order::kRows, Flush::kStart);
      const PoolGuard pool(threads);
      linear_cross_entropy(many.params(true, true));
      const auto same = [](const auto& a, const auto& b) {
        return std::memcmp(a.data(), b.data(), at(a.bytes())) == 0;
      };
      CHECK(same(one.row_loss, many.row_loss) && same(one.dx.memory, many.dx.memory) &&
                same(one.dw.memory, many.dw.memory) && same(one.db.memory, many.db.memory),
            "%s: %ld threads give other bits", type_name(type), static_cast<long>(threads));
    }
  }
}

}  // namespace
