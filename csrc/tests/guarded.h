// Memory that ends at a page nobody may touch: reading or writing one byte too far, on either side,
// ends the program.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fastnn::test {

enum class Flush { kEnd, kStart };  // which end of the buffer touches a forbidden page

// `count` elements of T flush with one forbidden page, `offset` elements away from it on request
// (misalignment). The slack on the other side, up to the other forbidden page, holds a pattern that
// `intact` checks.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, Flush flush = Flush::kEnd, int64_t offset = 0)
      : bytes_(count * static_cast<int64_t>(sizeof(T))) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t skip = offset * static_cast<int64_t>(sizeof(T));
    inner_ = (bytes_ + skip + page - 1) / page * page + page;
    total_ = inner_ + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(total_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED ||
        mprotect(base_ + page, static_cast<size_t>(inner_), PROT_READ | PROT_WRITE) != 0) {
      std::perror("Guarded");
      std::abort();
    }
    std::memset(base_ + page, kPattern, static_cast<size_t>(inner_));
    first_ = base_ + page + (flush == Flush::kEnd ? inner_ - bytes_ - skip : skip);
  }
  ~Guarded() { munmap(base_, static_cast<size_t>(total_)); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(first_); }
  const T* data() const { return reinterpret_cast<const T*>(first_); }
  int64_t bytes() const { return bytes_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

  // Whether every readable byte outside the buffer still holds the pattern.
  bool intact() const {
    const char* const page = base_ + sysconf(_SC_PAGESIZE);
    for (const char* p = page; p < page + inner_; ++p) {
      if ((p < first_ || p >= first_ + bytes_) && *p != static_cast<char>(kPattern)) return false;
    }
    return true;
  }

 private:
  static constexpr int kPattern = 0x5a;
  int64_t bytes_, inner_, total_;
  char* base_;
  char* first_;
};

}  // namespace fastnn::test
