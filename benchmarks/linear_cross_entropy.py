"""Time and memory of linear + cross-entropy, forward and backward: ours, eager, compiled, and torch's own chunks.

    python benchmarks/linear_cross_entropy.py [--shape 8192x768x128000] [--dtype float32] [--threads 2] [--with fastnn]

Each contender runs once to warm up on 8 rows and once for the measurement, in a process of its own: memory is what the
process's peak grew by, less the gradients that everybody must return.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w), t)


def chunked(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return F.linear_cross_entropy(x, w, t, options=torch.nn.LinearCrossEntropyOptions())


def contenders() -> dict[str, Loss]:
    found: dict[str, Loss] = {"fastnn": fastnn.linear_cross_entropy, "eager": eager, "compile": torch.compile(eager)}
    return {**found, "chunked": chunked} if hasattr(F, "linear_cross_entropy") else found


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str, rows: int, features: int, classes: int, dtype: torch.dtype) -> str:
    """One line: seconds, megabytes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator).to(dtype).requires_grad_()
    w = torch.empty(classes, features, dtype=dtype)
    for part in w.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator) / features**0.5)
    w.requires_grad_()
    t = torch.randint(classes, (rows,), generator=generator)
    loss = contenders()[name]
    torch.autograd.grad(loss(x[:8], w, t[:8]), (x, w))
    if name == "compile":
        torch.compiler.reset()
    before, start = peak(), time.perf_counter()
    found = torch.autograd.grad(loss(x, w, t), (x, w))
    seconds = time.perf_counter() - start
    # The warm-up's weight gradient was given back and is used again: it is in the peak before.
    return f"{name:10} {seconds:8.2f} s {(peak() - before - found[0].nbytes) / 1e6:8.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8192x768x128000")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--with", dest="names", default=",".join(contenders()))
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.alone:
        print(measure(given.names, *map(int, given.shape.split("x")), getattr(torch, given.dtype)))
        return
    print(f"torch {torch.__version__}, {given.dtype}, {given.shape}, {given.threads} thread(s)", flush=True)
    for name in given.names.split(","):
        options = ["--shape", given.shape, "--dtype", given.dtype, "--threads", str(given.threads)]
        done = subprocess.run(
            [sys.executable, __file__, *options, "--with", name, "--alone"], capture_output=True, text=True
        )
        print(done.stdout.strip() or f"{name}: {done.stderr.strip().splitlines()[-1:]}", flush=True)


if __name__ == "__main__":
    main()
