"""Runs cases: a process per contender (or per allocator setting, where contenders can share one), one at a time.

Contenders that bring their own threads must not share a process: pools that spin for work slow each other down. With
one thread those that run on torch's own threads share a process per allocator setting, and with it the very inputs.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..testing.bench_cases import BenchCase
from .allocators import PLAIN, SETTINGS, environment
from .contenders import contender
from .stats import DISTURBED

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])

OPEN_SECONDS, SAMPLE_SECONDS = 600.0, 300.0
"""How long a contender may take to prepare (compile) a case, and for one sample."""

STOP_SECONDS = 5.0
"""How long a process may take to end by itself."""

_SETTLE_SECONDS = 0.004
"""A pause before another multi-threaded process runs: OpenMP's workers spin for about a millisecond after work."""


class WorkerDied(RuntimeError):
    """A worker process ended or did not answer; the message says how."""


@dataclass(frozen=True)
class Entrant:
    """A contender under an allocator setting."""

    name: str
    setting: str

    @property
    def label(self) -> str:
        """How results call it."""
        return self.name if self.setting == PLAIN else f"{self.name}, {self.setting}"

    def process(self, threads: int, device: str = "cpu") -> tuple[str, str]:
        """The process that runs it: those with equal keys share one. On a GPU what torch.compile leaves is apart."""
        shared = contender(self.name).native and (threads == 1 if device == "cpu" else self.name != "compile")
        return ("torch" if shared else self.name, self.setting)


class WorkerProcess:
    """The other end of `fastnn.bench.worker`."""

    def __init__(self, threads: int, setting: str, cpus: Sequence[int], device: str = "cpu") -> None:
        self._errors = tempfile.TemporaryFile()
        path = os.pathsep.join([_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])])
        before = _pin(cpus)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "fastnn.bench.worker", str(threads), setting, device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # an interrupt is ours to handle; it ends when its input does
                env={**environment(SETTINGS[setting]), "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            )
        finally:
            _pin(before)
        self._rest = b""
        self._answer(OPEN_SECONDS)

    def ask(self, timeout: float, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            WorkerDied: the process ended, or did not answer in time (it is killed then).
        """
        pipe = self._child.stdin
        try:
            if pipe is not None:
                pipe.write(json.dumps(request).encode() + b"\n")
                pipe.flush()
        except OSError as error:
            raise WorkerDied(self._ending()) from error
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        pipe = self._child.stdout
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            if pipe is not None:
                selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if pipe is None or not selector.select(max(deadline - time.monotonic(), 0)):
                    self.stop()
                    raise WorkerDied(f"no answer in {timeout:g} s")
                chunk = os.read(pipe.fileno(), 1 << 16)
                if not chunk:
                    raise WorkerDied(self._ending())
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ending(self) -> str:
        try:
            status = self._child.wait(10)
        except subprocess.TimeoutExpired:
            return "closed its answers"
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")

    def stop(self) -> None:
        """Ends the process."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written to a dead process
                    pipe.close()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._errors.close()


def _pin(cpus: Iterable[int]) -> list[int]:
    """Restricts this process (and what it starts) to those processors; what it was restricted to before."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    before = sorted(os.sched_getaffinity(0))
    if cpus:
        os.sched_setaffinity(0, set(cpus))
    return before


@dataclass
class Record:
    """What was measured of one entrant on one case."""

    setting: str
    frozen: bool
    output: str = ""
    memory: int | None = None
    count: int = 1
    times: list[float] = field(default_factory=list)
    """Seconds per call, one for each round."""
    interrupted: int = 0
    """Samples during which the process did not run all the time, even after retries."""
    host: float | None = None
    """On a GPU: seconds per call on the CPU until everything is queued, the least of all rounds."""


@dataclass
class Measured:
    """What was measured of one case."""

    records: dict[str, Record] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Entrant -> why it did not take part."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Entrant -> how it disagrees with the truth; it has no times."""


class Session:
    """Worker processes and what they are asked. A context manager: leaving it ends the processes."""

    def __init__(self, threads: int, cpus: Sequence[int], sample_seconds: float, device: str = "cpu") -> None:
        self.threads, self.cpus, self.sample_seconds, self.device = threads, list(cpus), sample_seconds, device
        self._processes: dict[tuple[str, str], WorkerProcess] = {}
        self._turn = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_processes()

    def end_processes(self) -> None:
        """Ends the processes; the next visit starts new ones, whose memory lies elsewhere."""
        for process in self._processes.values():
            process.stop()
        self._processes.clear()

    def visit(self, case: BenchCase, entrants: Sequence[Entrant], rounds: int, measured: Measured) -> None:
        """Prepares the case for every entrant still in the race, runs `rounds` rounds and adds them to `measured`.

        On the first visit the correctness gate comes first: who disagrees with the truth gets no times.
        """
        first = not measured.records
        ready = self._open(case, entrants, measured, first)
        for _ in range(rounds):
            turn = self._turn % max(len(ready), 1)
            self._turn += 1
            for entrant in [*ready[turn:], *ready[:turn]]:
                if entrant.label in measured.records:
                    self._sample(entrant, measured)
        for process in {entrant.process(self.threads, self.device) for entrant in ready}:
            self._ask(process, SAMPLE_SECONDS, do="close")

    def _open(self, case: BenchCase, entrants: Sequence[Entrant], measured: Measured, first: bool) -> list[Entrant]:
        groups: dict[tuple[str, str], list[Entrant]] = {}
        for entrant in entrants:
            groups.setdefault(entrant.process(self.threads, self.device), []).append(entrant)
        ready = []
        for process, members in groups.items():
            answer = self._ask(
                process,
                OPEN_SECONDS,
                do="open",
                case=case.id,
                contenders=[entrant.name for entrant in members],
                seconds=self.sample_seconds,
                gate=first,
            )
            for entrant in members:
                found = answer.get(entrant.name, {"refused": answer.get("died", "no answer")})
                if "count" in found:
                    frozen = contender(entrant.name).frozen
                    record = measured.records.setdefault(entrant.label, Record(entrant.setting, frozen))
                    record.count, record.output = found["count"], found["output"]
                    record.memory = found.get("memory", record.memory)
                    ready.append(entrant)
                elif "wrong" in found:
                    measured.wrong[entrant.label] = found["wrong"]
                else:
                    self._drop(entrant, found["refused"], measured)
        return ready

    def _sample(self, entrant: Entrant, measured: Measured) -> None:
        record = measured.records[entrant.label]
        if self.threads > 1:
            time.sleep(_SETTLE_SECONDS)
        process = entrant.process(self.threads, self.device)
        answer = self._ask(process, SAMPLE_SECONDS, do="sample", contender=entrant.name, count=record.count)
        if "died" in answer:
            self._drop(entrant, answer["died"], measured)
            return
        record.times.append(answer["seconds"])
        if "host" in answer:
            record.host = min(answer["host"], record.host or answer["host"])
        record.interrupted += self.threads == 1 and answer["idle"] > DISTURBED

    @staticmethod
    def _drop(entrant: Entrant, why: str, measured: Measured) -> None:
        measured.refused[entrant.label] = why
        measured.records.pop(entrant.label, None)

    def _ask(self, key: tuple[str, str], timeout: float, **request: Any) -> dict[str, Any]:
        """The answer of the process of that key, started if need be; `died` with the reason where there is none."""
        try:
            if key not in self._processes:
                self._processes[key] = WorkerProcess(self.threads, key[1], self.cpus, self.device)
            return self._processes[key].ask(timeout, **request)
        except WorkerDied as error:
            dead = self._processes.pop(key, None)
            if dead is not None:
                dead.stop()
            return {"died": f"its process {error}"}
