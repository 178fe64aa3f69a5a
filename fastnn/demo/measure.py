"""Interleaved timing of two candidates, and an interval for their ratio."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_SHORTEST = 0.03
"""Seconds that one timing should last at least: calls shorter than that are repeated."""


@dataclass(frozen=True)
class Comparison:
    """Two candidates timed in turns."""

    before_ms: float
    """Median over the rounds."""
    after_ms: float
    """Median over the rounds."""
    ratio: float
    """before / after, median of the rounds' ratios: above 1 where the second is faster."""
    low: float
    """Lower end of the ratio's interval."""
    high: float
    """Upper end of the ratio's interval."""
    rounds: int
    confidence: float
    """Of the interval, which is made of two of the rounds' ratios."""

    @property
    def method(self) -> str:
        """How the numbers were found."""
        interval = (
            f"{100 * self.confidence:.0f} % interval of" if self.confidence >= 0.95 else "extremes of the rounds, not"
        )
        return f"Medians of {self.rounds} interleaved rounds; {interval} the median ratio."


def compare(
    before: Callable[[], object], after: Callable[[], object], rounds: int, progress: Callable[[], None]
) -> Comparison:
    """Times both in every round, in alternating order, the garbage collector off; calls `progress` after each."""
    repeats = [max(1, math.ceil(_SHORTEST / _timed(f, 2))) for f in (before, after)]
    calls = max(repeats)
    times: list[tuple[float, float]] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            if i % 2:
                second, first = _timed(after, calls), _timed(before, calls)
            else:
                first, second = _timed(before, calls), _timed(after, calls)
            times.append((first, second))
            progress()
    finally:
        if collecting:
            gc.enable()
    ratios = sorted(a / b for a, b in times)
    low, confidence = _interval_rank(rounds)
    return Comparison(
        1e3 * statistics.median(a for a, _ in times),
        1e3 * statistics.median(b for _, b in times),
        statistics.median(ratios),
        ratios[low],
        ratios[rounds - 1 - low],
        rounds,
        confidence,
    )


def _timed(call: Callable[[], object], times: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _interval_rank(n: int) -> tuple[int, float]:
    """k such that the k-th smallest and largest of n values (from 0) enclose the median with at least 95 %.

    By the binomial distribution, whatever that of the values is; with fewer than six values 0, and what that gives.
    """
    below, tail = 0, 0.5**n
    while below + 1 < n / 2 and 2 * (tail + math.comb(n, below + 1) * 0.5**n) <= 0.05:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return below, 1 - 2 * tail
