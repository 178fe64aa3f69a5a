"""The GPU that a measurement was taken on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..info import why_no_gpu as why_no_gpu

_DRIVER = Path("/proc/driver/nvidia/version")


def driver_version() -> str:
    """The NVIDIA driver's version; empty where the system does not tell."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d[\d.]+)\s", _DRIVER.read_text("utf-8"))
    except OSError:
        return ""
    return match[1] if match else ""


def describe_gpu(index: int = 0) -> dict[str, Any]:
    """What a result file says of a GPU; it must be there."""
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "count": torch.cuda.device_count(),
        "key": gpu_key(index),
    }


def gpu_key(index: int = 0) -> str:
    """For file names: where this is the same, limits are."""
    found = torch.cuda.get_device_properties(index)
    text = f"{found.name}-{found.multi_processor_count}-{driver_version()}-torch-{torch.__version__}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
