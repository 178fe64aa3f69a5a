// What the bindings of losses share: options, targets, class weights, reductions.
#pragma once
#include <optional>
#include <vector>

#include "bindings/tensor.h"
#include "params/cross_entropy.h"

namespace fastnn {

using OptionalTensor = std::optional<Tensor>;

enum Reduction : int64_t { kNone, kMean, kSum };  // torch's codes

// The parameters of a loss, and the memory they point into.
struct LossCall {
  CrossEntropyParams p = {};
  int64_t reduction = kMean;
  Tensor target_holder;
  OptionalTensor weight_holder;  // on CUDA
  std::vector<float> weight;

  const void* class_weight() const {
    return weight_holder ? weight_holder->const_data_ptr() : nullptr;
  }
};

void read_loss_options(LossCall& call, const char* op, int64_t reduction, int64_t ignore_index,
                       double label_smoothing, double z_loss, double softcap);
// p.rows of them, int64.
void read_class_indices(LossCall& call, const char* op, const Tensor& target);

// After the target: on the CPU its indices are looked at too, and IndexError says which is bad.
struct WeightTypes {
  DType input, other;  // either is allowed
};
void read_class_weight(LossCall& call, const char* op, const OptionalTensor& weight,
                       const WeightTypes& types);

// On the CPU. The mean divides the loss by the first, the targets' weights, and the z term by the
// second, the rows that count.
void set_divisors(const LossCall& call, float* divisors);
// Sums are in index order and in double: the same bits for any number of threads. z may be empty.
Tensor reduced_loss(const LossCall& call, const std::vector<float>& row_loss,
                    const std::vector<float>& row_z, DType dtype);

// How often a row's loss and z term count in what backward is asked for; stride 0: one for all.
struct RowScales {
  RowScales(const LossCall& call, const Tensor& grad, DType grad_dtype, const float* divisors);
  explicit RowScales(const float* divisors);  // of the loss itself, reduced
  std::vector<float> loss, z;
  int64_t stride;
};

}  // namespace fastnn
