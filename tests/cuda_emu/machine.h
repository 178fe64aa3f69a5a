// Blocks, warps and threads: barriers, warp collectives, shared memory, the schedule.
//
// Blocks run one after another, the threads of a block as fibers. What it checks while running:
//   - shared memory starts as NaN (bytes 0xff), with red zones that AddressSanitizer knows;
//   - the order of threads, warps and blocks is forward, reverse or random: a missing barrier
//   shows;
//   - a barrier that some threads do not reach, a collective whose lanes disagree: abort, with the
//     state of the threads;
//   - copies to shared memory (cp.async) land at the wait that covers them, or at once: a missing
//     wait shows in the first mode, a buffer that is overwritten while still read in the second.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emu {

constexpr size_t kArenaBytes = 256 << 10;
constexpr size_t kSharedLimit = 227 << 10;  // of sm_90; sm_120 has 99 KB
constexpr size_t kSlotBytes = 64;           // what a lane can hand to a warp collective

enum class Order { kForward, kReverse, kRandom };
enum class State : uint8_t { kReady, kInWarp, kInBlock, kDone };

struct Copy {
  void* to;
  const void* from;
  int from_bytes, to_bytes;
};
struct Access {
  uintptr_t at;
  uint32_t bytes;
};

struct Thread : Context {
  uint3 index;
  int warp, lane;
  State state;
  const char* where;                      // what it waits at
  unsigned collectives;                   // so far
  std::vector<std::vector<Copy>> copies;  // groups not waited for; back() is the open one
  std::vector<Access> shared, global;     // while tracing
};
struct Warp {
  unsigned mask = 0, arrived = 0;
  const char* what = nullptr;
  alignas(16) unsigned char slot[2][32][kSlotBytes];
  char sync;
};
struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  size_t at_barrier = 0, alive = 0;
  int votes = 0, voted = 0;
  const char* barrier = nullptr;
  char sync;
  unsigned char* arena = nullptr;
  size_t used = 0, dynamic = 0;
  std::map<const void*, void*> statics;
};

// ---- what is counted
struct Counters {
  uint64_t threads, switches, launches;
  uint64_t loaded, stored;            // bytes of global memory, as asked for
  uint64_t cached;                    // bytes of loads that caches serve by design (parameters)
  uint64_t accesses, wide;            // of global memory; those of 16 bytes
  uint64_t loaded_wide;               // bytes that loads of 16 bytes were asked for
  uint64_t sectors, ideal_sectors;    // of 32 bytes, per warp and instruction; while tracing
  uint64_t bank_passes, bank_excess;  // of shared memory, and those that conflicts add; tracing
  uint64_t mma, ldsm, ldsm_conflicts;
};
inline Counters counters;
inline uint64_t &n_mma = counters.mma, &n_ldsm = counters.ldsm,
                &n_ldsm_conflicts = counters.ldsm_conflicts;
inline bool tracing = false;

// ---- settings
inline Order order = Order::kForward;
inline bool copies_early = false;
inline int multiprocessors = 132, arch = 90;
inline std::mt19937 dice{1};

inline Block* block = nullptr;
inline Thread* cur = nullptr;
inline Context scheduler;
inline std::function<void()> body;
inline char start_sync, end_sync;

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "cuda_emu: %s, in block (%u, %u, %u)\n", why, blockIdx.x, blockIdx.y,
               blockIdx.z);
  if (block != nullptr) {
    for (const Thread& t : block->threads) {
      if (t.lane > 1 && &t != cur) continue;
      std::fprintf(stderr, "  thread (%u, %u, %u), warp %d lane %d: %s %s\n", t.index.x, t.index.y,
                   t.index.z, t.warp, t.lane, t.state == State::kReady ? "runs after" : "at",
                   t.where);
    }
  }
  std::abort();
}

inline void count_load(size_t bytes) {
  const Quiet quiet;
  counters.loaded += bytes;
  ++counters.accesses;
  counters.wide += bytes == 16;
  counters.loaded_wide += bytes == 16 ? 16 : 0;
}
inline void count_store(size_t bytes) {
  const Quiet quiet;
  counters.stored += bytes;
  ++counters.accesses;
  counters.wide += bytes == 16;
}
inline void count_cached(size_t bytes) {
  const Quiet quiet;
  counters.cached += bytes;
}
inline void trace_global(const void* p, size_t bytes) {
  if (!tracing) return;
  const Quiet quiet;
  cur->global.push_back({reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes)});
}
inline void trace_shared(const void* p, size_t bytes) {
  if (!tracing) return;
  const Quiet quiet;
  cur->shared.push_back({reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(bytes)});
}

// ---- barriers and warp collectives

inline void stop(State state, const char* where) {
  cur->state = state;
  cur->where = where;
  go(*cur, scheduler);
}

inline int barrier(int vote, const char* what) {
  const Quiet quiet;
  Block& b = *block;
  if (b.alive != b.threads.size()) die("a barrier after some threads have left");
  if (b.at_barrier != 0 && b.barrier != what) die("threads wait at different kinds of barrier");
  release(&b.sync);
  b.barrier = what;
  b.votes += vote;
  if (++b.at_barrier == b.alive) {
    b.voted = b.votes;
    b.votes = 0;
    b.at_barrier = 0;
    for (Thread& t : b.threads) {
      if (t.state == State::kInBlock) t.state = State::kReady;
    }
    cur->where = what;
  } else {
    stop(State::kInBlock, what);
  }
  acquire(&b.sync);
  return b.voted;
}

using Slots = unsigned char (*)[kSlotBytes];

// Every lane of `mask` puts `in` into its slot; when the last one arrives, last(slots) runs once;
// then all go on and may read the slots until their next but one collective.
template <class In, class Last>
Slots collective(unsigned mask, const char* what, const In& in, Last last) {
  static_assert(sizeof(In) <= kSlotBytes, "more than a slot holds");
  const Quiet quiet;
  Block& b = *block;
  Warp& w = b.warps[static_cast<size_t>(cur->warp)];
  const Slots slots = w.slot[cur->collectives++ & 1];
  const size_t first = static_cast<size_t>(cur->warp) * 32;
  const size_t lanes = std::min<size_t>(32, b.threads.size() - first);
  unsigned live = 0;
  for (size_t l = 0; l < lanes; ++l) {
    if (b.threads[first + l].state != State::kDone) live |= 1u << l;
  }
  if (lanes < 32) mask &= (1u << lanes) - 1;
  if ((mask >> cur->lane & 1) == 0) die("a lane is not in the mask of its own collective");
  if ((mask & ~live) != 0) die("the mask of a collective names a lane that has left");
  if (w.arrived == 0) {
    w.mask = mask;
    w.what = what;
  } else if (w.mask != mask || w.what != what) {
    die("lanes of one warp are at different collectives");
  }
  std::memcpy(slots[cur->lane], &in, sizeof in);
  release(&w.sync);
  w.arrived |= 1u << cur->lane;
  if (w.arrived == mask) {
    w.arrived = 0;
    acquire(&w.sync);
    last(slots);
    release(&w.sync);
    for (size_t l = 0; l < lanes; ++l) {
      Thread& t = b.threads[first + l];
      if ((mask >> l & 1) != 0 && t.state == State::kInWarp) t.state = State::kReady;
    }
    cur->where = what;
  } else {
    stop(State::kInWarp, what);
  }
  acquire(&w.sync);
  return slots;
}

template <class T>
T shuffle(unsigned mask, const char* what, T value, int source) {
  const Slots slots = collective(mask, what, value, [](Slots) {});
  const Quiet quiet;
  if (source < 0 || source > 31) source = cur->lane;
  T got;
  std::memcpy(&got, slots[source], sizeof got);
  return got;
}

// ---- copies from global to shared memory that land later

inline void land(const Copy& c) {
  if (c.from_bytes > 0) std::memcpy(c.to, c.from, static_cast<size_t>(c.from_bytes));
  std::memset(static_cast<char*>(c.to) + c.from_bytes, 0,
              static_cast<size_t>(c.to_bytes - c.from_bytes));
}
// The first from_bytes come from `from`, the rest is zero.
inline void copy_async(void* to, const void* from, int from_bytes, int to_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(to_bytes) != 0 ||
      (from_bytes > 0 &&
       reinterpret_cast<uintptr_t>(from) % static_cast<uintptr_t>(to_bytes) != 0)) {
    die("cp.async with an address that is not aligned");
  }
  const Copy copy = {to, from, from_bytes, to_bytes};
  if (copies_early) return land(copy);
  const Quiet quiet;
  cur->copies.back().push_back(copy);
}
inline void copy_commit() {
  const Quiet quiet;
  cur->copies.emplace_back();
}
// Leaves at most `pending` committed groups on their way.
inline void copy_wait(size_t pending) {
  std::vector<Copy> due;
  {
    const Quiet quiet;
    auto& groups = cur->copies;
    while (groups.size() > pending + 1) {
      due.insert(due.end(), groups.front().begin(), groups.front().end());
      groups.erase(groups.begin());
    }
  }
  for (const Copy& c : due) land(c);
}

// The same memory for all threads of the block; `key` tells declarations apart.
inline void* shared_memory(const void* key, size_t bytes) {
  const Quiet quiet;
  Block& b = *block;
  const auto known = b.statics.find(key);
  if (known != b.statics.end()) return known->second;
  const size_t offset = (b.used + 127) & ~size_t{127};
  if (offset + bytes > kSharedLimit) die("more shared memory than a block can have");
  b.used = offset + bytes + 64;  // and a red zone
  unsigned char* const p = b.arena + offset;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
  b.statics.emplace(key, p);
  return p;
}
inline char dynamic_key;

}  // namespace emu
