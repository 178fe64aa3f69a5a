"""What an allocator setting does for torch: a few calls of each size, timed in a process that runs under it."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

SECONDS = 0.12
"""For each workload."""

_WARM_CALLS = 10
"""Untimed: a heap that keeps what is freed takes about so many calls of one size to settle."""

SMALL = "small layer"
"""The workload that must not lose."""


def workloads() -> dict[str, Callable[[], object]]:
    """Name -> call. Above 32 MB glibc returns every freed block to the system."""
    large, medium = torch.randn(6144, 2048), torch.randn(1024, 2048)
    x, w = torch.randn(32, 256), torch.randn(256, 256)

    def mixed() -> None:
        for rows in (6000, 4500, 5200):
            torch.relu(large[:rows])

    return {
        "softmax of 48 MB": lambda: torch.softmax(large, -1),
        "36 to 48 MB, mixed": mixed,
        "softmax of 8 MB": lambda: torch.softmax(medium, -1),
        SMALL: lambda: [torch.relu(x @ w) for _ in range(100)],
    }


def typical_time(call: Callable[[], object], seconds: float) -> float:
    """The median of the processor time of the calls that fit `seconds`, and of three at least.

    Processor time, because it tells the same on a busy machine; page faults count, being the kernel's work for us.
    """
    for _ in range(_WARM_CALLS):
        call()
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def main() -> None:
    """Prints workload -> seconds, and the peak memory, as JSON."""
    times = {name: typical_time(call, SECONDS) for name, call in workloads().items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sys.stdout.write(json.dumps({"times": times, "peak": peak}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
