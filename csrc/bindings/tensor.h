// What every binding needs of torch: shapes, types, fresh outputs, errors. Only csrc/bindings/
// includes torch or pybind11.
#pragma once
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/device.h"
#include "cpu/memory.h"
#include "params/common.h"

namespace fastnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- errors: the Python exception type is chosen, the text names operator, argument, what came
// and what is allowed

struct NotImplemented : pybind11::builtin_exception {
  using builtin_exception::builtin_exception;
  void set_error() const override;
};
struct OutOfMemory : pybind11::builtin_exception {
  using builtin_exception::builtin_exception;
  void set_error() const override;
};

template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}
#define FASTNN_CHECK(condition, Error, ...)                                    \
  do {                                                                         \
    if (__builtin_expect(!(condition), 0)) ::fastnn::fail<Error>(__VA_ARGS__); \
  } while (0)
using TypeError = pybind11::type_error;
using ValueError = pybind11::value_error;
using IndexError = pybind11::index_error;

// "(2, 3)"
std::string shape_of(const Tensor& t);
std::string shape_text(const std::vector<int64_t>& sizes);
std::string dtype_name(ScalarType t);

// ---- views

// A dense tensor on the call's device, of a type that kernels take; ValueError, TypeError or
// NotImplementedError otherwise.
DType checked_dtype(const Tensor& t, const char* op, const char* argument);
ScalarType scalar_type(DType t);
std::optional<DType> kernel_dtype(ScalarType t);

// ValueError unless it is on the call's device; also NotImplementedError unless it is dense.
void check_device(const Tensor& t, const char* op, const char* argument);
void check_dense(const Tensor& t, const char* op, const char* argument);

std::vector<int64_t> sizes_of(const Tensor& t);

// A tensor [*, columns] seen as rows x columns. Leading dimensions that no single stride describes,
// are copied first; the copy lives in `holder`.
struct Rows {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;
};
Rows rows_of(const Tensor& t, Tensor& holder);

// ---- outputs

// A fresh tensor on the call's device, contiguous or by strides that leave no holes, on huge pages
// where it is large, filled with NaN under FASTNN_POISON.
Tensor new_output(const std::vector<int64_t>& sizes, DType dtype);
Tensor new_strided_output(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                          DType dtype);
// A contiguous one of int8 codes.
Tensor new_codes(const std::vector<int64_t>& sizes);
// What the caller keeps and streams again and again, on the CPU: float32, flat (cpu/memory.h).
Tensor new_kept(int64_t floats);

// Raw operators compute no gradients: with grad mode on the caller must have said that it takes
// care of them.
void check_grad_handled(bool grad_handled, const char* op);

// Plugs torch's thread pool into the core. Once, at import.
void plug_in_threads();

}  // namespace fastnn
