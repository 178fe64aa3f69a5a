"""What an allocator setting does for torch: a few calls of each size, timed in a process that runs under it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch

SECONDS = 0.3
"""For each workload."""


def workloads() -> dict[str, Callable[[], object]]:
    """Name -> call. Above 32 MB glibc returns every freed block to the system; `small` must not lose."""
    large, medium = torch.randn(12288, 2048), torch.randn(1024, 2048)
    x, w = torch.randn(32, 256), torch.randn(256, 256)
    return {
        "softmax of 96 MB": lambda: torch.softmax(large, -1),
        "sum of 96 MB": lambda: large + large,
        "softmax of 8 MB": lambda: torch.softmax(medium, -1),
        "small layer": lambda: torch.relu(x @ w),
    }


def best_time(call: Callable[[], object], seconds: float) -> float:
    """The fastest of the calls that fit `seconds`; whatever disturbs a call makes it slower."""
    call()
    start, best = time.perf_counter(), float("inf")
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    """Prints workload -> seconds, and the peak memory, as JSON."""
    times = {name: best_time(call, SECONDS) for name, call in workloads().items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    sys.stdout.write(json.dumps({"times": times, "peak": peak}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
