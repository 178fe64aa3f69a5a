// Attention, forward and backward, against double: lengths around the tile of queries and the block
// of keys, few queries (decoding), head dimensions around the vector width, masks, windows, grouped
// heads, dropout, page ends, several threads.
#include "cpu/attention.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/simd/philox.h"
#include "tests/buffer.h"
#include "tests/isa.h"
#include "tests/pool.h"

using namespace fastnn;
using namespace fastnn::test;

namespace {

struct Shape {
  int64_t B, H, H_kv, S_q, S_k, D, D_v;
  int64_t queries() const { return B * H * S_q; }
  int64_t keys() const { return B * H_kv * S_k; }
};
struct Options {
  MaskKind mask = MaskKind::kNone;
  bool mask_per_query = true;
  int64_t left = -1, right = -1;
  double softcap = 0, dropout = 0;
};

// One call in guarded memory, and the formula in double.
class Call {
 public:
  Call(const Shape& s, DType type, const Options& o, Flush flush)
      : s_(s),
        type_(type),
        o_(o),
        q_(s.queries() * s.D, type, flush, 0),
        k_(s.keys() * s.D, type, flush, 0),
        v_(s.keys() * s.D_v, type, flush, 0),
        d_out_(s.queries() * s.D_v, type, flush, 0),
        bools_(s.B * s.H * s.S_q * s.S_k, flush),
        mask_(s.B * s.H * s.S_q * s.S_k, type, flush, 0) {
    Random random(static_cast<uint64_t>(s.S_q * 131 + s.S_k * 7 + s.D));
    fill(q_, s.queries() * s.D, random);
    fill(k_, s.keys() * s.D, random);
    fill(v_, s.keys() * s.D_v, random);
    fill(d_out_, s.queries() * s.D_v, random);
    for (int64_t i = 0; i < s.B * s.H * s.S_q * s.S_k; ++i) {
      bools_[i] = random.uniform() < 0.7;
      mask_.set(i, random.uniform());
    }
    p_.B = s.B;
    p_.H = s.H;
    p_.H_kv = s.H_kv;
    p_.S_q = s.S_q;
    p_.S_k = s.S_k;
    p_.D = s.D;
    p_.D_v = s.D_v;
    p_.q = {q_.memory.data(), s.H * s.S_q * s.D, s.S_q * s.D, s.D};
    p_.k = {k_.memory.data(), s.H_kv * s.S_k * s.D, s.S_k * s.D, s.D};
    p_.v = {v_.memory.data(), s.H_kv * s.S_k * s.D_v, s.S_k * s.D_v, s.D_v};
    p_.dtype = p_.mask_dtype = type;
    p_.scale = 0.25f;
    p_.softcap = static_cast<float>(o.softcap);
    p_.window_left = o.left;
    p_.window_right = o.right;
    p_.dropout = static_cast<float>(o.dropout);
    p_.seed = 12345678901234567u;
    p_.lse_head_stride = s.S_q;
    p_.mask_kind = o.mask;
    p_.mask = o.mask == MaskKind::kBool ? static_cast<const void*>(bools_.data())
                                        : static_cast<const void*>(mask_.memory.data());
    if (o.mask != MaskKind::kNone) {
      p_.mask_strides[0] = s.H * s.S_q * s.S_k;
      p_.mask_strides[1] = s.S_q * s.S_k;
      p_.mask_strides[2] = o.mask_per_query ? s.S_k : 0;
      p_.mask_strides[3] = 1;
    }
  }

  AttentionFwdParams forward(void* out, float* lse) const {
    return {p_, out, s_.H * s_.S_q * s_.D_v, s_.S_q * s_.D_v, s_.D_v, lse};
  }
  AttentionBwdParams backward(const void* out, const float* lse, void* dq, void* dk,
                              void* dv) const {
    const Heads heads = {out, s_.H * s_.S_q * s_.D_v, s_.S_q * s_.D_v, s_.D_v};
    Heads d_out = heads;
    d_out.data = d_out_.memory.data();
    return {p_,
            heads,
            d_out,
            lse,
            dq,
            dk,
            dv,
            {s_.H * s_.S_q * s_.D, s_.S_q * s_.D, s_.D},
            {s_.H_kv * s_.S_k * s_.D, s_.S_k * s_.D, s_.D},
            {s_.H_kv * s_.S_k * s_.D_v, s_.S_k * s_.D_v, s_.D_v}};
  }
  bool intact() const {
    return q_.memory.intact() && k_.memory.intact() && v_.memory.intact() &&
           d_out_.memory.intact() && bools_.intact() && mask_.memory.intact();
  }

  // Weights of one query over all keys, and what multiplies each by dropout; the sum of |score|.
  struct Row {
    std::vector<double> weight, keep, slope;
    double lse = INFINITY, size = 0;
  };
  Row row(int64_t b, int64_t h, int64_t i) const {
    Row r;
    const auto n = static_cast<size_t>(s_.S_k);
    r.weight.assign(n, -INFINITY);
    r.keep.assign(n, 1);
    r.slope.assign(n, 1);
    const int64_t kv = h / (s_.H / s_.H_kv);
    double top = -INFINITY;
    for (int64_t j = 0; j < s_.S_k; ++j) {
      if ((o_.left >= 0 && j < i - o_.left) || (o_.right >= 0 && j > i + o_.right)) continue;
      double score = 0, size = 0;
      for (int64_t d = 0; d < s_.D; ++d) {
        const double term = q_.at(((b * s_.H + h) * s_.S_q + i) * s_.D + d) *
                            k_.at(((b * s_.H_kv + kv) * s_.S_k + j) * s_.D + d) * 0.25;
        score += term;
        size += std::abs(term);
      }
      r.size = std::max(r.size, size);
      if (o_.softcap != 0) {
        const double t = std::tanh(score / o_.softcap);
        score = o_.softcap * t;
        r.slope[static_cast<size_t>(j)] = 1 - t * t;
      }
      const int64_t at = ((b * s_.H + h) * s_.S_q + (o_.mask_per_query ? i : 0)) * s_.S_k + j;
      if (o_.mask == MaskKind::kBool && !bools_[at]) score = -INFINITY;
      if (o_.mask == MaskKind::kAdditive) score += mask_.at(at);
      r.weight[static_cast<size_t>(j)] = score;
      top = std::max(top, score);
    }
    double sum = 0;
    for (double& w : r.weight) sum += w = top == -INFINITY ? 0 : std::exp(w - top);
    for (double& w : r.weight) w = sum == 0 ? 0 : w / sum;
    if (sum > 0) r.lse = top + std::log(sum);
    for (int64_t j = 0; o_.dropout > 0 && j < s_.S_k; ++j) {
      const auto counter =
          static_cast<uint64_t>(((b * s_.H + h) * s_.S_q + i) * ((s_.S_k + 3) / 4) + j / 4);
      const bool dropped = philox(p_.seed, counter).x[j % 4] <
                           static_cast<uint64_t>(static_cast<double>(p_.dropout) * 4294967296.0);
      r.keep[static_cast<size_t>(j)] = dropped ? 0 : 1 / (1 - static_cast<double>(p_.dropout));
    }
    return r;
  }

  void check_forward(const char* isa, const Buffer& out, const float* lse) const {
    for_each_row([&](int64_t b, int64_t h, int64_t i, int64_t at, const Row& r) {
      check_close(isa, "lse", lse[at], r.lse, 1e-5 * (1 + r.size), at, 0);
      const int64_t kv = b * s_.H_kv + h / (s_.H / s_.H_kv);
      for (int64_t d = 0; d < s_.D_v; ++d) {
        double truth = 0, size = 0;
        for (int64_t j = 0; j < s_.S_k; ++j) {
          const double w = r.weight[static_cast<size_t>(j)] * r.keep[static_cast<size_t>(j)];
          truth += w * v_.at((kv * s_.S_k + j) * s_.D_v + d);
          size += w * std::abs(v_.at((kv * s_.S_k + j) * s_.D_v + d));
        }
        // Products of pairs take the weights rounded to bfloat16: half of its step at 1, 2^-7.
        const double weights = rounds_weights(isa) ? std::ldexp(size, -8) : 0;
        const double bound = 3e-6 * size * (1 + r.size) + weights + storing_bound(truth, type_);
        check_close(isa, "output", out.at(at * s_.D_v + d), truth, bound, at, d);
      }
      (void)i;
    });
  }

  void check_backward(const char* isa, const Buffer& dq, const Buffer& dk, const Buffer& dv) const {
    std::vector<double> k_truth(static_cast<size_t>(s_.keys() * s_.D)),
        v_truth(static_cast<size_t>(s_.keys() * s_.D_v));
    for_each_row([&](int64_t b, int64_t h, int64_t, int64_t at, const Row& r) {
      const int64_t kv = (b * s_.H_kv + h / (s_.H / s_.H_kv)) * s_.S_k;
      std::vector<double> dp(static_cast<size_t>(s_.S_k));
      double delta = 0;
      for (int64_t j = 0; j < s_.S_k; ++j) {
        const auto n = static_cast<size_t>(j);
        for (int64_t d = 0; d < s_.D_v; ++d) {
          const double g = d_out_.at(at * s_.D_v + d);
          dp[n] += g * v_.at((kv + j) * s_.D_v + d) * r.keep[n];
          v_truth[static_cast<size_t>((kv + j) * s_.D_v + d)] += g * r.weight[n] * r.keep[n];
        }
        delta += dp[n] * r.weight[n];
      }
      for (int64_t d = 0; d < s_.D; ++d) {
        double truth = 0;
        for (int64_t j = 0; j < s_.S_k; ++j) {
          const auto n = static_cast<size_t>(j);
          const double ds = r.weight[n] * (dp[n] - delta) * r.slope[n] * 0.25;
          truth += ds * k_.at((kv + j) * s_.D + d);
          k_truth[static_cast<size_t>((kv + j) * s_.D + d)] += ds * q_.at(at * s_.D + d);
        }
        gradient_close(isa, "dq", dq.at(at * s_.D + d), truth, at, d);
      }
    });
    for (size_t i = 0; i < k_truth.size(); ++i)
      gradient_close(isa, "dk", dk.at(static_cast<int64_t>(i)), k_truth[i], 0, 0);
    for (size_t i = 0; i < v_truth.size(); ++i)
      gradient_close(isa, "dv", dv.at(static_cast<int64_t>(i)), v_truth[i], 0, 0);
  }

 private:
  bool rounds_weights(const char* isa) const {
    return type_ == DType::kBFloat16 && std::string(isa) == "avx512_bf16";
  }
  // Without outliers: gradients are differences, and the bounds below know nothing of their terms.
  static void fill(Buffer& b, int64_t n, Random& random) {
    for (int64_t i = 0; i < n; ++i) b.set(i, 2 * random.uniform() - 1);
  }
  template <class F>
  void for_each_row(F&& f) const {
    for (int64_t b = 0; b < s_.B; ++b) {
      for (int64_t h = 0; h < s_.H; ++h) {
        for (int64_t i = 0; i < s_.S_q; ++i) f(b, h, i, (b * s_.H + h) * s_.S_q + i, row(b, h, i));
      }
    }
  }
  // The saved output is rounded to its type, and delta with it: what half precision can give.
  void gradient_close(const char* isa, const char* what, double got, double truth, int64_t at,
                      int64_t d) const {
    const double relative = type_ == DType::kFloat32   ? 1e-4
                            : type_ == DType::kFloat16 ? 1e-2
                                                       : 6e-2;
    check_close(isa, what, got, truth, relative * (1 + std::abs(truth)), at, d);
  }
  void check_close(const char* isa, const char* what, double got, double truth, double bound,
                   int64_t at, int64_t d) const {
    CHECK(std::abs(got - truth) <= bound || (std::isinf(truth) && got == truth),
          "%s %s %s (%ld,%ld,%ld,%ld,%ld,%ld,%ld) mask %d window %ld %ld cap %g dropout %g, query "
          "%ld feature %ld: %.9g, truth %.9g, bound %.3g",
          isa, type_name(type_), what, static_cast<long>(s_.B), static_cast<long>(s_.H),
          static_cast<long>(s_.H_kv), static_cast<long>(s_.S_q), static_cast<long>(s_.S_k),
          static_cast<long>(s_.D), static_cast<long>(s_.D_v), static_cast<int>(o_.mask),
          static_cast<long>(o_.left), static_cast<long>(o_.right), o_.softcap, o_.dropout,
          static_cast<long>(at), static_cast<long>(d), got, truth, bound);
  }

  Shape s_;
  DType type_;
  Options o_;
  Buffer q_, k_, v_, d_out_;
  Guarded<uint8_t> bools_;
  Buffer mask_;
  AttentionParams p_ = {};
};

void check_call(const char* isa, const Shape& s, DType type, const Options& options) {
  const Flush flush = s.S_k % 2 == 0 ? Flush::kStart : Flush::kEnd;
  const Call call(s, type, options, flush);
  Buffer out(s.queries() * s.D_v, type, flush, 0);
  Guarded<float> lse(s.queries(), flush);
  attention_fwd(call.forward(out.memory.data(), lse.data()));
  call.check_forward(isa, out, lse.data());
  Buffer dq(s.queries() * s.D, type, flush, 0), dk(s.keys() * s.D, type, flush, 0),
      dv(s.keys() * s.D_v, type, flush, 0);
  attention_bwd(call.backward(out.memory.data(), lse.data(), dq.memory.data(), dk.memory.data(),
                              dv.memory.data()));
  call.check_backward(isa, dq, dk, dv);
  CHECK(call.intact() && out.memory.intact() && lse.intact() && dq.memory.intact() &&
            dk.memory.intact() && dv.memory.intact(),
        "%s wrote outside, S_q %ld S_k %ld D %ld", isa, static_cast<long>(s.S_q),
        static_cast<long>(s.S_k), static_cast<long>(s.D));
}

TEST(lengths_around_tile_and_block) {
  for_each_isa([](const char* isa) {
    for (const int64_t S_q : {1, 2, 8, 9, 15, 17, 47, 49}) {
      for (const int64_t S_k : {1, 5, 95, 97, 193}) {
        const DType type = kAllTypes[static_cast<size_t>(S_q + S_k) % 3];
        check_call(isa, {1, 1, 1, S_q, S_k, 6, 5}, type, {});
      }
    }
  });
}

TEST(every_head_dimension) {
  for_each_isa([](const char* isa) {
    for (int64_t D = 1; D <= 36; ++D) {
      for (const DType type : kAllTypes) {
        check_call(isa, {1, 1, 1, 3, 21, D, 37 - D}, type, {});
        check_call(isa, {1, 1, 1, 11, 21, D, 37 - D}, type, {});
      }
    }
  });
}

TEST(few_queries_in_groups_of_any_size) {
  for_each_isa([](const char* isa) {
    for (const int64_t group : {1, 2, 3, 5, 8, 15}) {
      for (const DType type : kAllTypes) {
        check_call(isa, {2, 2 * group, 2, 1, 40, 20, 33}, type, {});
        check_call(isa, {1, group, 1, 2, 270, 16, 16}, type, {});
      }
    }
    // Keys in parts.
    check_call(isa, {1, 2, 1, 1, 1100, 8, 8}, DType::kFloat32, {});
    check_call(isa, {1, 2, 1, 3, 1100, 8, 8}, DType::kBFloat16, {});
  });
}

TEST(options_with_few_and_many_queries) {
  const Options all[] = {{MaskKind::kBool},
                         {MaskKind::kAdditive},
                         {MaskKind::kBool, false},
                         {MaskKind::kAdditive, false},
                         {MaskKind::kNone, true, -1, 0},
                         {MaskKind::kNone, true, 3, 2},
                         {MaskKind::kNone, true, 0, -1},
                         {MaskKind::kNone, true, -1, -1, 2.0},
                         {MaskKind::kNone, true, -1, -1, 0, 0.3},
                         {MaskKind::kAdditive, true, 30, 20, 3.0, 0.2}};
  for_each_isa([&](const char* isa) {
    for (const Options& options : all) {
      for (const int64_t S_q : {1, 4, 60}) {
        check_call(isa, {2, 4, 2, S_q, 105, 12, 17}, DType::kFloat32, options);
        check_call(isa, {1, 2, 1, S_q, 7, 9, 3}, DType::kBFloat16, options);
      }
    }
  });
}

TEST(same_bits_with_any_number_of_threads) {
  for_each_isa([](const char* isa) {
    for (const int64_t S_q : {1, 100}) {
      const Shape s = {2, 4, 2, S_q, 1200, 32, 32};
      const Call call(s, DType::kFloat32, {}, Flush::kEnd);
      std::vector<float> outs[2], lse(static_cast<size_t>(s.queries()));
      for (int i = 0; i < 2; ++i) {
        outs[i].resize(static_cast<size_t>(s.queries() * s.D_v));
        const PoolGuard pool(i == 0 ? 1 : 3);
        attention_fwd(call.forward(outs[i].data(), lse.data()));
        CHECK(i == 0 || pool.runs() > 0, "%s: the pool was not used", isa);
      }
      CHECK(std::memcmp(outs[0].data(), outs[1].data(), outs[0].size() * 4) == 0,
            "%s: one and three threads differ, S_q %ld", isa, static_cast<long>(S_q));
    }
  });
}

}  // namespace
