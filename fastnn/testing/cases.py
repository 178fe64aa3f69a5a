"""The one list of cases per op, for tests, benchmarks and `verify`.

Each op registers its cases and its invalid calls in one module of `fastnn.testing.ops`, named like the op. Adding
an op is adding that file: the modules are found, not listed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from . import ops

Inputs = dict[str, Tensor]
"""Argument name -> tensor."""

MATRIX_LAYOUTS = ("contiguous", "strided", "expanded", "offset", "empty", "tail")
"""What every op must have a case of, for every dtype and instruction set."""

LAYOUTS = (
    *MATRIX_LAYOUTS,
    "padded_rows",
    "transposed",
    "leading_dims",
    "one_row",
    "large_magnitude",
    "nonfinite",
)
"""Every layout: of memory, or of sizes and values."""

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes the kernels take, under the names that test ids have."""

REFERENCE_DTYPES: dict[str, torch.dtype] = {**DTYPES, "fp64": torch.float64}
"""The dtypes the reference is tested in."""


@dataclass(frozen=True)
class Case:
    """One way to call an op, with everything needed to judge the result."""

    op: str
    """Stem of the op, as in csrc/ops.def."""
    name: str
    """Unique within the op."""
    layout: str
    """One of `LAYOUTS`."""
    make: Callable[[torch.dtype, torch.Generator], Inputs]
    """Builds the tensors, in the case's memory layout."""
    call: Callable[[Inputs], Tensor]
    """The call of fastnn's public function."""
    reference: Callable[[Inputs], Tensor]
    """The same in plain PyTorch: truth when given float64 tensors."""
    forward_kernel: str
    """Name under which the kernel is recorded in the forward pass."""
    backward_kernel: str = ""
    """The same in the backward pass."""
    differentiable: tuple[str, ...] = ()
    """The inputs whose gradient is checked; empty for calls that only run without gradients."""
    rival: Callable[[Inputs], Tensor] | None = None
    """Torch's own op where that is not the reference in the tested dtype."""
    wide: bool = False
    """Belongs to the op's sweep, not to the matrix (size sweeps, large shapes)."""
    bites: bool = True
    """Whether the true output is asserted to be not all near zero; off where the op itself makes it so."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"fastnn.testing: case {self.op}/{self.name} has unknown layout {self.layout!r}")

    @property
    def parts(self) -> tuple[str, ...]:
        """What is compared: the forward result and each gradient."""
        return ("forward", *(f"grad_{name}" for name in self.differentiable))

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Fresh tensors for `dtype`; the same seed gives the same values."""
        return self.make(dtype, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class InvalidCall:
    """A call that must raise, and what the message must say."""

    op: str
    """Stem of the op, as in csrc/ops.def."""
    name: str
    """Unique within the op."""
    call: Callable[[], object]
    """Makes the call."""
    error: type[Exception] | tuple[type[Exception], ...]
    """What is raised."""
    words: tuple[str, ...]
    """Each must occur in the message: the op's name, the culprit, what was got."""
    raw: bool = False
    """A call of a raw operator (`torch.ops.fastnn`): needs the extension and runs in a process of its own."""


@cache
def op_names() -> tuple[str, ...]:
    """The ops that have cases, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(ops.__path__)))


@cache
def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op."""
    found: tuple[Case, ...] = importlib.import_module(f"{ops.__name__}.{op}").CASES
    _check_unique(op, [case.name for case in found], [case.op for case in found])
    return found


@cache
def invalid_calls(op: str) -> tuple[InvalidCall, ...]:
    """All invalid calls of one op."""
    found: tuple[InvalidCall, ...] = importlib.import_module(f"{ops.__name__}.{op}").INVALID
    _check_unique(op, [call.name for call in found], [call.op for call in found])
    return found


def find_case(op: str, name: str) -> Case:
    """The case of that name."""
    for case in cases(op):
        if case.name == name:
            return case
    raise KeyError(f"fastnn.testing: op {op!r} has no case {name!r}")


def _check_unique(op: str, names: list[str], of: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or set(of) - {op}:
        raise ValueError(f"fastnn.testing: {op}: names that occur twice: {twice}; ops named: {sorted(set(of))}")
