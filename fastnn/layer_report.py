"""What a verb that converts layers in place (`quantize_`, `sparsify_`) says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from .accelerate.table import Column, Printed, ms_text, size_text


@dataclass(frozen=True, kw_only=True)
class LayerEntry:
    """One layer: what became of it, or why nothing did."""

    name: str
    """Its path in the model; empty for the model itself."""
    was: str
    """Its class before."""
    became: str | None
    """What it is now; None where it was left alone."""
    reason: str
    """Why it was left alone; a remark otherwise."""
    bytes_before: int
    """Of the weight, a mask over it included; 0 where another entry of the report has it already (tied layers)."""
    bytes_after: int
    """Of what stands for the weight now; copies in the kernel's order are not counted."""
    input_shape: tuple[int, ...] | None = None
    """Of its first call on the example; None where it was not run."""
    ms_before: float | None = None
    """Median time of the layer as it was, on an input of that shape; None where it was not measured."""
    ms_after: float | None = None
    """The same of what it became, of one that was left alone because it is slower, too."""

    @property
    def speedup(self) -> float | None:
        """Time before / time after; None where it was not measured."""
        return None if self.ms_before is None or not self.ms_after else self.ms_before / self.ms_after


def _shape(entry: LayerEntry) -> str:
    return "" if entry.input_shape is None else "x".join(map(str, entry.input_shape))


FATE = (
    Column("layer", lambda e: e.name or "(the model)", style="cyan", wraps=True),
    Column("class", lambda e: e.was),
    Column("became", lambda e: e.became or "", style="green"),
)
BYTES = (
    Column("before", lambda e: size_text(e.bytes_before), "right"),
    Column("after", lambda e: size_text(e.bytes_after), "right"),
    Column("input", _shape, "right"),
)
MS_BEFORE = Column("ms before", lambda e: ms_text(e.ms_before), "right")
MS_AFTER = Column("ms after", lambda e: ms_text(e.ms_after), "right")
REMARK = Column("remark", lambda e: e.reason, style="yellow", wraps=True)


E = TypeVar("E", bound=LayerEntry)


@dataclass(frozen=True)
class LayerReport(Printed, Generic[E]):
    """Every layer with a weight of two or more dimensions, in the model's order. Prints as a table."""

    entries: tuple[E, ...]
    config: str
    """The configuration, as it was given."""

    @property
    def converted(self) -> tuple[E, ...]:
        """The layers that something became of."""
        return tuple(entry for entry in self.entries if entry.became)

    @property
    def skipped(self) -> tuple[E, ...]:
        """The layers that were left alone, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.became)

    @property
    def bytes_before(self) -> int:
        """Of all weights listed."""
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """Of all weights listed, and what stands for them now."""
        return sum(entry.bytes_after for entry in self.entries)

    def _summary(self, done: str) -> str:
        """One line; done: what became of layers, in words."""
        weights = f"{size_text(self.bytes_before)} of weights became {size_text(self.bytes_after)}"
        return f"{self.config}: {len(self.converted)} of {len(self.entries)} layers {done}, {weights}"
