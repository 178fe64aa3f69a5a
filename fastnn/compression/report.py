"""What `fastnn.compress` found, tried and did."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from ..accelerate.table import Column, Parts, Printed, ms_text, size_text
from ..cli import MissingExtra


@dataclass(frozen=True)
class Tried:
    """One candidate for one layer or group, measured apart from all others."""

    candidate: str
    error: float | None
    """Of the model's outputs on the calibration with this alone, norm of the difference / norm; None: not tried."""
    ms_before: float | None
    """Of the layer, or of the layers of a group, on what the example gives them; None where nothing was timed."""
    ms_after: float | None
    bytes_before: int
    bytes_after: int
    verdict: str
    """What became of it and why."""


@dataclass(frozen=True)
class Entry:
    """One layer (with those that share its weight), or one group of neurons, heads or channels."""

    name: str
    """Its path; empty for the model itself."""
    kind: str
    """layer, neurons, heads or channels."""
    was: str
    became: str | None
    """None where it was left as it was."""
    reason: str
    """Why it was left, or why not more became of it."""
    tried: tuple[Tried, ...]

    @property
    def chosen(self) -> Tried | None:
        """The candidate that it became."""
        return next((one for one in self.tried if one.verdict == "taken"), None)


@dataclass(frozen=True)
class Point:
    """One plan that was evaluated: where it lies in a plot of accuracy against latency."""

    plan: str
    """What becomes of which unit; empty for the floating model on fastnn's kernels."""
    changed: int
    """How many units."""
    metrics: dict[str, float]
    ms: float
    """Of the model on the example, median."""
    ms_before: float
    """Of the model as it was, in turns with it."""
    nbytes: int
    """Of its tensors."""
    accepted: bool


@dataclass(frozen=True)
class Figures:
    """What was measured of the whole model."""

    metrics: dict[str, float]
    ms: float
    """Median on the example."""
    nbytes: int
    """Of parameters and buffers, shared ones once."""
    packed: int
    """Of copies of weights in the kernel's order, which are held beside them."""
    peak: int | None
    """Tensors, packed copies and what a call takes beside them; None where the system does not tell."""


def _of(name: str, text: Callable[[Any], str]) -> Callable[[Entry], str]:
    def found(entry: Entry) -> str:
        return "" if entry.chosen is None else text(getattr(entry.chosen, name))

    return found


_COLUMNS = (
    Column("name", lambda e: e.name or "(the model)", style="cyan", wraps=True),
    Column("kind", lambda e: e.kind),
    Column("was", lambda e: e.was),
    Column("became", lambda e: e.became or "", style="green"),
    Column("before", _of("bytes_before", size_text), "right"),
    Column("after", _of("bytes_after", size_text), "right"),
    Column("ms before", _of("ms_before", ms_text), "right"),
    Column("ms after", _of("ms_after", ms_text), "right"),
    Column("error", _of("error", lambda v: "" if v is None else f"{100 * v:.2g} %"), "right"),
    Column("why", lambda e: e.reason, style="yellow", wraps=True),
)
_POINTS = (
    Column("units changed", lambda p: str(p.changed), "right"),
    Column("metrics", lambda p: ", ".join(f"{k} {v:.4f}" for k, v in p.metrics.items())),
    Column("ms", lambda p: ms_text(p.ms), "right"),
    Column("speed", lambda p: f"{p.ms_before / p.ms:.2f}x", "right"),
    Column("bytes", lambda p: size_text(p.nbytes), "right"),
    Column("", lambda p: "kept" if p.accepted else "rolled back"),
)


@dataclass(frozen=True)
class Report(Printed):
    """Every layer's fate, every point tried, and the model before and after. Prints as tables."""

    _verb = "compress"

    entries: tuple[Entry, ...]
    """In the model's order, groups first."""
    points: tuple[Point, ...]
    """In the order in which they were tried."""
    metric: str
    """The one that counted."""
    max_drop: float
    allowed: float
    """By how much the metric might fall for a plan: `max_drop` without the reserve."""
    target: str
    before: Figures
    after: Figures
    speedup: tuple[float, float, float]
    """Time before / after on the example, rounds in turns: median, smallest, largest."""
    threads: int
    evaluations: int
    """Calls of `evaluate`, those of an earlier part of a search that was gone on with not counted."""
    shapes: dict[str, Any] = field(default_factory=dict)
    """What `fastnn.prune.resize_` needs where structure was taken out; empty otherwise."""
    remarks: tuple[str, ...] = ()

    @property
    def compressed(self) -> tuple[Entry, ...]:
        """What became something else."""
        return tuple(entry for entry in self.entries if entry.became is not None)

    @property
    def left(self) -> tuple[Entry, ...]:
        """The others, each with its reason."""
        return tuple(entry for entry in self.entries if entry.became is None)

    @property
    def drop(self) -> float:
        """By how much the metric is smaller."""
        return self.before.metrics[self.metric] - self.after.metrics[self.metric]

    @property
    def lines(self) -> tuple[str, ...]:
        """The whole model, before and after."""
        a, b = self.before, self.after
        median, low, high = self.speedup
        kept = f", for a plan by {self.allowed:.4g}" if self.allowed < self.max_drop else ""
        metrics = ", ".join(f"{name} {a.metrics[name]:.4f} -> {b.metrics[name]:.4f}" for name in a.metrics)
        return (
            f"{metrics} ({self.metric} may fall by {self.max_drop:g}{kept}, fell by {self.drop:.4f})",
            f"tensors {size_text(a.nbytes)} -> {size_text(b.nbytes)} ({b.nbytes / max(a.nbytes, 1):.1%}), "
            f"packed copies {size_text(a.packed)} -> {size_text(b.packed)}, "
            f"peak of a call {size_text(a.peak)} -> {size_text(b.peak)}",
            f"{a.ms:.4g} ms -> {b.ms:.4g} ms on the example, {median:.2f}x (rounds from {low:.2f}x to {high:.2f}x), "
            f"{self.threads} threads",
        )

    @property
    def summary(self) -> str:
        """A few lines."""
        done = f"{len(self.compressed)} of {len(self.entries)} layers and groups changed for {self.target}"
        return "\n".join([f"{done}, {self.evaluations} evaluations", *self.lines, *self.remarks])

    def _parts(self) -> Parts:
        return (
            ("Compressed", _COLUMNS, self.compressed),
            ("Left alone", _COLUMNS, self.left),
            ("Points tried", _POINTS, self.points),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as `json.dumps` takes it; what is not finite as None."""
        found: dict[str, Any] = _finite({**asdict(self), "drop": self.drop})
        return found

    def to_markdown(self) -> str:
        """The tables and the summary."""
        lines = "\n".join(f"- {line}" for line in self.summary.splitlines())
        return "\n\n".join([*self._tables(_markdown), lines]) + "\n"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws the metric against milliseconds, a mark for every point tried, as matplotlib writes that kind of file.

        Raises:
            MissingExtra: (an ImportError) matplotlib is not installed.
            OSError: the file cannot be written.
        """
        try:
            figure_of = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise MissingExtra("a plot needs matplotlib; install with:  pip install matplotlib") from error
        figure = figure_of.Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for label, accepted, mark in (("kept", True, "o"), ("rolled back", False, "x")):
            points = [p for p in self.points if p.accepted is accepted and math.isfinite(p.metrics[self.metric])]
            if points:
                times = [p.ms * self.before.ms / p.ms_before for p in points]  # the machine's speed changes meanwhile
                axes.scatter(times, [p.metrics[self.metric] for p in points], marker=mark, label=label)
        for label, one, mark in (("before", self.before, "s"), ("after", self.after, "*")):
            axes.scatter([one.ms], [one.metrics[self.metric]], marker=mark, s=90, label=label)
        start = self.before.metrics[self.metric]
        axes.axhline(start - self.max_drop, linestyle="--", linewidth=1, label="budget")
        if self.allowed < self.max_drop:
            axes.axhline(start - self.allowed, linestyle=":", linewidth=1, label="without its reserve")
        axes.set_xlabel(f"ms on the example ({self.threads} threads)")
        axes.set_ylabel(self.metric)
        axes.legend()
        figure.savefig(path)


def _markdown(title: str, columns: Any, rows: Any) -> str:
    used = [column for column in columns if any(column.text(row) for row in rows)]
    lines = ["| " + " | ".join(column.title for column in used) + " |", "|" + " --- |" * len(used)]
    lines += ["| " + " | ".join(column.text(row).replace("|", "\\|") for column in used) + " |" for row in rows]
    return "\n".join([f"## {title}", "", *lines])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
