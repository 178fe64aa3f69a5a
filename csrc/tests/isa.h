// Runs a check on every instruction set that this CPU has, forced and proven to be the one that
// ran.
#pragma once
#include <string>

#include "cpu/dispatch.h"
#include "tests/check.h"

namespace fastnn::test {

template <class F>
void for_each_isa(F&& f) {
  for (const std::string& isa : isa_supported()) {
    set_isa(isa);
    CHECK(kernels().isa == isa, "asked for %s, got code compiled for %s", isa.c_str(),
          kernels().isa);
    f(isa.c_str());
  }
  set_isa("");
}

}  // namespace fastnn::test
