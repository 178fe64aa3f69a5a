"""A GPU's limits, measured through torch: bandwidths of its memory, and matrix products in each type.

Each is the best of several trials timed by the GPU's events. The products are cuBLAS's on large squares, so what a
kernel reaches of them is the share of what the vendor's own library reaches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..testing.bench_cases import Work
from .files import write_atomically
from .gpu_machine import describe_gpu, gpu_key
from .limits import Bound, cache_folder, stream_seconds

FORMAT = 1

_BYTES, _SIDE, _FP32_SIDE, _TRIALS = 1 << 30, 8192, 4096, 12

UNITS: dict[str, tuple[torch.dtype, bool]] = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}
"""Unit -> type of the product's operands, and whether torch may round them to tf32."""


@dataclass
class GpuLimits:
    """Rates per second of one GPU."""

    machine: str
    gpu: dict[str, Any]
    peak: dict[str, float]
    """Unit -> operations."""
    memory: dict[str, float]
    """read, copy, write -> bytes, read and written together."""

    def bound(self, work: Work, threads: int = 1) -> Bound:
        """The least time for `work`: the longer of its operations at the peak and its bytes at the bandwidth."""
        streaming = stream_seconds(work, self.memory["read"], self.memory["copy"], self.memory["write"])
        computing = work.operations / self.peak.get(work.unit, self.peak["fp32"])
        if computing > streaming:
            return Bound(computing, f"{work.unit} operations")
        return Bound(streaming, "memory")

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": FORMAT, **vars(self)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> GpuLimits:
        """From what `to_json` gave; KeyError or TypeError where it is something else."""
        if found["format"] != FORMAT:
            raise KeyError("format")
        return cls(**{name: found[name] for name in ("machine", "gpu", "peak", "memory")})


def gpu_limits(*, fresh: bool = False) -> GpuLimits:
    """The limits of the first GPU, from the user's cache folder where they are known, else measured in a second."""
    known = None if fresh else _kept()
    if known is not None:
        return known
    found = measure()
    try:
        write_atomically(_file(), json.dumps(found.to_json(), indent=1) + "\n")
    except OSError:
        pass  # an unwritable cache folder costs a measurement each time, nothing else
    return found


def _file() -> Path:
    return cache_folder() / f"limits-{gpu_key()}.json"


def _kept() -> GpuLimits | None:
    try:
        found = GpuLimits.from_json(json.loads(_file().read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.machine == gpu_key() else None


def measure(device: str = "cuda", seconds_of: Callable[[Callable[[], object]], float] | None = None) -> GpuLimits:
    """Measures; `seconds_of` times a call and is the GPU's own events unless given."""
    seconds_of = seconds_of or best_seconds
    memory = _measure_memory(device, seconds_of, _BYTES if device == "cuda" else 1 << 16)
    peak = {}
    for unit, (dtype, tf32) in UNITS.items():
        side = (_FP32_SIDE if unit == "fp32" else _SIDE) if device == "cuda" else 32
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with _tf32(tf32):
            peak[unit] = 2 * side**3 / seconds_of(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    if device != "cuda":
        return GpuLimits("test", {}, peak, memory)
    torch.cuda.empty_cache()
    return GpuLimits(gpu_key(), describe_gpu(), peak, memory)


def _measure_memory(device: str, seconds_of: Callable[[Callable[[], object]], float], size: int) -> dict[str, float]:
    source, target = (torch.zeros(size // 4, device=device) for _ in range(2))
    return {
        "read": size / min(seconds_of(source.sum), seconds_of(source.amax)),
        "copy": 2 * size / seconds_of(lambda: target.copy_(source)),
        "write": size / seconds_of(lambda: target.fill_(1.0)),
    }


def best_seconds(call: Callable[[], object]) -> float:
    """The shortest of a dozen calls by the GPU's events, after two untimed ones."""
    found = []
    for trial in range(_TRIALS + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if trial >= 2:
            found.append(begin.elapsed_time(end) * 1e-3)
    return min(found)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
