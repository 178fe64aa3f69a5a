// Runs the blocks of a launch, and what the traces of a block's accesses say.
#pragma once
#include "machine.h"

namespace emu {

// Walks through the k-th access of every lane, warp by warp: fibers do not run in step, but lanes
// of a warp that take the same path make the same accesses in the same order.
template <class Visit>
void by_instruction(const Block& b, std::vector<Access> Thread::* list, Visit visit) {
  for (size_t w = 0; w < b.warps.size(); ++w) {
    const size_t first = w * 32, end = std::min(first + 32, b.threads.size());
    size_t longest = 0;
    for (size_t i = first; i < end; ++i) longest = std::max(longest, (b.threads[i].*list).size());
    for (size_t k = 0; k < longest; ++k) {
      std::vector<Access> together;
      for (size_t i = first; i < end; ++i) {
        if (k < (b.threads[i].*list).size()) together.push_back((b.threads[i].*list)[k]);
      }
      visit(together);
    }
  }
}

inline void count_traces(const Block& b) {
  by_instruction(b, &Thread::global, [](const std::vector<Access>& lanes) {
    std::vector<uintptr_t> sectors;
    size_t bytes = 0;
    for (const Access& a : lanes) {
      bytes += a.bytes;
      for (uintptr_t s = a.at / 32; s <= (a.at + a.bytes - 1) / 32; ++s) sectors.push_back(s);
    }
    std::sort(sectors.begin(), sectors.end());
    counters.sectors +=
        static_cast<uint64_t>(std::unique(sectors.begin(), sectors.end()) - sectors.begin());
    counters.ideal_sectors += (bytes + 31) / 32;
  });
  by_instruction(b, &Thread::shared, [](const std::vector<Access>& lanes) {
    // 128 bytes a pass: lanes with 8 bytes go by halves of the warp, with 16 by quarters.
    const size_t group = 128 / std::max<size_t>(4, lanes[0].bytes);
    for (size_t from = 0; from < lanes.size(); from += group) {
      std::map<uintptr_t, std::vector<uintptr_t>> words_of_bank;
      for (size_t i = from; i < std::min(from + group, lanes.size()); ++i) {
        for (uintptr_t w = lanes[i].at / 4; w <= (lanes[i].at + lanes[i].bytes - 1) / 4; ++w) {
          auto& words = words_of_bank[w % 32];
          if (std::find(words.begin(), words.end(), w) == words.end()) words.push_back(w);
        }
      }
      size_t passes = 1;
      for (const auto& [bank, words] : words_of_bank) passes = std::max(passes, words.size());
      counters.bank_passes += passes;
      counters.bank_excess += passes - 1;
    }
  });
}

inline void permute(std::vector<int>& o) {
  for (size_t i = 0; i < o.size(); ++i) o[i] = static_cast<int>(i);
  if (order == Order::kReverse) std::reverse(o.begin(), o.end());
  if (order == Order::kRandom) std::shuffle(o.begin(), o.end(), dice);
}

inline void thread_main() {
  arrived_first(scheduler);
  acquire(&start_sync);
  body();
  release(&end_sync);
  {
    const Quiet quiet;
    cur->state = State::kDone;
    cur->where = "its end";
    --block->alive;
    if (block->at_barrier != 0) die("some threads left while others wait at a barrier");
  }
  go(*cur, scheduler, true);
  std::abort();
}

// A warp runs as far as it gets, then the next; of a random order, one step of each.
inline void run_block(Block& b) {
  std::vector<int> warps(b.warps.size()), lanes(32);
  permute(warps);
  permute(lanes);
  while (b.alive != 0) {
    bool any = false;
    if (order == Order::kRandom) {
      permute(warps);
      permute(lanes);
    }
    for (const int w : warps) {
      for (bool more = true; more;) {
        more = false;
        for (const int l : lanes) {
          const size_t i = static_cast<size_t>(w) * 32 + static_cast<size_t>(l);
          if (i >= b.threads.size() || b.threads[i].state != State::kReady) continue;
          cur = &b.threads[i];
          threadIdx = cur->index;
          ++counters.switches;
          go(scheduler, *cur);
          any = true;
          more = order != Order::kRandom;
        }
      }
    }
    if (!any) die("deadlock: threads wait for each other");
  }
}

inline void start_block(Block& b, const std::vector<char*>& stacks, size_t dynamic) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(b.arena, kArenaBytes);
#elif defined(__SANITIZE_THREAD__)
  fresh_pages(b.arena, kArenaBytes);
#endif
  std::memset(b.arena, 0xff, std::max(b.used, dynamic) + 256);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(b.arena, kArenaBytes);
#endif
  b.used = 0;
  b.statics.clear();
  b.dynamic = dynamic;
  b.alive = b.threads.size();
  b.at_barrier = 0;
  b.votes = 0;
  for (Warp& w : b.warps) w.arrived = 0;
  const unsigned nx = blockDim.x, ny = blockDim.y;
  for (size_t i = 0; i < b.threads.size(); ++i) {
    Thread& t = b.threads[i];
    const auto n = static_cast<unsigned>(i);
    t.index = {n % nx, n / nx % ny, n / (nx * ny)};
    t.warp = static_cast<int>(i / 32);
    t.lane = static_cast<int>(i % 32);
    t.state = State::kReady;
    t.where = "its start";
    t.collectives = 0;
    t.copies.clear();
    t.copies.emplace_back();
    t.shared.clear();
    t.global.clear();
    prepare(t, stacks[i], thread_main);
  }
}

inline void launch(dim3 grid, dim3 threads, size_t dynamic, std::function<void()> kernel) {
  const Quiet quiet;
  static Block b;
  static std::vector<char*> stacks;
  const size_t n = size_t{threads.x} * threads.y * threads.z;
  if (n < 1 || n > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || dynamic > kSharedLimit) {
    std::fprintf(stderr, "cuda_emu: a launch of (%u, %u, %u) blocks of %zu threads, %zu bytes\n",
                 grid.x, grid.y, grid.z, n, dynamic);
    std::abort();
  }
  while (stacks.size() < n) stacks.push_back(new_stack());
  if (b.arena == nullptr) {
    b.arena = reinterpret_cast<unsigned char*>(fresh_pages(nullptr, kArenaBytes));
    b.used = kSharedLimit;
  }
  block = &b;
  b.threads.resize(n);
  b.warps.resize((n + 31) / 32);
  body = std::move(kernel);
  blockDim = threads;
  gridDim = grid;
  ++counters.launches;
#if defined(__SANITIZE_THREAD__)
  scheduler.shadow = __tsan_get_current_fiber();
#endif
  std::vector<int> blocks(size_t{grid.x} * grid.y * grid.z);
  permute(blocks);
  for (const int i : blocks) {
    const auto at = static_cast<unsigned>(i);
    blockIdx = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    start_block(b, stacks, dynamic);
    release(&start_sync);
    run_block(b);
    counters.threads += n;
    if (tracing) count_traces(b);
  }
  acquire(&end_sync);
  cur = nullptr;
}

// Settings from the environment: EMU_ORDER=forward|reverse|random[:seed],
// EMU_COPIES=late|early.
inline bool set_order(const char* text) {
  if (std::strcmp(text, "forward") == 0) {
    order = Order::kForward;
  } else if (std::strcmp(text, "reverse") == 0) {
    order = Order::kReverse;
  } else if (std::strncmp(text, "random", 6) == 0) {
    order = Order::kRandom;
    dice.seed(text[6] == ':' ? static_cast<unsigned>(std::atoi(text + 7)) : 1u);
  } else {
    return false;
  }
  return true;
}
inline const bool configured = [] {
  const char* const wanted = std::getenv("EMU_ORDER");
  if (wanted != nullptr && !set_order(wanted)) die("EMU_ORDER is no order");
  const char* const copies = std::getenv("EMU_COPIES");
  copies_early = copies != nullptr && std::strcmp(copies, "early") == 0;
  return true;
}();

}  // namespace emu
