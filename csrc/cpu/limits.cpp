#include "cpu/limits.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"

namespace fastnn {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Fresh pages of one size, given back at the end.
class Region {
 public:
  Region(int64_t bytes, Pages pages) {
    mapped_ = static_cast<size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment);
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(base_, mapped_, pages == Pages::kHuge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
    const auto first =
        (reinterpret_cast<uintptr_t>(base_) + kAlignment - 1) / kAlignment * kAlignment;
    data_ = reinterpret_cast<float*>(first);
  }
  ~Region() { munmap(base_, mapped_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  float* get() const { return data_; }

 private:
  static constexpr int64_t kAlignment = int64_t{2} << 20;
  void* base_;
  size_t mapped_;
  float* data_;
};

// Puts the calling thread on the index-th processor that the process may use; no harm where the
// system refuses.
void pin(int64_t index) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int64_t left = index % std::max(CPU_COUNT(&allowed), 1);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || left-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    return;
  }
#else
  (void)index;
#endif
}

// All threads enter a trial together; spinning, because waking up takes longer than a trial.
class Gate {
 public:
  explicit Gate(int64_t threads) : threads_(threads) {}
  void wait() {
    const int64_t turn = turn_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0);
      turn_.store(turn + 1);
    } else {
      while (turn_.load() == turn) std::this_thread::yield();
    }
  }

 private:
  const int64_t threads_;
  std::atomic<int64_t> arrived_{0}, turn_{0};
};

// Does some work, repeated, in one of several places; returns how much.
using Body = std::function<double(int64_t repeats, int64_t place)>;

constexpr double kTrialSeconds = 0.001;  // within a time slice of a busy machine
constexpr int64_t kLeastTrials = 20;
constexpr int64_t kSlice = int64_t{8} << 20;  // floats: 32 MiB, a millisecond or two

// What the fastest tenth of the trials reaches: the very best of many is luck.
double undisturbed(std::vector<double>& found) {
  const auto at = found.begin() + static_cast<std::ptrdiff_t>(found.size() / 10);
  std::nth_element(found.begin(), at, found.end());
  return *at;
}

// The rate of going once through all places, with trials of `seconds` in all.
// make(thread) gives that thread's body. With one place a trial repeats it for about kTrialSeconds.
template <class Make>
double undisturbed_rate(int64_t threads, double seconds, int64_t places, Make make) {
  std::vector<Clock::time_point> began(static_cast<size_t>(threads)), ended(began);
  std::vector<double> work(static_cast<size_t>(threads));
  std::vector<std::vector<double>> found(static_cast<size_t>(places));  // seconds per unit of work
  Gate gate(threads);
  std::atomic<int64_t> repeats{1};
  std::atomic<bool> more{true};
  const auto start = Clock::now();

  int64_t counted = 0;
  const auto judge = [&](int64_t trial) {  // by the first thread, between two gates
    const double took =
        std::chrono::duration<double>(*std::max_element(ended.begin(), ended.end()) -
                                      *std::min_element(began.begin(), began.end()))
            .count();
    double total = 0;
    for (const double w : work) total += w;
    auto& here = found[static_cast<size_t>(trial % places)];
    if (places == 1 && took < kTrialSeconds / 2) {  // too short to count
      repeats = repeats * 2;
      here.clear();
      counted = 0;
    } else {
      here.push_back(std::max(took, 1e-9) / total);
      ++counted;
    }
    more = counted < std::max(2 * places, kLeastTrials) || seconds_since(start) < seconds;
  };
  const auto run = [&](int64_t thread) {
    pin(thread);
    const Body body = make(thread);
    for (int64_t place = 0; place < places; ++place) body(1, place);  // not the first touch
    const auto i = static_cast<size_t>(thread);
    for (int64_t trial = 0; more.load(); ++trial) {
      gate.wait();
      began[i] = Clock::now();
      work[i] = body(repeats.load(), trial % places);
      ended[i] = Clock::now();
      gate.wait();
      if (thread == 0) judge(trial);
      gate.wait();
    }
  };
  std::vector<std::thread> pool;
  for (int64_t thread = 0; thread < threads; ++thread) pool.emplace_back(run, thread);
  for (std::thread& thread : pool) thread.join();
  double all = 0;
  for (auto& here : found) all += undisturbed(here);
  return static_cast<double>(places) / all;
}

}  // namespace

double measure_peak(PeakKind kind, int64_t threads, double seconds) {
  const KernelTable& table = kernels();
  alignas(64) float probe[16];
  if (table.peak_operations(kind, 1, probe) == 0) return 0;
  return undisturbed_rate(threads, seconds, 1, [&](int64_t) {
    return [&table, kind](int64_t repeats, int64_t) {
      alignas(64) float sink[16];
      return static_cast<double>(table.peak_operations(kind, repeats * 1000, sink));
    };
  });
}

double measure_stream(StreamKind kind, int64_t bytes, Pages pages, bool streaming, int64_t threads,
                      double seconds) {
  const KernelTable& table = kernels();
  const int64_t buffers = kind == StreamKind::kCopy ? 2 : 1;
  const int64_t n = std::max<int64_t>(bytes / buffers / 4 / kStreamBlock, 1) * kStreamBlock;
  std::vector<std::vector<std::unique_ptr<Region>>> regions(static_cast<size_t>(threads));
  for (auto& mine : regions) {
    for (int64_t b = 0; b < buffers; ++b) mine.push_back(std::make_unique<Region>(n * 4, pages));
  }
  // A large set is streamed in slices: a turn through them finds nothing of the last one in a
  // cache, and each is short enough to pass between two interruptions.
  const int64_t places = std::max<int64_t>(n / kSlice, 1);
  const int64_t slice = n / places / kStreamBlock * kStreamBlock;
  return undisturbed_rate(threads, seconds, places, [&](int64_t thread) {
    const auto& mine = regions[static_cast<size_t>(thread)];
    float* const x = mine.front()->get();
    float* const y = mine.back()->get();
    for (const auto& region : mine) std::fill_n(region->get(), n, 1.f);  // pages of its own
    return [=, &table](int64_t repeats, int64_t place) {
      const StreamParams p{x + place * slice, y + place * slice, slice, repeats, kind, streaming};
      [[maybe_unused]] volatile float sink = table.stream(p);
      return static_cast<double>(repeats * slice * 4 * buffers);
    };
  });
}

}  // namespace fastnn
