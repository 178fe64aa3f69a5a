"""Accelerating a model in place: look, change, check, report."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import Module

from ..nn import Linear
from .conv1d import _Conv1D
from .fused import STATE
from .isolate import check_model
from .report import Entry, Patch, Report
from .survey import Finding, survey


def accelerate(model: Module, *, example_inputs: Any = None, freeze: bool = False) -> Report:
    """Runs the model's linear, softmax, norm and activation layers on fastnn's kernels, in place and reversibly.

    The model stays the same object with the same parameters, buffers, `state_dict` keys, ties and hooks; only the
    classes of some of its modules change, to subclasses of what they were. `torch.nn.Linear`, `Softmax`, `LogSoftmax`,
    `LayerNorm` and `RMSNorm`, and transformers' `Conv1D`, become fastnn's; subclasses of them are left alone. A linear
    layer and the activation that alone uses its result, a gated feed-forward block, or a sum and the norm that alone
    uses it, run as one op where torch.fx can trace the smallest module whose forward calls all of it, and none has
    hooks; a call that the trace does not cover runs the original forward.

    Args:
        model: any module, float32, bfloat16 or float16 (what has another type or device is left alone, and reported).
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on them
            before and after, with one backward where it is training, and a change that disagrees beyond the error
            policy is undone. Buffers, `.grad` and the random state are as before afterwards. Without them the report
            says 'unverified'.
        freeze: keep packed copies of the linear layers' weights, which makes inference faster and costs their memory
            again; on the CPU alone (the report says so of layers elsewhere). A copy is never used while the layer
            trains, and is rebuilt when the weight changes.

    Returns:
        The report: what was done with every layer and why not, and `restore()`. As a context manager it restores on
        leaving. Calling again on an accelerated model finds nothing new to do.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has lazy parameters that have no shape yet.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU()).eval()
        >>> with fastnn.accelerate(model, example_inputs=torch.randn(2, 8)) as report:
        ...     report.fused, report.verified
        (1, True)
    """
    check_model("accelerate", model)
    found = survey(model, freeze)
    for fusion in found.fusions:
        if STATE in fusion.attributes:
            fusion.attributes[STATE].make(fusion.module)
    changes = _Changes([f.patch for f in found.findings if f.patch is not None], found.fusions)
    with ExitStack() as undo:
        undo.callback(changes.undo)
        verification = changes.apply() if example_inputs is None else changes.verify(model, example_inputs)
        undo.pop_all()
    kept = [patch for patch in changes.all if id(patch) not in changes.rejected]
    _pack(kept)
    entries = tuple(_entry(finding, changes) for finding in found.findings)
    return Report(entries, verification, changes.verified, changes.max_difference, _patches=kept)


class _Changes:
    """A model's patches: layers first, then the modules that fuse them, which do nothing without."""

    def __init__(self, layers: list[Patch], fusions: list[Patch]) -> None:
        self.stages = (layers, fusions)
        self.all = [*layers, *fusions]
        self.rejected: dict[int, str] = {}
        """id of a patch -> what disagreed."""
        self.verified = False
        self.max_difference: float | None = None

    def apply(self) -> str:
        for patch in self.all:
            patch.apply()
        return "unverified: no example_inputs were given"

    def undo(self) -> None:
        for patch in reversed(self.all):
            patch.undo()

    def verify(self, model: Module, example_inputs: Any) -> str:
        """Applies what agrees; what was checked, in words."""
        from .verify import Verifier, undo_culprits

        if not self.all:
            return "nothing to check"
        verifier = Verifier(model, example_inputs)
        self.apply()
        if not verifier.has_outputs:
            return "unverified: the model returned no tensors"
        if not verifier.agrees():
            self.undo()
            if not verifier.agrees():
                self.apply()
                return f"unverified: two runs of the model itself disagree ({verifier.failure})"
            self.rejected = undo_culprits(verifier, self.stages)
        self.verified, self.max_difference = True, verifier.max_difference
        what = "outputs and gradients" if model.training else "outputs"
        undone = f", {len(self.rejected)} changes undone" if self.rejected else ""
        return f"verified: {what} agree{undone}, largest difference {self.max_difference:.2g}"


def _pack(patches: list[Patch]) -> None:
    """Packs frozen weights now rather than at the first call."""
    for patch in patches:
        layer = patch.module
        if not patch.freeze or layer.training:
            continue
        with torch.no_grad():
            if isinstance(layer, Linear) and layer.packed is not None:
                layer.packed.get(layer.weight, layer.training)
            elif isinstance(layer, _Conv1D):
                layer.pack()


def _entry(found: Finding, changes: _Changes) -> Entry:
    layer = found.feeder or found
    lost = [changes.rejected[id(p)] for p in (layer.patch, found.fusion) if p is not None and id(p) in changes.rejected]
    held = layer.patch is None or id(layer.patch) not in changes.rejected
    fused = held and found.fusion is not None and id(found.fusion) not in changes.rejected
    if not fused and (found.patch is None or not held):
        return Entry(found.name, found.was, None, "", f"undone: {lost[0]}" if lost else found.reason, None)
    if found.feeder is not None:
        became, reason = f"in {_label(found.feeder.name)}", f"fused in {found.where}"
    else:
        is_linear = found.op == "linear" and not isinstance(found.module, _Conv1D)
        became = "fastnn.Linear" if is_linear else f"fastnn.{found.was}"
        became = "fastnn.KVCache" if found.op == "attention_cache" else became
        became += f" + {found.activation or 'sum'}" if fused else ""
        reason = f"fused with {found.partner} in {found.where}" if fused else found.note
        if lost:
            reason = f"not fused: undone, {lost[0]}"
    activation = found.activation if fused and found.op else None
    block = layer.block is not None and id(layer.block) not in changes.rejected
    return Entry(found.name, found.was, became, _kernel(layer, block), reason, changes.verified or None, activation)


def _label(name: str) -> str:
    """The last part of a name, with the one before where it is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _kernel(layer: Finding, block: bool) -> str:
    if layer.backend == "reference":
        return "reference"
    if layer.op == "attention_cache":
        return "attention_cache_append"
    held = layer.op == "linear" and vars(layer.module).get("packed") is not None and not layer.module.training
    packed = held and layer.backend == "cpu"
    return f"{'mlp' if block else layer.op}{'_packed' if packed else ''}_fwd"
