"""Mistakes in the Triton kernels, one text replaced each, and the cases that must see it.

    TRITON_INTERPRET=1 python tests/interpreted/faults.py

plants them one by one in a copy of the package, in a process each. Exit status 0 if the unchanged copy passes all the
cases and every fault is caught.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    case: str
    """op/name/dtype; far/name/offset: as in far.py."""


SOFTMAX, LOSS, NORM = "softmax.py", "cross_entropy.py", "norm.py"
FAULTS = [
    Fault(
        "softmax: no mask on the columns",
        SOFTMAX,
        'inside = (r < rows) & (c < columns)\n        x = tl.load(x_row + c, mask=inside, other=-float("inf"))',
        'inside = (r < rows) & (c < BLOCK)\n        x = tl.load(x_row + c, mask=inside, other=-float("inf"))',
        "softmax/rows_apart/fp32",
    ),
    Fault(
        "softmax: the maximum is not subtracted",
        SOFTMAX,
        "        x = x - tl.max(x, 1)[:, None]\n",
        "",
        "softmax/wide_range/fp32",
    ),
    Fault(
        "softmax: the row stride is taken for the number of columns",
        SOFTMAX,
        "    x_row = x_ptr + r * x_stride\n",
        "    x_row = x_ptr + r * columns\n",
        "softmax/rows_apart/fp32",
    ),
    Fault(
        "softmax: a long row forgets to scale what it summed before",
        SOFTMAX,
        "lanes = lanes * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)[None, :]",
        "lanes = lanes + tl.sum(tl.exp(x - new), 0)[None, :]",
        "softmax/one_long_row/fp32",
    ),
    Fault(
        "softmax: offsets in 32 bits",
        SOFTMAX,
        "r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]\n    c = tl.arange(0, BLOCK)[None, :]\n"
        "    x_row = x_ptr + r * x_stride",
        "r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]\n    c = tl.arange(0, BLOCK)[None, :]\n"
        "    x_row = x_ptr + r * x_stride",
        "far/softmax/0",
    ),
    Fault(
        "softmax: backward adds up the gradient without the weights",
        SOFTMAX,
        "dx = y * (dy - tl.sum(dy * y, 1)[:, None])",
        "dx = y * (dy - tl.sum(dy, 1)[:, None])",
        "softmax/rows/fp32",
    ),
    Fault(
        "cross-entropy: ignored rows count in the mean",
        LOSS,
        "tl.store(row_weight_ptr + 2 * r, tl.where(counts, row_weight, 0.0), mask=here)",
        "tl.store(row_weight_ptr + 2 * r, tl.where(here, row_weight, 0.0), mask=here)",
        "cross_entropy/{ignore}/fp32",
    ),
    Fault(
        "cross-entropy: the cap has no derivative",
        LOSS,
        "            dx *= 1.0 - h * h\n",
        "            dx *= 1.0\n",
        "cross_entropy/{softcap}/fp32",
    ),
    Fault(
        "cross-entropy: any stride is taken for a multiple of 16 bytes",
        "library.py",
        "1 if columns % unit or any(stride % unit for stride in strides) else unit",
        "1 if columns % unit or not strides else unit",
        "cross_entropy/whole_vectors_rows_apart/fp32",
    ),
    Fault(
        "cross-entropy: any number of classes is taken for a multiple of 16 bytes",
        "library.py",
        "1 if columns % unit or any(stride % unit for stride in strides) else unit",
        "1 if any(stride % unit for stride in strides) else unit",
        "cross_entropy/rows_apart/fp32",
    ),
    Fault(
        "norm: the mean of the masked lanes counts",
        NORM,
        "d = tl.where(inside, x - first, 0.0)\n        shift",
        "d = x - first\n        shift",
        "norm/layer_rows_apart/fp32",
    ),
    Fault(
        "norm: the variance is not about the mean",
        NORM,
        "variance = tl.sum(d * d, 1)[:, None] / n - shift * shift",
        "variance = tl.sum(x * x, 1)[:, None] / n - first * first",
        "norm/{far_from_zero}/fp32",
    ),
    Fault(
        "norm: backward forgets the gradient of the sum",
        "norm_bwd.py",
        "                dx += tl.load(d_total_ptr + r * d_total_stride + c, mask=inside",
        "                dx += 0.0 * tl.load(d_total_ptr + r * d_total_stride + c, mask=inside",
        "norm/{add}/fp32",
    ),
    Fault(
        "norm: offsets in 32 bits",
        NORM,
        "r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]",
        "r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]",
        "far/norm/0",
    ),
    Fault(
        "activation: the bias is read by rows",
        "elementwise.py",
        "        z += tl.load(bias_ptr + c, mask=c < n, other=0.0).to(tl.float32)\n    y = ",
        "        z += tl.load(bias_ptr + r, mask=r < rows, other=0.0).to(tl.float32)\n    y = ",
        "activation/gelu_bias_unaligned/fp32",
    ),
    Fault(
        "activation: the row stride is taken for the number of columns",
        "elementwise.py",
        "r, c, inside = _tile(rows, n, ROWS, BLOCK)\n    z = tl.load(x_ptr + r * x_stride + c",
        "r, c, inside = _tile(rows, n, ROWS, BLOCK)\n    z = tl.load(x_ptr + r * n + c",
        "activation/silu_pair_rows_apart/fp32",
    ),
    Fault(
        "swiglu: a packed gradient is written side by side",
        "elementwise.py",
        "    d_stride = 2 * n if packed else n\n",
        "    d_stride = n\n",
        "activation/silu_packed_rows/fp32",
    ),
    Fault(
        "activation: the gradient of the bias takes in the rows past the end",
        "sums.py",
        "        db += tl.where(inside, dz, 0.0)\n",
        "        db += dz + 0.25\n",
        "activation/gelu_bias_rows/fp32",
    ),
    Fault(
        "activation: the parts of the gradient of the bias overlap",
        "sums.py",
        "    end = tl.minimum(rows, (part + 1) * part_rows)\n",
        "    end = rows\n",
        "activation/{bias}/fp32",
    ),
    Fault(
        "linear: offsets in 32 bits",
        "matmul.py",
        "m = (first + program % per_group % height).to(tl.int64) * BM",
        "m = (first + program % per_group % height) * BM",
        "far/linear/1",
    ),
    Fault(
        "linear: the tail of K is read",
        "matmul.py",
        "x = tl.load(a, mask=(m < M)[:, None] & (at + k < end)[None, :], other=0.0)",
        "x = tl.load(a, mask=(m < M)[:, None] & (at + k < end + BK)[None, :], other=0.0)",
        "linear/all_unaligned/fp32",
    ),
    Fault(
        "linear: the epilogue scales",
        "matmul.py",
        "activate(acc, ACTIVATION).to(c_ptr.dtype.element_ty), mask=inside)\n\n\n@triton.jit\ndef matmul_bulk",
        "activate(acc * 1.01, ACTIVATION).to(c_ptr.dtype.element_ty), mask=inside)\n\n\n@triton.jit\ndef matmul_bulk",
        "linear/all_unaligned/fp32",
    ),
    Fault(
        "attention: keys beyond the last are seen",
        "attention_tile.py",
        "        seen = n < S_k\n",
        "        seen = n < S_k + 1\n",
        "attention/plain/fp32",
    ),
    Fault(
        "attention: the causal edge is one off",
        "attention_tile.py",
        "seen = seen & (n <= m + right)",
        "seen = seen & (n < m + right)",
        "attention/causal/fp32",
    ),
    Fault(
        "attention: a new maximum does not rescale the output",
        "attention_fwd.py",
        "        acc = acc * correction[:, None]\n",
        "",
        "attention/rising/fp32",
    ),
    Fault(
        "attention: query heads read the wrong key head",
        "attention_fwd.py",
        "k_base = k_ptr + b * k_batch + h // group * k_head",
        "k_base = k_ptr + b * k_batch + h % (H // group) * k_head",
        "attention/grouped/fp32",
    ),
    Fault(
        "attention: dropout draws other numbers",
        "attention_tile.py",
        "counter = (row_base + m[:, None]) * groups + group",
        "counter = (row_base + m[:, None]) * groups + group + 1",
        "attention/dropout/fp32",
    ),
    Fault(
        "attention: offsets in 32 bits",
        "attention_fwd.py",
        "    first = (low + j).to(tl.int64)\n",
        "    first = low + j\n",
        "far/attention/0",
    ),
    Fault(
        "attention: backward forgets delta",
        "attention_bwd.py",
        "ds = p * (dp - delta[None, :])",
        "ds = p * dp",
        "attention/plain/fp32",
    ),
]


def run(what: str) -> None:
    """A case, by name or by what its name holds in braces."""
    import far

    from fastnn import testing

    op, name, dtype = what.split("/")
    if op == "far":
        return far.compare(name, int(dtype))
    if name.startswith("{"):
        found = [c for c in testing.cases(op) if name[1:-1] in c.name and not c.wide]
        assert found, what
    else:
        found = [testing.find_case(op, name)]
    for case in found:
        testing.check(case, dtype, testing.INTERPRETED)


def outcome(package: Path, cases: list[str]) -> str:
    """What a new process with that package says to the cases: "" where all pass."""
    read, write = os.pipe()
    if not (child := os.fork()):
        message = ""
        try:
            sys.path.insert(0, str(package))
            from fastnn.testing import interpreter

            interpreter.repair()
            for case in cases:
                run(case)
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"[:150].replace("\n", " ") or "failed"
        os.write(write, message.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    status = os.waitpid(child, 0)[1]
    return message or (f"crashed: {status}" if status else "")


def main() -> int:
    import numpy  # noqa: F401  (what every child needs, loaded once)
    import torch
    import triton  # noqa: F401

    torch.set_num_threads(1)
    # An editable install answers `import fastnn` before any path is looked at; not here.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "fastnn" not in type(finder).__module__]
    caught, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "fastnn"
        shutil.copytree(ROOT / "fastnn", package, ignore=shutil.ignore_patterns("__pycache__"))
        if message := outcome(Path(folder), sorted({fault.case for fault in FAULTS})):
            print(f"the unchanged package fails: {message}")
            return 2
        for fault in FAULTS:
            path = package / "kernels" / fault.file
            text = path.read_text()
            if text.count(fault.old) != 1:
                print(f"NOT PLANTED {fault.name}: {text.count(fault.old)} times in {fault.file}")
                continue
            path.write_text(text.replace(fault.old, fault.new))
            message = outcome(Path(folder), [fault.case])
            path.write_text(text)
            caught += bool(message)
            print(f"{'caught' if message else 'MISSED':>7}  {fault.name}  <- {message}", flush=True)
    print(f"{caught}/{len(FAULTS)} faults caught in {time.monotonic() - start:.0f} s")
    return 0 if caught == len(FAULTS) else 1


if __name__ == "__main__":
    sys.exit(main())
