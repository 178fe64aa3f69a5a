"""Channels that go together, gathered into groups of units that are alike: a layer's neurons, heads or channels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor
from torch.nn import Module, MultiheadAttention

from .labels import Atoms, Slot
from .trace import Trace

Kind = Literal["neurons", "heads", "channels"]


@dataclass(frozen=True)
class Part:
    """What the units of a group are in one dimension of one tensor."""

    slot: Slot
    tensor: Tensor
    name: str
    """The tensor's path."""
    index: Atoms
    """(units, indices of each)."""
    used: bool
    """Whether a product sums over this dimension: without these, the unit's contribution is gone."""


@dataclass(frozen=True)
class Group:
    """Units of which each can be taken out, from all parts at once."""

    name: str
    """The path of the module that makes them, the first in the model's order."""
    kind: Kind
    parts: tuple[Part, ...]
    units: int
    roots: Atoms
    """Of each unit, its class."""
    splitters: tuple[str, ...]
    """Paths of the modules whose views made heads of them."""

    @property
    def width(self) -> int:
        """Indices that a unit takes in the layer that makes it."""
        return max(part.index.shape[1] for part in self.parts if not part.used)


@dataclass(frozen=True)
class Kept:
    """A layer that keeps all its channels, and why."""

    name: str
    reason: str


def groups_of(model: Module, trace: Trace) -> tuple[list[Group], list[Kept]]:
    """The groups that can be pruned, and the layers that cannot."""
    root = trace.solution.root
    used = np.zeros(trace.relation.count, bool)
    for atoms in trace.relation.used:
        used[atoms.reshape(-1)] = True
    free = set(np.unique(root[used]).tolist()) - trace.solution.frozen.keys()
    members: dict[int, list[tuple[int, Atoms]]] = defaultdict(list)
    for position, slot in enumerate(trace.relation.slots):
        mine = root[slot.first : slot.first + slot.size]
        order = np.argsort(mine, kind="stable")
        values, starts = np.unique(mine[order], return_index=True)
        for one, index in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
            if one in free:
                members[one].append((position, index))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
    for one in sorted(members):
        alike[tuple((position, len(index)) for position, index in members[one])].append(one)
    heads = {int(root[atom]): where for atom, where in trace.relation.heads.items()}
    found = [
        group
        for roots in alike.values()
        if len(roots) > 1 and (group := _group(trace, used, members, roots, heads)) is not None
    ]
    found.sort(key=lambda group: min(part.slot.tensor for part in group.parts))
    modules = dict(model.named_modules())
    packed = {id(g): path for g in found for path in g.splitters if isinstance(modules.get(path), MultiheadAttention)}
    kept = _kept(trace, used, found)
    for group in found:
        if id(group) in packed:
            reason = f"{packed[id(group)]} is torch's MultiheadAttention, which has no form with fewer heads"
            kept.append(Kept(group.name, reason))
    return [group for group in found if id(group) not in packed], kept


def _group(
    trace: Trace, used: Atoms, members: dict[int, list[tuple[int, Atoms]]], roots: list[int], heads: dict[int, str]
) -> Group | None:
    parts = []
    for i, (position, _) in enumerate(members[roots[0]]):
        slot = trace.relation.slots[position]
        held = trace.held[slot.tensor]
        index = np.stack([members[one][i][1] for one in roots])
        parts.append(Part(slot, held.tensor, held.names[0], index, bool(used[slot.first + index[0, 0]])))
    makers = [part for part in parts if not part.used and part.tensor.dim() > 1] or [p for p in parts if not p.used]
    if not makers:  # what the model is given as a parameter alone
        return None
    splitters = tuple(dict.fromkeys(heads[one] for one in roots if one in heads))
    image = any(part.tensor.dim() > 2 for part in parts if part.used or part in makers)
    kind: Kind = "heads" if splitters else "channels" if image else "neurons"
    return Group(owner(makers[0].name), kind, tuple(parts), len(roots), np.array(roots), splitters)


def owner(name: str) -> str:
    """The path of the module that holds a parameter."""
    return name.rpartition(".")[0]


def _kept(trace: Trace, used: Atoms, groups: list[Group]) -> list[Kept]:
    """Layers whose weight has outputs that are in no group, with the first reason known."""
    done = {part.slot.tensor for group in groups for part in group.parts if not part.used}
    found: dict[str, str] = {}
    for slot in trace.relation.slots:
        held = trace.held[slot.tensor]
        outputs = held.tensor.dim() > 1 and held.tensor.is_floating_point() and not used[slot.first]
        if not outputs or slot.tensor in done or slot.dim > 1:
            continue
        reason = trace.solution.frozen.get(int(trace.solution.root[slot.first]), "no product uses what it makes")
        found.setdefault(owner(held.names[0]), reason)
    return [Kept(name, reason) for name, reason in found.items()]
