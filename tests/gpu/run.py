"""Runs every test that needs a GPU, in parallel where pytest-xdist is installed, and keeps what came out.

`make test-gpu`, or `python tests/gpu/run.py [pytest's arguments]`. Unattended, ten minutes at most; status 0 where all
passed or there is no GPU (which is said; --require makes that 2), 1 where not. The result is a JSON file in
benchmarks/results/gpu_tests: machine, versions, counts and failures, and of each op, type and backend the largest
errors against float64 beside torch's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600.0
LAST_TESTS = 15.0
"""Seconds before the limit from which no further test is begun."""

PROCESSES = 12
"""At most: each holds a CUDA context, and half a gigabyte of the GPU's memory with it."""


def parse(junit: Path) -> dict[str, Any]:
    """Counts, failures, reasons of skips, and what the matrix recorded."""
    counts: Counter[str] = Counter()
    failures, skips, matrix, cpu = [], Counter(), {}, {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name', '')}"
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            counts["failed"] += 1
            failures.append({"test": name, "message": (bad.get("message") or "")[:2000]})
        elif skipped is not None:
            counts["skipped"] += 1
            skips[skipped.get("message") or ""] += 1
        else:
            counts["passed"] += 1
        found = {one.get("name"): one.get("value") for one in case.iter("property")}
        record(name, found, matrix, cpu)
    return {
        "counts": dict(counts),
        "failures": failures,
        "skipped": dict(skips),
        "matrix": [vars_of(key, value) for key, value in sorted(matrix.items())],
        "difference_to_cpu": cpu,
    }


def record(name: str, found: dict[str, str], matrix: dict[tuple[str, ...], list[float]], cpu: dict[str, float]) -> None:
    """Adds what one test recorded: the matrix's errors by (op, dtype, target, part), the worst of all layouts."""
    where = name.partition("[")[2].rstrip("]")
    if "largest_difference_to_cpu" in found:
        cpu[where] = float(found["largest_difference_to_cpu"])
    if "cells" not in found:
        return
    op, dtype, rest = where.split("-", 2)
    target = rest.rpartition("-")[0]
    for part in ("forward", "gradients"):
        if part in found:
            worst = matrix.setdefault((op, dtype, target, part), [0.0, 0.0, 0.0, 0])
            values = json.loads(found[part])
            worst[:3] = [max(a, b) for a, b in zip(worst[:3], values, strict=True)]
            worst[3] += 1


def vars_of(key: tuple[str, ...], value: list[float]) -> dict[str, Any]:
    """One line of the matrix."""
    op, dtype, target, part = key
    error, torchs, share, layouts = value
    return {
        "op": op,
        "dtype": dtype,
        "target": target,
        "part": part,
        "error": error,
        "torch_error": torchs,
        "share_of_budget": round(share, 3),
        "layouts": layouts,
    }


def table(found: dict[str, Any]) -> str:
    """A result's largest errors as a table for a document."""
    errors = {(one["op"], one["dtype"], one["part"], one["target"]): one for one in found["matrix"]}
    targets = sorted({one["target"] for one in found["matrix"]} - {"reference-cuda"})
    gpu, versions = found["gpu"], found["versions"]
    where = f"{gpu['name']}, driver {gpu['driver']}, torch {versions['torch']}"
    lines = [f"{where}, commit {found['commit']}, {found['date']}", ""]
    heads = ["op", "type", "part", "torch", *targets, *(f"{target}: of the budget" for target in targets)]
    lines += ["| " + " | ".join(heads) + " |", "| --- | --- | --- |" + " ---: |" * (1 + 2 * len(targets))]
    for op, dtype, part in dict.fromkeys(key[:3] for key in errors):
        here = [errors.get((op, dtype, part, target)) for target in targets]
        if not any(here):
            continue
        torchs = max(one["torch_error"] for one in here if one)
        cells = [op, dtype, part, f"{torchs:.2g}", *("-" if one is None else f"{one['error']:.2g}" for one in here)]
        cells += ["-" if one is None else f"{100 * one['share_of_budget']:.0f} %" for one in here]
        lines.append("| " + " | ".join(cells) + " |")
    counts = ", ".join(f"{number} {what}" for what, number in sorted(found["counts"].items()))
    return "\n".join([*lines, "", f"Tests: {counts}."])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_tests")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds; what is not begun by then is skipped")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a result's errors as a table, test nothing")
    parser.add_argument("--require", action="store_true", help="status 2 where there is no GPU")
    parser.add_argument("--processes", type=int, default=min(PROCESSES, os.cpu_count() or 1))
    arguments, rest = parser.parse_known_args()
    if arguments.table:
        sys.stdout.write(table(json.loads(arguments.table.read_text("utf-8"))) + "\n")
        return 0
    sys.path.insert(0, str(ROOT))
    from fastnn.bench.files import check_writable, write_atomically
    from fastnn.bench.gpu_machine import describe_gpu, why_no_gpu
    from fastnn.bench.machine import commit, versions

    if why := why_no_gpu():
        sys.stderr.write(f"tests/gpu: skipped, nothing was tested: {why}\n")
        return 2 if arguments.require else 0
    check_writable(arguments.results)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            str(ROOT / "tests" / "gpu"),
            f"--junitxml={junit}",
        ]
        command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        if find_spec("xdist") is not None and arguments.processes > 1:
            command += ["-n", str(arguments.processes), "--dist", "worksteal"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command.append(f"--gpu-deadline={time.time() + arguments.limit - LAST_TESTS}")
        stopped = ""
        child = subprocess.Popen([*command, *rest], cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
        try:
            child.wait(arguments.limit)
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {arguments.limit:g} s"
            child.send_signal(signal.SIGINT)  # pytest writes what it has
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        found = parse(junit) if junit.exists() else {"counts": {}, "failures": [], "matrix": []}
    left = sum(number for why, number in found.get("skipped", {}).items() if "no time was left" in why)
    if left and not stopped:
        stopped = f"no time was left for {left} tests"
    result = {
        "format": 1,
        "kind": "gpu tests",
        "gpu": describe_gpu(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(time.monotonic() - started, 1),
        "stopped": stopped,
        **found,
    }
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    target = arguments.results / f"{stamp}-test-gpu.json"
    write_atomically(target, json.dumps(result, indent=1) + "\n")
    sys.stderr.write(
        f"{result['gpu']['name']}: {found['counts']} in {result['seconds']} s {stopped}; kept in {target}\n"
    )
    return 0 if found["counts"].get("passed") and not found["counts"].get("failed") and not stopped else 1


if __name__ == "__main__":
    sys.exit(main())
