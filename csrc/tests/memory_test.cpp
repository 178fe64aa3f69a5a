// Scratch memory: alignment, reuse, nesting, poison. Kept memory: parts of slabs.
#include "cpu/memory.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "tests/check.h"

using namespace fastnn;

namespace {

bool all_nan(const void* p, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) {
    float x;
    std::memcpy(&x, static_cast<const char*>(p) + i * 4, sizeof x);
    if (!std::isnan(x)) return false;
  }
  return true;
}

TEST(poison_fills_outputs_and_scratch) {
  CHECK(!poison(), "off unless asked for");
  float output[37] = {};
  prepare_output(output, sizeof output);
  CHECK(output[0] == 0.f && output[36] == 0.f, "without poison nothing is written");
  set_poison(true);
  prepare_output(output, sizeof output);
  CHECK(all_nan(output, 37), "output");
  for (int round = 0; round < 2; ++round) {  // fresh memory, then the thread's kept buffer
    const Scratch scratch(1000 * 4);
    CHECK(all_nan(scratch.get(), 1000), "scratch, round %d", round);
    std::memset(scratch.get(), 0, 1000 * 4);
  }
  set_poison(false);
}

TEST(kept_memory_is_aligned_and_its_own) {
  std::vector<std::pair<std::shared_ptr<void>, int64_t>> parts;
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{64}, int64_t{65}, int64_t{5} << 20,
                              int64_t{9} << 20, int64_t{4} << 20, int64_t{100}}) {
    parts.emplace_back(keep_memory(bytes), bytes);
    const auto& [part, size] = parts.back();
    CHECK(reinterpret_cast<uintptr_t>(part.get()) % 64 == 0, "%ld bytes", static_cast<long>(size));
    std::memset(part.get(), static_cast<int>(parts.size()), static_cast<size_t>(size));
  }
  parts.erase(parts.begin() + 3);  // whose slab the others still need
  for (size_t i = 0; i < parts.size(); ++i) {
    const auto* const bytes = static_cast<const char*>(parts[i].first.get());
    for (int64_t j = 0; j < parts[i].second; ++j)
      CHECK(bytes[j] == static_cast<char>(i < 3 ? i + 1 : i + 2), "part %zu, byte %ld", i,
            static_cast<long>(j));
  }
}

TEST(kept_memory_goes_with_its_last_part) {
  const std::shared_ptr<void> small = keep_memory(64);
  std::shared_ptr<void> beside = keep_memory(64);
  const std::weak_ptr<void> gone = beside;
  CHECK(static_cast<char*>(beside.get()) - static_cast<char*>(small.get()) == 64,
        "two small parts do not share a slab");
  beside.reset();
  CHECK(!gone.expired(), "the slab went while a part of it was kept");
}

TEST(scratch_is_aligned_and_its_own) {
  for (const int64_t bytes :
       {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{4097}, int64_t{3} << 20}) {
    const Scratch outer(bytes), inner(bytes);
    CHECK(reinterpret_cast<uintptr_t>(outer.get()) % 64 == 0, "%ld bytes",
          static_cast<long>(bytes));
    CHECK(outer.get() != inner.get(), "two at a time share memory");
    std::memset(outer.get(), 1, static_cast<size_t>(bytes));
    std::memset(inner.get(), 2, static_cast<size_t>(bytes));
    CHECK(bytes == 0 || static_cast<char*>(outer.get())[bytes - 1] == 1,
          "overwritten by the other one");
  }
}

TEST(scratch_is_kept_by_its_thread) {
  const void* first = nullptr;
  {
    const Scratch scratch(1 << 20);
    first = scratch.get();
  }
  const Scratch again(1 << 19);
  CHECK(again.get() == first, "a smaller buffer reuses the kept one");
  std::thread([&] {
    const Scratch other(1 << 19);
    CHECK(other.get() != first, "another thread has its own");
  }).join();
}

TEST(impossible_scratch_is_bad_alloc) {
  bool caught = false;
  try {
    const Scratch scratch(int64_t{1} << 60);
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  CHECK(caught, "an allocation that cannot work must throw");
}

}  // namespace
