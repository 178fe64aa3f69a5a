"""What `fastnn.sparsify_` did, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..accelerate.table import Column, plain, rich_table


@dataclass(frozen=True)
class Entry:
    """One layer: what became of it, or why nothing did."""

    name: str
    """Its path in the model; empty for the model itself."""
    was: str
    """Its class before."""
    became: str | None
    """What it is now; None where it was left alone."""
    reason: str
    """Why it was left alone; a remark otherwise."""
    units: int
    """Blocks, or weights, that it had; 0 where they were not looked at."""
    kept: int
    """Those that are left, or would have been."""
    bytes_before: int
    """Of the weight, a mask over it included; 0 where another entry of the report has it already (tied layers)."""
    bytes_after: int
    """Of values and indices, or of the weight and its mask."""
    input_shape: tuple[int, ...] | None = None
    """Of its first call on the example; None where it was not run."""
    ms_before: float | None = None
    """Median time of the layer as it was, on an input of that shape; None where it was not measured."""
    ms_packed: float | None = None
    """The same of fastnn's dense layer on a packed weight, which does not skip anything."""
    ms_after: float | None = None
    """The same of the block-sparse layer, of one that was left alone because it is slower, too."""

    @property
    def density(self) -> float | None:
        """The part of the units that is left; None where they were not looked at."""
        return self.kept / self.units if self.units else None

    @property
    def speedup(self) -> float | None:
        """Time before / time after; None where it was not measured."""
        return None if self.ms_before is None or not self.ms_after else self.ms_before / self.ms_after


def _bytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _shape(entry: Entry) -> str:
    return "" if entry.input_shape is None else "x".join(map(str, entry.input_shape))


_COLUMNS = (
    Column("layer", lambda e: e.name or "(the model)", style="cyan", wraps=True),
    Column("class", lambda e: e.was),
    Column("became", lambda e: e.became or "", style="green"),
    Column("kept", lambda e: "" if e.density is None else f"{e.density:.1%}", "right"),
    Column("before", lambda e: _bytes(e.bytes_before), "right"),
    Column("after", lambda e: _bytes(e.bytes_after), "right"),
    Column("input", _shape, "right"),
    Column("ms before", lambda e: _ms(e.ms_before), "right"),
    Column("ms packed", lambda e: _ms(e.ms_packed), "right"),
    Column("ms after", lambda e: _ms(e.ms_after), "right"),
    Column("remark", lambda e: e.reason, style="yellow", wraps=True),
)


@dataclass(frozen=True)
class Report:
    """Every layer with a weight of two or more dimensions, in the model's order. Prints as a table."""

    entries: tuple[Entry, ...]
    config: str
    """The configuration, as it was given."""

    @property
    def sparsified(self) -> tuple[Entry, ...]:
        """The layers that lost something."""
        return tuple(entry for entry in self.entries if entry.became)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The layers that were left alone, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.became)

    @property
    def bytes_before(self) -> int:
        """Of all weights listed."""
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """Of all weights listed, values, indices and masks now."""
        return sum(entry.bytes_after for entry in self.entries)

    @property
    def summary(self) -> str:
        """One line."""
        done = f"{len(self.sparsified)} of {len(self.entries)} layers made sparse"
        return f"{self.config}: {done}, {_bytes(self.bytes_before)} of weights became {_bytes(self.bytes_after)}"

    def _tables(self, make: Callable[..., Any]) -> list[Any]:
        parts = (("Made sparse", self.sparsified), ("Left alone", self.skipped))
        return [make(title, _COLUMNS, rows) for title, rows in parts if rows]

    def __str__(self) -> str:
        return "\n\n".join([*self._tables(plain), f"fastnn.sparsify_: {self.summary}"])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(*self._tables(rich_table), Text(self.summary, style="bold"))
