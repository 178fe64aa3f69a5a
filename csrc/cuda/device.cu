#include "cuda/device.h"

#include <cuda_runtime.h>

int fastnn_cuda_fill(void* p, int byte, int64_t bytes, void* stream) {
  return static_cast<int>(
      cudaMemsetAsync(p, byte, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

const char* fastnn_cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char* fastnn_cuda_problem() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(code);
  }
  return count > 0 ? "" : "there is no CUDA device";
}
