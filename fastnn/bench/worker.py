"""The process that runs contenders: prepares cases, checks them against the truth, times them when told to.

Speaks JSON lines: a request on standard input, an answer on what was standard output when it started (whatever the
contenders' libraries print goes to standard error). `fastnn.bench.session` is the other end. On a GPU only the clock
differs (`fastnn.bench.gpu_clock`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from .._record import record
from ..accelerate.isolate import Attempt
from ..testing.bench_cases import BenchCase, Results, find_bench_case
from ..testing.cases import Inputs
from ..testing.policy import FORWARD_FACTOR, GRADIENT_FACTOR, BudgetError, assert_within_budget
from .contenders import Contender, Ours, Runner, contender
from .gpu_clock import GpuClock
from .samples import Sample, Timer
from .stats import DISTURBED

WARM_BELOW = 0.05
"""Calls shorter than this are run once untimed before each sample, so that a sample starts with warm caches."""

_RETRIES = 3

_SETTLING_CALLS = 12

_SLICE, _GPU_SLICE = 1 << 20, 1 << 25


def timed(call: Callable[[], object], count: int) -> Sample:
    """Time per call of `count` calls."""
    cpu, start = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    wall = time.perf_counter() - start
    return Sample(wall / count, max(0.0, 1 - (time.process_time() - cpu) / wall))


def sample(call: Callable[[], object], count: int, threads: int, warm: bool, timer: Timer = timed) -> Sample:
    """A sample, taken again (at most three times) where the process was interrupted; the least interrupted one."""
    if warm:
        call()
    found = timer(call, count)
    for _ in range(_RETRIES if threads == 1 else 0):
        if found.idle <= DISTURBED:
            break
        again = timer(call, count)
        found = min(found, again, key=lambda one: one.idle)
    return found


def settle(call: Callable[[], object], timer: Timer = timed) -> None:
    """Calls until the time stays the same: a heap that keeps freed blocks takes about ten large ones to settle."""
    times: list[float] = []
    while len(times) < _SETTLING_CALLS:
        times.append(timer(call, 1).seconds)
        last = times[-3:]
        if len(last) == 3 and max(last) <= 1.2 * min(last):
            return


def calibrate(
    call: Callable[[], object], seconds: float, timer: Timer = timed, most: int | None = None
) -> tuple[int, float]:
    """How many calls last about `seconds`, `most` at most, and how long one takes."""
    settle(call, timer)
    once = max(timer(call, 1).seconds, 1e-7)
    if once < seconds / 10 and most is None:  # short calls get faster as they warm up
        count = max(1, int(seconds / 4 / once))
        once = max(timer(call, count).seconds, 1e-8)
    count = max(1, round(seconds / once))
    return count if most is None else min(count, most), once


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at most during a call, its result included; None where nothing tells."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field(name: str) -> int:
        match = re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return int(match[1]) << 10 if match else 0

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would hide what this one takes
        refs.write_text("5")
        before = field("VmRSS")
        call()
        return max(field("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def truth_of(case: BenchCase, inputs: Inputs) -> Results:
    """What the case computes, in float64."""
    return case.run(case.torch_call, {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})


def check(case: BenchCase, found: Results, truth: Results, rival: Results, name: str) -> None:
    """The correctness gate.

    Raises:
        BudgetError: outside the error policy.
    """
    if len(found) != len(truth):
        raise BudgetError(f"{name}: {len(found)} results instead of {len(truth)}")
    for i, (ours, true, theirs) in enumerate(zip(found, truth, rival, strict=True)):
        forward = i == 0 and case.direction != "bwd"
        factor = FORWARD_FACTOR if forward else GRADIENT_FACTOR
        where = f"{case.id} {name}"
        if ours.shape != true.shape or ours.dim() == 0:
            assert_within_budget(ours, true, theirs, theirs.dtype, factor, where=where)
            continue
        # In slices: the comparison takes a dozen float64 copies, and a slice's bound is the tighter one.
        elements = _SLICE if ours.device.type == "cpu" else _GPU_SLICE
        rows = max(1, elements * max(ours.shape[0], 1) // max(ours.numel(), 1))
        for start in range(0, max(ours.shape[0], 1), rows):
            parts = [t[start : start + rows] for t in (ours, true, theirs)]
            assert_within_budget(parts[0], parts[1], parts[2], theirs.dtype, factor, where=where)


def check_kernel(case: BenchCase, who: Contender, runner: Runner) -> str:
    """What is wrong with the kernels that one of our ways ran; empty where they are the right ones."""
    if not isinstance(who, Ours):
        return ""
    way = next(way for way in case.ours if way.label == who.label)
    with record() as runs:
        runner.call()
    ran = {run.kernel for run in runs if run.backend != "reference" and way.backend in ("", run.backend)}
    recorded = sorted(
        {f"{run.kernel} on {run.backend}" if way.backend or run.backend == "reference" else run.kernel for run in runs}
    )
    return "" if way.kernel in ran else f"{way.kernel} did not run; recorded: {recorded}"


class Worker:
    """The state between requests: one case, prepared for some contenders."""

    def __init__(self, threads: int, setting: str, device: str = "cpu", clock: GpuClock | None = None) -> None:
        self.threads, self.setting = threads, setting
        self.clock = GpuClock() if clock is None and device == "cuda" else clock
        self.runners: dict[str, Runner] = {}
        self.warm: dict[str, bool] = {}

    def open(self, case: str, contenders: list[str], seconds: float, gate: bool) -> dict[str, Any]:
        """Prepares a case: per contender what was found out about it, or `refused` or `wrong` with the reason."""
        found = find_bench_case(case)
        self.close()
        inputs = found.inputs()
        rival = found.rival(inputs) if gate else ()
        truth = truth_of(found, inputs) if gate else ()
        answer: dict[str, Any] = {}
        for name in contenders:
            with Attempt() as attempt:
                answer[name] = self._prepare(found, inputs, name, truth, rival, seconds, gate)
            if attempt.failure:
                answer[name] = {"refused": attempt.failure}
            if "count" not in answer[name]:
                self.runners.pop(name, None)
        del truth, rival
        if self.clock is not None:
            self.clock.release()
        return answer

    def _prepare(
        self, case: BenchCase, inputs: Inputs, name: str, truth: Results, rival: Results, seconds: float, gate: bool
    ) -> dict[str, Any]:
        who = contender(name)
        why = who.missing() or who.why_not(case)
        if why:
            return {"refused": why}
        runner = who.prepare(case, inputs, self.threads, self.setting)
        found: dict[str, Any] = {"output": runner.output}
        with runner.around():
            if gate:
                try:
                    check(case, runner.results(), truth, rival, name)
                except BudgetError as error:
                    return {"wrong": str(error)}
                wrong = check_kernel(case, who, runner)
                if wrong:
                    return {"wrong": wrong}
                found["memory"] = self._memory(runner.call)
            count, once = self._calibrate(runner.call, seconds)
        self.runners[name], self.warm[name] = runner, once < WARM_BELOW
        return {**found, "count": count}

    def _memory(self, call: Callable[[], object]) -> int | None:
        return extra_memory(call) if self.clock is None else self.clock.extra_memory(call)

    def _calibrate(self, call: Callable[[], object], seconds: float) -> tuple[int, float]:
        if self.clock is None:
            return calibrate(call, seconds)
        return calibrate(call, seconds, self.clock.timed, self.clock.most_calls)

    def sample(self, contender: str, count: int) -> dict[str, Any]:
        """Times `count` calls of a prepared contender."""
        runner, timer = self.runners[contender], timed if self.clock is None else self.clock.timed
        with runner.around():
            taken = sample(runner.call, count, self.threads, self.warm[contender], timer)
        answer = {"seconds": taken.seconds, "idle": taken.idle}
        return answer if taken.host is None else {**answer, "host": taken.host}

    def close(self) -> dict[str, Any]:
        """Forgets the case and its memory."""
        self.runners.clear()
        gc.collect()
        if self.clock is not None:
            self.clock.release()
        return {}


def serve(requests: TextIO, answers: TextIO, worker: Worker) -> None:
    """Answers requests until there are no more."""
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "open": worker.open,
        "sample": worker.sample,
        "close": worker.close,
    }
    for line in requests:
        request = json.loads(line)
        answer = methods[request.pop("do")](**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(threads: int, setting: str, device: str = "cpu") -> None:
    """Serves standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    gc.disable()
    answers.write(json.dumps({"ready": os.getpid()}) + "\n")
    answers.flush()
    serve(sys.stdin, answers, Worker(threads, setting, device))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
