// fastnn._C: what Python asks the core. The operators themselves are reached through
// torch.ops.fastnn.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "bindings/decoder.h"
#include "bindings/tensor.h"
#include "cpu/cache.h"
#include "cpu/dispatch.h"
#include "cpu/limits.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(fastnn, m) {
  (void)m;
}  // opens the namespace; each binding adds its operators

namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

FloatArray vector_math(const std::string& name, const FloatArray& x) {
  static const char* const kNames[] = {"exp", "log", "tanh", "erf", "sigmoid"};
  for (int f = 0; f < 5; ++f) {
    if (name != kNames[f]) continue;
    FloatArray y(x.size());
    fastnn::kernels().vector_math(static_cast<fastnn::MathFunction>(f), x.data(), y.mutable_data(),
                                  x.size());
    return y;
  }
  throw py::value_error("fastnn._C.vector_math: name must be exp, log, tanh, erf or sigmoid; got " +
                        name);
}

int64_t position(const char* function, const char* argument, const std::string& name,
                 std::initializer_list<const char*> known) {
  std::string all;
  int64_t i = 0;
  for (const char* const one : known) {
    if (name == one) return i;
    ++i;
    all += std::string(all.empty() ? "" : ", ") + one;
  }
  throw py::value_error(std::string("fastnn._C.") + function + ": " + argument +
                        " must be one of " + all + "; got " + name);
}

void check_measurement(const char* function, int64_t threads, double seconds) {
  if (threads < 1 || threads > 4096 || !(seconds > 0 && seconds <= 60)) {
    throw py::value_error(std::string("fastnn._C.") + function +
                          ": threads must be 1..4096 and seconds above 0, up to 60; got " +
                          std::to_string(threads) + ", " + std::to_string(seconds));
  }
}

double measure_peak(const std::string& kind, int64_t threads, double seconds) {
  check_measurement("measure_peak", threads, seconds);
  const auto k = position("measure_peak", "kind", kind, {"fp32", "bf16", "int8"});
  const py::gil_scoped_release unlocked;
  return fastnn::measure_peak(static_cast<fastnn::PeakKind>(k), threads, seconds);
}

double measure_stream(const std::string& kind, int64_t bytes, const std::string& pages,
                      bool streaming, int64_t threads, double seconds) {
  check_measurement("measure_stream", threads, seconds);
  const auto k = position("measure_stream", "kind", kind, {"read", "copy", "write"});
  const auto size = position("measure_stream", "pages", pages, {"small", "huge"});
  if (bytes < 1 || bytes > (int64_t{1} << 40)) {
    throw py::value_error("fastnn._C.measure_stream: bytes must be 1..2^40; got " +
                          std::to_string(bytes));
  }
  const py::gil_scoped_release unlocked;
  return fastnn::measure_stream(static_cast<fastnn::StreamKind>(k), bytes,
                                static_cast<fastnn::Pages>(size), streaming, threads, seconds);
}

std::vector<std::string> op_names() {
  return {
#define FASTNN_OP(name) #name,
#include "ops.def"
#undef FASTNN_OP
  };
}

// Only products of float32 on CUDA tensors ask.
bool torch_allows_tf32() {
  const py::gil_scoped_acquire lock;
  return py::module_::import("fastnn._dispatch").attr("allows_tf32")().cast<bool>();
}

std::map<std::string, int64_t> cache_stats() {
  const fastnn::CacheStats s = fastnn::cache_stats();
  return {{"waiting_bytes", s.waiting_bytes},
          {"used_bytes", s.used_bytes},
          {"peak_bytes", s.peak_bytes},
          {"reused", s.reused},
          {"mapped", s.mapped}};
}

// A writable array that owns its part of cpu/memory.h's kept memory.
py::array_t<uint8_t> keep_memory(int64_t bytes) {
  if (bytes < 0 || bytes > (int64_t{1} << 48)) {
    throw py::value_error("fastnn._C.keep_memory: bytes must be 0..2^48; got " +
                          std::to_string(bytes));
  }
  auto owner = std::make_unique<std::shared_ptr<void>>(fastnn::keep_memory(bytes));
  auto* const data = static_cast<uint8_t*>(owner->get());
  const py::capsule base(owner.release(),
                         [](void* p) { delete static_cast<std::shared_ptr<void>*>(p); });
  return py::array_t<uint8_t>(bytes, data, base);
}

bool environment_flag(const char* name) {
  const char* const value = std::getenv(name);
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of fastnn.";
  fastnn::plug_in_threads();
  fastnn::set_tf32_question(&torch_allows_tf32);
  fastnn::set_poison(environment_flag("FASTNN_POISON"));
  m.def("isa", [] { return fastnn::kernels().isa; }, "Instruction set in force.");
  m.def("isa_compiled", &fastnn::isa_compiled, "Instruction sets compiled in, in rising order.");
  m.def("isa_supported", &fastnn::isa_supported, "Those of them that this CPU runs.");
  m.def(
      "set_isa", [](const std::optional<std::string>& name) { fastnn::set_isa(name.value_or("")); },
      py::arg("name").none(true),
      "Forces an instruction set; None takes the best. ValueError if unknown or not supported.");
  m.def("threads", &fastnn::thread_count, "Threads the next kernel may use.");
  m.def("record_start", &fastnn::record_start, "Starts logging kernel runs.");
  m.def("record_stop", &fastnn::record_stop, "Stops; returns [(kernel, instruction set)].");
  m.def("poison", &fastnn::poison, "Whether fresh memory is filled with NaN.");
  m.def("set_poison", &fastnn::set_poison, py::arg("on"),
        "Fills fresh outputs and scratch with NaN from now on.");
  m.def("set_cache_limit", &fastnn::set_cache_limit, py::arg("bytes"),
        "How much freed memory of results is kept; 0 turns it off.");
  m.def("cache_limit", &fastnn::cache_limit, "What set_cache_limit was last given.");
  m.def("empty_cache", &fastnn::empty_cache, "Gives kept memory back to the system.");
  m.def("cache_stats", &cache_stats, "What the cache holds and did.");
  m.def("keep_freed_memory", &fastnn::keep_freed_memory, py::arg("on"),
        "Has malloc keep what is freed; whether it obeyed.");
  m.def(
      "keep_memory", &keep_memory, py::arg("bytes"),
      "Memory on huge pages for what is kept and streamed again and again, as an array of bytes.");
  m.def("cuda_compiled", &fastnn::cuda_compiled, "Whether CUDA kernels are compiled in.");
  m.def("allow_tf32", &fastnn::allow_tf32,
        "Whether float32 products on CUDA may be tf32: fastnn._dispatch.allows_tf32().");
  m.def("cuda_problem", &fastnn::cuda_problem,
        "Why no CUDA kernel can run here, in words; empty where one can. Makes no CUDA context.");
  m.def("ops", &op_names, "The ops of csrc/ops.def.");
  m.def("vector_math", &vector_math, py::arg("name"), py::arg("x"),
        "A vector function over a float32 array.");
  m.def("measure_peak", &measure_peak, py::arg("kind"), py::arg("threads"), py::arg("seconds"),
        "Operations per second that the instruction set in force reaches in registers; kind: fp32, "
        "bf16, int8; 0 where it has no such instruction.");
  m.def("measure_stream", &measure_stream, py::arg("kind"), py::arg("bytes"), py::arg("pages"),
        py::arg("streaming"), py::arg("threads"), py::arg("seconds"),
        "Bytes per second read and written over a working set of `bytes` for each thread; kind: "
        "read, copy, write; pages: small, huge.");
  fastnn::add_decoder(m);
}
