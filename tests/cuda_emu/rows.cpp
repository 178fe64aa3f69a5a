// The row kernels on small shapes, from buffers of exact size, against plain loops in double:
// prints "right", or what is wrong. Built under AddressSanitizer and ThreadSanitizer, and with
// faults planted into the kernels' source (tests/test_cuda_emu_faults.py).
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cuda/activation.h"
#include "cuda/common.cuh"
#include "cuda/cross_entropy.h"
#include "cuda/norm.h"
#include "cuda/softmax.h"
#include "expect.h"

namespace fastnn {
namespace {

Buffer workspace(int64_t bytes) { return buffer((bytes + 3) / 4); }

void expect_near(const char* what, int64_t rows, int64_t n, double got, double want, double scale) {
  expect(what, rows, n, got, want, 1e-4 * scale);
}

// Forward and backward of one row shape; rows lie `gap` elements apart, from one element on where
// `odd`: then no row begins on a 16-byte boundary.
void softmax(int64_t rows, int64_t n, int64_t gap, bool odd, bool log) {
  const int64_t stride = n + gap, head = odd ? 1 : 0;
  const Buffer x = values(head + (rows - 1) * stride + n, 1), dy = values(rows * n, 2);
  Buffer y = buffer(rows * n), dx = buffer(rows * n);
  const auto f = DType::kFloat32;
  const SoftmaxParams p = {x.get() + head, y.get(), rows, n, 1, stride, f, f, log};
  const Buffer memory = workspace(fastnn_cuda_softmax_fwd_workspace(&p));
  fastnn_cuda_softmax_fwd(&p, memory.get(), nullptr);
  const SoftmaxBwdParams b = {dy.get(), y.get(), dx.get(), rows, n, 1, n, f, f, log};
  const Buffer more = workspace(fastnn_cuda_softmax_bwd_workspace(&b));
  fastnn_cuda_softmax_bwd(&b, more.get(), nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    const float *const xr = x.get() + head + r * stride, *const g = dy.get() + r * n;
    double sum = 0.0, dot = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(double{xr[i]});
    for (int64_t i = 0; i < n; ++i) dot += log ? g[i] : g[i] * std::exp(double{xr[i]}) / sum;
    for (int64_t i = 0; i < n; ++i) {
      const double q = std::exp(double{xr[i]}) / sum;
      expect_near("softmax", rows, n, y[r * n + i], log ? std::log(q) : q, log ? 1.0 : 1.0 / n);
      expect_near("its gradient", rows, n, dx[r * n + i], log ? g[i] - q * dot : q * (g[i] - dot),
                  1.0);
    }
  }
}

void norm(int64_t rows, int64_t n, bool rms) {
  const Buffer x = values(rows * n, 3), more = values(rows * n, 4), w = values(n, 5),
               bias = values(n, 6), dy = values(rows * n, 7);
  Buffer y = buffer(rows * n), total = buffer(rows * n), stats = buffer(rows * 2),
         dx = buffer(rows * n), dw = buffer(n), db = buffer(n);
  NormParams p = {};
  p.rows = rows;
  p.columns = p.x_row_stride = p.residual_row_stride = n;
  p.x = x.get();
  p.residual = more.get();
  p.weight = w.get();
  p.bias = rms ? nullptr : bias.get();
  p.y = y.get();
  p.total = total.get();
  p.stats = stats.get();
  p.eps = 1e-5f;
  p.rms = rms;
  fastnn_cuda_norm_fwd(&p, nullptr, nullptr);
  NormBwdParams b = {};
  b.rows = rows;
  b.columns = b.dy_row_stride = b.x_row_stride = n;
  b.dy = dy.get();
  b.x = total.get();
  b.weight = w.get();
  b.stats = stats.get();
  b.dx = dx.get();
  b.dw = dw.get();
  b.db = db.get();
  b.rms = rms;
  const Buffer memory = workspace(fastnn_cuda_norm_bwd_workspace(&b));
  fastnn_cuda_norm_bwd(&b, memory.get(), nullptr);
  std::vector<double> want_dw(static_cast<size_t>(n)), want_db(static_cast<size_t>(n));
  for (int64_t r = 0; r < rows; ++r) {
    const auto at = [&](int64_t i) { return double{x[r * n + i]} + double{more[r * n + i]}; };
    double mean = 0.0, square = 0.0, g_sum = 0.0, gh = 0.0;
    for (int64_t i = 0; i < n && !rms; ++i) mean += at(i) / n;
    for (int64_t i = 0; i < n; ++i) square += (at(i) - mean) * (at(i) - mean) / n;
    const double rstd = 1.0 / std::sqrt(square + 1e-5);
    for (int64_t i = 0; i < n; ++i) {
      const double h = (at(i) - mean) * rstd, g = double{dy[r * n + i]} * w[i];
      g_sum += rms ? 0.0 : g / n;
      gh += g * h / n;
      want_dw[i] += dy[r * n + i] * h;
      want_db[i] += dy[r * n + i];
      expect_near("norm", rows, n, y[r * n + i], h * w[i] + (rms ? 0.0 : bias[i]), 1.0);
    }
    for (int64_t i = 0; i < n; ++i) {
      const double h = (at(i) - mean) * rstd, g = double{dy[r * n + i]} * w[i];
      expect_near("its gradient", rows, n, dx[r * n + i], rstd * (g - g_sum - h * gh), 3.0 + rstd);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    expect_near("dw", rows, n, dw[i], want_dw[i], static_cast<double>(rows));
    expect_near("db", rows, n, db[i], want_db[i], static_cast<double>(rows));
  }
}

// silu of a sum with a bias, or times a factor.
void activation(int64_t rows, int64_t n, bool product) {
  const Buffer x = values(rows * n, 9), other = values(product ? rows * n : n, 10),
               dy = values(rows * n, 11);
  Buffer y = buffer(rows * n), dx = buffer(rows * n), d_other = buffer(product ? rows * n : n);
  ActivationParams p = {};
  p.rows = rows;
  p.columns = p.x_row_stride = p.factor_row_stride = n;
  p.x = x.get();
  (product ? p.factor : p.bias) = other.get();
  p.y = y.get();
  p.activation = Activation::kSilu;
  fastnn_cuda_activation_fwd(&p, nullptr, nullptr);
  ActivationBwdParams b = {};
  b.rows = rows;
  b.columns = b.dy_row_stride = b.x_row_stride = b.factor_row_stride = b.d_row_stride = n;
  b.dy = dy.get();
  b.x = x.get();
  b.factor = p.factor;
  b.bias = p.bias;
  b.dx = dx.get();
  (product ? b.d_factor : b.db) = d_other.get();
  b.activation = Activation::kSilu;
  const Buffer memory = workspace(fastnn_cuda_activation_bwd_workspace(&b));
  fastnn_cuda_activation_bwd(&b, memory.get(), nullptr);
  std::vector<double> sums(static_cast<size_t>(n));
  for (int64_t i = 0; i < rows * n; ++i) {
    const double z = double{x[i]} + (product ? 0.0 : other[i % n]);
    const double sigmoid = 1.0 / (1.0 + std::exp(-z)), f = product ? other[i] : 1.0;
    const double slope = dy[i] * f * sigmoid * (1.0 + z * (1.0 - sigmoid));
    expect_near("activation", rows, n, y[i], z * sigmoid * f, 4.0);
    expect_near("its gradient", rows, n, dx[i], slope, 4.0);
    if (product) expect_near("d_factor", rows, n, d_other[i], dy[i] * z * sigmoid, 4.0);
    sums[i % n] += slope;
  }
  for (int64_t i = 0; i < n && !product; ++i) {
    expect_near("the bias's", rows, n, d_other[i], sums[i], static_cast<double>(rows));
  }
}

void cross_entropy(int64_t rows, int64_t n, float smoothing) {
  const Buffer x = values(rows * n, 8);
  Buffer stats = buffer(rows * 2), divisors = buffer(2), loss = buffer(1), dx = buffer(rows * n);
  const std::unique_ptr<int64_t[]> target(new int64_t[static_cast<size_t>(rows)]);
  for (int64_t r = 0; r < rows; ++r) target[r] = r % 3 == 2 ? -100 : (r * 7919) % n;
  CrossEntropyParams p = {};
  p.rows = rows;
  p.classes = p.x_row_stride = n;
  p.x = x.get();
  p.target = target.get();
  p.ignore_index = -100;
  p.label_smoothing = smoothing;
  const CudaLossFwdParams f = {p,          nullptr,     LossReduction::kMean,
                               loss.get(), stats.get(), divisors.get()};
  const Buffer memory = workspace(fastnn_cuda_cross_entropy_fwd_workspace(&f));
  fastnn_cuda_cross_entropy_fwd(&f, memory.get(), nullptr);
  const float one = 1.f;
  const CudaLossBwdParams b = {p, nullptr, &one, 0, stats.get(), divisors.get(), dx.get()};
  fastnn_cuda_cross_entropy_bwd(&b, nullptr, nullptr);
  double total = 0.0, count = 0.0;
  for (int64_t r = 0; r < rows; ++r) count += target[r] >= 0 ? 1.0 : 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const float* const xr = x.get() + r * n;
    double sum = 0.0, even = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += std::exp(double{xr[i]});
    for (int64_t i = 0; i < n; ++i) even += (std::log(sum) - xr[i]) / n;
    const int64_t t = target[r];
    if (t >= 0) total += (1.0 - smoothing) * (std::log(sum) - xr[t]) + smoothing * even;
    for (int64_t i = 0; i < n; ++i) {
      const double share = (i == t ? 1.0 - smoothing : 0.0) + smoothing / n;
      const double want = t < 0 ? 0.0 : (std::exp(double{xr[i]}) / sum - share) / count;
      expect_near("the loss's gradient", rows, n, dx[r * n + i], want, 1.0 / count);
    }
  }
  expect_near("cross-entropy", rows, n, loss[0], total / count, total / count);
}

void far_rows() {
  constexpr int64_t kColumns = 40, kStride = FarRows<float>::kStride;
  const FarRows<float> x(values(kColumns, 1).get(), kColumns);
  const Buffer y = buffer(2 * kColumns), stats = buffer(4), divisors = buffer(2), loss = buffer(2);
  const auto f = DType::kFloat32;
  const SoftmaxParams s = {x.data, y.get(), 2, kColumns, 1, kStride, f, f, false};
  fastnn_cuda_softmax_fwd(&s, nullptr, nullptr);
  expect_equal_rows("softmax of far rows", y.get(), kColumns);
  NormParams n = {};
  n.rows = 2;
  n.columns = kColumns;
  n.x = x.data;
  n.x_row_stride = kStride;
  n.y = y.get();
  n.eps = 1e-5f;
  fastnn_cuda_norm_fwd(&n, nullptr, nullptr);
  expect_equal_rows("norm of far rows", y.get(), kColumns);
  ActivationParams a = {};
  a.rows = 2;
  a.columns = kColumns;
  a.x = x.data;
  a.x_row_stride = kStride;
  a.y = y.get();
  a.activation = Activation::kSilu;
  fastnn_cuda_activation_fwd(&a, nullptr, nullptr);
  expect_equal_rows("activation of far rows", y.get(), kColumns);
  const int64_t target[2] = {3, 3};
  CrossEntropyParams c = {};
  c.rows = 2;
  c.classes = kColumns;
  c.x = x.data;
  c.x_row_stride = kStride;
  c.target = target;
  const CudaLossFwdParams l = {c,          nullptr,     LossReduction::kNone,
                               loss.get(), stats.get(), divisors.get()};
  const Buffer memory = workspace(fastnn_cuda_cross_entropy_fwd_workspace(&l));
  fastnn_cuda_cross_entropy_fwd(&l, memory.get(), nullptr);
  expect_equal_rows("loss of far rows", loss.get(), 1);
}

}  // namespace
}  // namespace fastnn

// With an argument: that op alone, or "far", rows far apart.
int main(int count, char** arguments) {
  using namespace fastnn;
  const std::string only = count > 1 ? arguments[1] : "";
  const auto asked = [&](const char* op) { return only.empty() || only == op; };
  if (only == "far") {
    far_rows();
    return report();
  }
  // Of lanes, of a warp, of a block, and, for a machine of 132 multiprocessors, shared out.
  for (const bool log : {false, true}) {
    if (!asked("softmax")) break;
    softmax(5, 7, 0, false, log);
    softmax(3, 200, 5, true, log);
    softmax(2, 1100, 4, false, log);
    softmax(1, 16400, 0, true, log);
  }
  for (const bool rms : {false, true}) {
    if (!asked("norm")) break;
    norm(2, 1030, rms);
    norm(5, 33, rms);
    norm(20, 300, rms);
  }
  for (const float smoothing : {0.f, 0.25f}) {
    if (!asked("cross_entropy")) break;
    cross_entropy(4, 9, smoothing);
    cross_entropy(4, 700, smoothing);
    cross_entropy(1, 16500, smoothing);
  }
  for (const bool product : {false, true}) {
    if (!asked("activation")) break;
    activation(5, 7, product);
    activation(70, 300, product);
    activation(1, 5000, product);
  }
  return report();
}
