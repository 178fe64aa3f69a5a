// The choice of the instruction set: names, order, what is refused.
#include <algorithm>
#include <stdexcept>

#include "tests/isa.h"

using namespace fastnn;
using fastnn::test::for_each_isa;

namespace {

bool refused(const char* name, const char* reason) {
  try {
    set_isa(name);
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).find(reason) != std::string::npos;
  }
  return false;
}

TEST(unsupported_and_unknown_sets_are_refused) {
  const auto compiled = isa_compiled(), supported = isa_supported();
  for (const auto& isa : compiled) {
    if (std::find(supported.begin(), supported.end(), isa) != supported.end()) continue;
    CHECK(refused(isa.c_str(), "not supported by this CPU"), "%s", isa.c_str());
  }
  set_isa(supported.front());
  CHECK(refused("avx1024", "unknown instruction set 'avx1024'"), "names what was asked for");
  CHECK(refused("Scalar", supported.back().c_str()), "lists what there is");
  CHECK(kernels().isa == supported.front(), "a refused choice changes nothing");
  set_isa("");
}

TEST(empty_name_takes_the_best) {
  set_isa("scalar");
  set_isa("");
  CHECK(kernels().isa == isa_supported().back(), "got %s", kernels().isa);
}

TEST(supported_sets_are_a_prefix_of_the_compiled) {
  const auto compiled = isa_compiled(), supported = isa_supported();
  CHECK(!supported.empty() && supported.size() <= compiled.size(), "%zu of %zu", supported.size(),
        compiled.size());
  for (size_t i = 0; i < supported.size(); ++i) {
    CHECK(compiled[i] == supported[i], "%s without the sets it includes", supported[i].c_str());
  }
  CHECK(compiled.front() == "scalar", "the first is %s", compiled.front().c_str());
}

TEST(forced_set_is_the_one_that_runs) {
  for_each_isa([](const char*) {});
}

}  // namespace
