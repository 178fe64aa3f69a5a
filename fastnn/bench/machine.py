"""What a measurement was taken on: processor, caches, kernel, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..info import info

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PROC = Path("/proc/cpuinfo")
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ROOT = Path(__file__).resolve().parents[2]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


@cache
def cache_bytes() -> dict[str, int]:
    """Size of each level of data cache in bytes, `L1` to `L3`; usual sizes where the system does not tell."""
    found = {}
    for folder in sorted(_CACHES.glob("index*")):
        level, kind, size = (_read(folder / name).strip() for name in ("level", "type", "size"))
        match = re.fullmatch(r"(\d+)([KM])", size)
        if match and kind in ("Data", "Unified"):
            found[f"L{level}"] = int(match[1]) << (10 if match[2] == "K" else 20)
    return found or {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


@cache
def cpu_family() -> tuple[str, int, int]:
    """Vendor, family and model number of the processor; zeros where the system does not tell."""
    text = _read(_PROC)

    def field(name: str) -> str:
        match = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
        return match[1].strip() if match else ""

    return field("vendor_id"), int(field("cpu family") or 0), int(field("model") or 0)


def allowed_cpus() -> list[int]:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy_ticks() -> dict[int, tuple[int, int]]:
    """Busy and total clock ticks of each processor since the system started."""
    found = {}
    for match in re.finditer(r"^cpu(\d+) (.*)$", _read(Path("/proc/stat")), re.MULTILINE):
        ticks = [int(field) for field in match[2].split()[:8]]
        found[int(match[1])] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    return found


def load_of_cpus(seconds: float = 0.3) -> dict[int, float]:
    """Share of the time that each allowed processor was busy during a pause of `seconds`; empty if not told."""
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    return {
        cpu: (after[cpu][0] - before[cpu][0]) / max(after[cpu][1] - before[cpu][1], 1)
        for cpu in allowed_cpus()
        if cpu in before and cpu in after
    }


def idlest_cpus(count: int) -> list[int]:
    """The `count` allowed processors that are least busy at the moment."""
    load = load_of_cpus()
    return sorted(sorted(allowed_cpus(), key=lambda cpu: load.get(cpu, 0.0))[:count])


class OthersLoad:
    """How much of the allowed processors' time other processes take from now on."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = self._busy_seconds(), self._own_seconds(), time.monotonic()

    @staticmethod
    def _busy_seconds() -> float:
        ticks = _busy_ticks()
        return sum(ticks[cpu][0] for cpu in allowed_cpus() if cpu in ticks) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own_seconds() -> float:
        """Of this process and of its children that have ended."""
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system

    def share(self) -> float:
        """0 for an otherwise idle machine, 1 where others could fill all of it; 0 where the system does not tell."""
        wall = max(time.monotonic() - self._start, 1e-3) * len(allowed_cpus())
        others = (self._busy_seconds() - self._busy) - (self._own_seconds() - self._own)
        return min(max(others / wall, 0.0), 1.0)


@dataclass(frozen=True)
class Machine:
    """The machine as far as it decides about speed: results are comparable where these are equal."""

    cpu: str
    isa: str
    cores: int
    kernel: str

    @property
    def key(self) -> str:
        """For file names."""
        text = f"{self.cpu}-{self.isa}-{self.cores}-{self.kernel}"
        return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def this_machine() -> Machine:
    """The machine this process runs on."""
    found = info()
    _, family, model = cpu_family()
    name = found["cpu"] if not family else f"{found['cpu']} {family}.{model}"
    isa = found["isa"]["supported"][-1] if found["isa"]["supported"] else "reference"
    return Machine(name, isa, len(allowed_cpus()), f"{platform.system()} {platform.release()}")


def versions() -> dict[str, str]:
    """Versions of what took part or could have."""
    found = {"python": platform.python_version(), "fastnn": info()["fastnn"], "torch": torch.__version__}
    for package in ("onnxruntime", "openvino", "torchao", "llama-cpp-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    libc = " ".join(part for part in platform.libc_ver() if part)
    return {**found, "libc": libc} if libc else found


def commit() -> str:
    """The commit of the source folder that runs, with `+` if tracked files differ; empty outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 and (_ROOT / ".git").exists() else ""


def describe() -> dict[str, Any]:
    """Everything a result file says about where it was measured."""
    vendor, family, model = cpu_family()
    found = info()
    thp = re.search(r"\[(\w+)\]", _read(_THP))
    machine = this_machine()
    return {
        "cpu": found["cpu"],
        "vendor": vendor,
        "family": family,
        "model": model,
        "amx": found["amx"],
        "isa": found["isa"]["in_force"],
        "isa_supported": found["isa"]["supported"],
        "cores": machine.cores,
        "caches": cache_bytes(),
        "kernel": machine.kernel,
        "huge_pages": thp[1] if thp else "unknown",
        "key": machine.key,
    }


def bars_hold(machine: dict[str, Any]) -> bool:
    """Whether the performance page's bars are meant for this machine: AVX-512 with BF16 and VNNI, without AMX."""
    return machine["isa"] == "avx512_bf16" and machine["amx"].startswith("absent")
