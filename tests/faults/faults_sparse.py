"""Faults in layers with a block-sparse weight."""

from __future__ import annotations

from fault import Fault, cell

KERNEL, DRIVER, BINDING = (
    "csrc/cpu/kernels/block_sparse.h",
    "csrc/cpu/block_sparse.cpp",
    "csrc/bindings/block_sparse.cpp",
)
OP, TESTS = "fastnn/ops/block_sparse.py", "tests/test_block_sparse.py"


def swept(name: str) -> tuple[str, ...]:
    return (f"tests/test_ops_sweep.py::test_sweep_everywhere[linear-block_sparse_{name}-{{isa}}]",)


PLAIN, DEEP, LAYER = (cell(f"linear-fp32-{{isa}}-{name}") for name in ("contiguous", "large_magnitude", "one_row"))
SPARSE_FAULTS = [
    Fault(
        "block sparse: a strip's sums start again where they are cut",
        KERNEL,
        "accumulate ? sum + load(at) : sum",
        "sum",
        swept("wide_long16"),
    ),
    Fault(
        "block sparse: every block reads the first columns of the input",
        KERNEL,
        "const char* x = g.panel + *column++ * block_bytes;",
        "const char* x = g.panel + *column++ * 0;",
        PLAIN,
    ),
    Fault(
        "block sparse: dx forgets the strips beyond the first 192",
        KERNEL,
        "total += sum_each(sums);",
        "total = sum_each(sums);",
        swept("wide_tall"),
    ),
    Fault(
        "block sparse: the gradient of the values forgets rows before the last 64",
        KERNEL,
        "store(at, load(at) + sums[i][v]);",
        "store(at, sums[i][v]);",
        swept("wide_m130"),
    ),
    Fault(
        "block sparse: the second half of a deep block takes the gradient of the first",
        KERNEL,
        "(p.w.columns[block] * depth + piece * J) * kSparseDwRows",
        "(p.w.columns[block] * depth + piece * 0) * kSparseDwRows",
        DEEP,
    ),
    Fault(
        "block sparse: what lies beyond the outputs is not cleared before dx",
        DRIVER,
        "std::fill(row + l.N, row + shape.strips * kStrip, 0.f);",
        "std::fill(row + l.N, row + l.N, 0.f);",
        PLAIN,
    ),
    Fault(
        "block sparse: with threads, the last strip is nobody's",
        DRIVER,
        "return part <= 0 ? 0 : n;",
        "return part <= 0 ? 0 : n - 1;",
        PLAIN,
    ),
    Fault(
        "block sparse: columns out of range are read",
        BINDING,
        "w.columns[last - 1] < limit",
        "w.columns[last - 1] <= limit",
        ("tests/test_ops_invalid.py::test_invalid_call[linear-block_sparse_fwd_far]",),
    ),
    Fault(
        "block sparse: the slope is left out of backward",
        OP,
        "bwd(grad, input, values, columns, starts, slope, code, shape, mask, True)",
        "bwd(grad, input, values, columns, starts, slope, 0, shape, mask, True)",
        LAYER,
    ),
    Fault(
        "block sparse: a block's outputs and columns change places",
        OP,
        ".permute(0, 2, 3, 1)\n",
        ".permute(0, 2, 1, 3).reshape(strips, width, depth, OUTPUTS)\n",
        (f"{TESTS}::test_where_a_value_lies",),
    ),
]
