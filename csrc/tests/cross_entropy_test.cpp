// Cross-entropy, forward and backward, against double: all numbers of classes around the vector
// width, every kind of target and option, rows apart, misaligned and at page ends, several threads.
#include "cpu/cross_entropy.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

constexpr double kEps = 0x1p-23;
constexpr int64_t kIgnored = -100;

struct Options {
  bool probabilities, weight;
  double smoothing, z_loss, softcap;
};
constexpr Options kOptions[] = {
    {false, false, 0, 0, 0},    {false, true, 0, 0, 0},      {false, true, 0.1, 0, 0},
    {false, false, 0, 0.25, 0}, {false, false, 0, 0, 2},     {false, true, 0.25, 0.25, 2},
    {true, false, 0, 0, 0},     {true, true, 0.25, 0.25, 2}, {false, false, 1, 0, 0}};

// One call: its operands in guarded memory, and the formula in double.
class Loss {
 public:
  Loss(int64_t rows, int64_t classes, int64_t row_stride, DType type, const Options& o, Flush flush,
       int64_t offset)
      : rows_(rows),
        classes_(classes),
        row_stride_(row_stride),
        type_(type),
        o_(o),
        x_(rows == 0 ? 0 : (rows - 1) * row_stride + classes, type, flush, offset),
        share_(o.probabilities ? rows * classes : 0, type, flush, offset),
        weight_(o.weight ? classes : 0, flush, offset),
        target_(rows, flush) {
    Random random(static_cast<uint64_t>(classes * 31 + rows));
    x_.fill(rows == 0 ? 0 : (rows - 1) * row_stride + classes, random);
    if (o.probabilities) {
      for (int64_t i = 0; i < rows * classes; ++i) share_.set(i, random.uniform());
    }
    double sum = 0;
    for (int64_t c = 0; o.weight && c < classes; ++c) {
      weight_[c] = static_cast<float>(0.5 + random.uniform());
      sum += weight_[c];
    }
    for (int64_t r = 0; r < rows; ++r) target_[r] = r % 4 == 3 ? kIgnored : (r * 7 + 1) % classes;
    p_ = {rows,
          classes,
          x_.memory.data(),
          row_stride,
          type,
          o.probabilities ? nullptr : target_.data(),
          o.probabilities ? share_.memory.data() : nullptr,
          o.weight ? weight_.data() : nullptr,
          static_cast<float>(o.weight ? sum : static_cast<double>(classes)),
          kIgnored,
          static_cast<float>(o.smoothing),
          static_cast<float>(o.z_loss),
          static_cast<float>(o.softcap)};
  }

  const CrossEntropyParams& params() const { return p_; }
  bool ignored(int64_t r) const { return !o_.probabilities && target_[r] == kIgnored; }
  bool intact() const {
    return x_.memory.intact() && share_.memory.intact() && weight_.intact() && target_.intact();
  }

  double logit(int64_t r, int64_t c) const {
    const double x = x_.at(r * row_stride_ + c);
    return o_.softcap == 0 ? x : o_.softcap * std::tanh(x / o_.softcap);
  }
  double slope(int64_t r, int64_t c) const {
    if (o_.softcap == 0) return 1;
    const double h = std::tanh(x_.at(r * row_stride_ + c) / o_.softcap);
    return 1 - h * h;
  }
  double log_sum(int64_t r) const {
    double top = -INFINITY, sum = 0;
    for (int64_t c = 0; c < classes_; ++c) top = std::max(top, logit(r, c));
    for (int64_t c = 0; c < classes_; ++c) sum += std::exp(logit(r, c) - top);
    return top + std::log(sum);
  }
  // Weighted share of a class in the target.
  double share(int64_t r, int64_t c) const {
    const double even = o_.smoothing / static_cast<double>(classes_);
    const double own = o_.probabilities ? share_.at(r * classes_ + c) : c == target_[r] ? 1.0 : 0.0;
    return ((1 - o_.smoothing) * own + even) * (o_.weight ? weight_[c] : 1.0);
  }

  void check_forward(const char* isa, const float* loss, const float* z, const float* stats) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const double lse = log_sum(r);
      double truth = 0, size = 0;
      for (int64_t c = 0; c < classes_; ++c) {
        truth += share(r, c) * (lse - logit(r, c));
        size += share(r, c) * (std::abs(lse) + std::abs(logit(r, c)) + 8);
      }
      const double steps = 16 + static_cast<double>(classes_) / 16;
      const double z_truth = ignored(r) ? 0 : o_.z_loss * lse * lse;
      if (ignored(r)) truth = size = 0;
      close(isa, "loss", loss[r], truth, kEps * size * steps, r, 0);
      if (z != nullptr) close(isa, "z", z[r], z_truth, kEps * 32 * (1 + z_truth), r, 0);
      if (!ignored(r))
        close(isa, "logsumexp", stats[2 * r] + stats[2 * r + 1], lse, kEps * 32, r, 0);
    }
  }
  void check_backward(const char* isa, const Buffer& dx, double scale, double z_scale) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const double lse = log_sum(r);
      double shares = 0;
      for (int64_t c = 0; c < classes_; ++c) shares += share(r, c);
      for (int64_t c = 0; c < classes_; ++c) {
        const double e = std::exp(logit(r, c) - lse), z = 2 * o_.z_loss * lse * z_scale;
        const double truth =
            ignored(r) ? 0 : slope(r, c) * (e * (shares * scale + z) - share(r, c) * scale);
        const double size = e * (shares * scale + std::abs(z)) + share(r, c) * scale;
        const double bound = kEps * 64 * size + storing_bound(truth, type_);
        close(isa, "gradient", dx.at(r * classes_ + c), truth, bound, r, c);
      }
    }
  }

 private:
  void close(const char* isa, const char* what, double got, double truth, double bound, int64_t r,
             int64_t c) const {
    CHECK(
        std::abs(got - truth) <= bound,
        "%s %s %s (%ld, %ld) probabilities %d smoothing %g z %g cap %g at (%ld, %ld): %.9g, truth "
        "%.9g, bound %.3g",
        isa, type_name(type_), what, static_cast<long>(rows_), static_cast<long>(classes_),
        o_.probabilities, o_.smoothing, o_.z_loss, o_.softcap, static_cast<long>(r),
        static_cast<long>(c), got, truth, bound);
  }

  int64_t rows_, classes_, row_stride_;
  DType type_;
  Options o_;
  Buffer x_, share_;
  Guarded<float> weight_;
  Guarded<int64_t> target_;
  CrossEntropyParams p_;
};

void check_call(const char* isa, int64_t rows, int64_t classes, int64_t row_stride, DType type,
                const Options& options, Flush flush, int64_t offset) {
  const Loss loss(rows, classes, row_stride, type, options, flush, offset);
  Guarded<float> row_loss(rows, flush), z(rows, flush), stats(2 * rows, flush);
  const bool wants_z = options.z_loss != 0;
  cross_entropy_fwd({loss.params(), row_loss.data(), wants_z ? z.data() : nullptr, stats.data()});
  loss.check_forward(isa, row_loss.data(), wants_z ? z.data() : nullptr, stats.data());
  const float scale = 0.75f, z_scale = 0.5f;
  Buffer dx(rows * classes, type, flush, offset);
  cross_entropy_bwd({loss.params(), stats.data(), &scale, &z_scale, 0, dx.memory.data()});
  loss.check_backward(isa, dx, scale, z_scale);
  CHECK(loss.intact() && row_loss.intact() && z.intact() && stats.intact() && dx.memory.intact(),
        "%s wrote outside, classes %ld", isa, static_cast<long>(classes));
}

TEST(every_number_of_classes_and_misalignment) {
  for_each_isa([](const char* isa) {
    for (int64_t classes = 1; classes <= 67; ++classes) {
      for (const DType type : kAllTypes) {
        const Flush flush = classes % 2 == 0 ? Flush::kStart : Flush::kEnd;
        check_call(isa, 5, classes, classes, type, kOptions[0], flush, classes % 3);
        check_call(isa, 2, classes, classes, type, kOptions[5], flush, classes % 3);
        check_call(isa, 2, classes, classes, type, kOptions[7], flush, classes % 3);
      }
    }
  });
}

TEST(every_option) {
  for_each_isa([](const char* isa) {
    for (const Options& options : kOptions) {
      for (const DType type : kAllTypes) {
        for (const int64_t classes : {3, 16, 130})
          check_call(isa, 6, classes, classes, type, options, Flush::kEnd, 1);
      }
    }
  });
}

TEST(rows_apart_and_expanded) {
  for_each_isa([](const char* isa) {
    for (const int64_t stride : {int64_t{0}, int64_t{40}, int64_t{74}})
      check_call(isa, 5, 37, stride, DType::kFloat32, kOptions[2], Flush::kEnd, 0);
  });
}

TEST(no_rows_and_long_rows) {
  for_each_isa([](const char* isa) {
    check_call(isa, 0, 5, 5, DType::kFloat32, kOptions[0], Flush::kEnd, 0);
    for (const DType type : kAllTypes)
      check_call(isa, 2, 5001, 5001, type, kOptions[5], Flush::kEnd, 0);
  });
}

TEST(targets_out_of_range_are_found) {
  std::vector<float> x(4 * 3);
  for (const int64_t bad : {int64_t{-1}, int64_t{3}, int64_t{1} << 40}) {
    const int64_t target[4] = {0, kIgnored, 2, bad};
    CrossEntropyParams p = {};
    p.rows = 4;
    p.classes = 3;
    p.x = x.data();
    p.target = target;
    p.ignore_index = kIgnored;
    CHECK(first_bad_target(p) == 3, "%ld", static_cast<long>(bad));
    p.rows = 3;
    CHECK(first_bad_target(p) == -1, "%ld", static_cast<long>(bad));
  }
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_isa([](const char* isa) {
    const int64_t rows = 400, classes = 257;
    const Loss loss(rows, classes, classes, DType::kFloat32, kOptions[5], Flush::kEnd, 0);
    const float scale = 1.f;
    std::vector<float> results[2];
    for (int i = 0; i < 2; ++i) {
      results[i].resize(static_cast<size_t>(rows * (classes + 4)));
      float* const at = results[i].data();
      const PoolGuard pool(i == 0 ? 1 : 4);
      cross_entropy_fwd({loss.params(), at, at + rows, at + 2 * rows});
      cross_entropy_bwd({loss.params(), at + 2 * rows, &scale, &scale, 0, at + 4 * rows});
      CHECK(i == 0 || pool.runs() > 0, "%s: the pool was not used", isa);
    }
    CHECK(std::memcmp(results[0].data(), results[1].data(), results[0].size() * 4) == 0,
          "%s: one and four threads differ", isa);
  });
}

}  // namespace
