// fastnn._C.Decoder: the layers of a model as cpu/decoder.h runs them. Tensors come as arrays of
// their bytes, which are held for as long as they are pointed into.
#include "cpu/decoder.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "bindings/decoder.h"

namespace py = pybind11;

namespace fastnn {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Counts = py::array_t<int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

void demand(bool holds, const char* what) {
  if (!holds) throw py::value_error(std::string("fastnn._C.Decoder: ") + what);
}

DType dtype_of(int64_t code) {
  demand(code >= 0 && code < 3, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return kTypes[code];
}

void demand_bytes(const Bytes& b, int64_t bytes, const char* what) {
  demand(b.size() == bytes, what);
}

struct Product {
  DecoderProduct p = {};
  DType dtype;
  Bytes packed;
  std::optional<Bytes> bias;

  Product(int64_t dtype_code, int64_t kind, int64_t N, int64_t K, Bytes weight,
          std::optional<Bytes> b, int64_t group, int64_t bits, bool offsets, bool int8_input)
      : dtype(dtype_of(dtype_code)), packed(std::move(weight)), bias(std::move(b)) {
    demand(kind >= 0 && kind <= 2 && N >= 1 && K >= 1, "a product needs a kind and sizes");
    demand(group >= 1 && (bits == 4 || (bits == 8 && !offsets && !int8_input)),
           "groups must be positive, bits 4, or 8 without offsets and for inputs as they are");
    p = {static_cast<ProductKind>(kind), N,       K,         packed.data(), nullptr, group,
         static_cast<int>(bits),         offsets, int8_input};
    demand_bytes(packed, decoder_product_bytes(p, dtype), "a packed weight has another size");
    if (bias) {
      demand_bytes(*bias, N * element_bytes(dtype), "a bias has another size");
      p.bias = bias->data();
    }
  }

  void apply(const Bytes& x, Bytes y) const {
    const int64_t element = element_bytes(dtype), M = y.size() / (p.N * element);
    demand(x.size() == M * p.K * element && y.size() == M * p.N * element,
           "x and y must be rows of the product's inputs and outputs");
    void* const to = y.mutable_data();
    const py::gil_scoped_release unlocked;
    multiply(p, dtype, M, x.data(), to);
  }
};

class Decoder {
 public:
  Decoder(int64_t dtype, int64_t width, int64_t hidden, int64_t heads, int64_t kv_heads,
          int64_t head, int64_t activation)
      : s_{dtype_of(dtype),
           width,
           hidden,
           heads,
           kv_heads,
           head,
           static_cast<Activation>(activation)} {
    demand(width >= 1 && hidden >= 1 && kv_heads >= 1 && heads >= 1 && heads % kv_heads == 0,
           "sizes must be positive, heads a multiple of kv_heads");
    demand(head >= 2 && head % 2 == 0, "the features of a head must be even");
    demand(activation >= 0 && activation < kActivationCount, "no such activation");
  }

  void add(const Bytes& before, double before_eps, const Product& qkv, const Product& out,
           const Bytes& after, double after_eps, const Product& up, const Product& down) {
    const int64_t head = s_.head;
    demand_product(qkv, (s_.heads + 2 * s_.kv_heads) * head, s_.width);
    demand_product(out, s_.width, s_.heads * head);
    demand_product(up, 2 * s_.hidden, s_.width);
    demand_product(down, s_.width, s_.hidden);
    layers_.push_back(
        {norm(before, before_eps), qkv.p, out.p, norm(after, after_eps), up.p, down.p});
    for (const Product* const p : {&qkv, &out, &up, &down}) {
      held_.push_back(p->packed);
      if (p->bias) held_.push_back(*p->bias);
    }
  }
  void finish(const Bytes& weight, double eps) { last_ = norm(weight, eps); }

  // In the place of x.
  void run(Bytes x, int64_t batch, int64_t n, const Counts& lengths, const Floats& cos,
           const Floats& sin, int64_t capacity, std::vector<Bytes> keys,
           std::vector<Bytes> values) {
    demand(last_.weight != nullptr, "finish() comes first");
    demand(batch >= 0 && n >= 0 && capacity >= 0, "sizes must not be negative");
    const int64_t element = element_bytes(s_.dtype);
    demand_bytes(x, batch * n * s_.width * element, "x has another size");
    demand(lengths.size() == batch, "lengths must have an entry for each sequence");
    demand(cos.size() == sin.size() && cos.size() % (s_.head / 2) == 0,
           "cos and sin must be (positions, head / 2)");
    const int64_t rows = std::min(capacity, static_cast<int64_t>(cos.size()) / (s_.head / 2));
    for (int64_t b = 0; b < batch; ++b) {
      demand(lengths.data()[b] >= 0 && lengths.data()[b] <= rows - n,
             "a sequence is longer than the caches or the tables");
    }
    demand(keys.size() == layers_.size() && values.size() == layers_.size(),
           "each layer must have keys and values");
    std::vector<void*> k, v;
    for (size_t l = 0; l < layers_.size(); ++l) {
      for (auto* const all : {&keys, &values}) {
        demand_bytes((*all)[l], batch * s_.kv_heads * capacity * s_.head * element,
                     "a cache has another size");
        (all == &keys ? k : v).push_back((*all)[l].mutable_data());
      }
    }
    const DecoderStep step = {batch,    n,        lengths.data(), cos.data(),      sin.data(),
                              capacity, k.data(), v.data(),       x.mutable_data()};
    const py::gil_scoped_release unlocked;
    run_decoder(s_, layers_, last_, step);
  }

 private:
  DecoderNorm norm(const Bytes& weight, double eps) {
    demand_bytes(weight, s_.width * element_bytes(s_.dtype), "a norm's weight has another size");
    held_.push_back(weight);
    return {weight.data(), static_cast<float>(eps)};
  }
  void demand_product(const Product& p, int64_t N, int64_t K) const {
    demand(p.dtype == s_.dtype && p.p.N == N && p.p.K == K,
           "a product has another size or type than the layer");
  }

  DecoderSizes s_;
  std::vector<DecoderLayer> layers_;
  DecoderNorm last_ = {};
  std::vector<Bytes> held_;
};

}  // namespace

void add_decoder(py::module_& m) {
  py::class_<Product>(m, "DecoderProduct", "x W^T + b with a packed weight.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Bytes, std::optional<Bytes>, int64_t,
                    int64_t, bool, bool>(),
           py::arg("dtype"), py::arg("kind"), py::arg("out_features"), py::arg("in_features"),
           py::arg("packed").noconvert(), py::arg("bias").noconvert(), py::arg("group") = 1,
           py::arg("bits") = 4, py::arg("offsets") = false, py::arg("int8_input") = false)
      .def("apply", &Product::apply, py::arg("x").noconvert(), py::arg("y").noconvert(),
           "Writes the product of the rows x to y.");
  py::class_<Decoder>(m, "Decoder", "The layers of a Llama-shaped model.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>(),
           py::arg("dtype"), py::arg("width"), py::arg("hidden"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head"), py::arg("activation"))
      .def("add", &Decoder::add, py::arg("before").noconvert(), py::arg("before_eps"),
           py::arg("qkv"), py::arg("out"), py::arg("after").noconvert(), py::arg("after_eps"),
           py::arg("up"), py::arg("down"), "One more layer.")
      .def("finish", &Decoder::finish, py::arg("weight").noconvert(), py::arg("eps"),
           "The norm behind the last layer.")
      .def("run", &Decoder::run, py::arg("x").noconvert(), py::arg("batch"), py::arg("n"),
           py::arg("lengths").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
           py::arg("capacity"), py::arg("keys").noconvert(), py::arg("values").noconvert(),
           "n new tokens of each sequence, from embeddings to the last norm, in the place of x; "
           "their keys and values go behind `lengths` rows of the caches.");
}

}  // namespace fastnn
