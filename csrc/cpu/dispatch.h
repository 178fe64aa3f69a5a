// Which instruction set runs, chosen at run time.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernel_table.h"

namespace fastnn {

// In rising order; each includes the ones before it.
std::vector<std::string> isa_compiled();
std::vector<std::string> isa_supported();

// Forces one by name; "" takes the best that this CPU has. Throws std::invalid_argument for a name
// that is unknown, not compiled in, or not supported by this CPU. At load time the environment
// variable FASTNN_ISA is obeyed by fastnn/_extension.py.
void set_isa(const std::string& name);

// The kernels in force. One atomic load.
const KernelTable& kernels();

}  // namespace fastnn
