// What the bindings ask of the CUDA runtime. A C interface, no CUDA header.
#pragma once
#include <cstdint>

extern "C" {
// Fills memory of the current device, in the order of `stream`. Returns a cudaError_t.
int fastnn_cuda_fill(void* p, int byte, int64_t bytes, void* stream);
// A cudaError_t in words.
const char* fastnn_cuda_error_text(int code);
// Why no kernel can run here, in words; empty where one can. Makes no context.
const char* fastnn_cuda_problem();
}
