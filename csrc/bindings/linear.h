// Weights and inputs of linear layers: what the bindings of linear and of feed-forward blocks
// share.
#pragma once
#include <optional>
#include <vector>

#include "bindings/tensor.h"
#include "params/linear.h"

namespace fastnn {

using OptionalTensor = std::optional<Tensor>;

inline void check_same_dtype(DType got, DType wanted, const char* op, const char* argument) {
  FASTNN_CHECK(got == wanted, TypeError, "fastnn::", op, ": ", argument,
               " must have the input's type ", dtype_name(scalar_type(wanted)), ", got ",
               dtype_name(scalar_type(got)));
}

// A 2-d weight as a matrix with positive or zero strides; sizes of one get the stride that lets it
// be read in place.
inline Matrix weight_matrix(const Tensor& w, DType dtype) {
  return {w.const_data_ptr(), w.size(0) == 1 ? w.size(1) : w.stride(0),
          w.size(1) == 1 ? 1 : w.stride(1), dtype};
}

inline void check_weight(const Tensor& weight, const char* op) {
  FASTNN_CHECK(weight.dim() == 2, ValueError, "fastnn::", op,
               ": weight must be (out_features, in_features), got shape ", shape_of(weight));
}

inline std::vector<int64_t> output_sizes(std::vector<int64_t> input_sizes, int64_t out_features) {
  input_sizes.back() = out_features;
  return input_sizes;
}

inline void check_input(const Tensor& input, int64_t in_features, const char* op) {
  FASTNN_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == in_features, ValueError,
               "fastnn::", op, ": input's last dimension must be in_features = ", in_features,
               ", got shape ", shape_of(input));
}

}  // namespace fastnn
