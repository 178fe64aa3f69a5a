// torch.ops.fastnn.rope_fwd / rope_bwd.
#include "cpu/rope.h"

#include <utility>

#include "bindings/tensor.h"

namespace fastnn {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The tensors a call's parameters point into.
struct Call {
  RopeParams p = {};
  int64_t heads_dim = 1, length_dim = 2;
  Tensor holders[5];
};

// cos or sin: (length, width) or (batch or 1, length, width).
RopeTable table_of(Call& call, const Tensor& t, const char* name, const char* op, Tensor& holder) {
  const RopeParams& p = call.p;
  FASTNN_CHECK(checked_dtype(t, op, name) == p.table_dtype, TypeError, "fastnn::", op, ": ", name,
               " must have cos's type ", dtype_name(scalar_type(p.table_dtype)), ", got ",
               dtype_name(t.scalar_type()));
  const int64_t rank = t.dim();
  const bool by_row = p.positions == nullptr;  // a row for each row of query
  const bool fits = (rank == 2 || (rank == 3 && by_row && (t.size(0) == 1 || t.size(0) == p.B))) &&
                    (!by_row || t.size(rank - 2) == p.S) && t.size(rank - 1) == p.table_width;
  FASTNN_CHECK(fits, ValueError, "fastnn::", op, ": ", name, " must be ",
               by_row ? "([batch or 1,] length, width)" : "(rows, width) beside positions",
               " of query's batch ", p.B, " and length ", p.S, ", the width rotary_dim ", p.rotary,
               " or half of it; got shape ", shape_of(t));
  holder = t.stride(rank - 1) == 1 || t.size(rank - 1) <= 1 ? t : torch::stable::contiguous(t);
  const bool shared = rank == 2 || holder.size(0) == 1;
  return {holder.const_data_ptr(), shared ? 0 : holder.stride(0), holder.stride(rank - 2)};
}

void read_positions(Call& call, const OptionalTensor& positions, int64_t rows, const char* op) {
  RopeParams& p = call.p;
  if (!positions) return;
  check_device(*positions, op, "positions");
  FASTNN_CHECK(positions->scalar_type() == ScalarType::Long, TypeError, "fastnn::", op,
               ": positions must be int64, got ", dtype_name(positions->scalar_type()));
  const int64_t rank = positions->dim(), batch = rank == 2 ? positions->size(0) : 1;
  FASTNN_CHECK(
      (rank == 1 || rank == 2) && positions->size(rank - 1) == p.S && (batch == 1 || batch == p.B),
      ValueError, "fastnn::", op, ": positions must be (length,) or (batch or 1, length), ",
      "batch ", p.B, " and length ", p.S, "; got shape ", shape_of(*positions));
  call.holders[4] = positions->is_contiguous() ? *positions : torch::stable::contiguous(*positions);
  p.positions = static_cast<const int64_t*>(call.holders[4].const_data_ptr());
  p.positions_batch_stride = batch == 1 ? 0 : p.S;
  for (int64_t i = 0; i < batch * p.S; ++i) {
    FASTNN_CHECK(p.positions[i] >= 0 && p.positions[i] < rows, IndexError, "fastnn::", op,
                 ": positions must be in [0, ", rows - 1, "], the rows of cos and sin; got ",
                 p.positions[i]);
  }
}

// All but the operands; sizes are those of `main`.
void read_call(Call& call, const char* op, const Tensor& main, const char* main_name,
               const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
               int64_t rotary_dim, bool interleaved, int64_t heads_dim) {
  RopeParams& p = call.p;
  p.dtype = checked_dtype(main, op, main_name);
  p.table_dtype = checked_dtype(cos, op, "cos");
  FASTNN_CHECK(main.dim() == 4, ValueError, "fastnn::", op, ": ", main_name,
               " must have four dimensions, got shape ", shape_of(main));
  FASTNN_CHECK(heads_dim == 1 || heads_dim == 2, ValueError, "fastnn::", op,
               ": heads_dim must be 1 or 2, got ", heads_dim);
  call.heads_dim = heads_dim;
  call.length_dim = 3 - heads_dim;
  p.B = main.size(0);
  p.S = main.size(call.length_dim);
  p.D = main.size(3);
  FASTNN_CHECK(rotary_dim >= 0 && rotary_dim % 2 == 0 && rotary_dim <= p.D, ValueError,
               "fastnn::", op, ": rotary_dim must be even and in [0, ", p.D,
               "], the features of a head; got ", rotary_dim);
  p.rotary = rotary_dim;
  FASTNN_CHECK(cos.dim() >= 2, ValueError, "fastnn::", op,
               ": cos must be ([batch or 1,] length, width), got shape ", shape_of(cos));
  const int64_t width = cos.size(cos.dim() - 1);
  p.table_width = 2 * width == rotary_dim ? width : rotary_dim;
  p.interleaved = interleaved;
  read_positions(call, positions, cos.size(cos.dim() - 2), op);
  p.cos = table_of(call, cos, "cos", op, call.holders[2]);
  p.sin = table_of(call, sin, "sin", op, call.holders[3]);
  FASTNN_CHECK(cos.size(cos.dim() - 2) == sin.size(sin.dim() - 2), ValueError, "fastnn::", op,
               ": cos and sin must have the same rows, got shapes ", shape_of(cos), " and ",
               shape_of(sin));
}

// One more tensor to rotate; its result lies in memory by positions and then heads where `inside`,
// else the other way round.
Tensor add_operand(Call& call, const Tensor& t, bool inside, const char* name, const char* op) {
  RopeParams& p = call.p;
  FASTNN_CHECK(checked_dtype(t, op, name) == p.dtype, TypeError, "fastnn::", op, ": ", name,
               " must have query's type ", dtype_name(scalar_type(p.dtype)), ", got ",
               dtype_name(t.scalar_type()));
  FASTNN_CHECK(
      t.dim() == 4 && t.size(0) == p.B && t.size(call.length_dim) == p.S && t.size(3) == p.D,
      ValueError, "fastnn::", op, ": ", name,
      " must have query's shape in all but the heads: batch ", p.B, ", length ", p.S, ", features ",
      p.D, "; got shape ", shape_of(t));
  const bool in_place = p.D <= 1 || t.stride(3) == 1;
  Tensor& holder = call.holders[p.count];
  holder = in_place ? t : torch::stable::contiguous(t);
  const bool swapped = inside == (call.heads_dim == 1);
  std::vector<int64_t> sizes = sizes_of(t), strides(4, 1);
  const size_t outer = swapped ? 2 : 1, inner = swapped ? 1 : 2;
  const auto extent = [&](size_t d) { return sizes[d] > 1 ? sizes[d] : 1; };
  strides[inner] = extent(3);
  strides[outer] = strides[inner] * extent(inner);
  strides[0] = strides[outer] * extent(outer);
  Tensor y = new_strided_output(sizes, strides, p.dtype);
  const auto head = static_cast<int32_t>(call.heads_dim),
             row = static_cast<int32_t>(call.length_dim);
  p.operands[p.count++] = {holder.const_data_ptr(),
                           y.mutable_data_ptr(),
                           holder.size(head),
                           holder.stride(0),
                           holder.stride(head),
                           holder.stride(row),
                           strides[0],
                           strides[static_cast<size_t>(head)],
                           strides[static_cast<size_t>(row)]};
  return y;
}

std::tuple<Tensor, OptionalTensor> fwd(const Tensor& query, const OptionalTensor& key,
                                       const Tensor& cos, const Tensor& sin,
                                       const OptionalTensor& positions, int64_t rotary_dim,
                                       bool interleaved, int64_t heads_dim, bool grad_handled) {
  constexpr auto op = "rope_fwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(query);
  Call call;
  read_call(call, op, query, "query", cos, sin, positions, rotary_dim, interleaved, heads_dim);
  const auto inside = [&](const Tensor& t) {
    return t.dim() == 4 && (heads_dim == 1) == (t.stride(1) < t.stride(2));
  };
  Tensor rotated = add_operand(call, query, inside(query), "query", op);
  OptionalTensor rotated_key;
  if (key) rotated_key = add_operand(call, *key, inside(*key), "key", op);
  rope(call.p);
  return {rotated, rotated_key};
}

// inside: whether query's (key's) gradient is laid out by positions and then heads.
std::tuple<OptionalTensor, OptionalTensor> bwd(const OptionalTensor& grad_query,
                                               const OptionalTensor& grad_key, const Tensor& cos,
                                               const Tensor& sin, const OptionalTensor& positions,
                                               int64_t rotary_dim, bool interleaved,
                                               int64_t heads_dim, std::vector<bool> inside,
                                               bool grad_handled) {
  constexpr auto op = "rope_bwd";
  check_grad_handled(grad_handled, op);
  const DeviceScope scope(cos);
  FASTNN_CHECK(inside.size() == 2, ValueError, "fastnn::", op, ": inside must have 2 entries, got ",
               inside.size());
  FASTNN_CHECK(grad_query || grad_key, ValueError, "fastnn::", op, ": there is no gradient");
  Call call;
  read_call(call, op, grad_query ? *grad_query : *grad_key, grad_query ? "grad_query" : "grad_key",
            cos, sin, positions, rotary_dim, interleaved, heads_dim);
  call.p.inverse = true;
  OptionalTensor dq, dk;
  if (grad_query) dq = add_operand(call, *grad_query, inside[0], "grad_query", op);
  if (grad_key) dk = add_operand(call, *grad_key, inside[1], "grad_key", op);
  rope(call.p);
  return {dq, dk};
}

}  // namespace
}  // namespace fastnn

FASTNN_SCHEMAS(m) {
  m.def(
      "rope_fwd(Tensor query, Tensor? key, Tensor cos, Tensor sin, Tensor? positions, int "
      "rotary_dim, bool interleaved, int heads_dim, bool grad_handled=False) -> (Tensor, Tensor?)");
  m.def(
      "rope_bwd(Tensor? grad_query, Tensor? grad_key, Tensor cos, Tensor sin, Tensor? positions, "
      "int rotary_dim, bool interleaved, int heads_dim, bool[2] inside, bool grad_handled=False) "
      "-> (Tensor?, Tensor?)");
}
FASTNN_KERNELS(m) {
  m.impl("rope_fwd", TORCH_BOX(&fastnn::fwd));
  m.impl("rope_bwd", TORCH_BOX(&fastnn::bwd));
}
