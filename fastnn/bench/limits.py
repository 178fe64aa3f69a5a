"""The machine's limits, measured: what no kernel can beat, and so what every figure is held against.

Peaks are multiply-adds out of registers, per dtype and instruction set; bandwidths are streams over each level of
cache and over memory, there with 4 KiB pages, with huge pages and with stores that bypass the caches. Each is the best
of short trials (whatever disturbs a trial makes it slower), per number of threads, and kept in a file per machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _extension
from ..testing.bench_cases import Work
from .files import write_atomically
from .machine import OthersLoad, allowed_cpus, cache_bytes, this_machine

FORMAT = 1

UNITS = ("fp32", "bf16", "int8")

MEMORY_WAYS: dict[str, tuple[tuple[str, bool], ...]] = {
    "read": (("small", False), ("huge", False)),
    "copy": (("small", False), ("huge", False), ("huge", True)),
    "write": (("small", False), ("huge", False), ("huge", True)),
}
"""How memory is streamed: page size, and whether stores bypass the caches."""

RESIDENT = 0.6
"""The share of a cache that a row may fill and still find itself there in the next call."""

BUSY = 0.1
"""Limits measured while others took more than this share of the processors are measured again at the next occasion, and
the better of each rate is kept: what disturbs can only slow down."""

_PEAK_SECONDS, _CACHE_SECONDS, _MEMORY_SECONDS = 0.04, 0.06, 0.35
_HASTE = 6
"""How many times shorter a hasty measurement is."""


class NoLimits(RuntimeError):
    """The limits cannot be measured; the message says why."""


def way_name(pages: str, streaming: bool) -> str:
    """How a way of streaming memory is called: `4 KiB pages`, `huge pages`, `huge pages, streaming stores`."""
    return ("4 KiB pages" if pages == "small" else "huge pages") + (", streaming stores" if streaming else "")


def stream_seconds(work: Work, read: float, copy: float, write: float) -> float:
    """Time to stream the work's bytes: per byte between those of the three bandwidths, by the written share."""
    read, copy, write = 1 / read, 1 / copy, 1 / write
    share = work.written / max(work.bytes, 1)
    per_byte = read + (copy - read) * 2 * share if share <= 0.5 else copy + (write - copy) * (2 * share - 1)
    return work.bytes * per_byte


@dataclass(frozen=True)
class Bound:
    """The limit of one row."""

    seconds: float
    by: str
    """What bounds it: `fp32 operations`, `L3 read`, `memory`."""


@dataclass
class Limits:
    """Rates per second (operations, bytes), all threads together; the dictionaries are keyed by number of threads."""

    machine: str
    isa: str
    peak: dict[str, dict[str, dict[str, float]]]
    """Threads -> instruction set -> unit -> operations; a unit that the set lacks is missing."""
    cache: dict[str, dict[str, dict[str, float]]]
    """Threads -> level -> read, copy, write -> bytes."""
    memory: dict[str, dict[str, dict[str, float]]]
    """Threads -> read, copy, write -> way -> bytes."""
    load: dict[str, float]
    """Threads -> share of the processors that other processes took meanwhile."""

    @property
    def threads(self) -> tuple[int, ...]:
        """The numbers of threads that were measured."""
        return tuple(sorted(map(int, self.peak)))

    def _nearest(self, threads: int) -> str:
        return str(max([count for count in self.threads if count <= threads], default=self.threads[0]))

    def operations(self, unit: str, threads: int = 1) -> float:
        """Peak of a unit on the instruction set in force; a unit that it lacks computes in float32."""
        by_isa = self.peak[self._nearest(threads)]
        rates = by_isa.get(self.isa) or by_isa[list(by_isa)[-1]]
        return rates.get(unit, rates["fp32"])

    def bandwidth(self, kind: str, threads: int = 1) -> float:
        """Memory bandwidth for read, copy or write: the best of all ways."""
        return max(self.memory[self._nearest(threads)][kind].values())

    def memory_seconds(self, work: Work, threads: int = 1) -> float:
        """Time to stream so many bytes."""
        return stream_seconds(work, *(self.bandwidth(kind, threads) for kind in ("read", "copy", "write")))

    def bound(self, work: Work, threads: int = 1) -> Bound:
        """The least time for `work`: the longer of its operations at the peak and its bytes at the bandwidth.

        What fits `RESIDENT` of a cache counts as resident there and is held to that cache's read rate.
        """
        count = self._nearest(threads)
        sizes = cache_bytes()
        best = Bound(self.memory_seconds(work, threads), "memory")
        for level in sorted(self.cache[count], reverse=True):
            private = 1 if level == max(sizes) else int(count)
            if work.bytes <= RESIDENT * sizes[level] * private:
                best = Bound(work.bytes / self.cache[count][level]["read"], f"{level} read")
        computing = work.operations / self.operations(work.unit, threads)
        return Bound(computing, f"{work.unit} operations") if computing > best.seconds else best

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": FORMAT, **vars(self)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Limits:
        """From what `to_json` gave; KeyError or TypeError where it is something else."""
        if found["format"] != FORMAT:
            raise KeyError("format")
        return cls(**{name: found[name] for name in ("machine", "isa", "peak", "cache", "memory", "load")})


def cache_folder() -> Path:
    """Where measured limits are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastnn"


def _file() -> Path:
    return cache_folder() / f"limits-{this_machine().key}.json"


def _kept() -> Limits | None:
    try:
        found = Limits.from_json(json.loads(_file().read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.machine == this_machine().key else None


def thread_counts() -> tuple[int, ...]:
    """Powers of two up to the number of processors, and that number."""
    cores = len(allowed_cpus())
    powers = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    return tuple(sorted({*powers, cores}))


def machine_limits(*, fresh: bool = False, threads: Iterable[int] | None = None) -> Limits:
    """The limits of this machine, from the user's cache folder where they are known, else measured (seconds each).

    Args:
        fresh: measure even if they are known.
        threads: numbers of threads that must be covered; by default powers of two and all processors.

    Raises:
        NoLimits: there is no compiled extension to measure with.
    """
    wanted = thread_counts() if threads is None else tuple(sorted(set(threads)))
    known = None if fresh else _kept()
    doubtful = [count for count in wanted if known is None or known.load.get(str(count), 1.0) > BUSY]
    if known is not None and not doubtful:
        return _in_force(known)
    found = measure(doubtful)
    if known is not None:
        found = _better(known, found)
    return _keep(found)


def hasty_limits(threads: int) -> Limits | None:
    """The limits for so many threads: those that are kept, however found, else measured in two or three seconds.

    For a first impression: what is measured in haste is measured again by `machine_limits`. None where there is no
    compiled extension.
    """
    known = _kept()
    if known is not None and str(threads) in known.peak:
        return _in_force(known)
    try:
        found = measure([threads], hasty=True)
    except NoLimits:
        return None
    return _keep(found if known is None else _better(known, found))


def _keep(found: Limits) -> Limits:
    try:
        write_atomically(_file(), json.dumps(found.to_json(), indent=1) + "\n")
    except OSError:
        pass  # an unwritable cache folder costs a measurement each time, nothing else
    return _in_force(found)


def _better(known: Limits, found: Limits) -> Limits:
    """The higher of each rate, the lower load; what only one of them has as it is."""

    def merge(old: Any, new: Any, pick: Callable[[float, float], float]) -> Any:
        if isinstance(old, dict) and isinstance(new, dict):
            names = [*old, *(name for name in new if name not in old)]
            return {name: merge(old.get(name), new.get(name), pick) for name in names}
        return old if new is None else new if old is None else pick(old, new)

    rates = [merge(getattr(known, name), getattr(found, name), max) for name in ("peak", "cache", "memory")]
    return Limits(found.machine, found.isa, rates[0], rates[1], rates[2], merge(known.load, found.load, min))


def _in_force(limits: Limits) -> Limits:
    extension = _extension._C
    if extension is not None and extension.isa() in limits.peak[str(limits.threads[0])]:
        limits.isa = extension.isa()
    return limits


def measure(threads: Iterable[int], *, hasty: bool = False) -> Limits:
    """Measures for those numbers of threads; in haste only the instruction set in force, and as if on a busy machine.

    Raises:
        NoLimits: there is no compiled extension.
    """
    extension = _extension._C
    if extension is None:
        raise NoLimits(f"the machine's limits are measured by the compiled extension: {_extension.missing}")
    limits = Limits(this_machine().key, extension.isa(), {}, {}, {}, {})
    haste = _HASTE if hasty else 1
    for count in threads:
        others = OthersLoad()
        isas = [extension.isa()] if hasty else extension.isa_supported()
        limits.peak[str(count)] = _measure_peaks(extension, count, isas, haste)
        limits.cache[str(count)] = _measure_caches(extension, count, haste)
        limits.memory[str(count)] = _measure_memory(extension, count, haste)
        limits.load[str(count)] = 1.0 if hasty else round(others.share(), 3)
    return limits


def _measure_peaks(extension: Any, threads: int, isas: list[str], haste: int) -> dict[str, dict[str, float]]:
    before, found = extension.isa(), {}
    try:
        for isa in isas:
            extension.set_isa(isa)
            rates = {unit: extension.measure_peak(unit, threads, _PEAK_SECONDS / haste) for unit in UNITS}
            found[isa] = {unit: rate for unit, rate in rates.items() if rate}
    finally:
        extension.set_isa(before)
    return found


def _measure_caches(extension: Any, threads: int, haste: int) -> dict[str, dict[str, float]]:
    sizes = cache_bytes()
    found = {}
    for level, size in sizes.items():
        # Half of a private cache; a third of the last one, which all threads (and neighbours) share.
        working_set = size // 3 // threads if level == max(sizes) else size // 2
        found[level] = {
            kind: extension.measure_stream(kind, working_set, "huge", False, threads, _CACHE_SECONDS / haste)
            for kind in ("read", "copy", "write")
        }
    return found


def _measure_memory(extension: Any, threads: int, haste: int) -> dict[str, dict[str, float]]:
    largest = max(cache_bytes().values())
    each = max(8 * largest // min(haste, 2), 128 << 20) // threads
    return {
        kind: {
            way_name(pages, streaming): extension.measure_stream(
                kind, each, pages, streaming, threads, _MEMORY_SECONDS / haste
            )
            for pages, streaming in ways
        }
        for kind, ways in MEMORY_WAYS.items()
    }


def level_number(level: str) -> int:
    """1 of `L1`."""
    return int(re.sub(r"\D", "", level) or 0)
