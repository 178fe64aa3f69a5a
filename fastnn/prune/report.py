"""What `fastnn.shrink_` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..accelerate.table import Column, Parts, Printed


@dataclass(frozen=True)
class Entry:
    """Units of one kind that go together, or a layer that keeps all."""

    name: str
    """The path of the layer that makes them, the first of several."""
    kind: str
    """neurons, heads or channels; empty for a layer that keeps all."""
    before: int
    """How many there were."""
    after: int
    """How many there are."""
    kept: tuple[int, ...]
    """Which, by their old numbers."""
    tensors: tuple[str, ...]
    """The parameters and buffers that have them."""
    reason: str
    """Why none went; a remark otherwise."""


_COLUMNS = (
    Column("layer", lambda e: e.name or "(the model)", style="cyan", wraps=True),
    Column("kind", lambda e: e.kind),
    Column("before", lambda e: str(e.before) if e.kind else "", "right"),
    Column("after", lambda e: str(e.after) if e.kind else "", "right"),
    Column("remark", lambda e: e.reason, style="yellow", wraps=True),
)


@dataclass(frozen=True)
class Report(Printed):
    """Every group of units, and every layer that has none, in the model's order. Prints as a table."""

    _verb = "shrink_"

    entries: tuple[Entry, ...]
    parameters_before: int
    """Of the model, tied ones once."""
    parameters_after: int
    macs_before: int
    """Multiply-adds of matrix products, convolutions and attention on the example."""
    macs_after: int
    shapes: dict[str, Any]
    """What `fastnn.prune.resize_` needs to give a fresh model these sizes; goes into JSON."""
    config_lacks: str
    """What a transformers configuration cannot say of the model now; empty where it says all, or there is none."""
    max_difference: float
    """Largest difference of an output from that of the old model with the units' contributions set to zero."""

    @property
    def shrunk(self) -> tuple[Entry, ...]:
        """The groups that lost units."""
        return tuple(entry for entry in self.entries if entry.after < entry.before)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The others, each with its reason."""
        return tuple(entry for entry in self.entries if entry.after == entry.before)

    @property
    def summary(self) -> str:
        """One line."""
        text = (
            f"{len(self.shrunk)} groups shrunk, {_share('parameters', self.parameters_before, self.parameters_after)}"
        )
        return f"{text}, {_share('multiply-adds', self.macs_before, self.macs_after)}; time is for you to measure"

    def _parts(self) -> Parts:
        return (("Shrunk", _COLUMNS, self.shrunk), ("Left alone", _COLUMNS, self.skipped))


def _share(what: str, before: int, after: int) -> str:
    return f"{before:,} {what} became {after:,} ({after / before:.0%})" if before else f"no {what}"
