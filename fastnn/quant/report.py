"""What `fastnn.quantize_` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..accelerate.table import Column, Parts
from ..layer_report import BYTES, FATE, MS_AFTER, MS_BEFORE, REMARK, LayerEntry, LayerReport


@dataclass(frozen=True, kw_only=True)
class Entry(LayerEntry):
    """One layer: what became of it, or why nothing did. `bytes_after` is of codes and scales."""

    error: float | None = None
    """Of its outputs on the calibration, norm of the difference / norm; None where GPTQ did not choose its codes."""
    error_nearest: float | None = None
    """What that would be with every weight rounded to nearest."""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"


_COLUMNS = (
    *FATE,
    *BYTES,
    MS_BEFORE,
    MS_AFTER,
    Column("error, nearest", lambda e: _percent(e.error_nearest), "right"),
    Column("error", lambda e: _percent(e.error), "right"),
    REMARK,
)


@dataclass(frozen=True)
class Report(LayerReport[Entry]):
    """Every layer with a weight of two or more dimensions, in the model's order. Prints as a table."""

    _verb = "quantize_"

    calibration: str = ""
    """How the model was run on the calibration, in words; empty where there was none."""

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """The layers that were quantised."""
        return self.converted

    @property
    def summary(self) -> str:
        """One line."""
        return "; ".join(filter(None, [self._summary("quantised"), self.calibration]))

    def _parts(self) -> Parts:
        return (("Quantised", _COLUMNS, self.quantized), ("Left alone", _COLUMNS, self.skipped))
