#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace fastnn {
namespace {

constexpr int64_t kGrainOperations = int64_t{1} << 20;  // about 10 us of one core
constexpr int64_t kTurns = 8;  // of a thread, where there are so many items: their costs differ

int64_t grain_of(int64_t operations) {
  return std::max<int64_t>(1, kGrainOperations / std::max<int64_t>(1, operations));
}

// body(begin, end, scratch) over [0, n): whoever is free takes the next few items, at least
// `grain`.
template <class Body>
void share_out(int64_t n, int64_t grain, int64_t scratch_floats, Body&& body) {
  const int64_t tasks = std::min(thread_count(), (n + grain - 1) / grain);
  if (n <= 0) return;
  if (tasks <= 1) {
    const Scratch scratch(scratch_floats * 4);
    return body(int64_t{0}, n, static_cast<float*>(scratch.get()));
  }
  const int64_t turn = std::max(grain, n / (tasks * kTurns));
  std::atomic<int64_t> next{0};
  parallel_for(tasks, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_floats * 4);
    for (int64_t i; (i = next.fetch_add(turn, std::memory_order_relaxed)) < n;)
      body(i, std::min(i + turn, n), static_cast<float*>(scratch.get()));
  });
}

// Items of several sequences, numbered through.
class Numbered {
 public:
  template <class Count>
  Numbered(int64_t sequences, Count&& count) : first_(static_cast<size_t>(sequences) + 1, 0) {
    for (size_t s = 0; s + 1 < first_.size(); ++s)
      first_[s + 1] = first_[s] + count(static_cast<int64_t>(s));
  }
  int64_t total() const { return first_.back(); }
  int64_t first(int64_t sequence) const { return first_[static_cast<size_t>(sequence)]; }
  // body(sequence, begin, end) for items [begin, end), numbered within their sequences.
  template <class Body>
  void split(int64_t begin, int64_t end, Body&& body) const {
    auto s = std::upper_bound(first_.begin(), first_.end(), begin) - first_.begin() - 1;
    for (; begin < end; ++s) {
      const int64_t base = first(s), stop = std::min(end, first(s + 1));
      if (stop > begin) body(s, begin - base, stop - base);
      begin = std::max(begin, stop);
    }
  }

 private:
  std::vector<int64_t> first_;
};

// Half-precision keys and values as the products take them, made once per call and shared by all
// query tiles. Call: AttentionFwdParams or AttentionBwdParams.
template <class Call>
class Prepared {
 public:
  Prepared(const std::vector<const Call*>& calls, const KernelTable& table, bool forward)
      : floats_(static_cast<int64_t>(calls.size()),
                [&](int64_t s) {
                  const AttentionParams& p = calls[static_cast<size_t>(s)]->a;
                  return p.B * p.H_kv *
                         (table.attention_key_floats(p, forward) +
                          table.attention_value_floats(p, forward));
                }),
        memory_(floats_.total() * 4) {
    values_.reserve(calls.size());
    for (size_t s = 0; s < calls.size(); ++s) {
      const AttentionParams& p = calls[s]->a;
      values_.push_back(keys(static_cast<int64_t>(s)) +
                        p.B * p.H_kv * table.attention_key_floats(p, forward));
    }
    if (floats_.total() == 0) return;
    const Numbered heads(static_cast<int64_t>(calls.size()), [&](int64_t s) {
      const AttentionParams& p = calls[static_cast<size_t>(s)]->a;
      return p.B * p.H_kv;
    });
    share_out(heads.total(), 1, 0, [&](int64_t begin, int64_t end, float*) {
      heads.split(begin, end, [&](int64_t s, int64_t head, int64_t stop) {
        const AttentionParams& p = calls[static_cast<size_t>(s)]->a;
        const int64_t k = table.attention_key_floats(p, forward),
                      v = table.attention_value_floats(p, forward);
        for (; head < stop; ++head)
          table.attention_prepare(p, forward, head, keys(s) + head * k, values(s) + head * v);
      });
    });
  }
  float* keys(int64_t s) const { return static_cast<float*>(memory_.get()) + floats_.first(s); }
  float* values(int64_t s) const { return values_[static_cast<size_t>(s)]; }

 private:
  Numbered floats_;
  Scratch memory_;
  std::vector<float*> values_;
};

using Calls = std::vector<const AttentionFwdParams*>;

// Keys are split where there are few key heads; where, depends on the sizes and not on the threads.
constexpr int64_t kDecodeItems = 64;
constexpr int64_t kDecodePartKeys = 512;  // at least

// What of the keys any query of a sequence may see.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
Range visible_keys(const AttentionParams& p) {
  Range r = {0, p.S_k};
  if (p.window_left >= 0) r.begin = std::clamp(p.position - p.window_left, int64_t{0}, p.S_k);
  if (p.window_right >= 0) r.end = std::clamp(p.position + p.S_q + p.window_right, r.begin, p.S_k);
  return r;
}

void attention_decode(const Calls& calls, const KernelTable& table) {
  const auto sequences = static_cast<int64_t>(calls.size());
  auto at = [&](int64_t s) -> const AttentionFwdParams& { return *calls[static_cast<size_t>(s)]; };
  auto items = [&](int64_t s) { return at(s).a.B * at(s).a.H_kv; };
  int64_t keys = 0, operations = 0, scratch = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const AttentionParams& a = at(s).a;
    keys += items(s) * visible_keys(a).size();
    scratch = std::max(scratch, table.attention_decode_scratch(a));
    // Memory bounds few rows: as much time as 16 operations an element.
    operations += items(s) * visible_keys(a).size() * (a.D + a.D_v + 16) *
                  std::max<int64_t>(16, 2 * table.attention_decode_rows(a));
  }
  const int64_t part_keys = std::max(kDecodePartKeys, (keys + kDecodeItems - 1) / kDecodeItems);
  auto parts = [&](int64_t s) {
    return std::max<int64_t>(1, visible_keys(at(s).a).size() / part_keys);
  };
  auto floats = [&](int64_t s) {  // of a part
    return table.attention_decode_rows(at(s).a) * table.attention_decode_floats(at(s).a);
  };
  const Numbered heads(sequences, items);
  const Numbered work(sequences, [&](int64_t s) { return items(s) * parts(s); });
  const Numbered memory(sequences, [&](int64_t s) { return items(s) * parts(s) * floats(s); });
  const Scratch partial(memory.total() * 4);
  auto* const out = static_cast<float*>(partial.get());
  const int64_t grain = grain_of(operations / std::max<int64_t>(1, work.total()));
  share_out(work.total(), grain, scratch, [&](int64_t begin, int64_t end, float* buffer) {
    work.split(begin, end, [&](int64_t s, int64_t i, int64_t stop) {
      const Range range = visible_keys(at(s).a);
      const int64_t n = parts(s);
      for (; i < stop; ++i) {
        const int64_t part = i % n;
        table.attention_decode(at(s).a, i / n, range.begin + range.size() * part / n,
                               range.begin + range.size() * (part + 1) / n,
                               out + memory.first(s) + i * floats(s), buffer);
      }
    });
  });
  const int64_t merge_grain = grain_of(operations / std::max<int64_t>(1, heads.total()));
  share_out(heads.total(), merge_grain, 0, [&](int64_t begin, int64_t end, float*) {
    heads.split(begin, end, [&](int64_t s, int64_t i, int64_t stop) {
      const int64_t n = parts(s);
      for (; i < stop; ++i)
        table.attention_decode_merge(at(s), i, n, out + memory.first(s) + i * n * floats(s));
    });
  });
}

void attention_tiles(const Calls& calls, const KernelTable& table) {
  const Prepared<AttentionFwdParams> prepared(calls, table, true);
  int64_t operations = 0, scratch = 0;
  const Numbered tiles(static_cast<int64_t>(calls.size()), [&](int64_t s) {
    const AttentionParams& p = calls[static_cast<size_t>(s)]->a;
    const int64_t count = table.attention_fwd_items(p);
    operations += count * 2 * 48 * std::max<int64_t>(1, p.S_k) * (p.D + p.D_v + 16);
    scratch = std::max(scratch, table.attention_fwd_scratch(p));
    return count;
  });
  share_out(tiles.total(), grain_of(operations / std::max<int64_t>(1, tiles.total())), scratch,
            [&](int64_t begin, int64_t end, float* buffer) {
              tiles.split(begin, end, [&](int64_t s, int64_t first, int64_t stop) {
                table.attention_fwd(*calls[static_cast<size_t>(s)], prepared.keys(s),
                                    prepared.values(s), first, stop, buffer);
              });
            });
}

}  // namespace

void attention_fwd(const char* op, const AttentionFwdParams* sequences, int64_t count) {
  const KernelTable& table = kernels();
  record_run(op, table.isa);
  Calls few, many;
  for (int64_t s = 0; s < count; ++s) {
    const AttentionFwdParams& f = sequences[s];
    if (table.attention_fwd_items(f.a) == 0) continue;
    (table.attention_decode_rows(f.a) > 0 ? few : many).push_back(&f);
  }
  if (!few.empty()) attention_decode(few, table);
  if (!many.empty()) attention_tiles(many, table);
}

void attention_bwd(const char* op, const AttentionBwdParams* sequences, int64_t count) {
  const KernelTable& table = kernels();
  record_run(op, table.isa);
  std::vector<const AttentionBwdParams*> calls;
  int64_t scratch = 0;
  for (int64_t s = 0; s < count; ++s) {
    const AttentionParams& p = sequences[s].a;
    if (p.B * p.H_kv == 0) continue;
    calls.push_back(&sequences[s]);
    scratch = std::max(scratch, table.attention_bwd_scratch(p));
  }
  if (calls.empty()) return;
  const Prepared<AttentionBwdParams> prepared(calls, table, false);
  const Numbered heads(static_cast<int64_t>(calls.size()), [&](int64_t s) {
    const AttentionParams& p = calls[static_cast<size_t>(s)]->a;
    return p.B * p.H_kv;
  });
  share_out(heads.total(), 1, scratch, [&](int64_t begin, int64_t end, float* buffer) {
    heads.split(begin, end, [&](int64_t s, int64_t first, int64_t stop) {
      table.attention_bwd(*calls[static_cast<size_t>(s)], prepared.keys(s), prepared.values(s),
                          first, stop, buffer);
    });
  });
}

void attention_append(const AttentionAppendParams& p) {
  record_run("attention_cache_append", kernels().isa);
  const int64_t size = p.element_bytes;
  auto copy = [&](const Heads& from, void* to, const Strides& by, int64_t b, int64_t head,
                  int64_t features) {
    const char* in = static_cast<const char*>(from.data) +
                     (b * from.batch_stride + head * from.head_stride) * size;
    char* out =
        static_cast<char*>(to) + (b * by.batch + head * by.head + p.first[b] * by.row) * size;
    for (int64_t i = 0; i < p.length; ++i) {
      std::memcpy(out + i * by.row * size, in + i * from.row_stride * size,
                  static_cast<size_t>(features * size));
    }
  };
  const int64_t grain =
      std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, p.length * (p.D + p.D_v)));
  parallel_for(p.B * p.H_kv, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      copy(p.k, p.k_cache, p.k_cache_strides, i / p.H_kv, i % p.H_kv, p.D);
      copy(p.v, p.v_cache, p.v_cache_strides, i / p.H_kv, i % p.H_kv, p.D_v);
    }
  });
}

void attention_cached(const char* op, const AttentionParams& p, const int64_t* filled, void* out,
                      Strides out_strides, float* lse) {
  const int64_t element = element_bytes(p.dtype);
  std::vector<AttentionFwdParams> sequences;
  sequences.reserve(static_cast<size_t>(p.B));
  for (int64_t b = 0; b < p.B;) {
    // Neighbours of one length are one batch.
    int64_t end = b + 1;
    while (end < p.B && filled[end] == filled[b]) ++end;
    const auto entry = [element, b](const Heads& h) {
      return Heads{static_cast<const char*>(h.data) + b * h.batch_stride * element, h.batch_stride,
                   h.head_stride, h.row_stride};
    };
    AttentionParams one = p;
    one.B = end - b;
    one.S_k = filled[b];
    one.position = one.S_k - one.S_q;
    one.q = entry(p.q);
    one.k = entry(p.k);
    one.v = entry(p.v);
    sequences.push_back({one, static_cast<char*>(out) + b * out_strides.batch * element,
                         out_strides.batch, out_strides.head, out_strides.row,
                         lse == nullptr ? nullptr : lse + b * p.H * p.S_q});
    b = end;
  }
  attention_fwd(op, sequences.data(), static_cast<int64_t>(sequences.size()));
}

}  // namespace fastnn
