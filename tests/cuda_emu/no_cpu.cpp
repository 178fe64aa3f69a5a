// The emulated library takes the bindings as they are, and no CPU kernel: these stand where the
// bindings would call one.
#include <stdexcept>

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/dispatch.h"
#include "cpu/linear.h"
#include "cpu/norm.h"
#include "cpu/softmax.h"

namespace fastnn {
namespace {

[[noreturn]] void none() { throw std::logic_error("the emulated library has no CPU kernels"); }

}  // namespace

const KernelTable& kernels() { none(); }
void softmax_fwd(const SoftmaxParams&) { none(); }
void softmax_bwd(const SoftmaxBwdParams&, const char*) { none(); }
int64_t first_bad_target(const CrossEntropyParams&) { none(); }
void cross_entropy_fwd(const CrossEntropyFwdParams&) { none(); }
void cross_entropy_bwd(const CrossEntropyBwdParams&) { none(); }
void norm_fwd(const NormParams&) { none(); }
void norm_bwd(const NormBwdParams&) { none(); }
void linear_fwd(const LinearParams&) { none(); }
void linear_bwd(const LinearBwdParams&) { none(); }
int64_t linear_packed_bytes(int64_t, int64_t, DType) { none(); }
void linear_pack(const Matrix&, int64_t, int64_t, void*) { none(); }
void activation_fwd(const ActivationParams&) { none(); }
void activation_bwd(const ActivationBwdParams&) { none(); }
void attention_fwd(const char*, const AttentionFwdParams*, int64_t) { none(); }
void attention_bwd(const char*, const AttentionBwdParams*, int64_t) { none(); }

}  // namespace fastnn
