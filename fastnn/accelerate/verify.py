"""Running the model before and after, on copies of its buffers, and finding the patch that does harm."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from ..testing.policy import FLOOR, FORWARD_FACTOR, GRADIENT_FACTOR, BudgetError, assert_within_budget
from .isolate import Attempt, call, isolated, plain_inputs, tensors
from .report import Patch

_TRUTH_LIMIT = 2**28
"""Parameters of the largest model that is copied in float64 (2 GiB)."""

_WITHOUT_TRUTH = 64
"""Where there is no float64 run to measure torch's own error by, this many floors (64e-6 in float32) are allowed
between before and after: what a hundred layers accumulate, and well below what a wrong formula does."""


@dataclass(frozen=True)
class Run:
    """What one run of the model gave."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    """All parameter gradients, one vector per type; empty in evaluation."""


def run(model: Module, example_inputs: Any) -> Run:
    """Runs the model in its present mode, with one backward where it is training; `.grad` stays as it is."""
    with isolated(model), torch.inference_mode(False), torch.set_grad_enabled(model.training):
        outputs = tensors(call(model, example_inputs))
        differentiable = [t for t in outputs if t.requires_grad]
        parameters = [p for p in model.parameters() if p.requires_grad]
        by_type: dict[torch.dtype, list[Tensor]] = {}
        if differentiable and parameters:
            directions = [_direction(t) for t in differentiable]
            for gradient in torch.autograd.grad(differentiable, parameters, directions, allow_unused=True):
                if gradient is not None:
                    by_type.setdefault(gradient.dtype, []).append(gradient.detach().flatten())
        return Run([t.detach().clone() for t in outputs], [torch.cat(parts) for parts in by_type.values()])


def _direction(output: Tensor) -> Tensor:
    """The gradient given to an output: the same random numbers for every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)


class Verifier:
    """Compares a model, as it is patched at the moment, with what it gave before."""

    def __init__(self, model: Module, example_inputs: Any) -> None:
        """Runs the untouched model; raises what the model raises."""
        self._model, self._inputs = model, plain_inputs(example_inputs)
        self._before = run(model, self._inputs)
        self._truth = self._in_float64()
        self.failure = ""
        """What disagreed at the last comparison; empty where nothing did."""
        self.max_difference = 0.0
        """The largest difference between an output before and after at the last comparison."""

    @property
    def has_outputs(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self._before.outputs)

    def agrees(self) -> bool:
        """Whether the model gives what it gave before, within the error policy."""
        with Attempt() as attempt:
            after = run(self._model, self._inputs)
        self.failure = f"raised {attempt.failure}" if attempt.failure else self._disagreement(after)
        return not self.failure

    def _in_float64(self) -> Run | None:
        """The same run in float64; None where the model is too large to copy or does something else there."""
        if sum(p.numel() for p in self._model.parameters()) > _TRUTH_LIMIT:
            return None
        with Attempt() as attempt:
            inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self._inputs)
            truth = run(copy.deepcopy(self._model).double(), inputs)
        return truth if not attempt.failure and self._is_same_computation(truth) else None

    def _is_same_computation(self, truth: Run) -> bool:
        """Whether float64 agrees to half the digits; a dropout mask, say, may have come out differently."""
        known = [*self._before.outputs, *self._before.gradients]
        better = [*truth.outputs, *truth.gradients]
        if [t.shape for t in known] != [t.shape for t in better]:
            return False
        for ours, true in zip(known, better, strict=True):
            if ours.is_floating_point() and ours.numel():
                off = torch.where(ours.isfinite() & true.isfinite(), (ours - true).abs(), 0).max()
                if off > torch.finfo(ours.dtype).eps ** 0.5 * true.nan_to_num(0, 0, 0).abs().max():
                    return False
        return True

    def _disagreement(self, after: Run) -> str:
        before, truth = self._before, self._truth
        if len(after.outputs) != len(before.outputs) or len(after.gradients) != len(before.gradients):
            return "another number of outputs or gradients"
        self.max_difference = max([_difference(*pair) for pair in zip(after.outputs, before.outputs, strict=True)])
        for kind, factor in (("outputs", FORWARD_FACTOR), ("gradients", GRADIENT_FACTOR)):
            ours, rivals = getattr(after, kind), getattr(before, kind)
            trues = getattr(truth, kind) if truth else [None] * len(rivals)
            for triple in zip(ours, rivals, trues, strict=True):
                if failure := _compare(*triple, factor, kind):
                    return failure
        return ""


def _difference(ours: Tensor, rival: Tensor) -> float:
    if ours.shape != rival.shape or not ours.is_floating_point() or not ours.numel():
        return 0.0
    return torch.where(ours.isfinite() & rival.isfinite(), (ours - rival).abs(), 0).max().item()


def _compare(ours: Tensor, rival: Tensor, truth: Tensor | None, factor: float, where: str) -> str:
    if ours.shape != rival.shape or ours.dtype != rival.dtype:
        return f"{where}: {ours.dtype} {tuple(ours.shape)} instead of {rival.dtype} {tuple(rival.shape)}"
    if rival.dtype not in FLOOR:
        return "" if torch.equal(ours, rival) else f"{where}: other values"
    if truth is None:
        if not torch.equal(ours.isfinite(), rival.isfinite()):
            return f"{where}: NaN or infinity out of place"
        scale = rival.nan_to_num(0, 0, 0).abs().max().item() if rival.numel() else 0.0
        allowed = _WITHOUT_TRUTH * FLOOR[rival.dtype] * scale
        off = _difference(ours, rival)
        return "" if off <= allowed else f"{where}: differs by {off:.3g}, allowed {allowed:.3g}"
    try:
        assert_within_budget(ours, truth, rival, rival.dtype, factor, where=where)
    except BudgetError as error:
        return str(error)
    return ""


def undo_culprits(verifier: Verifier, stages: Sequence[Sequence[Patch]]) -> dict[int, str]:
    """Leaves those patches applied with which the model agrees with itself.

    Args:
        verifier: of the model, all patches undone.
        stages: patches that are judged one by one, given that the earlier stages' good ones are applied.

    Returns:
        id of each rejected patch -> what disagreed.
    """
    rejected: dict[int, str] = {}
    for stage in stages:
        for patch, failure in _culprits(verifier, stage):
            rejected[id(patch)] = failure
        for patch in stage:
            if id(patch) not in rejected:
                patch.apply()
    if not verifier.agrees():  # harmless one by one, not together: none can be trusted
        for stage in reversed(stages):
            for patch in reversed(stage):
                patch.undo()
                rejected.setdefault(id(patch), verifier.failure)
    return rejected


def _culprits(verifier: Verifier, patches: Sequence[Patch]) -> list[tuple[Patch, str]]:
    """By halving: the patches with any of which the model disagrees."""
    for patch in patches:
        patch.apply()
    agrees = not patches or verifier.agrees()
    for patch in reversed(patches):
        patch.undo()
    if agrees:
        return []
    if len(patches) == 1:
        return [(patches[0], verifier.failure)]
    half = len(patches) // 2
    return _culprits(verifier, patches[:half]) + _culprits(verifier, patches[half:])
