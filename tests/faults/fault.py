"""What a planted fault is, and names that several lists use."""

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
EPILOGUE = "csrc/cpu/gemm/epilogue.h"
NORM, NORM_BWD = "csrc/cpu/kernels/norm.h", "csrc/cpu/kernels/norm_bwd.h"
ACTIVATION = "csrc/cpu/kernels/activation.h"
MASKED, ROPE = "csrc/cpu/kernels/masked_softmax.h", "csrc/cpu/kernels/rope.h"
PARAMETERS = "csrc/cpu/parameters.h"
LINEAR, SIMD = "csrc/cpu/linear.cpp", "csrc/cpu/simd/"
OPS = "fastnn/ops/"
AUTOGRAD, PACKING = "tests/test_ops_autograd.py", "tests/test_ops_packing.py"
GRAD_LAYOUT = "tests/test_ops_sweep.py::test_grad_output_in_any_memory_layout"
