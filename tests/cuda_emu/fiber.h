// A stack of its own for every CUDA thread, and the switch from one to another. AddressSanitizer
// and ThreadSanitizer are told of each switch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_UNWATCHED __attribute__((no_sanitize("address"), noinline))
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMU_UNWATCHED __attribute__((no_sanitize("thread"), noinline))
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define EMU_UNWATCHED __attribute__((noinline))
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// Private zero pages. Mapping over old ones makes ThreadSanitizer forget who touched them.
inline char* fresh_pages(void* at, size_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at != nullptr ? MAP_FIXED : 0);
  void* const p = mmap(at, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED) {
    std::perror("cuda_emu: mmap");
    std::abort();
  }
  return static_cast<char*>(p);
}

inline char* new_stack() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* const p = fresh_pages(nullptr, kStackBytes + page);
  mprotect(p, page, PROT_NONE);  // overflow faults
  return p + page;
}

// Where one line of execution stopped.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t state = {};
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* shadow = nullptr;      // ThreadSanitizer's fiber
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

#if defined(__x86_64__)
extern "C" void fastnn_emu_switch(void** save, void* next);
asm(R"(.text
.weak fastnn_emu_switch
.type fastnn_emu_switch,@function
fastnn_emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastnn_emu_switch, .-fastnn_emu_switch)");
#endif

// Prepares `c` to start at `entry`, which never returns, on `stack`.
inline void prepare(Context& c, char* stack, void (*entry)()) {
#if defined(__SANITIZE_THREAD__)
  fresh_pages(stack, kStackBytes);
  if (c.shadow != nullptr) __tsan_destroy_fiber(c.shadow);
  c.shadow = __tsan_create_fiber(0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // frames that the last fiber never left
#endif
  c.stack = stack;
  c.stack_bytes = kStackBytes;
  c.fake_stack = nullptr;
#if defined(__x86_64__)
  auto* const top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStackBytes - 64) &
                                             ~uintptr_t{15});
  *top = reinterpret_cast<void*>(entry);
  c.stack_pointer = top - 6;  // six registers that the first switch pops
  std::memset(c.stack_pointer, 0, 48);
#else
  getcontext(&c.state);
  c.state.uc_stack.ss_sp = stack;
  c.state.uc_stack.ss_size = kStackBytes;
  c.state.uc_link = nullptr;
  makecontext(&c.state, entry, 0);
#endif
}

// First thing a fiber does: learns the stack of who started it.
EMU_UNWATCHED inline void arrived_first(Context& starter) {
  (void)starter;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &starter.stack, &starter.stack_bytes);
#endif
}

// Goes on with `to`; returns when somebody goes on with `from`. `last`: nobody ever will.
EMU_UNWATCHED inline void go(Context& from, Context& to, bool last = false) {
  (void)last;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.shadow, 1);  // 1: the switch itself orders nothing
#endif
#if defined(__x86_64__)
  fastnn_emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The emulator's own bookkeeping is no race.
struct Quiet {
#if defined(__SANITIZE_THREAD__)
  Quiet() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Quiet() {}
#endif
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// What a barrier orders, for ThreadSanitizer.
inline void acquire(void* p) {
  (void)p;
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(p);
#endif
}
inline void release(void* p) {
  (void)p;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(p);
#endif
}

}  // namespace emu
