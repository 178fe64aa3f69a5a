"""Rows of cross-entropy: the public ones, and a sweep of batches and vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.cross_entropy import cross_entropy
from ..bench_cases import Bar, BenchCase, Direction, Ours, Results, Work, forward_backward, on_gpu, public_and_sweep
from ..cases import DTYPES, Inputs

_PUBLIC: dict[tuple[Direction, str, tuple[int, int]], Bar] = {
    ("fb", "fp32", (2048, 50257)): Bar(8.5, 2.8, holder="compile"),
    ("fwd", "fp32", (2048, 50257)): Bar(1.8, holder="compile"),
    ("fb", "bf16", (2048, 50257)): Bar(6.1, 2.8, holder="compile"),
    ("fwd", "bf16", (2048, 50257)): Bar(2.0, holder="compile"),
}
"""The rows of the performance page with their bars."""

_OPERATIONS = 24
"""For each logit and pass: an exponential without softmax's product, as the page's shares of the limit have it."""

_VOCABULARIES = (2, 10, 100, 1000, 1021, 5003, 8192, 30522, 32000, 50000, 65537, 100003, 128256, 151936)
_SWEEP = tuple((rows, classes) for rows in (1, 7, 64, 509, 1024) for classes in _VOCABULARIES if rows * classes < 2**25)
"""From a digit's classes to the largest vocabularies, primes among them; a token to a batch."""


def _make(shape: tuple[int, int], direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    found = {
        "input": torch.randn(shape, generator=generator).to(dtype),
        "target": torch.randint(shape[1], (shape[0],), generator=generator),
    }
    return {**found, "grad": torch.ones((), dtype=dtype)} if direction == "fb" else found


def _torch_call(inputs: Inputs) -> Tensor:
    return F.cross_entropy(inputs["input"], inputs["target"])


def _our_call(inputs: Inputs) -> Tensor:
    return cross_entropy(inputs["input"], inputs["target"])


def _prepare(direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    if direction == "fb":
        return lambda: forward_backward(_our_call, ["input"], inputs)
    return lambda: (_our_call(inputs),)


def _case(direction: Direction, dtype: str, shape: tuple[int, int], bar: Bar, sweep: bool) -> BenchCase:
    logits = shape[0] * shape[1]
    size, passes = DTYPES[dtype].itemsize, 2 if direction == "fb" else 1
    targets = shape[0] * torch.int64.itemsize
    return BenchCase(
        family="cross_entropy",
        name=f"cross_entropy_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        # Forward writes one number, backward a gradient; both read the logits and the targets.
        work=Work(
            passes * (logits * size + targets), size + (passes - 1) * logits * size, passes * logits * _OPERATIONS
        ),
        make=partial(_make, shape, direction),
        torch_call=_torch_call,
        ours=(
            Ours("", partial(_prepare, direction), "cross_entropy_bwd" if passes == 2 else "cross_entropy_fwd", bar),
        ),
        wanted=("input",) if passes == 2 else (),
        sweep=sweep,
    )


CASES: tuple[BenchCase, ...] = public_and_sweep(_case, _PUBLIC, _SWEEP)

_GPU: dict[tuple[Direction, str], tuple[tuple[int, int], ...]] = {
    ("fwd", "bf16"): ((8192, 32000), (4096, 128256)),
    ("fb", "bf16"): ((8192, 32000), (4096, 128256)),
    ("fb", "fp32"): ((2048, 50257),),
}
"""Tokens of a training step by the vocabularies of language models."""

GPU_CASES: tuple[BenchCase, ...] = tuple(
    on_gpu(_case(direction, dtype, shape, Bar(), False))
    for (direction, dtype), shapes in _GPU.items()
    for shape in shapes
)
