// The layers of a Llama-shaped model on a few rows: what fastnn.generate runs for each token. It
// calls the drivers of the ops, one after the other, on buffers of its own; what it saves is
// everything that stands around a call: a thousand of them for a token of a small model.
#pragma once
#include <memory>
#include <vector>

#include "params/activation.h"
#include "params/linear_groupwise.h"
#include "params/linear_int8.h"

namespace fastnn {

enum class ProductKind : int32_t { kFloat, kInt8, kGroups };

// x W^T + b with a packed weight (N outputs, K inputs).
struct DecoderProduct {
  ProductKind kind;
  int64_t N, K;
  const void* packed;
  const void* bias;  // of the rows' type, or null
  // Of kGroups:
  int64_t group;
  int bits;
  bool offsets, int8_input;
};
// Bytes of its packed weight.
int64_t decoder_product_bytes(const DecoderProduct& p, DType dtype);
// y (M x N) = x (M x K) W^T + b, rows contiguous.
void multiply(const DecoderProduct& w, DType dtype, int64_t M, const void* x, void* y);

struct DecoderNorm {
  const void* weight;  // of the rows' type
  float eps;
};

struct DecoderLayer {
  DecoderNorm before;
  DecoderProduct qkv;  // queries, keys and values side by side
  DecoderProduct out;
  DecoderNorm after;
  DecoderProduct up;  // gate and factor side by side
  DecoderProduct down;
};

struct DecoderSizes {
  DType dtype;
  int64_t width, hidden, heads, kv_heads, head;
  Activation activation;  // of the gate
};

// Rows of batch x n new tokens; sequence b has lengths[b] before them.
struct DecoderStep {
  int64_t batch, n;
  const int64_t* lengths;
  const float *cos, *sin;  // (positions, head / 2)
  int64_t capacity;        // of the caches (batch, kv_heads, capacity, head)
  void* const* keys;       // of each layer
  void* const* values;
  void* x;  // (batch, n, width): embeddings, in their place the last norm's result
};

void run_decoder(const DecoderSizes& s, const std::vector<DecoderLayer>& layers,
                 const DecoderNorm& last, const DecoderStep& step);

}  // namespace fastnn
