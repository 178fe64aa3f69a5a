"""What a search decides on, one thing at a time: layers that share a weight, and groups of units that go together."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import Attempt
from ..prune import Shrink
from ..prune.apply import Removed
from ..prune.choose import removed
from ..prune.groups import Group, groups_of
from ..prune.shrink import scores
from ..prune.trace import trace
from ..quant.config import Config, recipes_of
from ..quant.quantize import quantize_
from ..selection import FilterFn, Patterns, left_out, matching
from ..sparse.config import Sparsify
from ..sparse.sparsify import sparsify_

Candidate = Config | Sparsify | Shrink
"""What may become of a layer or of a group; floating and whole it may stay in any case."""


@dataclass
class Option:
    """One candidate for one unit, and what was measured of it, apart from all others."""

    config: Candidate
    became: str = ""
    """What the unit would be."""
    reason: str = ""
    """Why it is out of the question; empty where it is not."""
    error: float | None = None
    """Of the model's outputs on the calibration with this alone, norm of the difference / norm."""
    ms_before: float | None = None
    """Of the unit's layers on what the example gives them; None where nothing was timed."""
    ms_after: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    gone: np.ndarray | None = None
    """Of structure: the group's units that go."""
    verdict: str = ""
    """What the search came to."""


@dataclass
class Unit:
    """Layers that share one weight (mostly one layer), or a group of neurons, heads or channels."""

    name: str
    kind: str
    """layer, neurons, heads or channels."""
    was: str
    """The class of the layer, or how many units there are."""
    names: tuple[str, ...] = ()
    """Paths of the layers."""
    modules: tuple[Module, ...] = ()
    group: Group | None = None
    reason: str = ""
    """Why nothing is to become of it."""
    options: list[Option] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What plans and files call it: a layer and the neurons that it makes have one name."""
        return f"{self.kind} {self.name}"


Choices = Mapping[str, tuple[Unit, Option]]
"""Key of a unit -> what it becomes: a plan. Units that are not in it stay as they are."""


def label(config: object) -> str:
    """A candidate in a few words."""
    name = type(config).__name__
    if isinstance(config, Sparsify) and config.values != "float":
        return f"{name}({config.amount}, {config.values})"
    return f"{name}({config.amount})" if isinstance(config, (Sparsify, Shrink)) else name


def layer_units(model: Module, filter_fn: FilterFn | None, include: Patterns, exclude: Patterns) -> list[Unit]:
    """The layers with a weight of two or more dimensions, those that share it together.

    Raises:
        ValueError: a pattern that matches no layer; one that takes some of the layers that share a weight.
    """
    found: dict[int, list[tuple[str, Module]]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            found.setdefault(id(weight), []).append((name, module))
    paths = [name for tied in found.values() for name, _ in tied]
    wanted = matching("compress", "include", include, paths)
    unwanted = matching("compress", "exclude", exclude, paths)
    units = []
    for tied in found.values():
        names, modules = zip(*tied, strict=True)
        reasons = [left_out(name, module, filter_fn, wanted, unwanted) for name, module in tied]
        left = [reason for reason in reasons if reason]
        if left and len(left) < len(tied):
            raise ValueError(
                f"fastnn.compress: {' and '.join(names)} share one weight: choose all of them or none "
                f"({names[reasons.index(left[0])]}: {left[0]})"
            )
        reason = left[0] if left else ""
        units.append(Unit(names[0], "layer", type(modules[0]).__name__, names, modules, reason=reason))
    return units


def group_units(model: Module, candidates: Sequence[Shrink], example_inputs: Any, calib: list[Any]) -> list[Unit]:
    """The groups that pruning can make smaller, with an option for each candidate.

    Where the model cannot be traced, one unit with the reason.
    """
    if not candidates:
        return []
    with Attempt() as attempt:
        groups, _ = groups_of(model, trace(model, example_inputs))
    if attempt.failure:
        return [Unit("", "structure", type(model).__name__, reason=f"cannot be traced: {attempt.failure}")]
    units = [Unit(group.name, group.kind, f"{group.units} {group.kind}", group=group) for group in groups]
    for config in candidates:
        with Attempt() as attempt:
            worth = scores(model, config, groups, calib, None)
        for i, (unit, group) in enumerate(zip(units, groups, strict=True)):
            option = Option(config, label(config), attempt.failure)
            if not attempt.failure:
                with Attempt() as amount:
                    (option.gone,) = removed(config, [group], [worth[i]])
                    option.became = f"{group.units - len(option.gone)} {group.kind}"
                none = "" if option.gone is None or len(option.gone) else "the amount takes none of it"
                option.reason = amount.failure or none
            unit.options.append(option)
    return units


def plan_key(choices: Choices) -> str:
    """A plan in words, the same for the same plan."""
    return "; ".join(f"{key} = {option.config!r}" for key, (_, option) in sorted(choices.items()))


def trained_part(choices: Choices) -> Choices:
    """What of a plan can be trained afterwards: structure and sparse weights, which come before codes."""
    return {key: one for key, one in choices.items() if isinstance(one[1].config, (Shrink, Sparsify))}


def removal(choices: Choices) -> Removed:
    """The units that a plan takes out."""
    chosen = [(unit.group, option.gone) for unit, option in choices.values()]
    return [(group, gone) for group, gone in chosen if group is not None and gone is not None]


def convert(model: Module, choices: Choices, calib: list[Any], *kinds: type) -> dict[str, Any]:
    """Makes sparse, or rounds, the layers of a plan; path -> what the report says of it, of all layers there are."""
    entries: dict[str, Any] = {}
    for kind in kinds:
        chosen = [(unit, option) for unit, option in choices.values() if isinstance(option.config, kind)]
        configs = {glob.escape(name): option.config for unit, option in chosen for name in unit.names}
        if not configs:
            continue
        verb: Any = sparsify_ if kind is Sparsify else quantize_
        asked = any(needs_calibration(config) for config in configs.values())
        report = verb(model, configs, include=list(configs), calibration=calib if asked else None)
        entries.update({entry.name: entry for entry in report.entries})
    return entries


def needs_calibration(config: object) -> bool:
    """Whether a configuration of layers is one by what the layers see."""
    if isinstance(config, Sparsify):
        return config.importance == "wanda"
    ((_, recipe),) = recipes_of(config)
    return recipe is not None and recipe.method is not None
