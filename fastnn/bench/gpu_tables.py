"""Results of a GPU as tables: our backends side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .contenders import OURS
from .gpu_limits import GpuLimits
from .results import Best, Result, Row, rows_of
from .tables import counts, ratio_text, shape_text, time_text
from .verdict import Verdict


@dataclass(frozen=True)
class Line:
    """One case: a row for each of our ways, by its label."""

    case: dict[str, Any]
    ways: dict[str, Row]

    @property
    def measured(self) -> dict[str, Row]:
        """The ways that have times."""
        return {label: row for label, row in self.ways.items() if row.ours is not None}

    @property
    def verdict(self) -> Verdict | None:
        """Of the faster way: that is what a call should run; a wrong result is nobody's second choice."""
        if any(row.verdict is Verdict.WRONG for row in self.ways.values()):
            return Verdict.WRONG
        times = {label: row.ours.median for label, row in self.ways.items() if row.ours is not None}
        return self.ways[min(times, key=lambda label: times[label])].verdict if times else None


def on_gpu(result: Result) -> bool:
    """Whether a result was measured on a GPU."""
    return bool(result.method.get("device", "cpu") != "cpu")


def lines(result: Result) -> Iterator[Line]:
    """The cases of a result."""
    for case in result.cases:
        labels = [way["label"] for way in case["ours"]]
        yield Line(case, dict(zip(labels, rows_of(case, False), strict=True)))


def labels_of(result: Result) -> list[str]:
    """Our ways, in the order of the columns."""
    return list(dict.fromkeys(way["label"] for case in result.cases for way in case["ours"]))


def heads(result: Result) -> list[str]:
    """The columns' heads."""
    labels = labels_of(result)
    ratios = [f"best / {label}" for label in labels]
    return ["row", "shape", *labels, "best other", *ratios, "limit", "of it", "to queue, us", "verdict"]


def cells(line: Line, labels: list[str]) -> list[str]:
    """The cells of a line, the verdict apart."""
    rows = [line.ways.get(label) for label in labels]
    best = next((row.plain for row in rows if row is not None and row.plain is not None), None)
    found = [line.case["row"], shape_text(line.case["shape"])]
    found += ["-" if row is None or row.ours is None else time_text(row.ours.median) for row in rows]
    found.append(f"{best.name} {time_text(best.times.median)}" if best else _fastest_other(line.case))
    found += ["-" if row is None or row.plain is None else ratio_text(row.plain.ratio) for row in rows]
    bound = line.case["bound"]
    shares = [row.share for row in rows if row is not None and row.share is not None]
    found.append(f"{time_text(bound['seconds'])} {bound['by']}" if bound else "")
    return [*found, f"{100 * max(shares):.0f} %" if shares else "", _host(line.case, labels, best)]


def _host(case: dict[str, Any], labels: list[str], best: Best | None) -> str:
    """What Python takes to queue a call of each of ours and of the best other one."""
    names = [*(f"{OURS} {label}" for label in labels), *([best.name] if best else [])]
    found = [case["entrants"].get(name, {}).get("host") for name in names]
    return " / ".join("-" if host is None else f"{host * 1e6:.0f}" for host in found)


def _fastest_other(case: dict[str, Any]) -> str:
    """Where none of ours has times there is no ratio, but the others' times are worth showing."""
    times = {label: statistics.median(one["times"]) for label, one in case["entrants"].items() if one["times"]}
    if not times:
        return ""
    best = min(times, key=lambda label: times[label])
    return f"{best} {time_text(times[best] * 1e-6)}"


def verdict_text(line: Line) -> str:
    """The verdict in words."""
    return "not measured" if line.verdict is None else line.verdict.value


def headline(result: Result) -> str:
    """The GPU, versions and date in one line."""
    gpu = result.machine["gpu"]
    runtime = f"CUDA {gpu['cuda']}" if gpu["cuda"] else f"HIP {gpu['hip']}"
    driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
    commit = f", commit {result.commit}" if result.commit else ""
    versions = f"torch {result.versions['torch']}, fastnn {result.versions['fastnn']}"
    return f"{gpu['name']}{driver}, {runtime}, {versions}{commit}, {result.date}"


def limits_line(result: Result) -> str:
    """The measured limits in one line; empty where there are none."""
    if result.limits is None:
        return ""
    limits = GpuLimits.from_json(result.limits)
    rates = ", ".join(f"{kind} {rate / 1e12:.2f}" for kind, rate in limits.memory.items())
    peaks = ", ".join(f"{unit} {rate / 1e12:.0f}" for unit, rate in limits.peak.items())
    return f"Limits measured on it: memory {rates} TB/s; matrix products through torch {peaks} TFLOP/s."


def footer(result: Result) -> list[str]:
    """Counts, method, what is missing, what went wrong."""
    found = [
        counts(result.rows()),
        limits_line(result),
        "best / ours: above 1, ours is faster; median of interleaved rounds with its 95 % interval. Timed by the GPU, "
        "its cache cold; to queue: what Python takes for a call of ours and of the best other.",
    ]
    found += [f"{name}: {why}" for name, why in result.missing.items()]
    found += [f"{label} on {case['id']}: {why}" for case in result.cases for label, why in case["wrong"].items()]
    found += _without_times(result)
    if not result.complete:
        found.append(f"Not complete{': ' + result.stopped if result.stopped else ''}: what was measured is shown.")
    return [line for line in found if line]


def _without_times(result: Result) -> list[str]:
    """Who gave no time, and why, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in result.cases:
        for label, why in case["refused"].items():
            if ":" in why or label.startswith(OURS):  # an exception's name, not a case that it does not know
                reasons.setdefault((label, why), []).append(case["id"])
    return [
        f"{label} gave no time: {why} ({len(ids)} rows)" if len(ids) > 1 else f"{label} on {ids[0]} gave no time: {why}"
        for (label, why), ids in reasons.items()
    ]


def rows_table(result: Result) -> Any:
    """The rows for rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    labels = labels_of(result)
    table = Table(
        title=Text(headline(result), "bold"), caption=Text("\n".join(footer(result)), "dim"), box=box.SIMPLE_HEAD
    )
    table.title_justify = table.caption_justify = "left"
    for i, head in enumerate(heads(result)):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for line in lines(result):
        colour = line.verdict.colour if line.verdict else ""
        table.add_row(*cells(line, labels), Text(verdict_text(line), style=colour))
    return table


def markdown(result: Result) -> str:
    """The rows for a document."""
    labels, columns = labels_of(result), heads(result)
    found = [headline(result), "", limits_line(result), ""]
    found += ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 3) + " --- |"]
    for line in lines(result):
        found.append("| " + " | ".join([*cells(line, labels), verdict_text(line)]) + " |")
    return "\n".join([*found, "", counts(result.rows()) + "."])


def limits_table(limits: GpuLimits) -> Any:
    """A GPU's limits for rich."""
    from rich import box
    from rich.table import Table

    table = Table(title=limits.gpu.get("name", limits.machine), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("limit")
    table.add_column("rate", justify="right")
    for kind, rate in limits.memory.items():
        table.add_row(f"memory, {kind}", f"{rate / 1e12:.2f} TB/s")
    for unit, rate in limits.peak.items():
        table.add_row(f"matrix product through torch, {unit}", f"{rate / 1e12:.0f} TFLOP/s")
    return table
