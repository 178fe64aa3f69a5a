"""How wrong every implementation is, against float64 and against each other, on shared inputs.

    python tools/accuracy.py [--write docs/accuracy.md] [--ops softmax,norm] [--jobs N]

The cases are those of `fastnn.testing`, each run by `fastnn.testing.check` (so by the one error policy) on torch, on
every instruction set of the CPU kernels, on the CUDA kernels in tests/cuda_emu's emulator and on the Triton kernels in
Triton's interpreter; each column in a process of its own. Exit status 1 where a column breaks the policy.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastnn import testing
from fastnn.testing import Case, Target

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("contiguous", "tail")
"""Of the cases: every option of an op, outliers, sizes that no tile divides. Not `large_magnitude`, whose values
cancel: everybody is then as wrong as the rounded inputs, and the largest error says only that."""

LOST = 0.25
"""A result of which torch's error is a larger part of the largest true value than this has no digits to compare."""

TORCH, EMULATED, INTERPRETED = "torch", "CUDA emulated", "Triton interpreted"
ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon")

Key = tuple[str, str, str, str]
"""(op, part, dtype, case)."""


class Found(TypedDict):
    """What a column's process hands back."""

    results: dict[Key, tuple[Tensor, float]]
    """The result, and its share of the policy's bound."""
    truth: dict[Key, Tensor]
    """Of torch's process only."""
    inputs: str
    """A digest of everything that the cases were given."""


class Row(NamedTuple):
    """One line of the table."""

    op: str
    part: str
    dtype: str
    errors: dict[str, float]
    """Column -> the largest error over the cases, in units of eps times the largest true value of the case."""
    share: float
    """The largest share of the policy's bound, of any column."""
    apart: dict[tuple[str, str], float]
    """Pair of columns -> the largest difference, in the same units."""


@dataclass
class Table:
    """What was found."""

    columns: list[str]
    rows: list[Row]
    missing: dict[str, str]
    """Column -> why this machine cannot run it."""
    without: dict[str, list[str]] = field(default_factory=dict)
    """Column -> the ops that it has no kernels of."""
    cases: dict[str, int] = field(default_factory=dict)
    """Op -> how many cases."""
    lost: list[Key] = field(default_factory=list)
    """Results that are not in the numbers: see `LOST`."""


# ---- one column, in its own process


def columns() -> dict[str, str]:
    """Every column -> why it cannot run here, or "". The instruction sets are those compiled in."""
    found = {TORCH: ""}
    reasons = testing.unavailable()
    for target in sorted((*testing.targets()[1:], *reasons), key=lambda target: _rank(target.isa)):
        found[str(target)] = reasons.get(target, "")
    lacking = [name for name in ("g++", "clang++") if shutil.which(name) is None]
    compiler = os.environ.get("CXX") or len(lacking) < 2
    found[EMULATED] = "" if compiler and importlib.util.find_spec("pybind11") else "needs a C++ compiler and pybind11"
    found[INTERPRETED] = "" if importlib.util.find_spec("triton") else "Triton is not installed"
    return found


def _rank(isa: str) -> int:
    return ISAS.index(isa) if isa in ISAS else len(ISAS)


def environment(column: str) -> dict[str, str]:
    """What a column's process needs to be told from outside."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    own = {"TRITON_INTERPRET": "1"} if column == INTERPRETED else {"FASTNN_ISA": column} if column in ISAS else {}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **own}


def target_of(column: str) -> Target:
    """Where a column runs, in its own process."""
    if column == TORCH:
        return testing.REFERENCE
    if column == EMULATED:
        sys.path.insert(0, str(ROOT / "tests/cuda_emu"))
        import emulated_ops

        emulated_ops.library()
        return emulated_ops.Emulated()
    if column == INTERPRETED:
        from fastnn.testing import interpreter

        interpreter.repair()
        return testing.INTERPRETED
    return Target("cpu", column)


def shared_cases(op: str) -> list[Case]:
    """The cases that every column can run: a packed weight is the CPU kernels' own format."""
    return [
        case for case in testing.cases(op)
        if not case.wide and case.layout in LAYOUTS and case.forward_kernel == f"{op}_fwd"
    ]  # fmt: skip


def run_column(column: str, ops: list[str]) -> Found:
    """The results of every case; for torch the truth too. Raises where the policy is broken."""
    torch.set_num_threads(1)
    target = target_of(column)
    results: dict[Key, tuple[Tensor, float]] = {}
    truth: dict[Key, Tensor] = {}
    inputs = hashlib.sha256()
    for case, dtype in ((case, dtype) for op in ops for case in shared_cases(op) for dtype in testing.DTYPES):
        for tensor in case.inputs(testing.DTYPES[dtype]).values():
            inputs.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
        if not target.takes(case):
            continue
        verdict = testing.check(case, dtype, target)
        for part, (ours, true, theirs) in verdict.compared.items():
            key = (case.op, part, dtype, case.name)
            found = verdict.measured[part]
            if column == TORCH:
                truth[key] = true
                results[key] = (theirs, 0.0)
            else:
                results[key] = (ours, found.error / found.allowed if found.allowed else 0.0)
    return {"results": results, "truth": truth, "inputs": inputs.hexdigest()}


# ---- all of them


def run_all(names: list[str], ops: list[str], jobs: int) -> dict[str, Found]:
    """Each column in a process of its own; RuntimeError with the words of one that failed."""
    with tempfile.TemporaryDirectory() as folder:

        def one(item: tuple[int, str]) -> Found:
            number, column = item
            file = Path(folder) / f"{number}.pt"
            command = [sys.executable, __file__, "--column", column, "--ops", ",".join(ops), "--out", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment(column))
            if done.returncode != 0:
                raise RuntimeError(f"{column}:\n{done.stderr[-3000:]}")
            return torch.load(file)

        with ThreadPoolExecutor(jobs) as pool:
            found = dict(zip(names, pool.map(one, enumerate(names)), strict=True))
    different = [column for column in names if found[column]["inputs"] != found[TORCH]["inputs"]]
    if different:
        raise RuntimeError(f"other inputs than torch's in {different}")
    return found


def eps(dtype: str) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(testing.DTYPES[dtype]).eps


def difference(a: Tensor, b: Tensor, truth: Tensor, dtype: str) -> float:
    """max|a - b| over the finite elements, in units of eps times max|truth|; eps is that of the tested type.

    A float32 weight's gradient from half-precision rows is no better than the rows.
    """
    wide, other = a.double(), b.double()
    finite = wide.isfinite() & other.isfinite() & truth.isfinite()
    scale = torch.where(finite, truth.abs(), 0.0).max().item() if finite.any() else 0.0
    if scale == 0.0:
        return 0.0
    return torch.where(finite, (wide - other).abs(), 0.0).max().item() / (scale * eps(dtype))


def _is_lost(torchs: Tensor, truth: Tensor, dtype: str) -> bool:
    return difference(torchs, truth, truth, dtype) * eps(dtype) > LOST


def table(ops: list[str], jobs: int) -> Table:
    """Runs every column and compares."""
    known = columns()
    names = [column for column, reason in known.items() if not reason]
    found = run_all(names, ops, jobs)
    truth = found[TORCH]["truth"]
    groups: dict[tuple[str, str, str], list[Key]] = defaultdict(list)
    for key in truth:
        groups[key[:3]].append(key)
    result = Table(names, [], {column: reason for column, reason in known.items() if reason})
    parts = list(dict.fromkeys(part for _, part, _ in groups))
    places = {group: (ops.index(group[0]), parts.index(group[1])) for group in groups}
    for (op, part, dtype), keys in sorted(groups.items(), key=lambda item: places[item[0]]):
        errors, apart, share = {}, {}, 0.0
        lost = [key for key in keys if _is_lost(found[TORCH]["results"][key][0], truth[key], dtype)]
        keys = [key for key in keys if key not in lost]
        result.lost += lost
        having = [c for c in names if keys[0] in found[c]["results"]]
        of = {column: [found[column]["results"][key] for key in keys] for column in having}
        trues = [truth[key] for key in keys]
        for column in having:
            pairs = zip(of[column], trues, strict=True)
            errors[column] = max(difference(x, true, true, dtype) for (x, _), true in pairs)
            share = max([share, *(part for _, part in of[column])])
        for a, b in combinations(having, 2):
            pairs = zip(of[a], of[b], trues, strict=True)
            apart[a, b] = max(difference(x, y, true, dtype) for (x, _), (y, _), true in pairs)
        result.rows.append(Row(op, part, dtype, errors, share, apart))
    for column in names:
        if lacking := [op for op in ops if not any(row.op == op and column in row.errors for row in result.rows)]:
            result.without[column] = lacking
    result.cases = {op: len(shared_cases(op)) for op in ops}
    return result


# ---- the document


def number(value: float) -> str:
    """Two significant digits, no exponent below a million."""
    if value == 0.0:
        return "0"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main_lines(found: Table) -> Iterator[str]:
    """The table itself."""
    yield _line(["op", "result", "type", *found.columns, "of the bound", "furthest apart"])
    yield _line(["---"] * 3 + ["---:"] * (len(found.columns) + 1) + ["---"])
    for row in found.rows:
        cells = [number(row.errors[c]) if c in row.errors else "-" for c in found.columns]
        pair, most = max(row.apart.items(), key=lambda item: item[1])
        yield _line([row.op, row.part, row.dtype, *cells, f"{row.share:.2f}", f"{number(most)}: {' and '.join(pair)}"])


def pair_lines(found: Table, dtype: str) -> Iterator[str]:
    """The largest difference of every two columns, over all rows of a type."""
    rows = [row for row in found.rows if row.dtype == dtype]
    names = found.columns
    yield _line([dtype, *names[1:]])
    yield _line(["---"] + ["---:"] * (len(names) - 1))
    for a in names[:-1]:
        cells = [a]
        for b in names[1:]:
            values = [row.apart[a, b] for row in rows if (a, b) in row.apart]
            cells.append(number(max(values)) if values else "")
        yield _line(cells)


def document(found: Table) -> str:
    """docs/accuracy.md."""
    versions = [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if INTERPRETED in found.columns:
        import triton

        versions.append(f"Triton {triton.__version__}")
    counts = ", ".join(f"{op} {count}" for op, count in found.cases.items())
    missing = [f"- {column}: {reason}." for column, reason in found.missing.items()]
    missing += [f"- {column} has no kernels of {', '.join(ops)}." for column, ops in found.without.items()]
    pairs = [line for dtype in testing.DTYPES for line in ("", *pair_lines(found, dtype))]
    lines = [
        "# Accuracy",
        "",
        "Made by `python tools/accuracy.py --write docs/accuracy.md` (`make accuracy`); do not edit. No GPU took part.",
        "",
        f"{', '.join(versions)}, {platform.machine()}. Cases of the layouts {', '.join(LAYOUTS)}:",
        f"{counts};",
        "the same inputs and the same gradient of the output for every column, to the bit. [testing](testing.md) says",
        "what a case is, [numerics](numerics.md) what may be wrong by how much.",
        "",
        "- **The numbers** are the largest error against the reference in float64, over all cases and elements, in",
        "  units of eps x the largest true value of the case (eps: 1.2e-7 in fp32, 7.8e-3 in bf16, 9.8e-4 in fp16).",
        "  Rounding the truth itself costs up to 0.5.",
        f"  {len(found.lost)} results whose true value nearly cancels (torch's error is more than a quarter of it:",
        "  gradients of norms over one or two elements and the like) are within the policy and not in the numbers.",
        "- **torch**: its own eager op in that type on the CPU. Each instruction set of the CPU kernels has a column.",
        "  **CUDA emulated**: the source of the CUDA kernels, run by the emulator of `tests/cuda_emu`. **Triton",
        "  interpreted**: the Triton kernels in Triton's interpreter, with the repairs of `fastnn/testing`.",
        "- **of the bound**: the largest share of what the error policy allows that any column but torch uses, over",
        "  all cases; more than 1 would be a failure.",
        "- **furthest apart**: the largest difference between two columns, in the same units, and which two.",
        "",
        *main_lines(found),
        "",
        *(["Not in the table:", "", *missing, ""] if missing else []),
        "## Against each other",
        "",
        "The largest difference of every two columns over all ops and results, in the same units.",
        *pairs,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document (docs/accuracy.md)")
    parser.add_argument("--ops", default=",".join(testing.op_names()), help="only these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="columns at a time")
    parser.add_argument("--column", help=argparse.SUPPRESS)  # of this process
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ops = arguments.ops.split(",")
    if unknown := sorted(set(ops) - set(testing.op_names())):
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(testing.op_names())}")
    if arguments.column:
        torch.save(run_column(arguments.column, ops), arguments.out)
        return 0
    try:
        found = table(ops, arguments.jobs)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if arguments.write:
        arguments.write.write_text(document(found), "utf-8")
    else:
        sys.stdout.write("\n".join(main_lines(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
