"""In which order a search tries what may be gained: the most for the least loss first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from .units import Option, Unit

Target = Literal["latency", "size"]

_OTHER = 0.1
"""What a share of the model's bytes counts for where time is the target, and the other way round."""
_LEAST_COST = 1e-12
"""Squared errors below this are rounding: what costs nothing is ordered by what it gains."""


@dataclass(frozen=True)
class Move:
    """A step of one unit, from what the move before made of it, or from the floating layer, to an option."""

    unit: Unit
    option: Option
    ratio: float
    """Gain / cost of the step."""


def gain(option: Option, target: Target, milliseconds: float, nbytes: int) -> float:
    """What an option saves: its share of the model's time, or bytes, and a tenth of the other share.

    Args:
        option: with times and bytes measured.
        target: what counts.
        milliseconds: of the model.
        nbytes: of its tensors.
    """
    time = 0.0
    if option.ms_before is not None and option.ms_after is not None:
        time = (option.ms_before - option.ms_after) / milliseconds
    size = (option.bytes_before - option.bytes_after) / max(nbytes, 1)
    return time + _OTHER * size if target == "latency" else size + _OTHER * time


def moves(units: Iterable[Unit], target: Target, worth: Callable[[Option], float]) -> list[Move]:
    """Every step that may be worth it, best first.

    Cost is the squared relative error of the outputs with the option alone: errors of different layers are about
    orthogonal, so that their squares add. Of each unit, the options on the upper convex hull of gain over cost are
    steps from one to the next, with falling ratios (as in Shoham and Gersho 1988, Efficient bit allocation for an
    arbitrary set of quantizers); so the best plan for any loss is, by the estimate, a start of the list. Options that
    are out get a verdict.

    Args:
        units: with their options measured.
        target: what counts.
        worth: `gain` of an option.
    """
    found = []
    for unit in units:
        points = []
        for option in unit.options:
            if option.reason:
                continue
            saved = worth(option)
            if saved <= 0:
                option.verdict = _no_gain(option, target)
            elif option.error is None or not math.isfinite(option.error):
                option.verdict = "the outputs on the calibration have NaN or infinities"
            else:
                points.append((max(option.error**2, _LEAST_COST), saved, option))
        found += _hull(unit, sorted(points, key=lambda one: (one[0], -one[1])))
    return sorted(found, key=lambda move: -move.ratio)


def _hull(unit: Unit, points: list[tuple[float, float, Option]]) -> list[Move]:
    steps: list[Move] = []
    cost, saved = 0.0, 0.0
    left = points
    while left:
        ratio, best = max(((p[1] - saved) / max(p[0] - cost, _LEAST_COST), i) for i, p in enumerate(left))
        if ratio <= 0:
            break
        cost, saved, option = left[best]
        steps.append(Move(unit, option, ratio))
        left = left[best + 1 :]
    taken = {id(move.option) for move in steps}
    for _, _, option in points:
        if id(option) not in taken:
            option.verdict = "another candidate gains more for what it loses"
    return steps


def _no_gain(option: Option, target: Target) -> str:
    if option.ms_before is not None and option.ms_after is not None and target == "latency":
        return f"no gain here: {option.ms_after:.3g} ms, {option.ms_before:.3g} ms as it is"
    return f"no gain here: {option.bytes_after} bytes, {option.bytes_before} as it is"
