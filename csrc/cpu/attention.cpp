#include "cpu/attention.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

// Half-precision keys and values as the products take them, made once per call and shared by all
// query tiles.
class Prepared {
 public:
  Prepared(const AttentionParams& p, const KernelTable& table, bool forward)
      : key_floats_(table.attention_key_floats(p, forward)),
        value_floats_(table.attention_value_floats(p, forward)),
        memory_(p.B * p.H_kv * (key_floats_ + value_floats_) * 4),
        k_(static_cast<float*>(memory_.get())),
        v_(k_ + p.B * p.H_kv * key_floats_) {
    if (key_floats_ + value_floats_ == 0) return;
    parallel_for(p.B * p.H_kv, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        table.attention_prepare(p, forward, i, k_ + i * key_floats_, v_ + i * value_floats_);
    });
  }
  const float* k() const { return k_; }
  const float* v() const { return v_; }

 private:
  int64_t key_floats_, value_floats_;
  Scratch memory_;
  float *k_, *v_;
};

constexpr int64_t kGrainOperations = int64_t{1} << 20;  // about 10 us of one core

// Keys are split where there are few key heads; where, depends on the sizes and not on the threads.
constexpr int64_t kDecodeItems = 64;
constexpr int64_t kDecodePartKeys = 512;  // at least

void attention_decode(const AttentionFwdParams& p, const KernelTable& table) {
  const AttentionParams& a = p.a;
  const int64_t items = a.B * a.H_kv;
  const int64_t most = std::max<int64_t>(1, a.S_k / kDecodePartKeys);
  const int64_t parts = std::min(most, (kDecodeItems + items - 1) / items);
  const int64_t rows = table.attention_decode_rows(a);
  const int64_t floats = rows * table.attention_decode_floats(a);  // of a part
  const Scratch partial(items * parts * floats * 4);
  auto* const out = static_cast<float*>(partial.get());
  // Memory bounds few rows: as much time as 16 operations an element.
  const int64_t operations =
      std::max<int64_t>(1, a.S_k / parts) * (a.D + a.D_v + 16) * std::max<int64_t>(16, 2 * rows);
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / operations);
  parallel_for(items * parts, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.attention_decode_scratch(a) * 4);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      table.attention_decode(a, i / parts, a.S_k * part / parts, a.S_k * (part + 1) / parts,
                             out + i * floats, static_cast<float*>(scratch.get()));
    }
  });
  parallel_for(items, grain * parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      table.attention_decode_merge(p, i, parts, out + i * parts * floats);
  });
}

}  // namespace

void attention_fwd(const AttentionFwdParams& p) {
  const KernelTable& table = kernels();
  record_run("attention_fwd", table.isa);
  const int64_t items = table.attention_fwd_items(p.a);
  if (items == 0) return;
  if (table.attention_decode_rows(p.a) > 0) return attention_decode(p, table);
  const Prepared prepared(p.a, table, true);
  const int64_t operations = 2 * 48 * std::max<int64_t>(1, p.a.S_k) * (p.a.D + p.a.D_v + 16);
  parallel_for(items, std::max<int64_t>(1, kGrainOperations / operations),
               [&](int64_t begin, int64_t end) {
                 const Scratch scratch(table.attention_fwd_scratch(p.a) * 4);
                 table.attention_fwd(p, prepared.k(), prepared.v(), begin, end,
                                     static_cast<float*>(scratch.get()));
               });
}

void attention_bwd(const AttentionBwdParams& p) {
  const KernelTable& table = kernels();
  record_run("attention_bwd", table.isa);
  if (p.a.B * p.a.H_kv == 0) return;
  const Prepared prepared(p.a, table, false);
  parallel_for(p.a.B * p.a.H_kv, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.attention_bwd_scratch(p.a) * 4);
    table.attention_bwd(p, prepared.k(), prepared.v(), begin, end,
                        static_cast<float*>(scratch.get()));
  });
}

}  // namespace fastnn
