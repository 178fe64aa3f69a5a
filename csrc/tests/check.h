// Checks that count, and a main that runs the program's cases. Include in one .cpp per program.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace fastnn::test {

inline long g_checks = 0, g_failures = 0;
constexpr long kMaxPrinted = 20;

inline void passed() { ++g_checks; }
[[gnu::format(printf, 4, 5)]] inline void failed(const char* file, int line, const char* condition,
                                                 const char* detail, ...) {
  ++g_checks;
  if (++g_failures > kMaxPrinted) return;
  std::printf("%s:%d: %s  ", file, line, condition);
  va_list arguments;
  va_start(arguments, detail);
  std::vprintf(detail, arguments);
  va_end(arguments);
  std::printf("\n");
}

struct Case {
  static inline Case* first = nullptr;
  const char* name;
  void (*run)();
  Case* next;
  Case(const char* n, void (*r)()) : name(n), run(r), next(first) { first = this; }
};

}  // namespace fastnn::test

#define TEST(name)                                           \
  static void name();                                        \
  static const fastnn::test::Case name##_case(#name, &name); \
  static void name()
// CHECK(condition, "printf format", values...): the values that make a failure understandable, read
// only then.
#define CHECK(condition, ...)   \
  (static_cast<bool>(condition) \
       ? fastnn::test::passed() \
       : fastnn::test::failed(__FILE__, __LINE__, #condition, __VA_ARGS__))

int main() {
  for (const auto* c = fastnn::test::Case::first; c != nullptr; c = c->next) {
    const long checks = fastnn::test::g_checks, failures = fastnn::test::g_failures;
    c->run();
    const bool ok = fastnn::test::g_failures == failures && fastnn::test::g_checks > checks;
    std::printf("%-6s %-40s %ld checks\n", ok ? "ok" : "FAILED", c->name,
                fastnn::test::g_checks - checks);
    if (fastnn::test::g_checks == checks)
      ++fastnn::test::g_failures;  // a case that checks nothing is broken
  }
  return fastnn::test::g_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
