"""Result files: what was measured, on what, by which method; and the rows that follow from it.

A file holds the rounds' times. Rows (medians, ratios, limits, verdicts) are computed from them whenever they are shown,
so a table in a document can be made again, and checked, from its file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..testing.bench_cases import Bar, BenchCase
from .allocators import PLAIN, TUNED
from .contenders import OURS
from .files import write_atomically
from .limits import Bound
from .session import Measured
from .stats import Ratio, Summary, ratio_of, summary
from .verdict import Comparison, Verdict, judge, unsettled

FORMAT = 1


class BadResult(ValueError):
    """A file is no result of a benchmark; the message says why."""


@dataclass(frozen=True)
class Best:
    """The best contender under one allocator setting, and ours against it."""

    name: str
    times: Summary
    ours: Summary
    ratio: Ratio
    bar: float | None
    bar_name: str
    """The contender that the bar counts against: the best of those that it names."""
    bar_ratio: Ratio

    @property
    def comparisons(self) -> list[Comparison]:
        """With the best of all, which ours must not be behind, and with the one that the bar counts against."""
        if self.bar_name == self.name:
            return [(self.ratio, self.bar)]
        return [(self.ratio, None), (self.bar_ratio, self.bar)]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    family: str
    name: str
    shape: tuple[int, ...]
    ours: Summary | None
    """None where ours is wrong or did not run."""
    plain: Best | None
    """None where nobody else ran."""
    tuned: Best | None
    bound: str
    """What limits the row."""
    share: float | None
    """Of the machine's limit that ours reaches."""
    gbps: float | None
    gflops: float | None
    memory: int | None
    """Bytes by which the process grows at most during a call of ours."""
    holder: str
    """The contender that set the bar, where it was not measured; empty otherwise."""
    others: tuple[tuple[str, float], ...]
    """Every other contender with plain allocator: its time as a multiple of the best's."""
    verdict: Verdict | None
    """None where there is nothing to compare with."""
    problem: str = ""
    """Why ours has no times."""

    @property
    def comparisons(self) -> list[Comparison]:
        """What the verdict follows from."""
        return [one for best in (self.plain, self.tuned) if best is not None for one in best.comparisons]

    @property
    def unsettled(self) -> bool:
        """Whether more rounds could change the verdict."""
        return self.verdict is Verdict.NOISY or unsettled(self.comparisons)


@dataclass
class Result:
    """A run: everything that its file holds."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    method: dict[str, Any]
    limits: dict[str, Any] | None
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that are not installed, and how to install them."""
    cases: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    stopped: str = ""
    """Why the run ended early; empty where it did not."""
    others_load: float = 0.0
    """Share of the processors that other processes took meanwhile."""

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON, rows included for other readers (they are computed, not read)."""
        return {"format": FORMAT, **vars(self), "rows": [row_to_json(row) for row in self.rows()]}

    @classmethod
    def from_json(cls, found: Any) -> Result:
        """From what `to_json` gave.

        Raises:
            BadResult: it is something else.
        """
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise BadResult(f"expected a fastnn benchmark result of format {FORMAT}")
        lacking = [name for name in cls.__dataclass_fields__ if name not in found]
        if lacking:
            raise BadResult(f"lacks {', '.join(lacking)}")
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})

    def rows(self) -> list[Row]:
        """The rows, in the order of the cases."""
        bars = bool(self.method.get("bars"))
        return [row for case in self.cases for row in rows_of(case, bars)]

    def save(self, path: Path) -> None:
        """Writes the file; whoever reads it meanwhile sees the old or the new one.

        Raises:
            OSError: it cannot be written.
        """
        found = json.dumps(self.to_json(), ensure_ascii=False)
        # One line for each case and row: small files that differ by lines.
        for key in ("cases", "rows"):
            found = found.replace(f'"{key}": [{{', f'"{key}": [\n{{')
        write_atomically(path, found.replace('}, {"id": ', '},\n{"id": ').replace('}, {"row": ', '},\n{"row": ') + "\n")


def load(path: Path) -> Result:
    """The result in a file.

    Raises:
        BadResult: no such file, or it is no result.
    """
    try:
        return Result.from_json(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise BadResult(f"{path}: {error.strerror}") from error
    except ValueError as error:  # BadResult is one
        raise BadResult(f"{path}: {error}") from error


def case_to_json(case: BenchCase, bound: Bound | None, measured: Measured) -> dict[str, Any]:
    """One case as a result file holds it; times in microseconds with five digits."""
    entrants = {
        label: {
            **{name: value for name, value in vars(record).items() if name != "host" or value is not None},
            "times": [float(f"{time * 1e6:.5g}") for time in record.times],
        }
        for label, record in measured.records.items()
    }
    return {
        "id": case.id,
        "family": case.family,
        "row": case.row,
        "shape": list(case.shape),
        "direction": case.direction,
        "sweep": case.sweep,
        "constants": bool(case.constants),
        "work": asdict(case.work),
        "bound": None if bound is None else asdict(bound),
        "ours": [
            {"label": way.label, "frozen": way.frozen, "bar": asdict(way.bar) | {"against": list(way.bar.against)}}
            for way in case.ours
        ],
        "entrants": entrants,
        "refused": measured.refused,
        "wrong": measured.wrong,
    }


def _label(name: str, setting: str) -> str:
    return name if setting == PLAIN else f"{name}, {setting}"


def rows_of(case: dict[str, Any], bars: bool = True) -> Iterator[Row]:
    """The rows of one case: one for each of our ways to run it."""
    for way in case["ours"]:
        yield _row(case, way, bars)


def _row(case: dict[str, Any], way: dict[str, Any], bars: bool) -> Row:
    name = f"{OURS} {way['label']}".strip()
    bar: dict[str, Any] = way["bar"] if bars else asdict(Bar())
    best = {setting: _best(case, way, name, setting, bar) for setting in (PLAIN, TUNED)}
    mine = case["entrants"].get(name, {})
    ours = _summary(mine)
    problem = "" if ours else case["wrong"].get(name) or case["refused"].get(name) or "not measured"
    plain, tuned = best[PLAIN], best[TUNED]
    comparisons = [comparison for one in (plain, tuned) if one is not None for comparison in one.comparisons]
    verdict = Verdict.WRONG if name in case["wrong"] else judge(comparisons) if comparisons and ours else None
    held = not bars or not bar["holder"] or bar["holder"] in case["entrants"]
    seconds = ours.median if ours else None
    work, bound = case["work"], case["bound"]
    return Row(
        family=case["family"],
        name=f"{case['row']} {way['label']}".strip(),
        shape=tuple(case["shape"]),
        ours=ours,
        plain=plain,
        tuned=tuned,
        bound=bound["by"] if bound else "",
        share=bound["seconds"] / seconds if bound and seconds else None,
        gbps=(work["read"] + work["written"]) / seconds / 1e9 if seconds else None,
        gflops=work["operations"] / seconds / 1e9 if seconds else None,
        memory=mine.get("memory"),
        holder="" if held else bar["holder"],
        others=_others(case, way, plain),
        verdict=verdict,
        problem=problem,
    )


def _summary(entrant: dict[str, Any]) -> Summary | None:
    times = [time * 1e-6 for time in entrant.get("times", ())]
    return summary(times) if times else None


def _rivals(case: dict[str, Any], way: dict[str, Any], setting: str) -> dict[str, dict[str, Any]]:
    """Who can be compared with one of our ways: constants are treated as such by both or by neither."""
    return {
        label: entrant
        for label, entrant in case["entrants"].items()
        if entrant["setting"] == setting
        and entrant["times"]
        and not label.startswith(OURS)
        and (way["frozen"] or not (entrant["frozen"] and case["constants"]))
    }


def _best(case: dict[str, Any], way: dict[str, Any], name: str, setting: str, bar: dict[str, Any]) -> Best | None:
    rivals = {
        label.removesuffix(f", {setting}"): rival["times"] for label, rival in _rivals(case, way, setting).items()
    }
    mine = case["entrants"].get(_label(name, setting), {}).get("times", [])
    if not rivals or not mine:
        return None

    def best_of(names: Iterable[str]) -> str:
        return min(names, key=lambda one: statistics.median(rivals[one]))

    label = best_of(rivals)
    held = best_of([one for one in rivals if one in bar.get("against", ())] or rivals)
    to_seconds = [[time * 1e-6 for time in times] for times in (rivals[label], mine)]
    ratios = [ratio_of(rivals[one], mine) for one in (label, held)]
    return Best(label, summary(to_seconds[0]), summary(to_seconds[1]), ratios[0], bar[setting], held, ratios[1])


def _others(case: dict[str, Any], way: dict[str, Any], best: Best | None) -> tuple[tuple[str, float], ...]:
    if best is None:
        return ()
    found = [
        (label, statistics.median(entrant["times"]) * 1e-6 / best.times.median)
        for label, entrant in _rivals(case, way, PLAIN).items()
        if label != best.name
    ]
    return tuple(sorted(found, key=lambda one: one[1]))


def row_to_json(row: Row) -> dict[str, Any]:
    """A row for other programs; times in seconds."""

    def times(found: Summary | None) -> dict[str, Any] | None:
        return None if found is None else asdict(found)

    def best(found: Best | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {
            "name": found.name,
            "times": times(found.times),
            "ours": times(found.ours),
            "ratio": asdict(found.ratio),
            "bar": found.bar,
            "bar_against": found.bar_name,
            "bar_ratio": asdict(found.bar_ratio),
        }

    return {
        "row": row.name,
        "family": row.family,
        "shape": list(row.shape),
        "ours": times(row.ours),
        "plain": best(row.plain),
        "tuned": best(row.tuned),
        "share_of_limit": row.share,
        "limited_by": row.bound,
        "gbps": row.gbps,
        "gflops": row.gflops,
        "memory": row.memory,
        "bar_holder_missing": row.holder,
        "others": dict(row.others),
        "verdict": None if row.verdict is None else row.verdict.value,
        "problem": row.problem,
    }
