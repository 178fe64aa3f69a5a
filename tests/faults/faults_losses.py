"""Faults in linear_cross_entropy: driver, kernels, Python."""

from __future__ import annotations

from fault import OPS, Fault, cell

DRIVER, KERNEL = "csrc/cpu/linear_cross_entropy.cpp", "csrc/cpu/kernels/linear_cross_entropy.h"
TESTS = "tests/test_ops_linear_cross_entropy.py"

LINEAR_LOSS_FAULTS = [
    Fault(
        "linear_cross_entropy: each chunk overwrites the weight's gradient",
        DRIVER,
        "    if (chunk > 0) g.epilogue.addend = sums;\n",
        "",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: each block of classes overwrites the input's gradient",
        DRIVER,
        "    if (v0 > 0) g.epilogue.addend = floats(dx_sums_);\n",
        "",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: gradients of neighbours go to the first rows",
        DRIVER,
        "static_cast<char*>(p_.dx) + row_[i] * p_.K * size_",
        "static_cast<char*>(p_.dx) + i * p_.K * size_",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: rows apart are read as neighbours",
        DRIVER,
        "if (row_[rows_ - 1] - row_[0] == rows_ - 1) {",
        "if (true) {",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: backward scales every row by the first one's gradient",
        DRIVER,
        "scale_[at] = p_.scale[r * p_.scale_stride];",
        "scale_[at] = p_.scale[0];",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: the bias's gradient is that of the last row",
        KERNEL,
        "store_some(sums, load_some(sums, count) + load_some(",
        "store_some(sums, load_some(",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: the target's class is sought in the first block only",
        "csrc/cpu/kernels/cross_entropy.h",
        "first <= t && t < last) {",
        "first == 0 && t < last) {",
        cell("linear_cross_entropy-fp32-{isa}-contiguous"),
    ),
    Fault(
        "linear_cross_entropy: a second backward scales what the first gave away",
        f"{OPS}linear_cross_entropy.py",
        "            ctx.found = None\n",
        "            ctx.found = found\n",
        (f"{TESTS}::test_a_second_backward_finds_them_again",),
    ),
    Fault(
        "linear_cross_entropy: the incoming gradient is forgotten",
        f"{OPS}linear_cross_entropy.py",
        "            if float(grad) != 1.0:\n",
        "            if False:\n",
        (f"{TESTS}::test_incoming_gradients",),
    ),
    Fault(
        "linear_cross_entropy: float16 gradients are found before the loss scale",
        f"{OPS}linear_cross_entropy.py",
        'options.reduction != "none" and input.dtype != torch.float16',
        'options.reduction != "none"',
        (f"{TESTS}::test_loss_scale_reaches_float16_gradients_before_they_underflow",),
    ),
    Fault(
        "linear_cross_entropy: shift wraps round to the first target",
        f"{OPS}linear_cross_entropy.py",
        "    shifted[..., -1] = ignore_index\n",
        "",
        (f"{TESTS}::test_shift_is_the_next_token",),
    ),
]
