"""A benchmark run: which cases and contenders, in which order, until when; saved after every case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..testing.bench_cases import BenchCase, bench_cases, families
from .allocators import PLAIN, SETTINGS, TUNED
from .contenders import CONTENDERS, OURS
from .files import check_writable
from .gpu_limits import GpuLimits, gpu_limits
from .gpu_machine import describe_gpu, why_no_gpu
from .limits import Limits, NoLimits, hasty_limits, machine_limits
from .machine import OthersLoad, allowed_cpus, bars_hold, commit, describe, idlest_cpus, versions
from .results import Result, case_to_json, rows_of
from .session import Entrant, Measured, Session

RETIRED = 1.5
"""A contender that takes so many times as long as the best one after the first visit is out of the race: it keeps the
times it has and is not run again."""

QUICK_BYTES, QUICK_OPERATIONS = 100e6, 1e9
"""The most that the row of a quick run moves and computes: its float64 truth takes a dozen times as long."""


class BadOptions(ValueError):
    """Options that cannot be run; the message says what is allowed."""


@dataclass(frozen=True)
class Options:
    """How to run."""

    families: tuple[str, ...] = ()
    """Empty for all."""
    only: str = ""
    """Rows whose id contains this."""
    sweep: bool = False
    """The sweep's shapes, against eager torch alone, instead of the public rows."""
    contenders: tuple[str, ...] = ()
    """Names, `tuned` for the allocator setting; empty for everybody who is installed."""
    device: str = "cpu"
    """`cpu`, or `cuda`: the rows of GPUs, each of our backends there as a way of its own."""
    threads: int = 1
    rounds: int = 7
    """Rounds of one visit."""
    passes: int = 3
    """Visits of every row: apart in time, in new processes, so that the interval holds what drifts."""
    extra: int = 3
    """More visits, at most, of rows whose verdict more rounds could change."""
    sample_seconds: float = 0.01
    """A sample repeats the call for about so long."""
    quick: bool = False
    """A small row of each family, eager torch and ours, one visit; limits in haste where they are not known."""
    fresh: bool = False
    """Measure the machine's limits even where they are known."""


@dataclass
class Plan:
    """What a run consists of."""

    cases: list[BenchCase]
    contenders: list[str]
    settings: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)

    def entrants(self, case: BenchCase) -> tuple[list[Entrant], dict[str, str]]:
        """Who takes part in a case, ours first; and why others do not."""
        found, refused = [], {}
        ours = [f"{OURS} {way.label}".strip() for way in case.ours]
        for setting in self.settings:
            found += [Entrant(name, setting) for name in ours]
            for name in self.contenders:
                who = CONTENDERS[name]
                why = who.why_not(case)
                if why:
                    refused[name] = why
                elif setting in who.settings or case.device != "cpu":
                    found.append(Entrant(name, setting))
        return found, refused


def chosen_families(options: Options) -> tuple[str, ...]:
    """The families that `options` name, or all.

    Raises:
        BadOptions: an unknown one.
    """
    for name in options.families:
        if name not in families():
            raise BadOptions(f"no family of rows {name!r}; there are {', '.join(families())}")
    return options.families or families()


def plan(options: Options) -> Plan:
    """What `options` ask for.

    Raises:
        BadOptions: an unknown family or contender, one that is asked for and not installed, numbers out of range, a
            device that is not there.
    """
    _check_device(options)
    _check_numbers(options)
    chosen = [case for name in chosen_families(options) for case in bench_cases(name, options.device)]
    cases = [case for case in chosen if case.sweep == options.sweep and options.only in case.id]
    if not cases:
        known = ", ".join(dict.fromkeys(case.row for case in chosen if case.sweep == options.sweep))
        raise BadOptions(f"no row contains {options.only!r}; rows: {known}")
    if options.quick:
        named = [case for case in chosen if options.only in case.id]
        cases = [_quick([c for c in named if c.family == one]) for one in dict.fromkeys(c.family for c in cases)]
    return _plan_contenders(options, cases)


def _quick(cases: Sequence[BenchCase]) -> BenchCase:
    """A family's first public row that is small enough for a first impression, else the largest such of the sweep."""
    small = [c for c in cases if c.work.bytes <= QUICK_BYTES and c.work.operations <= QUICK_OPERATIONS]
    public = [case for case in small if not case.sweep]
    return public[0] if public else max(small or cases, key=lambda case: case.work.bytes)


def _check_device(options: Options) -> None:
    if options.device not in ("cpu", "cuda"):
        raise BadOptions(f"device must be cpu or cuda, got {options.device!r}")
    if options.device == "cuda":
        why = why_no_gpu()
        if why:
            raise BadOptions(f"device cuda: {why}")
        if options.sweep:
            raise BadOptions("device cuda has no sweep: its rows are all public")


def _check_numbers(options: Options) -> None:
    cores = len(allowed_cpus())
    if not 1 <= options.threads <= cores:
        raise BadOptions(f"threads must be 1 to {cores} (the processors this process may use), got {options.threads}")
    for name, low in (("rounds", 1), ("passes", 1), ("extra", 0)):
        if getattr(options, name) < low:
            raise BadOptions(f"{name} must be at least {low}, got {getattr(options, name)}")
    if not 0 < options.sample_seconds <= 10:
        raise BadOptions(f"sample seconds must be above 0 and at most 10, got {options.sample_seconds}")


def _plan_contenders(options: Options, cases: list[BenchCase]) -> Plan:
    known = {name: who for name, who in CONTENDERS.items() if options.device in who.devices}
    missing = {name: why for name, who in known.items() if (why := who.missing())}
    if options.quick or options.sweep:
        return Plan(cases, ["eager"], (PLAIN,), {})
    asked = options.contenders
    for name in asked:
        if name not in known and (name != TUNED or options.device != "cpu"):
            takers = ", ".join([*known, TUNED] if options.device == "cpu" else known)
            raise BadOptions(f"unknown contender {name!r}; known: {takers}")
        if name in missing:
            raise BadOptions(f"contender {name}: {missing[name]}")
    names = [name for name in known if name not in missing and (not asked or name in asked)]
    if not names:
        names = ["eager"]  # tuned alone was asked for
    settings = (PLAIN, TUNED) if options.device == "cpu" and (not asked or TUNED in asked) else (PLAIN,)
    return Plan(cases, names, settings, {} if asked else missing)


def method_of(options: Options, cpus: Sequence[int], bars: bool) -> dict[str, Any]:
    """The method as a result file states it."""
    found = {
        **{name: value for name, value in asdict(options).items() if name != "fresh"},
        "cpus": list(cpus),
        "settings": SETTINGS,
        "bars": bars,
        "caches": "warm: inputs are the same in every call",
        "clock": "median of rounds, contenders interleaved, order turning; garbage collection off",
    }
    if options.device == "cuda":
        found["caches"] = "cold: as much memory as fills the L2 cache four times is read before each call"
        found["clock"] = "CUDA events around each call, median of a sample's calls; " + found["clock"]
    return found


Progress = Callable[[str], None]


def run(options: Options, path: Path | None = None, progress: Progress = lambda text: None) -> Result:
    """Runs the benchmark and gives its result, saved to `path` after every case.

    What was measured is kept where the run is interrupted (KeyboardInterrupt): the result is then not complete.

    Raises:
        BadOptions: options that cannot be run.
        OSError: `path` cannot be written; before anything is measured.
    """
    todo = plan(options)
    if path is not None:
        check_writable(path.parent)
    progress("the machine's limits")
    limits = _limits(options)
    on_gpu = options.device == "cuda"
    cpus = [] if on_gpu else idlest_cpus(options.threads)  # autograd has a thread of its own for a GPU
    machine = {**describe(), "gpu": describe_gpu()} if on_gpu else describe()
    bars = bars_hold(machine) and options.threads == 1 and not (options.quick or options.sweep or on_gpu)
    result = Result(
        machine=machine,
        versions=versions(),
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        method=method_of(options, cpus, bars),
        limits=None if limits is None else limits.to_json(),
        missing=todo.missing,
    )
    if path is not None:
        result.save(path)
    others = OthersLoad()
    try:
        with Session(options.threads, cpus, options.sample_seconds, options.device) as session:
            _Run(options, todo, limits, session, result, path, progress).everything()
        result.complete = True
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    result.others_load = round(others.share(), 3)
    if path is not None:
        result.save(path)
    return result


def _limits(options: Options) -> Limits | GpuLimits | None:
    if options.device == "cuda":
        return gpu_limits(fresh=options.fresh)
    if options.quick and not options.fresh:
        return hasty_limits(options.threads)
    try:
        return machine_limits(fresh=options.fresh, threads=sorted({1, options.threads}))
    except NoLimits:
        return None


@dataclass
class _Run:
    """The state of a run."""

    options: Options
    todo: Plan
    limits: Limits | GpuLimits | None
    session: Session
    result: Result
    path: Path | None
    progress: Progress
    measured: dict[str, Measured] = field(default_factory=dict)

    def everything(self) -> None:
        """All passes, then more visits of the rows that need them."""
        passes = 1 if self.options.quick or self.options.sweep else self.options.passes
        for number in range(passes):
            self._visit_all(self.todo.cases, f"pass {number + 1} of {passes}")
        for number in range(self.options.extra if passes > 1 else 0):
            open_rows = [case for case in self.todo.cases if self._unsettled(case)]
            self._visit_all(open_rows, f"extra pass {number + 1}")

    def _visit_all(self, cases: Sequence[BenchCase], label: str) -> None:
        for i, case in enumerate(cases):
            self.progress(f"{label}: {i + 1} of {len(cases)}, {case.id}")
            self._visit(case)
            self._keep()
        self.session.end_processes()

    def _visit(self, case: BenchCase) -> None:
        entrants, refused = self.todo.entrants(case)
        first = case.id not in self.measured
        measured = self.measured.setdefault(case.id, Measured(refused=refused))
        if not first:
            entrants = [entrant for entrant in entrants if entrant.label in self._racing(measured)]
        self.session.visit(case, entrants, self.options.rounds, measured)

    @staticmethod
    def _racing(measured: Measured) -> set[str]:
        """Ours, and whoever may still be the best under its setting."""
        records = {label: record for label, record in measured.records.items() if record.times}
        racing = {label for label in records if label.startswith(OURS)}
        # Ways of ours that do not treat weights as constants compete with those who do not either.
        for setting in {record.setting for record in records.values()}:
            for group in ((False,), (False, True)):
                rivals = {
                    label: min(record.times)
                    for label, record in records.items()
                    if record.setting == setting and record.frozen in group and not label.startswith(OURS)
                }
                best = min(rivals.values(), default=0.0)
                racing |= {label for label, time in rivals.items() if time <= RETIRED * best}
        return racing

    def _unsettled(self, case: BenchCase) -> bool:
        bars = bool(self.result.method["bars"])
        return any(row.unsettled for row in rows_of(self._json(case), bars))

    def _json(self, case: BenchCase) -> dict[str, Any]:
        bound = None if self.limits is None else self.limits.bound(case.work, self.options.threads)
        return case_to_json(case, bound, self.measured[case.id])

    def _keep(self) -> None:
        self.result.cases = [self._json(case) for case in self.todo.cases if case.id in self.measured]
        if self.path is not None:
            self.result.save(self.path)
