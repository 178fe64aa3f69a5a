"""Times calls on a GPU by its own events, with its cache cold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .samples import Sample

FLUSH = 4
"""How many times the L2 cache is read over before a call."""

MOST_CALLS = 50
"""The most calls of a sample: the flushes between short calls would take longer than they do."""


CYCLES = 2e9
"""Of a GPU in a second, at most: what a pause is counted in."""

MOST_PAUSE = 2e-3


class GpuClock:
    """Events around each call, on the current stream.

    Before a call as much memory is read as fills the L2 cache several times: inputs come from memory, as in a model
    whose other layers ran in between, and no written lines are left that the call would have to evict. Then the GPU
    pauses for as long as Python takes to queue the call, so that the time is the GPU's alone; what Python takes is
    measured beside it.
    """

    most_calls = MOST_CALLS

    def __init__(self, device: str = "cuda", api: Any = None) -> None:
        self._api = torch.cuda if api is None else api
        size = max(FLUSH * self._api.get_device_properties(device).L2_cache_size, 128 << 20)
        self._filler = torch.zeros(size // 4, device=device)

    def timed(self, call: Callable[[], object], count: int) -> Sample:
        """The median of so many calls, and what one takes on the CPU."""
        events = [tuple(self._api.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        host = []
        pause = self._pause(call)
        for begin, end in events:
            self._filler.amax()
            self._api._sleep(pause)
            begin.record()
            start = time.perf_counter()
            call()
            host.append(time.perf_counter() - start)
            end.record()
        self._api.synchronize()
        return Sample(
            statistics.median(begin.elapsed_time(end) * 1e-3 for begin, end in events), 0.0, statistics.median(host)
        )

    def _pause(self, call: Callable[[], object]) -> int:
        """Cycles in which the call is queued with some to spare."""
        self._api.synchronize()
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        self._api.synchronize()
        return int(min(1.5 * queued + 1e-5, MOST_PAUSE) * CYCLES)

    def extra_memory(self, call: Callable[[], object]) -> int:
        """Bytes that torch's allocator hands out at most during a call, its result included."""
        self._api.synchronize()
        self._api.reset_peak_memory_stats()
        before: int = self._api.memory_allocated()
        call()
        self._api.synchronize()
        peak: int = self._api.max_memory_allocated()
        return max(peak - before, 0)

    def release(self) -> None:
        """Gives unused memory back, for other processes to take."""
        self._api.synchronize()
        self._api.empty_cache()
