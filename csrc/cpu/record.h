// A log of which kernel ran on which instruction set; off unless asked for.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace fastnn {

using RunLog = std::vector<std::pair<std::string, std::string>>;

void record_start();
RunLog record_stop();
void record_run(const char* kernel, const char* isa);  // one relaxed load where recording is off

}  // namespace fastnn
