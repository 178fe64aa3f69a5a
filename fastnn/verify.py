"""Whether this machine computes what it should: the test suite's cases, on every backend and instruction set it runs.

`python -m fastnn verify` takes at most half a minute, prints a table, ends with status 1 on a mismatch. The cases and
the error budget are those of the tests (`fastnn.testing`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _extension, testing
from .cli import MissingExtra
from .testing import Case, Target

SECONDS = 30.0
"""What a verification may take."""

_RESERVE = 0.85
"""Share of the time after which no further case is begun."""


@dataclass
class Part:
    """The cases of one op in one dtype on one target."""

    op: str
    target: str
    dtype: str
    passed: int = 0
    left: int = 0
    """Cases that there was no time for."""
    worst: float = 0.0
    """The largest share of the error budget that a result took."""
    failures: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found."""

    parts: list[Part]
    unavailable: dict[str, str]
    """Backend or instruction set -> why it cannot run here."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything that ran agrees, and something of each part ran."""
        return all(not part.failures and part.passed for part in self.parts)

    @property
    def failures(self) -> list[str]:
        """Every mismatch, in words."""
        return [failure for part in self.parts for failure in part.failures]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "ok": self.ok,
            "seconds": round(self.seconds, 2),
            "parts": [vars(part) for part in self.parts],
            "unavailable": self.unavailable,
        }


def verify(seconds: float = SECONDS) -> Report:
    """Runs the cases: those of the matrix first, on every target, then the sweeps' for as long as there is time.

    Args:
        seconds: what it may take; a slow machine leaves cases out, and the report says how many.

    Raises:
        ValueError: `seconds` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"fastnn.verify: seconds must be positive, got {seconds}")
    start = time.monotonic()
    parts: dict[tuple[str, str, str], Part] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the cases are small: starting threads would take most of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about empty tensors
            for case, dtype, target in _everything():
                part = parts.setdefault((case.op, str(target), dtype), Part(case.op, str(target), dtype))
                if time.monotonic() - start > seconds * _RESERVE:
                    part.left += 1
                else:
                    _check(case, dtype, target, part)
    finally:
        torch.set_num_threads(threads)
    missing = {**testing.unavailable(), **(testing.unavailable("cuda") if torch.cuda.is_available() else {})}
    unavailable = {str(target): why for target, why in missing.items()}
    order = [str(target) for target in _targets()]
    ordered = sorted(parts.values(), key=lambda part: (part.op, order.index(part.target)))
    return Report(ordered, unavailable, time.monotonic() - start)


def _targets() -> tuple[Target, ...]:
    """Of this machine: its CPU's and, where it has a GPU, its GPU's."""
    return (*testing.targets(), *testing.targets("cuda"))


def _everything() -> Iterator[tuple[Case, str, Target]]:
    """Every case, dtype and target; all targets take turns, so that a lack of time leaves out a little of each."""
    targets = _targets()
    for wide in (False, True):
        found = [[case for case in testing.cases(op) if case.wide == wide] for op in testing.op_names()]
        for number in range(max(map(len, found))):
            for case in [cases[number] for cases in found if number < len(cases)]:
                for target in [target for target in targets if target.takes(case)]:
                    for dtype in target.dtypes:
                        yield case, dtype, target


def _check(case: Case, dtype: str, target: Target, part: Part) -> None:
    try:
        verdict = testing.check(case, dtype, target)
    except (testing.BudgetError, testing.PromiseError) as error:
        part.failures.append(str(error))
        return
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        part.failures.append(f"{case.op}/{case.name} {dtype} on {target}: raised {type(error).__name__}: {error}")
        return
    part.passed += 1
    shares = [m.error / m.allowed for m in verdict.measured.values() if m.allowed]
    part.worst = max([part.worst, *shares])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"what it may take; {SECONDS:g} by default")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """The command: 0 where everything agrees, 1 where not, 2 where nothing could be compared."""
    if not arguments.seconds > 0:
        sys.stderr.write(f"fastnn verify: --seconds must be positive, got {arguments.seconds:g}\n")
        return 2
    if not arguments.json:
        _console()  # before the work, not after it
    report = verify(arguments.seconds)
    if arguments.json:
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    else:
        _print(report)
    if _extension._C is None:
        sys.stderr.write(f"fastnn verify: only the reference was verified: {_extension.missing}\n")
        return 1 if report.failures else 2
    return 0 if report.ok else 1


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingExtra("the table needs rich: pip install 'fastnn[cli]' (or --json)") from error
    return Console()


def _print(report: Report) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console()
    dtypes = list(dict.fromkeys(part.dtype for part in report.parts))
    table = Table(title="results within the error budget (share of it that the worst one took)", box=box.SIMPLE_HEAD)
    table.title_justify = "left"
    for head in ("op", "runs on", *dtypes):
        table.add_column(head, no_wrap=head in ("op", "runs on"), overflow="fold")
    for op, target in dict.fromkeys((part.op, part.target) for part in report.parts):
        cells = [_cell(report, op, target, dtype) for dtype in dtypes]
        table.add_row(op, target, *(Text(text, style) for text, style in cells))
    for target, why in report.unavailable.items():
        table.add_row("", target, Text(why, "dim"), *[""] * (len(dtypes) - 1))
    console.print(table)
    for failure in report.failures[:20]:
        console.print(Text(failure, "red"))
    if len(report.failures) > 20:
        console.print(Text(f"and {len(report.failures) - 20} more", "red"))
    left = sum(part.left for part in report.parts)
    passed = sum(part.passed for part in report.parts)
    more = f", {left} left out for lack of time" if left else ""
    verdict = "every result agrees" if report.ok else f"{len(report.failures)} mismatches"
    console.print(
        Text(f"{verdict}: {passed} checks passed in {report.seconds:.0f} s{more}", "green" if report.ok else "bold red")
    )


def _cell(report: Report, op: str, target: str, dtype: str) -> tuple[str, str]:
    found = [part for part in report.parts if (part.op, part.target, part.dtype) == (op, target, dtype)]
    if not found:
        return "", ""
    part = found[0]
    if part.failures:
        return f"{len(part.failures)} of {len(part.failures) + part.passed} wrong", "bold red"
    if not part.passed:
        return "no time", "yellow"
    return f"{part.passed} agree ({100 * part.worst:.0f} %)", "green"
