// The matrix kernels on small shapes, from buffers of exact size, against plain loops in double:
// prints "right", or what is wrong. Built under AddressSanitizer and ThreadSanitizer, and with
// faults planted into the kernels' source (tests/test_cuda_emu_faults.py).
#include <cmath>
#include <cstdlib>
#include <vector>

#include "cuda/attention.h"
#include "cuda/common.cuh"
#include "cuda/linear.h"
#include "expect.h"

namespace fastnn {
namespace {

// A tensor of normal numbers in bfloat16 or float32, and the same in double.
struct Tensor {
  DType dtype;
  std::unique_ptr<uint16_t[]> halves;
  Buffer floats;
  std::vector<double> exact;
  Tensor(int64_t n, DType type, unsigned seed) : dtype(type), exact(static_cast<size_t>(n)) {
    floats = values(n, seed);
    if (type == DType::kBFloat16) {
      halves.reset(new uint16_t[static_cast<size_t>(n)]);
      for (int64_t i = 0; i < n; ++i) {
        halves[i] = from_float<BFloat16>(floats[i]).bits;
        floats[i] = to_float(BFloat16{halves[i]});
      }
    }
    for (int64_t i = 0; i < n; ++i) exact[i] = floats[i];
  }
  void* data() {
    return dtype == DType::kBFloat16 ? static_cast<void*>(halves.get()) : floats.get();
  }
  double operator[](int64_t i) const {
    return dtype == DType::kBFloat16 ? to_float(BFloat16{halves[i]}) : floats[i];
  }
};
using Memory = std::unique_ptr<void, decltype(&std::free)>;
Memory workspace(int64_t bytes) {
  return Memory(std::aligned_alloc(256, static_cast<size_t>((bytes + 256) / 256 * 256)),
                &std::free);
}
void compare(const char* what, int64_t m, int64_t n, const Tensor& got,
             const std::vector<double>& want, double step) {
  for (size_t i = 0; i < want.size(); ++i) {
    expect(what, m, n, got[static_cast<int64_t>(i)], want[i], step * (1.0 + std::fabs(want[i])));
  }
}

// y = relu(x w^T + bias) and its gradients, on a device of so many multiprocessors.
void linear(int64_t m, int64_t n, int64_t k, DType type, int multiprocessors, bool tf32 = false) {
  emu::multiprocessors = multiprocessors;
  Tensor x(m * k, type, 1), w(n * k, type, 2), bias(n, type, 3), dy(m * n, type, 4);
  Tensor y(m * n, type, 5), dx(m * k, type, 6), dw(n * k, type, 7), db(n, type, 8);
  const double step = type == DType::kBFloat16 ? 1.0 / 128 : tf32 ? 1.0 / 64 : 1e-4;
  LinearParams p = {};
  p.M = m, p.N = n, p.K = k;
  p.x = {x.data(), k, 1, type};
  p.w = {w.data(), k, 1, type};
  p.bias = bias.data();
  p.bias_stride = 1;
  p.activation = Activation::kRelu;
  p.y = y.data();
  const Memory memory = workspace(fastnn_cuda_linear_fwd_workspace(&p));
  fastnn_cuda_linear_fwd(&p, tf32 ? 1 : 0, memory.get(), nullptr);
  std::vector<double> want(static_cast<size_t>(m * n)), dz(want.size());
  for (int64_t i = 0; i < m * n; ++i) {
    double z = bias.exact[i % n];
    for (int64_t j = 0; j < k; ++j) z += x.exact[i / n * k + j] * w.exact[i % n * k + j];
    want[i] = z > 0.0 ? z : 0.0;
    dz[i] = y[i] > 0.0 ? dy.exact[i] : 0.0;
  }
  compare("linear", m, n, y, want, step * (tf32 ? 4.0 : 1.0));
  LinearBwdParams b = {};
  b.M = m, b.N = n, b.K = k;
  b.dy = {dy.data(), n, 1, type};
  b.x = p.x;
  b.w = p.w;
  b.slope = y.data();
  b.activation = p.activation;
  b.dx = dx.data();
  b.dw = dw.data();
  b.db = db.data();
  const Memory more = workspace(fastnn_cuda_linear_bwd_workspace(&b));
  fastnn_cuda_linear_bwd(&b, tf32 ? 1 : 0, more.get(), nullptr);
  std::vector<double> want_dx(static_cast<size_t>(m * k)), want_dw(static_cast<size_t>(n * k)),
      want_db(static_cast<size_t>(n));
  for (int64_t i = 0; i < m * n; ++i) {
    want_db[i % n] += dz[i];
    for (int64_t j = 0; j < k; ++j) {
      want_dx[i / n * k + j] += dz[i] * w.exact[i % n * k + j];
      want_dw[i % n * k + j] += dz[i] * x.exact[i / n * k + j];
    }
  }
  compare("linear's dx", m, n, dx, want_dx, step * (tf32 ? 4.0 : 1.0));
  compare("linear's dw", m, n, dw, want_dw, step * (tf32 ? 4.0 : 1.0));
  compare("linear's db", m, n, db, want_db, step);
}

// Attention of two query heads that share keys, causal where there is no mask, and its gradients.
void attention(int64_t s_q, int64_t s_k, int64_t d, DType type, bool masked) {
  constexpr int64_t kHeads = 2;
  Tensor q(kHeads * s_q * d, type, 1), k(s_k * d, type, 2), v(s_k * d, type, 3);
  Tensor d_out(kHeads * s_q * d, type, 4), out(kHeads * s_q * d, type, 5),
      dq(kHeads * s_q * d, type, 6), dk(s_k * d, type, 7), dv(s_k * d, type, 8);
  const Buffer lse = buffer(kHeads * s_q);
  const std::unique_ptr<uint8_t[]> mask(new uint8_t[static_cast<size_t>(s_q * s_k)]);
  for (int64_t i = 0; i < s_q * s_k; ++i) mask[i] = i * 7919 % 5 != 0;
  AttentionParams a = {};
  a.B = 1, a.H = kHeads, a.H_kv = 1, a.S_q = s_q, a.S_k = s_k, a.D = a.D_v = d;
  a.q = {q.data(), kHeads * s_q * d, s_q * d, d};
  a.k = {k.data(), s_k * d, s_k * d, d};
  a.v = {v.data(), s_k * d, s_k * d, d};
  a.dtype = type;
  a.lse_head_stride = s_q;
  a.scale = 1.f / std::sqrt(static_cast<float>(d));
  a.window_left = -1;
  a.window_right = masked ? -1 : 0;
  if (masked) {
    a.mask_kind = MaskKind::kBool;
    a.mask = mask.get();
    a.mask_strides[2] = s_k;
    a.mask_strides[3] = 1;
  }
  const AttentionFwdParams f = {a, out.data(), kHeads * s_q * d, s_q * d, d, lse.get()};
  fastnn_cuda_attention_fwd(&f, nullptr, nullptr);
  const AttentionBwdParams b = {a,
                                {out.data(), kHeads * s_q * d, s_q * d, d},
                                {d_out.data(), kHeads * s_q * d, s_q * d, d},
                                lse.get(),
                                dq.data(),
                                dk.data(),
                                dv.data(),
                                {kHeads * s_q * d, s_q * d, d},
                                {s_k * d, s_k * d, d},
                                {s_k * d, s_k * d, d}};
  const Memory memory = workspace(fastnn_cuda_attention_bwd_workspace(&b));
  fastnn_cuda_attention_bwd(&b, memory.get(), nullptr);
  std::vector<double> want(out.exact.size()), want_dq(want.size()), want_dk(k.exact.size()),
      want_dv(k.exact.size()), p(static_cast<size_t>(s_k));
  for (int64_t row = 0; row < kHeads * s_q; ++row) {
    const int64_t i = row % s_q;
    double sum = 0.0, delta = 0.0;
    for (int64_t j = 0; j < s_k; ++j) {
      double score = 0.0;
      for (int64_t c = 0; c < d; ++c) score += q.exact[row * d + c] * k.exact[j * d + c];
      const bool seen = masked ? mask[i * s_k + j] != 0 : j <= i;
      p[j] = seen ? std::exp(score * a.scale) : 0.0;
      sum += p[j];
    }
    for (int64_t j = 0; j < s_k; ++j) {
      p[j] /= sum;
      for (int64_t c = 0; c < d; ++c) {
        want[row * d + c] += p[j] * v.exact[j * d + c];
        want_dv[j * d + c] += p[j] * d_out.exact[row * d + c];
      }
    }
    for (int64_t c = 0; c < d; ++c) delta += want[row * d + c] * d_out.exact[row * d + c];
    for (int64_t j = 0; j < s_k; ++j) {
      double dp = -delta;
      for (int64_t c = 0; c < d; ++c) dp += d_out.exact[row * d + c] * v.exact[j * d + c];
      for (int64_t c = 0; c < d; ++c) {
        want_dq[row * d + c] += a.scale * p[j] * dp * k.exact[j * d + c];
        want_dk[j * d + c] += a.scale * p[j] * dp * q.exact[row * d + c];
      }
    }
  }
  const double step = type == DType::kBFloat16 ? 1.0 / 50 : 1e-4;
  compare("attention", s_q, s_k, out, want, step);
  compare("attention's dq", s_q, s_k, dq, want_dq, step);
  compare("attention's dk", s_q, s_k, dk, want_dk, step);
  compare("attention's dv", s_q, s_k, dv, want_dv, step);
}

void far_rows() {
  constexpr int64_t kDepth = 64, kStride = FarRows<uint16_t>::kStride;
  const DType type = DType::kBFloat16;
  Tensor row(kDepth, type, 1), w(8 * kDepth, type, 2), y(2 * kDepth, type, 3);
  const FarRows<uint16_t> x(row.halves.get(), kDepth);
  LinearParams p = {};
  p.M = 2, p.N = 8, p.K = kDepth;
  p.x = {x.data, kStride, 1, type};
  p.w = {w.data(), kDepth, 1, type};
  p.y = y.data();
  fastnn_cuda_linear_fwd(&p, 0, nullptr, nullptr);
  expect_equal_rows("linear of far rows", y.halves.get(), 8);
  AttentionFwdParams f = {};
  AttentionParams& a = f.a;
  a.B = a.H = a.H_kv = 1, a.S_q = a.S_k = 2, a.D = a.D_v = kDepth;
  a.q = a.k = a.v = {x.data, 0, 0, kStride};
  a.dtype = type;
  a.scale = 0.125f;
  a.window_left = a.window_right = -1;
  f.out = y.data();
  f.out_row_stride = kDepth;
  fastnn_cuda_attention_fwd(&f, nullptr, nullptr);
  expect_equal_rows("attention of far rows", y.halves.get(), kDepth);
  // Two equal values: their mean is the value.
  for (int64_t i = 0; i < kDepth; ++i) {
    expect("attention of far rows", 2, kDepth, y[i], row.exact[i], 1e-2 * std::fabs(row.exact[i]));
  }
}

}  // namespace
}  // namespace fastnn

// With an argument: rows far apart instead.
int main(int count, char**) {
  using namespace fastnn;
  if (count > 1) {
    far_rows();
    return report();
  }
  constexpr DType kHalf = DType::kBFloat16, kFloat = DType::kFloat32;
  linear(70, 72, 136, kHalf, 132);
  linear(40, 64, 1032, kHalf, 132);  // the depth is split
  linear(130, 136, 72, kHalf, 1);    // larger tiles
  linear(35, 33, 41, kHalf, 132);    // element by element
  linear(35, 33, 41, kFloat, 132);
  linear(35, 40, 36, kFloat, 132, true);
  attention(70, 100, 64, kHalf, false);
  attention(40, 70, 40, kHalf, true);
  attention(20, 40, 128, kHalf, false);
  attention(20, 40, 40, kFloat, true);
  return report();
}
