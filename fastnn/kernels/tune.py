"""The search behind the pure configurations, on request only: FASTNN_TUNE=1.

Without it `run` launches with the configuration that it is given. With it, the first launch of a kernel for a device,
types, options and shape bucket times the neighbours of that configuration and keeps the fastest, on disk too: later
processes take it from there. Never while a CUDA graph is captured.
"""

import functools
import hashlib
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.errors import TritonError

from .. import __version__
from .config import Arch, Attention, Columns, NormBackward, Product, Rows, Tile, power_of_2

Config = TypeVar("Config", Rows, Tile, Columns, NormBackward, Product, Attention)

LEAST_GAIN = 0.03
"""A neighbour must be this much faster to replace a configuration: medians of equal kernels differ by 1 to 2 %."""

MOST = 24
"""Configurations timed in one search; each compiles, a second or so."""

_RANGES: dict[str, tuple[int, int]] = {
    "rows": (1, 64),
    "block": (16, 4096),
    "bm": (16, 256),
    "bn": (16, 256),
    "bk": (16, 128),
    "warps": (1, 16),  # 16 warps of AMD's 64 lanes are all that a program may have
}
"""Field -> least and most; a step halves or doubles. `stages` goes by one, from 1 to 5."""

_FIELDS: dict[type, tuple[str, ...]] = {
    Rows: ("warps", "rows"),
    Tile: ("warps", "block", "rows"),
    Columns: ("warps", "block", "rows"),  # not into how many partial sums the rows are cut: they are allocated
    NormBackward: ("warps",),  # its other numbers decide how many partial sums there are
    Product: ("bm", "bn", "bk", "warps", "stages"),
    Attention: ("bm", "bn", "warps", "stages"),
}

_log = logging.getLogger("fastnn.tune")
_lock = threading.RLock()
_known: dict[Path, dict[str, list[Any]]] = {}


def _asked() -> bool:
    value = os.environ.get("FASTNN_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FASTNN_TUNE is 0 or 1, got {value!r}")
    return value == "1"


enabled = _asked()
"""Whether launches are tuned: FASTNN_TUNE=1 when the kernels were imported."""


def neighbours(config: Config) -> Iterator[Config]:
    """One field at a time, a step down and a step up. A row that is not whole stays alone in its program."""
    for field in _FIELDS[type(config)]:
        value = getattr(config, field)
        if field == "rows" and not getattr(config, "whole", True):
            continue
        steps = (value - 1, value + 1) if field == "stages" else (value // 2, value * 2)
        least, most = (1, 5) if field == "stages" else _RANGES[field]
        for step in steps:
            if least <= step <= most:
                yield config._replace(**{field: step})


def _time(call: Callable[[], object]) -> float:
    """Median milliseconds of a launch on the GPU, with a cold L2 cache."""
    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))


clock: Callable[[Callable[[], object]], float] = _time
"""How a launch is timed; tests put their own clock here."""


def search(launch: Callable[[Config], None], config: Config) -> Config:
    """The fastest of `config` and what coordinate descent from it meets; what does not compile or fit is passed over.

    Errors of `config` itself are raised: they are not the search's.
    """
    best, least = config, clock(lambda: launch(config))
    seen = {config}
    improved = True
    while improved and len(seen) < MOST:
        improved = False
        for found in neighbours(best):
            if found in seen or len(seen) >= MOST:
                continue
            seen.add(found)
            taken = _time_of(launch, found)
            if taken is not None and taken < (1 - LEAST_GAIN) * least:
                best, least, improved = found, taken, True
                break
    return best


def _time_of(launch: Callable[[Config], None], config: Config) -> float | None:
    try:
        return clock(lambda: launch(config))
    except torch.AcceleratorError:
        raise  # nothing runs in this process any more
    except (TritonError, RuntimeError) as error:  # out of registers or shared memory; passes of the compiler that fail
        _log.debug("passed over %s: %s", config, error)
        return None


def folder() -> Path:
    """Where results are kept: fastnn/tune in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastnn" / "tune"


@functools.cache
def _sources() -> str:
    """A digest of the kernels: results of other kernels say nothing."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _file(device: torch.device, arch: Arch) -> Path:
    """One for each device, version of fastnn and of Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    parts = (name, arch.name, f"fastnn-{__version__}-{_sources()}", f"triton-{triton.__version__}")
    return folder() / (re.sub(r"[^\w.-]+", "-", "_".join(parts)) + ".json")


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # absent, or cut off: it is only a cache
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, key: str, value: list[Any]) -> None:
    """Adds to what other processes have written meanwhile, in one step."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({**_read(path), key: value}, indent=1, sort_keys=True), "utf-8")
        part.replace(path)
    except OSError as error:
        warnings.warn(f"FASTNN_TUNE: results are not kept: {error}", RuntimeWarning, stacklevel=3)


def _config(found: Any, start: Config) -> Config | None:
    """A kept result as a configuration, unless no search from `start` can have found it."""
    if not isinstance(found, list) or [type(value) for value in found] != [type(value) for value in start]:
        return None
    config = type(start)(*found)
    for field, before, value in zip(config._fields, start, config, strict=True):
        least, most = _RANGES.get(field, (1, 5)) if field in _FIELDS[type(start)] else (before, before)
        if value != before and not least <= value <= most:
            return None
    return config


def bucket(sizes: Iterable[int]) -> str:
    """Shapes that share a result: each size rounded up to a power of two."""
    return "x".join(str(power_of_2(size)) for size in sizes)


def best(launch: Callable[[Config], None], config: Config, x: torch.Tensor, arch: Arch, key: str) -> Config:
    """What was found before for this device and key, else what a search finds now."""
    full = f"{key} {x.dtype} from {','.join(map(str, config))}"
    with _lock:
        path = _file(x.device, arch)
        known = _known.setdefault(path, _read(path))
        found = _config(known.get(full), config)
        if found is None:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                return config
            found = search(launch, config)
            known[full] = list(found)
            _write(path, full, list(found))
            _log.info("%s: %s", full, found)
        return found


def run(
    kernel: str,
    launch: Callable[[Config], None],
    config: Config,
    x: torch.Tensor,
    arch: Arch,
    sizes: tuple[int, ...],
    options: tuple[Any, ...] = (),
) -> None:
    """Launches with `config`, or tuned.

    Args:
        kernel: what is launched.
        launch: launches it with a configuration; it may be called many times, and overwrites what it wrote.
        config: the pure function's choice.
        x: the main tensor.
        arch: its GPU.
        sizes: what the choice depends on; of their powers of two.
        options: everything else that the time depends on.
    """
    if enabled:
        config = best(launch, config, x, arch, f"{kernel} {bucket(sizes)} {options}")
    launch(config)
