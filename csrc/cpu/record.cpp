#include "cpu/record.h"

#include <atomic>
#include <mutex>

namespace fastnn {
namespace {

std::atomic<bool> g_recording{false};
std::mutex g_mutex;
RunLog g_runs;

}  // namespace

void record_start() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_runs.clear();
  g_recording.store(true, std::memory_order_relaxed);
}

RunLog record_stop() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_recording.store(false, std::memory_order_relaxed);
  return std::move(g_runs);
}

void record_run(const char* kernel, const char* isa) {
  if (!g_recording.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_runs.emplace_back(kernel, isa);
}

}  // namespace fastnn
