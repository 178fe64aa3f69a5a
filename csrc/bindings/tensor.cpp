#include "bindings/tensor.h"

#include <new>

#include "cpu/cache.h"
#include "cpu/parallel.h"

// Present from torch 2.13 on, null before: why the last C call failed.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastnn {

void NotImplemented::set_error() const { PyErr_SetString(PyExc_NotImplementedError, what()); }
void OutOfMemory::set_error() const { PyErr_SetString(PyExc_MemoryError, what()); }

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

std::string shape_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  if (sizes.size() == 1) text << ',';
  text << ')';
  return text.str();
}
std::string shape_of(const Tensor& t) { return shape_text(sizes_of(t)); }

std::string dtype_name(ScalarType t) {  // torch's Python names, not c10's
  switch (t) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(t);
  }
}

std::optional<DType> kernel_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kFloat32:
      break;
  }
  return ScalarType::Float;
}

void check_device(const Tensor& t, const char* op, const char* argument) {
  const DeviceScope& scope = DeviceScope::current();
  FASTNN_CHECK(scope.has(t), ValueError, "fastnn::", op, ": ", argument, " must be on ",
               scope.name());
}

void check_dense(const Tensor& t, const char* op, const char* argument) {
  check_device(t, op, argument);
  int32_t layout = 0;
  aoti_torch_get_layout(t.get(), &layout);
  FASTNN_CHECK(layout == aoti_torch_layout_strided(), NotImplemented, "fastnn::", op, ": ",
               argument, " must be a dense (strided) tensor");
}

DType checked_dtype(const Tensor& t, const char* op, const char* argument) {
  check_dense(t, op, argument);
  const auto dtype = kernel_dtype(t.scalar_type());
  FASTNN_CHECK(dtype.has_value(), TypeError, "fastnn::", op, ": ", argument,
               " must be float32, bfloat16 or float16, got ", dtype_name(t.scalar_type()));
  return *dtype;
}

Rows rows_of(const Tensor& t, Tensor& holder) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const auto rank = static_cast<int64_t>(sizes.size());
  Rows view = {t.const_data_ptr(), 1, sizes[rank - 1], 0, strides[rank - 1]};
  if (view.columns == 1) view.column_stride = 1;
  bool first = true;
  for (int64_t d = rank - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (first) {
      view.row_stride = strides[d];
      first = false;
    } else if (strides[d] != view.row_stride * view.rows) {
      if (t.numel() == 0) {
        view.rows *= sizes[d];
        continue;
      }
      holder = torch::stable::contiguous(t);
      return {holder.const_data_ptr(), holder.numel() / view.columns, view.columns, view.columns,
              1};
    }
    view.rows *= sizes[d];
  }
  if (view.rows == 1) view.row_stride = view.columns;
  return view;
}

namespace {

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

// Elements from the first to the last, or 0.
int64_t storage_elements(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return last + 1;
}

// A tensor that owns its part of `memory`.
Tensor on_memory(std::shared_ptr<void> memory, const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& strides, ScalarType dtype) {
  void* const data = memory.get();
  return torch::stable::from_blob(data, sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                  [memory = std::move(memory)](void*) {});
}

Tensor new_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                  ScalarType dtype, int64_t element) {
  const DeviceScope& scope = DeviceScope::current();
  if (!scope.cuda() && cache_limit() > 0) {
    const int64_t bytes = storage_elements(sizes, strides) * element;
    if (auto memory = cached_memory(bytes)) {
      prepare_output(memory.get(), bytes);
      return on_memory(std::move(memory), sizes, strides, dtype);
    }
  }
  AtenTensorHandle handle = nullptr;
  const auto failed =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               static_cast<int32_t>(dtype), scope.type(), scope.index(), &handle);
  if (failed) {
    const char* const why = torch_exception_get_what_without_backtrace
                                ? torch_exception_get_what_without_backtrace()
                                : "";
    fail<OutOfMemory>("fastnn: cannot allocate an output of shape ", shape_text(sizes), ", ",
                      dtype_name(dtype), ". ", why);
  }
  Tensor out(handle);
  const int64_t bytes = out.numel() * element;
  if (!scope.cuda()) {
    prepare_output(out.mutable_data_ptr(), bytes);
  } else if (poison()) {
    fill_cuda(out.mutable_data_ptr(), 0xff, bytes);
  }
  return out;
}

}  // namespace

Tensor new_strided_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                          DType dtype) {
  return new_tensor(sizes, strides, scalar_type(dtype), element_bytes(dtype));
}

Tensor new_output(const std::vector<int64_t>& sizes, DType dtype) {
  return new_strided_output(sizes, contiguous_strides(sizes), dtype);
}

Tensor new_codes(const std::vector<int64_t>& sizes) {
  return new_tensor(sizes, contiguous_strides(sizes), ScalarType::Char, 1);
}

Tensor new_kept(int64_t floats) {
  std::shared_ptr<void> memory;
  try {
    memory = keep_memory(floats * 4);
  } catch (const std::bad_alloc&) {
    fail<OutOfMemory>("fastnn: cannot allocate ", floats * 4, " bytes to keep");
  }
  return on_memory(std::move(memory), {floats}, {1}, ScalarType::Float);
}

void check_grad_handled(bool grad_handled, const char* op) {
  FASTNN_CHECK(
      grad_handled || !aoti_torch_grad_mode_is_enabled(), std::runtime_error, "fastnn::", op,
      " is a raw operator without gradients: call the public function of fastnn, or run it under "
      "torch.no_grad()");
}

namespace {

void run_on_torch_pool(int64_t n, int64_t grain, RangeBody body, void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}
int64_t torch_threads() { return torch::stable::get_num_threads(); }

}  // namespace

void plug_in_threads() { set_thread_pool({run_on_torch_pool, torch_threads}); }

}  // namespace fastnn
