"""What this installation is and what it runs on; `python -m fastnn info` prints it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from . import _dispatch, _extension

_LABEL = 19
"""Width of the labels in the printed form."""


def info() -> dict[str, Any]:
    """Version, backends and why one is missing, instruction set, threads, GPUs and the machine, ready for JSON.

    A backend for GPUs is available where its kernels are there and a GPU is, too. `isa` holds the instruction set in
    force and what this CPU supports and this build contains, in rising order; `environment` the FASTNN_ variables that
    are set.
    """
    from . import __version__

    extension = _extension._C
    name, flags = _cpu()
    _dispatch.why_no_kernel("", "triton")  # Triton's kernels are there from the first question on
    return {
        "fastnn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "amx": "present, not used" if "amx_tile" in flags else "absent",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "backends": {backend: _backend(backend) for backend in _dispatch.BACKENDS},
        "forced_backend": _dispatch.backend_in_force(),
        "isa": {
            "in_force": extension.isa() if extension else None,
            "supported": extension.isa_supported() if extension else [],
            "compiled": extension.isa_compiled() if extension else [],
        },
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("FASTNN_")},
    }


def _backend(backend: str) -> dict[str, Any]:
    known = sorted(_dispatch.KERNELS) or [""]
    reasons = {op: _dispatch.why_no_kernel(op, backend) for op in known}
    ops = [op for op in known if op and not reasons[op]]
    missing = "" if ops or backend == "reference" else reasons[known[0]]
    if ops and backend in ("cuda", "triton"):
        missing = why_no_gpu() or _dispatch.too_old(0)
    return {"available": not missing, "ops": [] if backend == "reference" else ops, "why_not": missing}


def why_no_gpu() -> str:
    """Why torch has no GPU here, in words; empty where it has one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        memory = round(gpu.total_memory / 2**30, 1)
        found.append({"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": memory})
    return found


def _cpu() -> tuple[str, frozenset[str]]:
    """The processor's name and feature flags, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(fields.get("flags", "").split())


def machine_line() -> str:
    """The machine in one line, for reports of measurements."""
    found = info()
    isa = found["isa"]["in_force"] or "no extension"
    return f"{found['cpu']}, {found['threads']} of {found['cores']} threads, {isa}, torch {found['torch']}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """The command."""
    found = info()
    sys.stdout.write((json.dumps(found, indent=2) if arguments.json else _text(found)) + "\n")
    return 0


def _text(found: dict[str, Any]) -> str:
    isa = found["isa"]
    lines = {
        "fastnn": f"{found['fastnn']}, torch {found['torch']}, Python {found['python']}, {found['platform']}",
        "processor": f"{found['cpu']} (AMX {found['amx']})",
        "threads": f"{found['threads']} of {found['cores']}",
    }
    for index, gpu in enumerate(found["gpus"]):
        lines[f"GPU {index}"] = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
    for backend, state in found["backends"].items():
        runs = ", ".join(state["ops"]) or "every op, in plain PyTorch"
        why = f"built for {runs}, not used: {state['why_not']}" if state["ops"] else f"missing: {state['why_not']}"
        forced = " (forced)" if found["forced_backend"] == backend else ""
        lines[f"{backend} backend"] = (runs if state["available"] else why) + forced
    lines["instruction set"] = isa["in_force"] or "none, the extension is missing"
    lines["  supported here"] = ", ".join(isa["supported"])
    lines["  in this build"] = ", ".join(isa["compiled"])
    lines["environment"] = ", ".join(f"{key}={value}" for key, value in found["environment"].items())
    width = max(40, shutil.get_terminal_size((100, 24)).columns - _LABEL)
    return "\n".join(
        f"{label:<{_LABEL}}" + f"\n{' ' * _LABEL}".join(textwrap.wrap(text, width))
        for label, text in lines.items()
        if text
    )
