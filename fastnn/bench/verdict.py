"""What a row's ratios mean against its bars."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from .stats import Ratio

FLOOR = 0.97
"""Ours is behind where the whole interval of its ratio to the best contender lies below this."""

NEAR = 0.85
"""The share of a bar that counts as being within reach of it."""

NOISY_WIDTH = 0.10
"""An interval wider than this share of its ratio is too wide to judge by, if the verdict depends on where in it the
truth lies."""


class Verdict(Enum):
    """From bad to good; the value is what is shown."""

    WRONG = "wrong result"
    BEHIND = "behind the best"
    NOISY = "too noisy to tell"
    MISSED = "bar missed"
    NEAR = "within 85 % of the bar"
    LEVEL = "not behind"
    REACHED = "bar reached"

    @property
    def colour(self) -> str:
        """For the terminal."""
        return _COLOURS[self]


_COLOURS = {
    Verdict.WRONG: "bold red",
    Verdict.BEHIND: "bold red",
    Verdict.NOISY: "yellow",
    Verdict.MISSED: "red",
    Verdict.NEAR: "yellow",
    Verdict.LEVEL: "green",
    Verdict.REACHED: "green",
}
_ORDER = (Verdict.BEHIND, Verdict.MISSED, Verdict.NEAR, Verdict.LEVEL, Verdict.REACHED)

Comparison = tuple[Ratio, float | None]
"""A ratio to a best contender, and the bar that it is held to."""


def level(value: float, high: float, bar: float | None) -> Verdict:
    """The verdict of a ratio; `high` is the upper end of what it may truly be, `value` itself where it is known."""
    if high < FLOOR:
        return Verdict.BEHIND
    if bar is None:
        return Verdict.LEVEL
    if value >= bar:
        return Verdict.REACHED
    return Verdict.NEAR if high >= NEAR * bar else Verdict.MISSED


def judge_one(ratio: Ratio, bar: float | None) -> Verdict:
    """The verdict of one comparison.

    Behind the floor, or short of what counts as near the bar, is a row whose whole interval is. A bar is reached by the
    median. An interval that is too wide and whose ends mean different things means nothing.
    """
    if ratio.width > NOISY_WIDTH and level(ratio.low, ratio.low, bar) != level(ratio.high, ratio.high, bar):
        return Verdict.NOISY
    return level(ratio.value, ratio.high, bar)


def judge(comparisons: Sequence[Comparison]) -> Verdict:
    """The verdict of a row: the worst of its comparisons; too noisy where one that could be worse is."""
    found = [judge_one(*comparison) for comparison in comparisons]
    certain = [verdict for verdict in found if verdict is not Verdict.NOISY]
    worst = min(certain, key=_ORDER.index, default=Verdict.NOISY)
    if worst is Verdict.BEHIND or Verdict.NOISY not in found:
        # A comparison without a bar only guards the floor: it does not hide that another one's bar is reached.
        with_bar = [verdict for verdict in certain if verdict is not Verdict.LEVEL]
        return min(with_bar, key=_ORDER.index, default=worst)
    return Verdict.NOISY


def unsettled(comparisons: Sequence[Comparison]) -> bool:
    """Whether more rounds could change the verdict: an interval holds one of the thresholds."""
    for ratio, bar in comparisons:
        thresholds = [FLOOR] if bar is None else [FLOOR, NEAR * bar, bar]
        if any(ratio.low < threshold <= ratio.high for threshold in thresholds):
            return True
    return False
