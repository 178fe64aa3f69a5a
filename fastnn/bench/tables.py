"""Results as tables: for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from .limits import BUSY, Limits, level_number
from .results import Best, Result, Row
from .stats import Ratio, Summary
from .verdict import FLOOR, Verdict


def time_text(seconds: float) -> str:
    """Three digits and a unit: `755 us`, `1.34 ms`."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 999.5 else f"{seconds * factor:.0f} {unit}"
    return ""


def ratio_text(ratio: Ratio) -> str:
    """`1.42 (1.39-1.44)`."""
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _time(found: Summary | None) -> str:
    return "" if found is None else time_text(found.median)


def _share(row: Row) -> str:
    return "" if row.share is None else f"{100 * row.share:.0f} %"


def _bar(best: Best | None) -> str:
    if best is None or best.bar is None:
        return ""
    against = "" if best.bar_name == best.name else f" {best.bar_name} {best.bar_ratio.value:.2f}"
    return f"{best.bar:.2f}{against}"


def _verdict(row: Row) -> str:
    if row.problem:
        return row.problem if row.verdict is None else f"{row.verdict.value}: {row.problem}"
    if row.verdict is None:
        return "nothing to compare with"
    return row.verdict.value + (f" (without {row.holder})" if row.holder else "")


def _rate(row: Row) -> str:
    if row.bound.endswith("operations") and row.gflops is not None:
        return f"{row.gflops:.0f} GFLOP/s"
    return "" if row.gbps is None else f"{row.gbps:.1f} GB/s"


def _memory(row: Row) -> str:
    """How far the process grows during a call of ours, its result included."""
    return "" if row.memory is None else f"{row.memory / 1e6:.3g} MB"


def shape_text(shape: Sequence[int]) -> str:
    """`64 x 32000`."""
    return "x".join(map(str, shape))


_HEADS = (
    "row",
    "shape",
    "ours",
    "best",
    "",
    "best / ours",
    "bar",
    "tuned best",
    "best / ours",
    "bar",
    "of limit",
    "rate",
    "memory",
)


def cells(row: Row) -> list[str]:
    """A row's cells, the verdict apart."""
    found = [row.name, shape_text(row.shape), _time(row.ours)]
    plain, tuned = row.plain, row.tuned
    found += [plain.name, _time(plain.times), ratio_text(plain.ratio), _bar(plain)] if plain else ["", "", "", ""]
    found += [tuned.name, ratio_text(tuned.ratio), _bar(tuned)] if tuned else ["", "", ""]
    return [*found, _share(row), _rate(row), _memory(row)]


def rows_table(result: Result) -> Any:
    """The rows for rich."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = result.rows()
    found = [(cells(row), row) for row in rows]
    used = [i for i in range(len(_HEADS)) if any(line[i] for line, _ in found)]
    table = Table(title=Text(headline(result), "bold"), caption=Text(footer(result), "dim"), box=box.SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    for i in used:
        table.add_column(_HEADS[i], justify="left" if i in (0, 1, 3, 7) else "right", no_wrap=i != 0)
    table.add_column("verdict")
    for line, row in found:
        colour = row.verdict.colour if row.verdict else ""
        table.add_row(*(line[i] for i in used), Text(_verdict(row), style=colour))
    return table


def headline(result: Result) -> str:
    """The machine, versions and date in one line."""
    machine, method = result.machine, result.method
    threads = f"{method['threads']} of {machine['cores']} threads"
    commit = f", commit {result.commit}" if result.commit else ""
    parts = [machine["cpu"], threads, machine["isa"] or "no extension", f"torch {result.versions['torch']}"]
    return ", ".join(parts) + f", fastnn {result.versions['fastnn']}{commit}, {result.date}"


def counts(rows: Sequence[Row]) -> str:
    """How many rows have which verdict."""
    found = [(verdict.value, sum(row.verdict is verdict for row in rows)) for verdict in reversed(Verdict)]
    unjudged = sum(row.verdict is None for row in rows)
    parts = [f"{number} {name}" for name, number in found if number]
    return f"{len(rows)} rows: " + ", ".join(parts + ([f"{unjudged} not judged"] if unjudged else []))


def footer(result: Result) -> str:
    """Counts, method, what is missing, what went wrong."""
    method = result.method
    lines = [
        counts(result.rows()),
        f"best / ours: above 1, ours is faster; median of interleaved rounds with its 95 % interval; behind: the whole "
        f"interval below {FLOOR}. Fresh outputs unless a contender can only reuse its own. Inputs warm.",
    ]
    if not method["bars"] and not method["quick"] and not method["sweep"]:
        lines.append("Bars are meant for one thread on AVX-512 with BF16 and VNNI and without AMX: not judged here.")
    if result.others_load > BUSY:
        lines.append(
            f"Other processes took {100 * result.others_load:.0f} % of the processors: figures are less certain."
        )
    lines += [f"{name}: {why}" for name, why in result.missing.items()]
    lines += [f"{label} on {case['id']}: {why}" for case in result.cases for label, why in case["wrong"].items()]
    lines += [
        f"{label} on {case['id']} gave no time: {why}"
        for case in result.cases
        for label, why in case["refused"].items()
        if ":" in why  # an exception's name: a failure, not a case that it does not know
    ]
    if not result.complete:
        lines.append(f"Not complete{': ' + result.stopped if result.stopped else ''}: what was measured is shown.")
    return "\n".join(lines)


def markdown(result: Result, rows: Sequence[Row] | None = None) -> str:
    """Rows of a result, all unless named, for a document."""
    rows = result.rows() if rows is None else rows
    lines = [
        headline(result),
        "",
        "| row | shape | fastnn | best other | best / fastnn (95 %) | tuned best / fastnn tuned | of limit | verdict |",
        "| --- | --- | ---: | --- | --- | --- | ---: | --- |",
    ]
    for row in rows:
        plain, tuned = row.plain, row.tuned
        best = f"{plain.name} {_time(plain.times)}" if plain else ""
        ratios = [
            f"{ratio_text(one.ratio)}{f', bar {_bar(one)}' if one.bar else ''}" if one else "" for one in (plain, tuned)
        ]
        if tuned:
            ratios[1] = f"{tuned.name} {ratios[1]}"
        line = [row.name, shape_text(row.shape), _time(row.ours), best, *ratios, _share(row), _verdict(row)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", counts(rows) + "."])


def _span(bests: Sequence[Best | None]) -> str:
    """`1.52x (0.51 to 3.01)`: the geometric mean of ratios, the lowest and the highest."""
    found = [best.ratio.value for best in bests if best is not None]
    return f"{geometric_mean(found):.2f}x ({min(found):.2f} to {max(found):.2f})" if found else ""


def summary(rows: Sequence[Row]) -> str:
    """A line for each family, for a document: how many rows, by what factor, and which are behind somebody."""
    lines = [
        "| rows | how many | best other / fastnn, as installed | both allocators tuned | behind somebody |",
        "| --- | ---: | --- | --- | --- |",
    ]
    for family in dict.fromkeys(row.family for row in rows):
        mine = [row for row in rows if row.family == family]
        behind = [
            f"{row.name} {shape_text(row.shape)}" for row in mine if row.verdict in (Verdict.BEHIND, Verdict.WRONG)
        ]
        spans = _span([row.plain for row in mine]), _span([row.tuned for row in mine])
        lines.append(f"| `{family}` | {len(mine)} | {spans[0]} | {spans[1]} | {', '.join(behind) or 'none'} |")
    return "\n".join(lines)


def limits_table(limits: Limits) -> list[Any]:
    """The machine's limits for rich: peaks, caches, memory."""
    from rich import box
    from rich.table import Table

    counts = [str(count) for count in limits.threads]

    def table(title: str, heads: Sequence[str]) -> Table:
        made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for i, head in enumerate(heads):
            made.add_column(head, justify="right" if i else "left")
        return made

    def rates(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value / 1e9:.1f}" for value in values]

    threads = [f"{count} thread{'s' if count != '1' else ''}" for count in counts]
    peaks = table("multiply-adds out of registers, G(FL)OP/s", ["", *threads])
    for isa in limits.peak[counts[0]]:
        for unit in ("fp32", "bf16", "int8"):
            values = [limits.peak[count][isa].get(unit) for count in counts]
            if any(values):
                peaks.add_row(f"{unit}, {isa}", *rates(values))
    caches = table("caches, GB/s read and written", ["", *threads])
    for level in sorted(limits.cache[counts[0]], key=level_number):
        for kind in ("read", "copy", "write"):
            caches.add_row(f"{level} {kind}", *rates([limits.cache[count][level][kind] for count in counts]))
    memory = table("memory, GB/s read and written; the best way of each kind is the limit", ["", *threads])
    for kind, ways in limits.memory[counts[0]].items():
        best = {count: max(limits.memory[count][kind].values()) for count in counts}
        for way in ways:
            values = [limits.memory[count][kind][way] for count in counts]
            marked = [
                f"[bold]{text}[/]" if value == best[count] else text
                for text, value, count in zip(rates(values), values, counts, strict=True)
            ]
            memory.add_row(f"{kind}, {way}", *marked)
    busy = max(limits.load.values())
    if busy > BUSY:
        memory.caption = f"Other processes took {100 * busy:.0f} % of the processors meanwhile: too low, most likely."
    return [peaks, caches, memory]
