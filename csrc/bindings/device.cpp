#include "bindings/device.h"

#include <dlfcn.h>

#include "bindings/tensor.h"
#include "cpu/record.h"
#include "cuda/device.h"

namespace fastnn {
namespace {

thread_local const DeviceScope* g_scope = nullptr;
bool (*g_ask_tf32)() = nullptr;

int32_t device_type_of(const Tensor& t) {
  int32_t type = 0;
  aoti_torch_get_device_type(t.get(), &type);
  return type;
}

#if defined(FASTNN_CUDA_EMU)
constexpr bool kEmulated = true;
void demand_cuda() {}
void* current_stream(int32_t) { return nullptr; }
#else
constexpr bool kEmulated = false;
// Torch's guard of a device that is not there fails an internal assertion: say first what is wrong.
void demand_cuda() {
  static const std::string problem = cuda_problem();
  FASTNN_CHECK(problem.empty(), std::runtime_error,
               "fastnn: no CUDA kernel can run in this process: ", problem);
}
// torch's CUDA library is in the process wherever there is a CUDA tensor. It is looked up, not
// linked: the same extension loads where torch has no CUDA.
[[maybe_unused]] void* current_stream(int32_t index) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  FASTNN_CHECK(get != nullptr && get(index, &stream) == 0, std::runtime_error,
               "fastnn: torch gives no current stream of cuda:", index);
  return stream;
}
#endif

}  // namespace

DeviceScope::DeviceScope(const Tensor& main)
    : type_(device_type_of(main)),
      index_(0),
      cuda_(kEmulated || type_ == aoti_torch_device_type_cuda()),
      outer_(g_scope) {
  if (cuda_ && !kEmulated) {
    demand_cuda();
    aoti_torch_get_device_index(main.get(), &index_);
    guard_.emplace(index_);
  }
  g_scope = this;
}
DeviceScope::~DeviceScope() { g_scope = outer_; }

const DeviceScope& DeviceScope::current() { return *g_scope; }

bool DeviceScope::has(const Tensor& t) const {
  if (device_type_of(t) != type_) return false;
  int32_t index = 0;
  if (cuda_ && !kEmulated) aoti_torch_get_device_index(t.get(), &index);
  return index == index_;
}

std::string DeviceScope::name() const {
  return cuda_ && !kEmulated ? "cuda:" + std::to_string(index_) : "the CPU";
}

bool allow_tf32() { return g_ask_tf32 != nullptr && g_ask_tf32(); }
void set_tf32_question(bool (*ask)()) { g_ask_tf32 = ask; }

#if defined(FASTNN_CUDA)
void run_cuda(const char* kernel, int64_t bytes, int (*launch)(void*, void*, void*),
              void* context) {
  const DeviceScope& scope = DeviceScope::current();
  Tensor workspace;
  void* memory = nullptr;
  if (bytes > 0) {
    workspace = new_output({(bytes + 3) / 4}, DType::kFloat32);
    memory = workspace.mutable_data_ptr();
  }
  record_run(kernel, "cuda");
  const int code = launch(context, memory, current_stream(scope.index()));
  FASTNN_CHECK(code == 0, std::runtime_error, "fastnn::", kernel, " on ", scope.name(), ": ",
               fastnn_cuda_error_text(code));
}
void fill_cuda(void* p, int byte, int64_t bytes) {
  fastnn_cuda_fill(p, byte, bytes, current_stream(DeviceScope::current().index()));
}
std::string cuda_problem() { return fastnn_cuda_problem(); }
bool cuda_compiled() { return true; }
#else
void run_cuda(const char* kernel, int64_t, int (*)(void*, void*, void*), void*) {
  fail<NotImplemented>("fastnn::", kernel, ": this build has no CUDA kernels");
}
void fill_cuda(void*, int, int64_t) {}
std::string cuda_problem() { return "this build has no CUDA kernels (FASTNN_CUDA=ON)"; }
bool cuda_compiled() { return false; }
#endif

}  // namespace fastnn
