"""What `fastnn.sparsify_` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..accelerate.table import Column, Parts, ms_text
from ..layer_report import BYTES, FATE, MS_AFTER, MS_BEFORE, REMARK, LayerEntry, LayerReport


@dataclass(frozen=True, kw_only=True)
class Entry(LayerEntry):
    """One layer: what became of it, or why nothing did. `bytes_after` is of values and indices, or weight and mask."""

    units: int
    """Blocks, or weights, that it had; 0 where they were not looked at."""
    kept: int
    """Those that are left, or would have been."""
    ms_packed: float | None = None
    """Time of fastnn's dense layer on a packed weight, which does not skip anything."""

    @property
    def density(self) -> float | None:
        """The part of the units that is left; None where they were not looked at."""
        return self.kept / self.units if self.units else None


_COLUMNS = (
    *FATE,
    Column("kept", lambda e: "" if e.density is None else f"{e.density:.1%}", "right"),
    *BYTES,
    MS_BEFORE,
    Column("ms packed", lambda e: ms_text(e.ms_packed), "right"),
    MS_AFTER,
    REMARK,
)


@dataclass(frozen=True)
class Report(LayerReport[Entry]):
    """Every layer with a weight of two or more dimensions, in the model's order. Prints as a table."""

    _verb = "sparsify_"

    @property
    def sparsified(self) -> tuple[Entry, ...]:
        """The layers that lost something."""
        return self.converted

    @property
    def summary(self) -> str:
        """One line."""
        return self._summary("made sparse")

    def _parts(self) -> Parts:
        return (("Made sparse", _COLUMNS, self.sparsified), ("Left alone", _COLUMNS, self.skipped))
