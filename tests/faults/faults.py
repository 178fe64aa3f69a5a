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
LINEAR, SIMD = "csrc/cpu/linear.cpp", "csrc/cpu/simd/"
OPS = "fastnn/ops/"
AUTOGRAD, PACKING = "tests/test_ops_autograd.py", "tests/test_ops_packing.py"
GRAD_LAYOUT = "tests/test_ops_sweep.py::test_grad_output_in_any_memory_layout"

KERNEL_FAULTS = [
    Fault(
        "softmax: the sum takes in the lanes past the tail",
        "csrc/cpu/kernels/rows.h",
        "total += keep_first(f(i, count), count);",
        "total += f(i, count);",
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
        "               accumulate || u > 0);",
        "               true);",
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
        "for (int s = 0; s < p.epilogue.count; ++s) {",
        "for (int s = p.epilogue.count - 1; s >= 0; --s) {",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear: bias dropped",
        LINEAR,
        "if (p.bias != nullptr) {",
        "if (p.bias != nullptr && p.M < 0) {",
        cell("linear-fp16-{isa}-contiguous"),
    ),
    Fault(
        "linear: the bias gradient loses a chunk of rows",
        LINEAR,
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
        "if (stride == 1) return count == kLanes",
        "if (stride != 0) return count == kLanes",
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
        "return max(zero(), x);",
        "return max(x, zero());",
        cell("linear-fp32-{isa}-nonfinite"),
    ),
    Fault(
        "gelu runs as gelu_tanh",
        f"{SIMD}activation.h",
        "return f(ActivationTag<Activation::kGelu>{});",
        "return f(ActivationTag<Activation::kGeluTanh>{});",
        cell("linear-fp32-{isa}-contiguous"),
    ),
    Fault(
        "gelu: the gradient lacks the density term",
        f"{SIMD}activation.h",
        "return dy * fma(s, density, normal_cdf(s));",
        "return dy * normal_cdf(s);",
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
        "if isinstance(input, Tensor) and _autocasts(input):",
        "if False:",
        ("tests/test_ops_autocast.py::test_linear_values",),
    ),
    Fault(
        "packed weight: a changed weight is not noticed",
        f"{OPS}packing.py",
        "            weight._version,\n",
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

FAULTS = [*KERNEL_FAULTS, *BINDING_FAULTS, *PYTHON_FAULTS]
