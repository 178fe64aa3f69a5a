#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

#define FASTNN_ISA(name) FASTNN_KERNEL_PARTS(FASTNN_DECLARE_TABLE, name)
#include "fastnn_isas.inc"
#undef FASTNN_ISA

namespace fastnn {
namespace {

// __builtin_cpu_supports reads CPUID and XGETBV: it says no where the operating system does not
// save the registers. "x86-64-v3" and "-v4" are exactly what the compiler may emit under -march of
// that name.
[[maybe_unused]] bool cpu_has_scalar() { return true; }
#if defined(__x86_64__)
[[maybe_unused]] bool cpu_has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
[[maybe_unused]] bool cpu_has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
[[maybe_unused]] bool cpu_has_avx512_vnni() {
  return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
}
[[maybe_unused]] bool cpu_has_avx512_bf16() {
  return cpu_has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
}
#endif

struct Entry {
  const char* name;
  KernelTable table;
  bool (*supported)();
};
const Entry kEntries[] = {
#define FASTNN_PART(Part, part, isa) FASTNN_TABLE_NAME(part, isa),
#define FASTNN_ISA(name) {#name, {FASTNN_KERNEL_PARTS(FASTNN_PART, name)}, cpu_has_##name},
#include "fastnn_isas.inc"
#undef FASTNN_ISA
#undef FASTNN_PART
};

std::atomic<const KernelTable*> g_table{nullptr};

const KernelTable* best() {
  const KernelTable* table = nullptr;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) table = &entry.table;
  }
  return table;
}

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

std::vector<std::string> isa_compiled() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.name);
  return names;
}

std::vector<std::string> isa_supported() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) {
    if (entry.supported()) names.emplace_back(entry.name);
  }
  return names;
}

void set_isa(const std::string& name) {
  if (name.empty()) {
    g_table.store(best());
    return;
  }
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    if (!entry.supported()) {
      throw std::invalid_argument("instruction set '" + name +
                                  "' is not supported by this CPU, which has " +
                                  joined(isa_supported()));
    }
    g_table.store(&entry.table);
    return;
  }
  throw std::invalid_argument("unknown instruction set '" + name +
                              "'; compiled in: " + joined(isa_compiled()));
}

const KernelTable& kernels() {
  const KernelTable* table = g_table.load(std::memory_order_relaxed);
  if (table == nullptr) {
    table = best();
    g_table.store(table);
  }
  return *table;
}

}  // namespace fastnn
