"""Which units go: the least important, as many as asked, with a width left that kernels like."""

from __future__ import annotations

import math

import numpy as np

from .config import Shrink
from .groups import Group


def removed(config: Shrink, groups: list[Group], scores: list[np.ndarray]) -> list[np.ndarray]:
    """The units that go, of each group, in rising order.

    Raises:
        ValueError: a count that leaves a layer, or all of them, with nothing.
    """
    if config.scope == "global":
        counts = _ranked(config, groups, scores)
    else:
        counts = [_count(config, group.units, group.name) for group in groups]
    counts = [_rounded(config, group, count) for group, count in zip(groups, counts, strict=True)]
    return [np.sort(np.argsort(s, kind="stable")[:n]) for s, n in zip(scores, counts, strict=True)]


def _count(config: Shrink, units: int, name: str) -> int:
    if isinstance(config.amount, float):
        return round(config.amount * units)
    if config.amount >= units:
        raise ValueError(f"fastnn.shrink_: cannot take {config.amount} of the {units} units of {name}")
    return config.amount


def _ranked(config: Shrink, groups: list[Group], scores: list[np.ndarray]) -> list[int]:
    """Counts of each group when all are ranked together; the best unit of each stays."""
    total = sum(group.units for group in groups)
    wanted = _count(config, total, "all layers") if groups else 0
    every = [(s, i) for i, one in enumerate(scores) for s in np.sort(one, kind="stable")[:-1].tolist()]
    if isinstance(config.amount, float):
        wanted = min(wanted, len(every))
    if wanted > len(every):
        raise ValueError(f"fastnn.shrink_: cannot take {wanted} units of {total} and leave every layer one")
    counts = [0] * len(groups)
    for _, i in sorted(every)[:wanted]:
        counts[i] += 1
    return counts


def _rounded(config: Shrink, group: Group, count: int) -> int:
    """So many that the width left is a multiple of what is asked, and never more than `count`."""
    step = config.multiple_of // math.gcd(config.multiple_of, group.width)
    left = math.ceil(max(group.units - count, 1) / step) * step
    return group.units - min(left, group.units)
