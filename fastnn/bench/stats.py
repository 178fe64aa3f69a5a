"""Medians, their spread, and ratios of interleaved rounds with a 95 % interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95

DISTURBED = 0.02
"""A single-threaded sample during which the process did not run for this share of the time was interrupted."""


@dataclass(frozen=True)
class Summary:
    """Times of one contender on one case, seconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is, with the interval that holds the true median in 95 of 100 runs."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Of the interval, relative to the value."""
        return (self.high - self.low) / self.value


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, between neighbours by proportion."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def summary(times: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile."""
    return Summary(statistics.median(times), percentile(times, 0.2), percentile(times, 0.8), len(times))


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics between which the true median lies with 95 % confidence, whatever the distribution.

    The number of values below the median is binomial(n, 1/2); fewer than six values cannot reach 95 % and give their
    whole range.
    """
    ordered, n = sorted(values), len(values)
    outside, rank = 0.5**n, 0  # P(fewer than rank + 1 values lie below the median)
    while rank < n // 2:
        more = outside + math.comb(n, rank + 1) * 0.5**n
        if 2 * more > 1 - CONFIDENCE:
            break
        outside, rank = more, rank + 1
    return ordered[rank], ordered[n - 1 - rank]


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Their time over ours, round by round; rounds beyond the shorter list are left out."""
    ratios = [t / o for t, o in zip(theirs, ours, strict=False)]
    low, high = interval_of_median(ratios)
    return Ratio(statistics.median(ratios), low, high)
