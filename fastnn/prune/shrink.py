"""Taking neurons, attention heads and channels out of a model for good."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import Attempt, call, check_model, tensors
from ..nn import QuantizedModule
from ..testing.policy import FLOOR
from . import importance
from .apply import Changes, Removed, shrink, silenced
from .choose import removed
from .config import PruneError, Shrink, assigned
from .groups import Group, Kept, groups_of
from .huggingface import configure
from .labels import Atoms
from .report import Entry, Report
from .trace import Trace, evaluating, trace

FilterFn = Callable[[Module, str], bool]

_ALLOWED = 64
"""Floors of the error policy by which the smaller model may differ from the old one without the units' contributions,
relative to the largest output (64e-6 in float32): sums of other lengths are added in another order. As much as
`fastnn.accelerate` allows."""


@torch.inference_mode(False)
def shrink_(
    model: Module,
    config: object,
    filter_fn: FilterFn | None = None,
    *,
    example_inputs: Any,
    calibration: Iterable[Any] | None = None,
    loss: importance.Loss | None = None,
) -> Report:
    """Takes the least important neurons, attention heads and channels out of a model, in place: its shapes shrink.

    The model is run once on the example, and its channels are followed through every operator: what must go together
    (through sums, concatenations, batch normalisation, groups, gates, shared weights, heads that share keys) goes
    together, and what no unit can leave stays. Parameters stay the same objects; those that shrink lose `.grad`, so
    shrink before an optimizer takes them. Afterwards the model is run once more and compared with what it gave before
    without those units' contributions: if that is not the same, nothing is changed.

    Args:
        model: any module that runs on the example, on any device and in any mode.
        config: a `fastnn.Shrink`, or a mapping to them (or to None) from "neurons", "heads", "channels" and patterns
            of the names of groups (as in fnmatch; `Entry.name`); the first that fits holds.
        filter_fn: called with the layer that makes a group's units and its path; False leaves the group alone.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        calibration: inputs like the example, for importance "activation"; whatever `loss` takes, for "taylor".
        loss: called with the model and one of `calibration`; gives the scalar whose first-order change ranks the units.

    Returns:
        The report: every group before and after, layers that keep all with the reason, parameters and multiply-adds.

    Raises:
        TypeError: no module, no configuration.
        ValueError: a pattern that fits nothing, an amount that leaves nothing, calibration or loss missing.
        PruneError: a layer that is asked for but whose shape its module's code has fixed; the model is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
        >>> report = fastnn.shrink_(model, fastnn.Shrink(0.5), example_inputs=torch.randn(2, 8))
        >>> model[0].out_features, model[2].in_features
        (32, 32)
    """
    check_model("shrink_", model, changes_weights=True)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            raise PruneError(f"fastnn.shrink_: {path or 'the model'} is quantised: shrink first, then quantise")
    traced = trace(model, example_inputs)
    groups, kept = groups_of(model, traced)
    chosen = [g for g in groups if filter_fn is None or filter_fn(model.get_submodule(g.name), g.name)]
    if not chosen:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in kept[:5])
        why = "filter_fn said no to every group" if groups else reasons or "no product of parameters was seen"
        raise PruneError(f"fastnn.shrink_: nothing can be pruned: {why}")
    plan: Removed = []
    for one, mine in assigned(config, chosen, kept):
        plan += zip(mine, removed(one, mine, scores(model, one, mine, calibration, loss)), strict=True)
    every = {id(group): units for group, units in plan}
    plan += [(group, np.empty(0, np.int64)) for group in groups if id(group) not in every]
    parameters, macs = _parameters(model), _macs(traced, [])
    changes, lacks, difference = take_out(model, plan, example_inputs)
    shapes = shapes_of(model, changes)
    entries = tuple([_entry(group, every.get(id(group))) for group in groups] + [_left(one) for one in kept])
    after = _parameters(model), _macs(traced, plan)
    return Report(entries, parameters, after[0], macs, after[1], shapes, lacks, difference)


def scores(
    model: Module, config: Shrink, groups: list[Group], calibration: Iterable[Any] | None, loss: importance.Loss | None
) -> list[np.ndarray]:
    """How much each group's units are worth, by the configuration's importance."""
    if config.importance == "norm":
        return [importance.norms(group) for group in groups]
    if calibration is None or (loss is None and config.importance == "taylor"):
        missing = "calibration" if calibration is None else "loss"
        raise ValueError(f"fastnn.shrink_: importance={config.importance!r} needs {missing}=")
    if config.importance == "activation":
        found = importance.activations(model, groups, calibration)
    else:
        found = importance.taylor(model, groups, calibration, loss)  # type: ignore[arg-type]
    return [found[i] for i in range(len(groups))]


def _outputs(model: Module, example_inputs: Any) -> list[Tensor]:
    with evaluating(model):
        return [one.detach().clone() for one in tensors(call(model, example_inputs))]


def take_out(model: Module, plan: Removed, example_inputs: Any) -> tuple[Changes, str, float]:
    """Takes units out; puts everything back where the model then gives something else than without what they say.

    Returns:
        What was changed; what a transformers configuration cannot say of it; the largest difference of an output.

    Raises:
        PruneError: a shape that a module's code has fixed; the model is as it was.
    """
    with silenced(plan):
        expected = _outputs(model, example_inputs)
    changes, lacks, difference, done = shrink(model, plan), "", 0.0, False
    try:
        with Attempt() as attempt:
            lacks = configure(changes, model, plan)
            difference, failure = _compare(_outputs(model, example_inputs), expected)
        failure = attempt.failure or failure
        done = not failure
    finally:
        if not done:
            changes.undo()
    if failure:
        name, why = _culprit(model, plan, example_inputs) or ("the model", failure)
        raise PruneError(
            f"fastnn.shrink_: {name} cannot be pruned: its code, or what uses it, has fixed the shape ({why})"
        )
    return changes, lacks, difference


def _culprit(model: Module, plan: Removed, example_inputs: Any) -> tuple[str, str] | None:
    """The first group that cannot be shrunk even alone, and what went wrong."""
    for group, units in plan:
        with silenced([(group, units)]):
            expected = _outputs(model, example_inputs)
        changes, failure = shrink(model, [(group, units)]), ""
        try:
            with Attempt() as attempt:
                failure = _compare(_outputs(model, example_inputs), expected)[1]
        finally:
            changes.undo()
        if attempt.failure or failure:
            return group.name, attempt.failure or failure
    return None


def _compare(outputs: list[Tensor], expected: list[Tensor]) -> tuple[float, str]:
    """The largest difference, and what is wrong; empty where nothing is."""
    if [one.shape for one in outputs] != [one.shape for one in expected]:
        return 0.0, "the outputs have other shapes"
    largest = 0.0
    for ours, true in zip(outputs, expected, strict=True):
        if not ours.is_floating_point() or not ours.numel():
            continue
        off = torch.where(ours.isfinite() & true.isfinite(), (ours - true).abs(), 0).max().item()
        scale = true.nan_to_num(0, 0, 0).abs().max().item()
        if off > _ALLOWED * FLOOR.get(ours.dtype, torch.finfo(ours.dtype).eps) * scale:
            return off, f"an output differs by {off:.3g} from that without the units' contributions"
        if not torch.equal(ours.isfinite(), true.isfinite()):
            return off, "NaN or infinity in an output"
        largest = max(largest, off)
    return largest, ""


def _parameters(model: Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(traced: Trace, plan: Removed) -> int:
    """Multiply-adds of the run, each product's in proportion to what is left of its dimensions."""
    gone = np.zeros(traced.relation.count + 1, bool)
    for group, units in plan:
        gone[group.roots[units]] = True

    def left(atoms: Atoms) -> float:
        return 1.0 - float(gone[traced.solution.root[atoms.reshape(-1)]].mean())

    return round(sum(product.macs * float(np.prod([left(dim) for dim in product.dims])) for product in traced.products))


def shapes_of(model: Module, changes: Changes) -> dict[str, Any]:
    """What `resize_` needs."""
    names = {id(tensor): name for kind in (model.named_parameters, model.named_buffers) for name, tensor in kind()}
    paths = {id(module): path for path, module in model.named_modules()}
    attributes: dict[str, dict[str, int]] = {}
    for owner, name, _ in changes.attributes:
        if id(owner) in paths:
            attributes.setdefault(paths[id(owner)], {})[name] = getattr(owner, name)
    return {
        "tensors": {names[id(tensor)]: list(tensor.shape) for tensor, _, _ in changes.tensors},
        "attributes": attributes,
    }


def _entry(group: Group, units: np.ndarray | None) -> Entry:
    kept = np.setdiff1d(np.arange(group.units), [] if units is None else units)
    why = "" if len(kept) < group.units else "not asked for" if units is None else "the amount takes none of it"
    tensors = tuple(dict.fromkeys(part.name for part in group.parts))
    return Entry(group.name, group.kind, group.units, len(kept), tuple(kept.tolist()), tensors, why)


def _left(kept: Kept) -> Entry:
    return Entry(kept.name, "", 0, 0, (), (), kept.reason)


@torch.inference_mode(False)
def resize_(model: Module, shapes: dict[str, Any]) -> None:
    """Gives a model that is made like the original the sizes of one that was shrunk, so that its state_dict fits.

    Args:
        model: as the other was before `fastnn.shrink_`; its values are of no further use.
        shapes: `Report.shapes`, or what JSON made of it.

    Raises:
        TypeError: `model` is no module.
        ValueError: a parameter, buffer, module or attribute that it lacks, or that is smaller already; nothing is done.
    """
    check_model("resize_", model)
    resized(model, shapes)


def resized(model: Module, shapes: dict[str, Any]) -> Changes:
    """As `resize_`; what was changed."""
    held = {n: t for kind in (model.named_parameters, model.named_buffers) for n, t in kind(remove_duplicate=False)}
    modules = dict(model.named_modules())
    for name, shape in shapes["tensors"].items():
        if name not in held or held[name].dim() != len(shape):
            raise ValueError(f"fastnn.prune.resize_: the model has no {name} of {len(shape)} dimensions")
        if any(n > m for n, m in zip(shape, held[name].shape, strict=True)):
            raise ValueError(f"fastnn.prune.resize_: {name} is {tuple(held[name].shape)}, smaller than {tuple(shape)}")
    for path, values in shapes["attributes"].items():
        if path not in modules or not all(hasattr(modules[path], name) for name in values):
            raise ValueError(f"fastnn.prune.resize_: the model has no module {path!r} with {', '.join(values)}")
    changes = Changes()
    for name, shape in shapes["tensors"].items():
        smaller = held[name].data[tuple(slice(n) for n in shape)]
        changes.resize(held[name], smaller.clone(memory_format=torch.contiguous_format))
    for path, values in shapes["attributes"].items():
        for name, value in values.items():
            changes.set(modules[path], name, value)
    return changes
