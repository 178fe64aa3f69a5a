"""What a clock measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Sample:
    """One timed group of calls."""

    seconds: float
    """Per call."""
    idle: float
    """Share of the time in which the process did not run."""
    host: float | None = None
    """On a GPU: what the call takes on the CPU until everything is queued, per call."""


Timer = Callable[[Callable[[], object], int], Sample]
"""Times so many calls."""
