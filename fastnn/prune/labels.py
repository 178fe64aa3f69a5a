"""Which indices of which tensors must go together: one atom for each index of each dimension of each parameter.

A dimension of a tensor carries an array of atoms, one for each of its indices, or None where nothing can be taken from
it. What a model computes says which atoms are the same channel (`tie`) and which must stay (`freeze`); `solve` gives
the classes of an equivalence relation, each of which is removed whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Atoms = NDArray[np.int64]
Labels = tuple[Atoms | None, ...]
"""Of a tensor, one for each dimension."""


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter or buffer, and its atoms [first, first + size)."""

    tensor: int
    """Which, in the model's order."""
    dim: int
    first: int
    size: int


@dataclass(frozen=True)
class Solution:
    """The classes that the ties make."""

    root: Atoms
    """atom -> the smallest atom of its class."""
    frozen: dict[int, str]
    """root -> why its class must stay."""


class Relation:
    """Atoms, and what is known of them so far."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.count = 0
        self._ties: list[tuple[Atoms, Atoms]] = []
        self._frozen: list[tuple[Atoms, str]] = []
        self.used: list[Atoms] = []
        """Atoms of parameters over which a product sums: taking them away takes a contribution away."""
        self.heads: dict[int, str] = {}
        """Atom of which a view made a head -> the path of the module that did."""

    def new(self, tensor: int, shape: Sequence[int]) -> Labels:
        """Fresh atoms for a tensor; none for dimensions of size one, which broadcast."""
        found: list[Atoms | None] = []
        for dim, size in enumerate(shape):
            if size < 2:
                found.append(None)
                continue
            self.slots.append(Slot(tensor, dim, self.count, size))
            found.append(np.arange(self.count, self.count + size))
            self.count += size
        return tuple(found)

    def tie(self, a: Atoms | None, b: Atoms | None, reason: str) -> None:
        """Says that index i of both is one channel; where one of them has nothing to give, neither has the other."""
        if a is None or b is None:
            self.freeze(a, reason)
            self.freeze(b, reason)
        else:
            self._ties.append((a, b))

    def freeze(self, atoms: Atoms | None, reason: str) -> None:
        """Says that these must stay."""
        if atoms is not None:
            self._frozen.append((atoms.reshape(-1), reason))

    def solve(self) -> Solution:
        """Connected components: each atom takes the smallest root it can see, until nothing changes."""
        root = np.arange(self.count)
        if self._ties:
            a = np.concatenate([tie[0].reshape(-1) for tie in self._ties])
            b = np.concatenate([tie[1].reshape(-1) for tie in self._ties])
            while True:
                low = np.minimum(root[a], root[b])
                new = root.copy()
                for at in (root[a], root[b], a, b):
                    np.minimum.at(new, at, low)
                new = new[new]
                if np.array_equal(new, root):
                    break
                root = new
        frozen: dict[int, str] = {}
        for atoms, reason in self._frozen:
            for one in np.unique(root[atoms]).tolist():
                frozen.setdefault(one, reason)
        return Solution(root, frozen)


def reshaped(
    relation: Relation, labels: Labels, old: Sequence[int], new: Sequence[int], asked: Sequence[int], where: str
) -> Labels:
    """Labels of a tensor after a view as `new`; `asked` is the size argument as it was written, -1 included."""
    result: list[Atoms | None] = [None] * len(new)
    for source, target in _factors(old, new):
        marked = [d for d in source if labels[d] is not None]
        if len(marked) > 1:
            for d in marked:
                relation.freeze(labels[d], f"a view mixes it with another dimension of channels, in {where}")
        elif marked:
            (d,) = marked
            shape = [old[s] if s == d else 1 for s in source]
            atoms = labels[d]
            full = np.broadcast_to(np.reshape(atoms, shape), [old[s] for s in source]) if atoms is not None else None
            if full is not None:
                axes = [new[t] for t in target]
                k, found = _axis(relation, full.reshape(axes), [asked[t] for t in target], where)
                result[target[k]] = found
    return tuple(result)


def _factors(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring dimensions of both with the same number of elements."""
    i = j = 0
    while i < len(old) and j < len(new):
        source, target, left, right = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(old):
                source.append(i)
                left, i = left * old[i], i + 1
            elif j < len(new):
                target.append(j)
                right, j = right * new[j], j + 1
            else:
                return
        yield source, target


def _axis(relation: Relation, full: Atoms, asked: Sequence[int], where: str) -> tuple[int, Atoms]:
    """The axis that keeps the channels, and its atoms.

    That is the one they depend on alone. Where they depend on several, a dimension of channels is being split, and
    along all but one axis they become one: the one left free (-1) in the call, else the outermost, as of (heads,
    width); of three and more not one that is as small as the number of projections packed together, (3, heads, width).
    """
    wide = [k for k, size in enumerate(full.shape) if size > 1]
    for k in wide:
        line = np.moveaxis(full, k, -1).reshape(-1, full.shape[k])
        if (line == line[0]).all():
            return k, line[0]
    k = wide[0]
    if -1 in asked:
        k = list(asked).index(-1)
    elif len(wide) > 2:
        k = next((one for one in wide if full.shape[one] > 3), k)
    line = np.moveaxis(full, k, -1).reshape(-1, full.shape[k])
    relation.tie(np.broadcast_to(line[0], line.shape), line, "")
    for atom in line[0].tolist():
        relation.heads.setdefault(atom, where)
    return k, line[0]


def sizes(labels: Any) -> tuple[int, ...]:
    """The lengths of labels; for messages."""
    return tuple(0 if one is None else len(one) for one in labels)
