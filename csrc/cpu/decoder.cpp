#include "cpu/decoder.h"

#include <cmath>
#include <cstring>

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/linear.h"
#include "cpu/linear_groupwise.h"
#include "cpu/linear_int8.h"
#include "cpu/memory.h"
#include "cpu/norm.h"
#include "cpu/rope.h"

namespace fastnn {
namespace {

// total += x where x is not null; y = norm(total).
void normalize(const DecoderSizes& s, const DecoderNorm& norm, int64_t M, const void* x,
               void* total, void* y) {
  NormParams p = {};
  p.rows = M;
  p.columns = s.width;
  p.x = x == nullptr ? total : x;
  p.x_row_stride = s.width;
  if (x != nullptr) {
    p.residual = total;
    p.residual_row_stride = s.width;
    p.total = total;
  }
  p.weight = norm.weight;
  p.weight_stride = 1;
  p.y = y;
  p.dtype = p.parameter_dtype = s.dtype;
  p.eps = norm.eps;
  p.rms = true;
  norm_fwd(p);
}

// Buffers of one call, side by side in one piece of memory, each on lines of its own.
class Buffers {
 public:
  Buffers(const DecoderSizes& s, int64_t M)
      : element_(element_bytes(s.dtype)),
        M_(M),
        memory_(take(s.width) * 3 + take((s.heads + 2 * s.kv_heads) * s.head) +
                take((s.heads + s.kv_heads) * s.head) + take(s.heads * s.head) +
                take(2 * s.hidden) + take(s.hidden)) {
    total = part(s.width);
    normed = part(s.width);
    added = part(s.width);
    features = part((s.heads + 2 * s.kv_heads) * s.head);
    turned = part((s.heads + s.kv_heads) * s.head);
    mixed = part(s.heads * s.head);
    both = part(2 * s.hidden);
    gated = part(s.hidden);
  }
  char *total, *normed, *added, *features, *turned, *mixed, *both, *gated;

 private:
  int64_t take(int64_t columns) const { return (M_ * columns * element_ + 63) / 64 * 64; }
  char* part(int64_t columns) {
    char* const p = static_cast<char*>(memory_.get()) + used_;
    used_ += take(columns);
    return p;
  }
  int64_t element_, M_, used_ = 0;
  Scratch memory_;
};

// Rotates queries and keys, puts keys and values behind the cached ones, attends.
void attend(const DecoderSizes& s, const DecoderStep& step, const int64_t* positions,
            const int64_t* behind, size_t layer, const Buffers& at) {
  const int64_t element = element_bytes(s.dtype), n = step.n, D = s.head;
  const int64_t row = (s.heads + 2 * s.kv_heads) * D, turned_row = (s.heads + s.kv_heads) * D;
  RopeParams r = {};
  r.B = step.batch;
  r.S = n;
  r.D = r.rotary = D;
  r.operands[0] = {at.features, at.turned, s.heads + s.kv_heads, n * row, D, row, n * turned_row,
                   D,           turned_row};
  r.count = 1;
  r.cos = {step.cos, 0, D / 2};
  r.sin = {step.sin, 0, D / 2};
  r.table_width = D / 2;
  r.positions = positions;
  r.positions_batch_stride = n;
  r.dtype = s.dtype;
  r.table_dtype = DType::kFloat32;
  rope(r);

  const int64_t cached_row = D, cached_head = step.capacity * D,
                cached_batch = s.kv_heads * cached_head;
  attention_append({step.batch,
                    s.kv_heads,
                    n,
                    D,
                    D,
                    element,
                    {at.turned + s.heads * D * element, n * turned_row, D, turned_row},
                    {at.features + turned_row * element, n * row, D, row},
                    step.keys[layer],
                    step.values[layer],
                    {cached_batch, cached_head, cached_row},
                    {cached_batch, cached_head, cached_row},
                    step.lengths});

  AttentionParams p = {};
  p.dtype = s.dtype;
  p.B = step.batch;
  p.H = s.heads;
  p.H_kv = s.kv_heads;
  p.S_q = n;
  p.D = p.D_v = D;
  p.q = {at.turned, n * turned_row, D, turned_row};
  p.k = {step.keys[layer], cached_batch, cached_head, cached_row};
  p.v = {step.values[layer], cached_batch, cached_head, cached_row};
  p.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(D)));
  p.window_left = -1;
  p.window_right = 0;
  p.lse_head_stride = n;
  attention_cached("attention_cache_fwd", p, behind, at.mixed, {n * s.heads * D, D, s.heads * D},
                   nullptr);
}

}  // namespace

int64_t decoder_product_bytes(const DecoderProduct& p, DType dtype) {
  switch (p.kind) {
    case ProductKind::kFloat:
      return linear_packed_bytes(p.N, p.K, dtype);
    case ProductKind::kInt8:
      return linear_int8_packed_bytes(p.N, p.K);
    case ProductKind::kGroups:
      return linear_groupwise_packed_bytes(p.N, GroupLayout(p.K, p.group, p.bits, p.offsets));
  }
  return 0;
}

void multiply(const DecoderProduct& w, DType dtype, int64_t M, const void* x, void* y) {
  const auto fill = [&](auto& p) {
    p.M = M;
    p.N = w.N;
    p.K = w.K;
    p.x = {x, w.K, 1, dtype};
    p.packed = w.packed;
    p.bias = w.bias;
    p.bias_stride = 1;
    p.y = y;
  };
  switch (w.kind) {
    case ProductKind::kFloat: {
      LinearParams p = {};
      fill(p);
      p.w = {nullptr, w.K, 1, dtype};
      p.is_packed = true;
      return linear_fwd(p);
    }
    case ProductKind::kInt8: {
      LinearInt8Params p = {};
      fill(p);
      p.bias_dtype = dtype;
      return linear_int8_fwd(p);
    }
    case ProductKind::kGroups: {
      LinearGroupwiseParams p = {};
      fill(p);
      p.bias_dtype = dtype;
      p.group = w.group;
      p.bits = w.bits;
      p.offsets = w.offsets;
      p.int8_input = w.int8_input;
      return linear_groupwise_fwd(p);
    }
  }
}

void run_decoder(const DecoderSizes& s, const std::vector<DecoderLayer>& layers,
                 const DecoderNorm& last, const DecoderStep& step) {
  const int64_t M = step.batch * step.n;
  if (M == 0) return;
  const Buffers at(s, M);
  std::vector<int64_t> positions, behind;
  for (int64_t b = 0; b < step.batch; ++b) {
    for (int64_t i = 0; i < step.n; ++i) positions.push_back(step.lengths[b] + i);
    behind.push_back(step.lengths[b] + step.n);
  }
  std::memcpy(at.total, step.x, static_cast<size_t>(M * s.width * element_bytes(s.dtype)));
  const void* added = nullptr;
  for (size_t l = 0; l < layers.size(); ++l) {
    const DecoderLayer& layer = layers[l];
    normalize(s, layer.before, M, added, at.total, at.normed);
    multiply(layer.qkv, s.dtype, M, at.normed, at.features);
    attend(s, step, positions.data(), behind.data(), l, at);
    multiply(layer.out, s.dtype, M, at.mixed, at.added);
    normalize(s, layer.after, M, at.added, at.total, at.normed);
    multiply(layer.up, s.dtype, M, at.normed, at.both);
    ActivationParams a = {};
    a.rows = M;
    a.columns = s.hidden;
    a.x = at.both;
    a.x_row_stride = a.factor_row_stride = 2 * s.hidden;
    a.factor = at.both + s.hidden * element_bytes(s.dtype);
    a.y = at.gated;
    a.dtype = a.bias_dtype = s.dtype;
    a.activation = s.activation;
    activation_fwd(a);
    multiply(layer.down, s.dtype, M, at.gated, at.added);
    added = at.added;
  }
  normalize(s, last, M, added, at.total, step.x);
}

}  // namespace fastnn
