"""Rows of linear + cross-entropy: the public ones, and a sweep of batches and vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear_cross_entropy import linear_cross_entropy
from ..bench_cases import Bar, BenchCase, Direction, Ours, Results, Work, forward_backward, public_and_sweep
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int]
"""(rows, in_features, classes)."""

_PUBLIC: dict[tuple[Direction, str, Shape], Bar] = {
    ("fb", "fp32", (1024, 768, 50257)): Bar(1.4, holder="compile"),
    ("fb", "bf16", (1024, 768, 50257)): Bar(1.2, holder="compile"),
}
"""The rows of the performance page with their bars."""

_ROWS = (1, 5, 16, 64, 129, 512)
_HEADS = ((16, 10), (64, 1000), (129, 257), (256, 2), (512, 4099))
_PROJECTIONS = (*_HEADS, (768, 1024), (768, 8192), (1024, 512), (300, 3001), (64, 30522))
_SWEEP: tuple[Shape, ...] = tuple((rows, *projection) for projection in _PROJECTIONS for rows in _ROWS)
"""From a classifier's head to a small model's vocabulary, odd sizes among them; a token to a batch."""

_WANTED = ("input", "linear_weight")


def _make(shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows, features, classes = shape
    found = {
        "input": torch.randn(rows, features, generator=generator).to(dtype),
        "linear_weight": (torch.randn(classes, features, generator=generator) / features**0.5).to(dtype),
        "target": torch.randint(classes, (rows,), generator=generator),
    }
    return {**found, "grad": torch.ones((), dtype=dtype)} if direction == "fb" else found


def _unfused(inputs: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(inputs["input"], inputs["linear_weight"]), inputs["target"])


def _chunked(inputs: Inputs) -> Tensor:
    """torch 2.13's own way to keep the logits out of memory."""
    options: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined, unused-ignore]
    call: Any = F.linear_cross_entropy  # type: ignore[attr-defined, unused-ignore]
    loss: Tensor = call(inputs["input"], inputs["linear_weight"], inputs["target"], options=options)
    return loss


def _our_call(inputs: Inputs) -> Tensor:
    return linear_cross_entropy(inputs["input"], inputs["linear_weight"], inputs["target"])


def _prepare(direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    if direction == "fb":
        return lambda: forward_backward(_our_call, _WANTED, inputs)
    return lambda: (_our_call(inputs),)


def _case(direction: Direction, dtype: str, shape: Shape, bar: Bar, sweep: bool) -> BenchCase:
    rows, features, classes = shape
    size, backward = DTYPES[dtype].itemsize, direction == "fb"
    operands = (rows * features + classes * features) * size
    return BenchCase(
        family="linear_ce",
        name=f"linear_ce_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        # Both passes read the operands; backward writes their gradients.
        work=Work(
            (1 + backward) * (operands + rows * torch.int64.itemsize),
            size + backward * operands,
            (1 + 2 * backward) * 2 * rows * features * classes,
            unit="bf16" if dtype == "bf16" else "fp32",
        ),
        make=partial(_make, shape, direction),
        torch_call=_unfused,
        by_hand=_chunked if not sweep and hasattr(torch.nn, "LinearCrossEntropyOptions") else None,
        ours=(Ours("", partial(_prepare, direction), "linear_cross_entropy_fwd", bar),),
        wanted=_WANTED if backward else (),
        sweep=sweep,
    )


CASES: tuple[BenchCase, ...] = public_and_sweep(_case, _PUBLIC, _SWEEP)

GPU_CASES: tuple[BenchCase, ...] = ()
"""No kernels there yet."""
