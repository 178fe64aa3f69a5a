"""Runs the invalid calls in a process of their own: a crash is a failure of one call, not the end of the suite.

`run_all` starts `python -m fastnn.testing.invalid`, which makes the calls one by one and prints a JSON line before
and after each; where the process dies, the call that it was in is reported and the rest goes on in a new process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass

from .. import _extension
from .cases import InvalidCall, invalid_calls, op_names


@dataclass(frozen=True)
class Outcome:
    """What one invalid call did."""

    op: str
    name: str
    problem: str
    """In words; empty where the call raised as it should."""


def all_calls() -> list[InvalidCall]:
    """The invalid calls of every op; those of raw operators only where there is an extension."""
    return [call for op in op_names() for call in invalid_calls(op) if not call.raw or _extension._C is not None]


def problem_with(call: InvalidCall) -> str:
    """Makes the call; what is wrong with how it failed, or an empty string."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = call.call()
    except call.error as error:
        missing = [word for word in call.words if word not in str(error)]
        return f"the message lacks {missing}: {str(error)[:300]}" if missing else ""
    except BaseException as error:  # whatever it is, it is the finding
        return f"raised {type(error).__name__} instead of {call.error}: {str(error)[:300]}"
    return f"returned {type(result).__name__} instead of raising {call.error}"


def run_all(timeout: float = 300.0) -> list[Outcome]:
    """Runs every invalid call in child processes and reports each."""
    outcomes: list[Outcome] = []
    total = len(all_calls())
    while len(outcomes) < total:
        outcomes += _run_from(len(outcomes), timeout)
    return outcomes


def _run_from(first: int, timeout: float) -> list[Outcome]:
    """The outcomes of the calls from number `first` on, up to the end or to a call that killed the process."""
    command = [sys.executable, "-m", "fastnn.testing.invalid", str(first)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        printed, ending = child.stdout, f"the process died with status {child.returncode}: {child.stderr[-500:]}"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else (error.stdout or "")
        ending = f"no answer in {timeout:g} s"
    found: list[Outcome] = []
    started: tuple[str, str] | None = None
    for line in printed.splitlines():
        if not line.startswith("["):
            continue
        fields = json.loads(line)
        if len(fields) == 2:
            started = (fields[0], fields[1])
        else:
            found.append(Outcome(*fields))
            started = None
    if started is not None:
        found.append(Outcome(*started, ending))
    elif not found:
        raise RuntimeError(f"fastnn.testing.invalid: nothing ran: {ending}")
    return found


def _main(first: int) -> None:
    for call in all_calls()[first:]:
        sys.stdout.write(json.dumps([call.op, call.name]) + "\n")
        sys.stdout.flush()
        sys.stdout.write(json.dumps([call.op, call.name, problem_with(call)]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
