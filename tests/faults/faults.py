"""The faults: each is one plausible mistake, planted by replacing one text, and the part of the suite that must see it.

A fault that nothing sees is a hole in the tests. A text that is no longer found exactly once is an error: when code
changes, its faults move with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake."""

    name: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]
    """What to run, as pytest takes it; {isa} stands for the instruction set that is built with the fault."""
    isa: str = ""
    """The instruction set whose object is rebuilt for a fault in a kernel; the default one unless named."""
    sets: int = 1
    """How many instruction sets must be there for the fault to show."""


def cell(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_matrix.py::test_cell[{name}]" for name in names)


SOFTMAX, GEMM = "csrc/cpu/kernels/softmax.h", "csrc/cpu/gemm/gemm.h"
NORM = "csrc/cpu/kernels/norm.h"
ACTIVATION = "csrc/cpu/kernels/activation.h"
MASKED, ROPE = "csrc/cpu/kernels/masked_softmax.h", "csrc/cpu/kernels/rope.h"
PARAMETERS = "csrc/cpu/parameters.h"
LINEAR, SIMD = "csrc/cpu/linear.cpp", "csrc/cpu/simd/"
OPS = "fastnn/ops/"
AUTOGRAD, PACKING = "tests/test_ops_autograd.py", "tests/test_ops_packing.py"
GRAD_LAYOUT = "tests/test_ops_sweep.py::test_grad_output_in_any_memory_layout"

KERNEL_FAULTS = [
    Fault(
        "softmax: the sum takes in the lanes past the tail",
        "csrc/cpu/kernels/rows.h",
        "s[0] += keep_first(f(i, count), count);",
        "s[0] += f(i, count);",
        cell("softmax-fp32-{isa}-tail"),
    ),
    Fault(
        "softmax: the maximum drops the tail",
        SOFTMAX,
        "if (i < n) m[1] = max(m[1], load_first(x + i, (int)(n - i), -__builtin_inff()));",
        "",
        cell("softmax-fp32-{isa}-tail"),
    ),
    Fault(
        "softmax: the maximum is not subtracted",
        SOFTMAX,
        "const Vec e = exp(load_some(x + i, count) - top);",
        "const Vec e = exp(load_some(x + i, count));",
        cell("softmax-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "log_softmax as x - (m + log s)",
        SOFTMAX,
        "return (v - top) - shift;",
        "return v - (top + shift);",
        cell("softmax-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "softmax: gradient doubled",
        SOFTMAX,
        "(dy - sum) * y;",
        "(dy - sum) * y * 2.f;",
        cell("softmax-bf16-{isa}-contiguous"),
    ),
    Fault(
        "softmax: an expanded grad_output is read as contiguous",
        SOFTMAX,
        "dy + r * p.dy_row_stride",
        "dy + r * p.cols",
        (f"{GRAD_LAYOUT}[softmax-expanded-{{isa}}]",),
    ),
    Fault(
        "product: sums start from stale scratch",
        "csrc/cpu/gemm/tile.h",
        "t + s * kStrip, ldt, accumulate,",
        "t + s * kStrip, ldt, true,",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "product: K tail dropped in the dot products of few rows",
        GEMM,
        "  if (k < K) {\n",
        "  if (k > K) {\n",
        cell("linear-fp32-{isa}-tail"),
    ),
    Fault(
        "product: K tail dropped in packing",
        "csrc/cpu/gemm/pack.h",
        "r[i] = load_units_first<Dot>(row, left);",
        "r[i] = zero();",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "product: padding of an odd K is not zero in bfloat16 pairs",
        "csrc/cpu/gemm/units.h",
        "std::memcpy(&v, p, (size_t)elements * sizeof(T));",
        "std::memcpy(&v, p, ((size_t)elements + 1) / 2 * 4);",
        cell("linear-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "epilogue runs backwards: activation before bias",
        GEMM,
        "write(c + start + n, activate<A, kRough>(v));",
        "if (bias != nullptr) v -= load(bias + n0 + n); v = activate<A, kRough>(v); "
        "if (bias != nullptr) v += load(bias + n0 + n); write(c + start + n, v);",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear: bias dropped",
        LINEAR,
        "const bool biased = p.bias != nullptr;",
        "const bool biased = p.bias != nullptr && p.M < 0;",
        cell("linear-fp16-{isa}-contiguous"),
    ),
    Fault(
        "linear: the bias gradient loses a chunk of rows",
        PARAMETERS,
        "for (int64_t c = 1; c < chunks; ++c) {",
        "for (int64_t c = 2; c < chunks; ++c) {",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[linear-wide_m513-{isa}]",),
    ),
    Fault(
        "linear: grad_output overwritten with the gradient of the pre-activation",
        LINEAR,
        "void* const dz = own_dz ? dz_memory.get() : nullptr;",
        "void* const dz = !own_dz ? nullptr : p.dy.col_stride == 1 && p.dy.row_stride == p.N"
        " ? const_cast<void*>(p.dy.data) : dz_memory.get();",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear: columns of a strided grad_output read as neighbours",
        "csrc/cpu/kernels/linear.h",
        "if (stride == 1) return load_some",
        "if (stride != 0) return load_some",
        (f"{GRAD_LAYOUT}[linear-strided-{{isa}}]",),
    ),
    Fault(
        "linear: the split over threads loses a row",
        LINEAR,
        "m1 = p.M * (row + 1) / split.rows;",
        "m1 = p.M * (row + 1) / split.rows - (row + 1 < split.rows);",
        ("tests/test_ops_sweep.py::test_thread_count[linear-packed_wide_rows-2]",),
    ),
    Fault(
        "linear: nothing is written where K is 0",
        LINEAR,
        "if (p.M == 0 || p.N == 0) return;\n  const Split",
        "if (p.M == 0 || p.N == 0 || p.K == 0) return;\n  const Split",
        cell("linear-fp32-{isa}-empty"),
    ),
    Fault(
        "relu: NaN becomes 0",
        f"{SIMD}activation.h",
        "return {max(zero(), x), splat(1.f)};",
        "return {max(x, zero()), splat(1.f)};",
        cell("linear-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "gelu runs as gelu_tanh",
        "csrc/params/activation.h",
        "X(kGelu) X(kGeluTanh)",
        "X(kGeluTanh) X(kGelu)",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "gelu: the gradient lacks the density term",
        f"{SIMD}activation.h",
        "return {x * p, fma(x, normal_density<kRough>(x), p)};",
        "return {x * p, p};",
        cell("linear-bf16-{isa}-contiguous"),
    ),
    Fault(
        "bfloat16: truncated instead of rounded",
        f"{SIMD}vec.h",
        "const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "const UVec rounded = bits >> 16;",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[softmax-wide_many_rows-{isa}]",),
    ),
    Fault(
        "exp: the low part of ln 2 is left out",
        f"{SIMD}math.h",
        "r = fma(n, splat(-0x1.0bfbe8p-15f), r);",
        "",
        ("tests/test_vector_math.py::test_error[exp-{isa}]",),
    ),
    Fault(
        "another instruction set than the one asked for runs",
        "csrc/cpu/dispatch.cpp",
        "g_table.store(entry.table);",
        "g_table.store(best());",
        cell("softmax-fp32-scalar-contiguous"),
        sets=2,
    ),
    Fault(
        "no kernel ever uses a second thread",
        "csrc/cpu/parallel.cpp",
        "  g_pool = pool;\n",
        "",
        ("tests/test_memory.py::test_as_many_threads_as_torch_says",),
    ),
    Fault(
        "softmax: half-precision rows too long for the buffer are added up instead of scaled",
        SOFTMAX,
        "return exp(v - top) * scale;",
        "return exp(v - top) + scale;",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[softmax-wide_70001-{isa}]",),
    ),
    Fault(
        "the poison switch does nothing",
        "csrc/cpu/memory.cpp",
        "g_poison.store(on, std::memory_order_relaxed);",
        "g_poison.store(on && !on, std::memory_order_relaxed);",
        ("tests/test_dispatch.py::TestPoison::test_it_really_fills",),
    ),
]

BINDING_FAULTS = [
    Fault(
        "softmax: a negative dim is one off",
        "csrc/bindings/softmax.cpp",
        "if (dim < 0) dim += wrapped;",
        "if (dim < 0) dim = -dim - 1;",
        cell("softmax-fp32-{isa}-leading_dims"),
    ),
    Fault(
        "linear: the weight's dtype is not checked",
        "csrc/bindings/linear.cpp",
        'check_same_dtype(checked_dtype(weight, op, "weight"), dtype, op, "weight");\n'
        "  check_weight(weight, op);\n  check_input",
        "check_weight(weight, op);\n  check_input",
        ("tests/test_ops_invalid.py::test_invalid_call[linear-fwd_weight_dtype]",),
    ),
]

PYTHON_FAULTS = [
    Fault(
        "softmax: second derivatives detached",
        f"{OPS}softmax.py",
        "if torch.is_grad_enabled():\n            dx",
        "if False:\n            dx",
        (f"{AUTOGRAD}::test_double_backward[softmax-rows]",),
    ),
    Fault(
        "softmax: the output is kept on ctx, out of autograd's sight",
        f"{OPS}softmax.py",
        "ctx.save_for_backward(output)",
        "ctx.save_for_backward(output.detach().clone())",
        (f"{AUTOGRAD}::TestInPlaceChanges::test_softmax_output",),
    ),
    Fault(
        "softmax: the fake kernel keeps the input's strides",
        f"{OPS}softmax.py",
        "return torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)",
        "return torch.empty_like(input, dtype=dtype or input.dtype)",
        ("tests/test_raw_ops.py::test_fake_tensor_has_the_real_shape_strides_and_dtype",),
    ),
    Fault(
        "linear: which gradients are wanted is ignored",
        f"{OPS}linear.py",
        "list(ctx.input_shape), list(needs), True)",
        "list(ctx.input_shape), [input is not None, input is not None, True], True)",
        (f"{AUTOGRAD}::test_only_the_wanted_gradients_are_computed",),
    ),
    Fault(
        "linear: weight and bias change places in the gradients wanted",
        f"{OPS}linear.py",
        "needs = ctx.needs_input_grad[:3]\n",
        "needs = ctx.needs_input_grad[:1] + ctx.needs_input_grad[2:0:-1]\n",
        (f"{AUTOGRAD}::test_some_gradients_only",),
    ),
    Fault(
        "linear: the second-order bias gradient is summed over the wrong axis",
        f"{OPS}linear.py",
        "rows.sum(0) if needs[2] else None",
        "rows.sum(1) if needs[2] else None",
        (f"{AUTOGRAD}::test_double_backward[linear-gelu_bias]",),
    ),
    Fault(
        "linear: autocast is ignored",
        f"{OPS}linear.py",
        "if isinstance(input, Tensor) and autocast.active(input):",
        "if False:",
        ("tests/test_ops_autocast.py::test_linear_values",),
    ),
    Fault(
        "packed weight: a changed weight is not noticed",
        f"{OPS}packing.py",
        "t._version, ",
        "",
        (f"{PACKING}::test_changed_weight_is_packed_again",),
    ),
    Fault(
        "packed weight: used while training",
        f"{OPS}packing.py",
        "if training or (weight.requires_grad and torch.is_grad_enabled()):",
        "if weight.requires_grad and torch.is_grad_enabled():",
        (f"{PACKING}::TestTraining",),
    ),
    Fault(
        "functorch transforms reach the kernels",
        "fastnn/_dispatch.py",
        "return _functorch_active() or _forward_ad._current_level >= 0",
        "return _forward_ad._current_level >= 0",
        ("tests/test_functorch.py::test_vmap", "tests/test_functorch.py::test_grad"),
    ),
    Fault(
        "dual numbers reach the kernels",
        "fastnn/_dispatch.py",
        "return _functorch_active() or _forward_ad._current_level >= 0",
        "return _functorch_active()",
        ("tests/test_functorch.py::test_dual_numbers",),
    ),
    Fault(
        "a forced backend that cannot run falls back in silence",
        "fastnn/_dispatch.py",
        "    if reason:\n        raise",
        '    if reason:\n        return "reference"\n        raise',
        ("tests/test_dispatch.py::TestUseBackend",),
    ),
]

CROSS_ENTROPY, ATTENTION = "csrc/cpu/kernels/cross_entropy.h", "csrc/cpu/kernels/attention.h"
ATTENTION_OPERANDS, ATTENTION_SCORES = "csrc/cpu/kernels/attention_operands.h", "csrc/cpu/kernels/attention_scores.h"
ATTENTION_BWD = "csrc/cpu/kernels/attention_bwd.h"

LOSS_FAULTS = [
    Fault(
        "cross_entropy: the running sum is not rescaled when the maximum rises",
        CROSS_ENTROPY,
        "      total = total * exp(m - top);\n",
        "",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[cross_entropy-wide_1000-{isa}]",),
    ),
    Fault(
        "cross_entropy: lanes past the last class count as logits of 0",
        CROSS_ENTROPY,
        "return fill_rest(value(i, count).logit, count, -__builtin_inff());",
        "return fill_rest(value(i, count).logit, count, 0.f);",
        cell("cross_entropy-fp32-{isa}-tail"),
    ),
    Fault(
        "cross_entropy: ignored rows get a gradient",
        CROSS_ENTROPY,
        "      for (int64_t i = 0; i < p.classes; i += kLanes) {\n        store_some(dx + i, zero(),",
        "      for (int64_t i = 0; i < p.classes; i += kLanes) {\n        store_some(dx + i, splat(1e-3f),",
        ("tests/test_ops_cross_entropy.py::test_ignored_rows_have_neither_loss_nor_gradient",),
    ),
    Fault(
        "cross_entropy: the mean's divisor counts ignored rows",
        "csrc/bindings/cross_entropy.cpp",
        "if (p.target[r] == p.ignore_index) return 0.0;",
        "if (p.target[r] == p.ignore_index) return 1.0;",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the smoothed share forgets the class weights",
        CROSS_ENTROPY,
        "  if (p.weight != nullptr) {\n    share = share *",
        "  if (p.weight != nullptr && p.label_smoothing == 0.f) {\n    share = share *",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the softcap's slope is left out of the gradient",
        CROSS_ENTROPY,
        "return kCap ? g * v.slope : g;",
        "return g;",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: the z-loss's gradient is halved",
        CROSS_ENTROPY,
        "2.f * p.z_loss * (max + log_sum)",
        "p.z_loss * (max + log_sum)",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: a padded row is read at the stride of a packed one",
        "csrc/bindings/cross_entropy.cpp",
        "  p.x_row_stride = rows.row_stride;",
        "  p.x_row_stride = p.classes;",
        cell("cross_entropy-fp32-{isa}-padded_rows"),
    ),
    Fault(
        "cross_entropy: gradients per row all take the first row's",
        "csrc/bindings/cross_entropy.cpp",
        "z_scale.data(), per_row ? 1 : 0,",
        "z_scale.data(), 0,",
        cell("cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "cross_entropy: second derivatives detached",
        f"{OPS}cross_entropy.py",
        "        if torch.is_grad_enabled():\n            loss =",
        "        if False:\n            loss =",
        (f"{AUTOGRAD}::test_double_backward",),
    ),
]

ATTENTION_FAULTS = [
    Fault(
        "attention: the output is not rescaled when the maximum rises",
        ATTENTION,
        "    if (rescale) {",
        "    if (rescale && p.S_q == 0) {",
        cell("attention-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "attention: causal is one key too generous",
        f"{OPS}attention.py",
        "        right = 0\n",
        "        right = 1\n",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the left edge of a window is one key too far",
        ATTENTION_SCORES,
        "to = left ? key + p.window_left : kQueries;",
        "to = left ? key + p.window_left + 1 : kQueries;",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the scale is left out of the keys' gradient",
        ATTENTION_BWD,
        "store_sums(m.dk, p.S_k, p.D, p.scale,",
        "store_sums(m.dk, p.S_k, p.D, 1.f,",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the sum of dO times O is left out of the gradient",
        ATTENTION_BWD,
        "(load(m.ds + j * kQueries + r) - load(m.delta + r));",
        "load(m.ds + j * kQueries + r);",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: the gradients of one key head start from the one before",
        ATTENTION_BWD,
        "    std::memset(m.dv, 0, (size_t)(p.S_k * padded_features(p.D_v)) * 4);\n",
        "    if (item == begin) std::memset(m.dv, 0, (size_t)(p.S_k * padded_features(p.D_v)) * 4);\n",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: grouped query heads are dealt out in turns",
        ATTENTION_OPERANDS,
        "t.kv_head = head / (p.H / p.H_kv);",
        "t.kv_head = head % p.H_kv;",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[attention-wide_grouped-{isa}]",),
    ),
    Fault(
        "attention: backward drops other weights than forward",
        ATTENTION_BWD,
        "if (p.dropout > 0.f) drop(p, t, j0, keys, m.p);",
        "if (p.dropout > 0.f) drop(p, t, j0 + 4, keys, m.p);",
        ("tests/test_ops_attention.py::TestDropout::test_backward_drops_what_forward_dropped",),
    ),
    Fault(
        "attention: dropped weights stay in the output",
        ATTENTION_SCORES,
        "x[j * stride] *= random.x[(j0 + j) % 4] < threshold ? 0.f : keep_scale;",
        "x[j * stride] *= keep_scale;",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
    Fault(
        "attention: a query that sees nothing gives NaN",
        ATTENTION,
        "select(after == splat(-__builtin_inff()), zero(), after);",
        "after;",
        ("tests/test_ops_attention.py::test_query_that_sees_nothing[60-{isa}]",),
    ),
    Fault(
        "attention: a mask of one row per batch entry is read at the first entry's",
        ATTENTION_SCORES,
        "mask += t.b * p.mask_strides[0] + t.head * p.mask_strides[1] +",
        "mask += t.head * p.mask_strides[1] +",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the output is not rescaled when the maximum rises",
        "csrc/cpu/kernels/attention_decode.h",
        "if (correction != 1.f) {",
        "if (correction > 1.f) {",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "decoding: the parts of the keys are merged as if they had one maximum",
        "csrc/cpu/kernels/attention_decode.h",
        "sum = sum * mine + other[features + 1] * theirs;",
        "sum = sum + other[features + 1];",
        cell("attention-fp32-{isa}-contiguous"),
    ),
    Fault(
        "attention: a window that begins at an odd key splits a pair",
        ATTENTION_OPERANDS,
        "t.key_begin / Dot::kPerUnit * Dot::kPerUnit : t.key_end;",
        "t.key_begin : t.key_end;",
        ("tests/test_ops_attention.py::test_windows_that_begin_at_any_key[avx512_bf16]",),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the last odd key meets the weights of a key that is not there",
        ATTENTION_OPERANDS,
        "j + 1 < keys ? load(x + (j + 1) * kQueries + r) : zero();",
        "load(x + (j + 1) * kQueries + r);",
        cell("attention-bf16-avx512_bf16-contiguous", "attention-bf16-avx512_bf16-tail"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the scale is applied to pairs before and inside the exponential",
        ATTENTION_SCORES,
        "? ScoreScale{p.scale, 1.f} :",
        "? ScoreScale{p.scale, p.scale} :",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the gradient of the queries takes pairs of queries for pairs of keys",
        ATTENTION_BWD,
        "      round_to_pairs(m.ds, keys, width, ds_by_keys);\n      round_rows(m.ds, keys, width);\n",
        "      round_rows(m.ds, keys, width);\n      round_to_pairs(m.ds, keys, width, ds_by_keys);\n",
        cell("attention-bf16-avx512_bf16-contiguous"),
        isa="avx512_bf16",
    ),
    Fault(
        "attention: the seed is drawn again in backward",
        f"{OPS}attention.py",
        "            gradients = list(bwd(grad, query, key, value, mask, seed, out,",
        "            seed = None if seed is None else torch.randint(0, 2**62, ())\n"
        "            gradients = list(bwd(grad, query, key, value, mask, seed, out,",
        ("tests/test_ops_attention.py::TestDropout",),
    ),
]

NORM_FAULTS = [
    Fault(
        "norm: the variance takes in the lanes past the tail",
        NORM,
        "d = keep_first(d - p, count);",
        "d = d - p;",
        cell("norm-fp32-{isa}-tail"),
    ),
    Fault(
        "norm: moments about an outlier, or out of range, are not taken again",
        NORM,
        "if (__builtin_expect(!good || variance + eps < kLeastVariance, 0)) {",
        "if (n < 0 && !good) {",
        ("tests/test_ops_norm.py::test_squares_out_of_range",),
    ),
    Fault(
        "norm: the gradient keeps its mean",
        NORM,
        "kRms ? g : g - mean_g",
        "g",
        cell("norm-bf16-{isa}-contiguous"),
    ),
    Fault(
        "norm: the gradient of the residual sum itself is dropped",
        NORM,
        "return d_total == nullptr ? v : v + load_some(d_total + i, count);",
        "return v;",
        cell("norm-fp32-{isa}-contiguous"),
    ),
    Fault(
        "norm: the gradients of weight and bias lose a chunk of rows",
        "csrc/cpu/norm.cpp",
        "chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);",
        "chunks = std::max<int64_t>(1, p.rows / rows);",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[norm-layer_wide_many_rows-{isa}]",),
    ),
    Fault(
        "norm: a weight 2 apart is read as neighbours",
        PARAMETERS,
        "(stride == 1 || n == 1)",
        "stride != 0",
        cell("norm-fp32-{isa}-strided"),
    ),
    Fault(
        "norm: the residual has a gradient only where the input has one",
        f"{OPS}norm.py",
        "needs = (of_input or of_residual, *of_parameters)",
        "needs = (of_input, *of_parameters)",
        (f"{AUTOGRAD}::test_some_gradients_only[norm-add_layer_rows]",),
    ),
]

ACTIVATION_FAULTS = [
    Fault(
        "activation: the tail is not computed",
        f"{SIMD}pair.h",
        "for (; i < end; i += kLanes) f(i,",
        "for (; i + kLanes <= end; i += kLanes) f(i,",
        cell("activation-fp32-{isa}-tail"),
    ),
    Fault(
        "activation: the slope is taken without the bias",
        ACTIVATION,
        "if constexpr (kBias) z[v] += b[v];",
        "",
        cell("activation-fp32-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: the gradient of up lacks the activation",
        ACTIVATION,
        "g[v] = g[v] * a.value;",
        "g[v] = g[v] * z[v];",
        cell("activation-bf16-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: the halves of a packed gradient overlap",
        "csrc/bindings/activation.cpp",
        "p.d_row_stride = packed ? 2 * p.columns : p.columns;",
        "p.d_row_stride = p.columns;",
        ("tests/test_ops_activation.py::test_packed_is_the_pair",),
    ),
    Fault(
        "relu: an infinite gradient times 0",
        f"{SIMD}activation.h",
        "return select(x <= zero(), zero(), g);",
        "return g * select(x <= zero(), zero(), splat(1.f));",
        cell("activation-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "gelu_tanh: a large cube times 0",
        f"{SIMD}activation.h",
        "fma(x * (p * q), slope, p)",
        "fma(x * slope * p, q, p)",
        cell("activation-fp32-{isa}-large_magnitude"),
    ),
    Fault(
        "activation: rows apart count as one long row",
        "csrc/cpu/activation.cpp",
        "if (p.bias == nullptr && p.x_row_stride == p.columns &&",
        "if (p.bias == nullptr &&",
        cell("activation-fp32-{isa}-padded_rows"),
    ),
    Fault(
        "activation: the gradient of the bias loses a chunk of rows",
        "csrc/cpu/activation.cpp",
        "chunks = std::max<int64_t>(1, (p.rows + rows - 1) / rows);",
        "chunks = std::max<int64_t>(1, p.rows / rows);",
        ("tests/test_ops_sweep.py::test_sweep_everywhere[activation-gelu_bias_wide_many_rows-{isa}]",),
    ),
    Fault(
        "swiglu: the odd elements of a bfloat16 pair are the even ones",
        f"{SIMD}pair.h",
        "v[1] = as_float(both & (int32_t)0xffff0000);",
        "v[1] = v[0];",
        cell("activation-bf16-{isa}-contiguous"),
    ),
    Fault(
        "swiglu: up is rounded to gate's type",
        f"{OPS}activation.py",
        "common = torch.promote_types(gate.dtype, up.dtype)",
        "common = gate.dtype",
        ("tests/test_ops_activation.py::test_gate_and_up_of_two_types",),
    ),
]

MASKED_FAULTS = [
    Fault(
        "masked_softmax: a row in which nothing takes part is NaN",
        MASKED,
        "top == -__builtin_inff() ? 0.f : top",
        "top",
        cell("masked_softmax-fp32-{isa}-contiguous"),
    ),
    Fault(
        "masked_softmax: a boolean mask lets NaN through",
        "csrc/cpu/kernels/mask.h",
        "if constexpr (__is_same(M, MaskByte)) return select(",
        "if constexpr (sizeof(M) == 0) return select(",
        cell("masked_softmax-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "masked_softmax: a row is not cleared past the diagonal",
        MASKED,
        "    std::memset(kept + n, 0, (size_t)(p.columns - n) * sizeof(float));\n",
        "",
        cell("masked_softmax-fp32-{isa}-contiguous"),
    ),
    Fault(
        "masked_softmax: a mask of heads is that of the first",
        "csrc/bindings/masked_softmax.cpp",
        "at < 0 || holder.size(at) == 1 ? 0 : holder.stride(at)",
        "at < 0 || d + 2 < rank || holder.size(at) == 1 ? 0 : holder.stride(at)",
        cell("masked_softmax-fp32-{isa}-leading_dims"),
    ),
    Fault(
        "masked_softmax: the gradient lacks the scale",
        SOFTMAX,
        "sum, kLog) * factor;",
        "sum, kLog);",
        cell("masked_softmax-bf16-{isa}-contiguous"),
    ),
]

DROPOUT_FAULTS = [
    Fault(
        "dropout_add: another mask in backward",
        "csrc/bindings/dropout_add.cpp",
        "  call.y = dx.mutable_data_ptr();\n",
        "  call.y = dx.mutable_data_ptr();\n  call.seed += 1;\n",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
    Fault(
        "dropout_add: rows share their mask",
        "csrc/cpu/kernels/dropout_add.h",
        "(uint64_t)r * groups + (uint64_t)i / 4",
        "(uint64_t)i / 4",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
    Fault(
        "dropout_add: what is kept is not divided by 1 - p",
        "csrc/cpu/kernels/dropout_add.h",
        "const float scale = 1.f / (1.f - p.p);",
        "const float scale = 1.f;",
        cell("dropout_add-bf16-{isa}-contiguous"),
    ),
    Fault(
        "philox: odd counters are the even ones",
        f"{SIMD}philox.h",
        "odd = multiply_low((LanePairs)a >> 32, m);",
        "odd = even;",
        cell("dropout_add-fp32-{isa}-contiguous"),
    ),
]

ROPE_FAULTS = [
    Fault(
        "rope: the rotation turns the wrong way",
        ROPE,
        "splat(p.inverse ? -1.f : 1.f)",
        "splat(p.inverse ? 1.f : -1.f)",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: backward of free tables takes its own entry of the sine",
        ROPE,
        "angles.sin + (p.inverse ? second : 0);",
        "angles.sin;",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: neighbours are exchanged before the sine in backward too",
        ROPE,
        "inverse ? swap_neighbours(turn * a[v]) : turn",
        "inverse ? -turn * swap_neighbours(a[v]) : turn",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: features that are not rotated are not written",
        ROPE,
        "if (p.rotary < p.D) keep_rest(",
        "if (p.rotary > p.D) keep_rest(",
        cell("rope-bf16-{isa}-contiguous"),
    ),
    Fault(
        "rope: positions of the first batch entry count for all",
        "csrc/bindings/rope.cpp",
        "p.positions_batch_stride = batch == 1 ? 0 : p.S;",
        "p.positions_batch_stride = 0;",
        cell("rope-fp32-{isa}-contiguous"),
    ),
    Fault(
        "rope: a position past the tables is read",
        "csrc/bindings/rope.cpp",
        "p.positions[i] < rows,",
        "p.positions[i] <= rows,",
        ("tests/test_ops_invalid.py::test_invalid_call[rope-fwd_positions_high]",),
    ),
    Fault(
        "rope: heads side by side come back apart",
        "csrc/bindings/rope.cpp",
        "const bool swapped = inside == (call.heads_dim == 1);",
        "const bool swapped = false;",
        ("tests/test_ops_rope.py::test_memory_order_is_kept",),
    ),
    Fault(
        "rope: the gradient of one of both is dropped",
        f"{OPS}rope.py",
        "if grads[0] is None and grads[1] is None:",
        "if grads[0] is None or grads[1] is None:",
        ("tests/test_ops_rope.py::test_one_of_both_gradients",),
    ),
]

INT8, INT8_KERNEL = "tests/test_int8.py", "csrc/cpu/kernels/linear_int8.h"
INT8_BITS = (f"{INT8}::test_same_bits_as_plain_pytorch[torch.float32-{{isa}}]",)
INT8_ROWS = (f"{INT8}::test_rows_of_every_kind[torch.float32-{{isa}}]",)
INT8_FAULTS = [
    Fault(
        "int8: the largest magnitude of a row misses its tail",
        INT8_KERNEL,
        "if (left <= 0) continue;",
        "if (left < kLanes) continue;",
        INT8_ROWS,
    ),
    Fault(
        "int8: a row with an infinity counts as finite",
        INT8_KERNEL,
        "if (bits >= kInfinityBits) {",
        "if (bits > kInfinityBits) {",
        INT8_ROWS,
    ),
    Fault(
        "int8: a row of zeros has the scale 0",
        INT8_KERNEL,
        "scale[m] = one > kLeastScale ? one : kLeastScale;",
        "scale[m] = one;",
        INT8_ROWS,
    ),
    Fault(
        "int8: values are cut down to codes, not rounded",
        f"{SIMD}codes.h",
        "_mm256_cvtps_epi32((__m256)x)",
        "_mm256_cvttps_epi32((__m256)x)",
        INT8_BITS,
        isa="avx2",
    ),
    Fault(
        "int8: products of bytes saturate at 16 bits",
        f"{SIMD}codes.h",
        "return (Vec)_mm256_add_epi32(_mm256_add_epi32((__m256i)c, even), odd);",
        "return (Vec)_mm256_add_epi32((__m256i)c, _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), "
        "_mm256_set1_epi16(1)));",
        (f"{INT8}::test_sums_are_exact_at_their_longest[avx2]",),
        isa="avx2",
    ),
    Fault(
        "int8: the shift of the inputs' codes is not taken back",
        GEMM,
        "(IVec)((UVec)load(t) - (UVec)load_ints(s.offset + n))",
        "(IVec)load(t)",
        INT8_BITS,
    ),
    Fault(
        "int8: sums of two blocks of K are added as floats",
        "csrc/cpu/gemm/units.h",
        "return (Vec)((UVec)a + (UVec)b);",
        "return a + b;",
        INT8_BITS,
    ),
    Fault(
        "int8: a layer's packed copy does not follow its scales",
        f"{OPS}packing.py",
        "t.stride()) for t in sources))",
        "t.stride()) for t in sources[:1]))",
        (f"{INT8}::test_packs_once_and_follows_its_buffers",),
    ),
    Fault(
        "int8: the scale is rounded with the model",
        "fastnn/nn/linear_int8.py",
        "if self.weight_scale.dtype != torch.float32:",
        "if self.weight_scale.dtype == torch.float64:",
        (f"{INT8}::test_scale_stays_float32",),
    ),
    Fault(
        "int8: floating weights are loaded as whole numbers",
        "fastnn/nn/linear_int8.py",
        "weight.dtype != torch.int8:",
        "weight.dtype == torch.float64:",
        (f"{INT8}::test_floating_weights_are_not_loaded_into_codes",),
    ),
    Fault(
        "quantize_: a slower layer is quantised all the same",
        "fastnn/quant/quantize.py",
        "if slowdown > max_slowdown:",
        "if slowdown > 10 * max_slowdown:",
        ("tests/test_quantize.py::test_slower_layers_are_left_alone_and_said_so",),
    ),
    Fault(
        "quantize_: tied layers have codes of their own",
        "fastnn/quant/quantize.py",
        "setattr(layer.made, name, buffer)",
        "setattr(layer.made, name, buffer.clone())",
        ("tests/test_quantize.py::test_tied_layers_share_their_codes",),
    ),
]

FAULTS = [
    *KERNEL_FAULTS,
    *BINDING_FAULTS,
    *PYTHON_FAULTS,
    *LOSS_FAULTS,
    *ATTENTION_FAULTS,
    *NORM_FAULTS,
    *ACTIVATION_FAULTS,
    *MASKED_FAULTS,
    *DROPOUT_FAULTS,
    *ROPE_FAULTS,
    *INT8_FAULTS,
]
