// Where a call runs: on the CPU, or on a CUDA device in its current stream. Built with
// FASTNN_CUDA_EMU (tests/cuda_emu), the CUDA kernels' CPU emulation takes the place of a device and
// the operators are those of torch.ops.fastnn_emu.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "cpu/memory.h"

namespace fastnn {

// Made first in every operator, from its main tensor. As long as it lives, checked_dtype demands
// tensors of the same device, new_output allocates there, and it is torch's current device.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& main);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  bool cuda() const { return cuda_; }
  int32_t type() const { return type_; }
  int32_t index() const { return index_; }
  std::string name() const;  // "the CPU", "cuda:0"
  bool has(const torch::stable::Tensor& t) const;
  static const DeviceScope& current();

 private:
  int32_t type_, index_;
  bool cuda_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  const DeviceScope* outer_;
};

// Runs a launcher in the current stream with `bytes` of workspace; RuntimeError where it fails.
void run_cuda(const char* kernel, int64_t bytes, int (*launch)(void* context, void*, void*),
              void* context);

// Fills memory of the call's device.
void fill_cuda(void* p, int byte, int64_t bytes);

template <class Params>
struct CudaKernel {
  const char* name;
  int64_t (*workspace)(const Params*);
  int (*launch)(const Params*, void* workspace, void* stream);

  void operator()(const Params& p) const {
    struct Context {
      const CudaKernel* kernel;
      const Params* params;
    } context = {this, &p};
    run_cuda(
        name, workspace(&p),
        [](void* c, void* memory, void* stream) {
          const auto* const call = static_cast<Context*>(c);
          return call->kernel->launch(call->params, memory, stream);
        },
        &context);
  }
};
// The kernel with the launchers fastnn_cuda_<name> and fastnn_cuda_<name>_workspace.
#define FASTNN_CUDA_KERNEL(name) \
  ::fastnn::CudaKernel { #name, &fastnn_cuda_##name##_workspace, &fastnn_cuda_##name }

// Why no CUDA kernel can run here, in words; empty where one can.
std::string cuda_problem();
bool cuda_compiled();

// Whether float32 products may be computed in tf32: what torch's setting says now. `ask` finds out;
// no, as long as nobody has said how to ask.
bool allow_tf32();
void set_tf32_question(bool (*ask)());

}  // namespace fastnn

// FASTNN_SCHEMAS(m) opens the list of an op's schemas, FASTNN_KERNELS(m) that of its CPU kernels
// (of the emulated ones), FASTNN_CUDA_KERNELS(m) that of its CUDA kernels.
#if defined(FASTNN_CUDA_EMU)
#define FASTNN_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(fastnn_emu, m)
#define FASTNN_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(fastnn_emu, CPU, m)
#else
#define FASTNN_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(fastnn, m)
#define FASTNN_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(fastnn, CPU, m)
#define FASTNN_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(fastnn, CUDA, m)
#endif
