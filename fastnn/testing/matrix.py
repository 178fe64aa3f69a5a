"""Runs a case on a target and judges it: the one place where results are compared.

`check` is what the tests, the benchmarks' correctness gate and `verify` call. It raises on the first broken promise
and returns what was measured and which cells of the matrix op x dtype x target x layout x part were filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .._record import KernelRun, record
from . import policy
from .cases import MATRIX_LAYOUTS, REFERENCE_DTYPES, Case, Inputs, cases
from .devices import memory, on_device, synchronize, torchs_sound_kernels
from .inputs import arrange, fill
from .poison import poisoned
from .targets import Target


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix."""

    op: str
    dtype: str
    target: str
    layout: str
    part: str
    """`forward` or `grad_<input>`."""

    def __str__(self) -> str:
        return f"{self.op}-{self.dtype}-{self.target}-{self.layout}-{self.part}"


class Compared(NamedTuple):
    """The results that were compared."""

    ours: Tensor
    truth: Tensor
    """float64."""
    rival: Tensor


@dataclass(frozen=True)
class Verdict:
    """A case that passed."""

    case: Case
    dtype: str
    target: Target
    measured: dict[str, policy.Measured]
    """Part -> errors."""
    runs: tuple[KernelRun, ...]
    """The kernels that ran."""
    compared: dict[str, Compared] = field(repr=False, compare=False)
    """Part -> results."""

    @property
    def cells(self) -> frozenset[Cell]:
        """The cells of the matrix that this filled."""
        where = (self.case.op, self.dtype, str(self.target), self.case.layout)
        return frozenset(Cell(*where, part) for part in self.measured)


class PromiseError(AssertionError):
    """A promise other than accuracy is broken; the message names it."""


def matrix_cells(op: str, targets: Sequence[Target], layouts: Sequence[str] = MATRIX_LAYOUTS) -> frozenset[Cell]:
    """Every cell that the matrix must fill for `op`: forward and each gradient, in each dtype, target and layout."""
    parts = {part for case in cases(op) for part in case.parts}
    return frozenset(
        Cell(op, dtype, str(target), layout, part)
        for target in targets
        for dtype, layout, part in product(target.dtypes, layouts, parts)
    )


def check_row(op: str, dtype: str, target: Target, layout: str, row: Sequence[Case]) -> None:
    """Checks the cases `row` of one layout, which must fill every cell that the matrix has there.

    Raises:
        AssertionError: a cell stays empty, or what `check` raises.
    """
    filled = {cell for case in row for cell in check(case, dtype, target).cells}
    wanted = {cell for cell in matrix_cells(op, [target], [layout]) if cell.dtype == dtype}
    if not wanted <= filled:
        raise AssertionError(f"empty cells: {sorted(map(str, wanted - filled))}")


def check(case: Case, dtype: str, target: Target, *, seed: int = 0, grad_layout: str | None = None) -> Verdict:
    """Runs `case` in `dtype` on `target`, twice, with poisoned memory, and compares with truth and rival.

    On a GPU the inputs are the CPU's, bit for bit, and the rival is torch there; the truth is always the CPU's.

    Args:
        case: what to run.
        dtype: a name in `REFERENCE_DTYPES`.
        target: where; it must be able to run (`targets()`).
        seed: of the inputs.
        grad_layout: memory layout of grad_output; the case's own layout unless given.

    Raises:
        BudgetError: outside the error policy.
        PromiseError: an input or grad_output was changed, two runs differ, another kernel or instruction set ran.
    """
    where = f"{case.op}/{case.name} {dtype} on {target}"
    inputs = on_device(case.inputs(REFERENCE_DTYPES[dtype], seed), target.device)
    layout = case.layout if grad_layout is None else grad_layout
    expect = _expected.__wrapped__ if case.wide else _expected
    truth, rival = expect(case, dtype, seed, layout, target.device)
    if case.bites:
        policy.assert_bites(truth[0], where=where)
    grad = None
    if case.differentiable:
        grad = on_device({"grad_output": _grad_output(rival[0], seed, layout)}, target.device)["grad_output"]
    ours, runs = _run_watched(case, inputs, grad, target, where)
    prove_ran(case, target, runs, where)
    compared = {part: Compared(*three) for part, *three in zip(case.parts, ours, truth, rival, strict=True)}
    measured = {}
    for part, (mine, true, theirs) in compared.items():
        factor = policy.FORWARD_FACTOR if part == "forward" else policy.GRADIENT_FACTOR
        label = f"{where} {part}"
        measured[part] = policy.assert_within_budget(mine, true, theirs, theirs.dtype, factor, where=label)
        policy.assert_unbiased(mine, true, theirs, where=label)
    return Verdict(case, dtype, target, measured, tuple(runs), compared)


@lru_cache(maxsize=256)
def _expected(
    case: Case, dtype: str, seed: int, grad_layout: str, device: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Truth and rival, on `device`: kept, since every target is compared with the same (not for large cases)."""
    given = case.inputs(REFERENCE_DTYPES[dtype], seed)
    exact = {name: t.to(torch.float64) if t.is_floating_point() else t for name, t in given.items()}
    grad = exact_grad = None
    if case.differentiable:
        with torch.no_grad():
            like = (case.rival or case.reference)(given)
        grad = _grad_output(like, seed, grad_layout)
        exact_grad = grad.to(torch.float64)
    truth = [t.to(device) for t in _run(case, case.reference, exact, exact_grad)]
    return tuple(truth), tuple(_rival(case, given, grad, device))


def _grad_output(like: Tensor, seed: int, layout: str) -> Tensor:
    values = fill(like.shape, like.dtype, torch.Generator().manual_seed(seed + 1))
    return arrange(values, layout)


def _rival(case: Case, given: Inputs, grad: Tensor | None, device: str) -> list[Tensor]:
    """Torch's results on `device`; the CPU's where torch cannot run the call there (mixed types in a norm, say)."""
    call = case.rival or case.reference
    if device != "cpu":
        there = None if grad is None else on_device({"grad_output": grad}, device)["grad_output"]
        try:
            with torchs_sound_kernels(device):
                found = _run(case, call, on_device(given, device), there)
            synchronize(device)
            if all(isinstance(t, Tensor) for t in found):  # no gradient of nothing, for some empty operands
                return found
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # nothing runs in this process any more
    return [t.to(device) for t in _run(case, call, given, grad)]


def _run(case: Case, call: Callable[[Inputs], Tensor], inputs: Inputs, grad: Tensor | None) -> list[Tensor]:
    """The result and, given grad_output, each gradient, in the order of `case.parts`."""
    if grad is None:
        with torch.no_grad():
            return [call(inputs)]
    leaves = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in inputs.items()}
    output = call(leaves)
    gradients = torch.autograd.grad(output, [leaves[name] for name in case.differentiable], grad)
    return [output.detach(), *gradients]


def _run_watched(
    case: Case, inputs: Inputs, grad: Tensor | None, target: Target, where: str
) -> tuple[list[Tensor], list[KernelRun]]:
    """Our results, after checking that two runs agree bit for bit and that nothing given was written to."""
    given = {**inputs, **({} if grad is None else {"grad_output": grad})}
    before = {name: memory(t).clone() for name, t in given.items()}
    with target.forced(), poisoned():
        with record() as runs:
            ours = _run(case, case.call, inputs, grad)
        again = _run(case, case.call, inputs, grad)
        synchronize(target.device)
    for name, t in given.items():
        if not policy.same_bits(memory(t), before[name]):
            raise PromiseError(f"{where}: {name} was written to")
    for part, first, second in zip(case.parts, ours, again, strict=True):
        if not policy.same_bits(first, second):
            raise PromiseError(f"{where}: {part} differs between two runs on the same inputs")
    return ours, runs


def prove_ran(case: Case, target: Target, runs: Sequence[KernelRun], where: str) -> None:
    """Raises PromiseError unless the kernels of `case`, and none elsewhere, ran on `target`."""
    strays = sorted({str(run) for run in runs if (run.backend, run.isa) != (target.backend, target.isa)})
    if strays:
        raise PromiseError(f"{where}: ran elsewhere: {', '.join(strays)}")
    if target.backend == "reference":
        wanted = {case.forward_kernel.replace("_packed", "")}  # packed weights are a format of the CPU kernels'
    else:
        wanted = {case.forward_kernel, *([case.backward_kernel] if case.differentiable else [])}
    lacking = wanted - {run.kernel for run in runs}
    if lacking:
        raise PromiseError(
            f"{where}: {', '.join(sorted(lacking))} did not run; recorded: {sorted({r.kernel for r in runs})}"
        )
