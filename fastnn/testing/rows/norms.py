"""Rows of layer norm and RMS norm, alone and of a residual sum: the public ones, and a sweep of lengths and counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...ops.norm import NormOptions, add_layer_norm, add_rms_norm, layer_norm, norm_reference, rms_norm
from ..bench_cases import Bar, BenchCase, Direction, Ours, Results, Work, as_results, forward_backward, on_gpu
from ..cases import DTYPES, Inputs

Shape = tuple[int, int]
"""(rows, columns)."""

_PUBLIC: dict[tuple[str, Direction], dict[str, Bar]] = {
    ("layernorm", "fwd"): {"fp32": Bar(1.8, holder="eager"), "bf16": Bar(2.6, holder="compile")},
    ("add_layernorm", "fwd"): {"fp32": Bar(1.2, holder="eager"), "bf16": Bar(3.0, holder="eager")},
    ("rmsnorm", "fwd"): {"fp32": Bar(1.4, holder="compile"), "bf16": Bar(2.8, holder="compile")},
    ("add_rmsnorm", "fwd"): {"fp32": Bar(1.1, holder="compile"), "bf16": Bar(2.2, holder="compile")},
    ("layernorm", "fb"): {"fp32": Bar(1.4, holder="eager"), "bf16": Bar(2.8, holder="compile")},
    ("add_layernorm", "fb"): {"fp32": Bar(2.5, 1.4, holder="eager"), "bf16": Bar(1.8, holder="compile")},
    ("rmsnorm", "fb"): {"fp32": Bar(1.7, holder="compile"), "bf16": Bar(3.0, holder="compile")},
}
"""The rows of the performance page, at (2048, 768), with their bars."""

_EPS = 1e-5
_OPERATIONS = 8
"""For each element and pass: the two moments, subtraction, scaling, weight and bias."""

_ELEMENTS = 1 << 20
_LENGTHS = (1, 7, 16, 31, 64, 100, 128, 255, 256, 384, 509, 512, 640, 1000, 1024, 1280, 1536, 2049, 3072, 4093, 5120)
_LONG = (8192, 12288, 16384, 32749, 65536, 131072)
_SWEEP: tuple[Shape, ...] = (
    *((max(_ELEMENTS // length, 1), length) for length in (*_LENGTHS, *_LONG)),
    *((rows, length) for rows in (1, 8, 61, 128) for length in (128, 384, 768, 1021, 3001, 4096)),
    (8192, 768),
    (2048, 4096),
)
"""A million elements in rows of any length, few rows of the usual hidden sizes, and two that leave the caches."""


def _make(kind: str, shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    names = ("input", "residual") if kind.startswith("add_") else ("input",)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name in names}
    found["weight"] = torch.randn(shape[1], generator=generator).to(dtype)
    if kind.endswith("layernorm"):
        found["bias"] = torch.randn(shape[1], generator=generator).to(dtype)
    return {**found, "grad": torch.randn(shape, generator=generator).to(dtype)} if direction == "fb" else found


def _torch_call(kind: str, inputs: Inputs) -> Tensor | Results:
    options = NormOptions(1, _EPS, kind.endswith("rmsnorm"))
    if "residual" not in inputs:
        return norm_reference(inputs["input"], inputs["weight"], inputs.get("bias"), options)
    total = inputs["input"] + inputs["residual"]
    return norm_reference(total, inputs["weight"], inputs.get("bias"), options), total


def _rms_by_hand(inputs: Inputs) -> Tensor:
    """In float32, one operation after the other, as models have it."""
    x = inputs["input"].float()
    y: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPS) * inputs["weight"].float()
    return y.to(inputs["input"].dtype)


def _our_call(kind: str, inputs: Inputs) -> Tensor | Results:
    x, weight, bias = inputs["input"], inputs["weight"], inputs.get("bias")
    if kind == "layernorm":
        return layer_norm(x, weight.shape, weight, bias, _EPS)
    if kind == "rmsnorm":
        return rms_norm(x, weight.shape, weight, _EPS)
    if kind == "add_layernorm":
        return add_layer_norm(x, inputs["residual"], weight, bias, _EPS)
    return add_rms_norm(x, inputs["residual"], weight, _EPS)


def _wanted(kind: str) -> tuple[str, ...]:
    first = ("input", "residual") if kind.startswith("add_") else ("input",)
    return (*first, "weight", "bias") if kind.endswith("layernorm") else (*first, "weight")


def _prepare(kind: str, direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    call = partial(_our_call, kind)
    if direction == "fb":
        return lambda: forward_backward(call, _wanted(kind), inputs)
    return lambda: as_results(call(inputs))


def _work(kind: str, shape: Shape, dtype: str, direction: Direction) -> Work:
    elements, size = shape[0] * shape[1], DTYPES[dtype].itemsize
    summands, parameters = (2 if kind.startswith("add_") else 1), (2 if kind.endswith("layernorm") else 1)
    read, written = summands * elements + parameters * shape[1], summands * elements
    if direction == "fb":  # backward reads what was normalized, its result's gradient and the weight
        read += 2 * elements + shape[1]
        written = (1 + summands) * elements + parameters * shape[1]
    passes = 2 if direction == "fb" else 1
    return Work(read * size, written * size, passes * elements * _OPERATIONS)


def _case(kind: str, direction: Direction, dtype: str, shape: Shape, bar: Bar, sweep: bool = False) -> BenchCase:
    backward = direction == "fb"
    return BenchCase(
        family="norms",
        name=f"{kind}_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(kind, shape, dtype, direction),
        make=partial(_make, kind, shape, direction),
        torch_call=partial(_torch_call, kind),
        ours=(Ours("", partial(_prepare, kind, direction), "norm_bwd" if backward else "norm_fwd", bar),),
        wanted=_wanted(kind) if backward else (),
        by_hand=_rms_by_hand if kind == "rmsnorm" else None,
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for (kind, direction), bars in _PUBLIC.items():
        for dtype, bar in bars.items():
            yield _case(kind, direction, dtype, (2048, 768), bar)
    for shape in _SWEEP:
        for dtype in ("fp32", "bf16"):
            for kind in ("layernorm", "rmsnorm"):
                yield _case(kind, "fwd", dtype, shape, Bar(), sweep=True)
                yield _case(kind, "fb", dtype, shape, Bar(), sweep=True)
            yield _case("add_layernorm", "fwd", dtype, shape, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

_GPU: tuple[tuple[str, Direction, str, Shape], ...] = (
    *((kind, "fwd", "bf16", (8192, 4096)) for kind in ("layernorm", "rmsnorm", "add_layernorm", "add_rmsnorm")),
    *((kind, "fb", "bf16", (8192, 4096)) for kind in ("layernorm", "rmsnorm", "add_rmsnorm")),
    ("layernorm", "fwd", "fp32", (8192, 4096)),
    ("rmsnorm", "fwd", "bf16", (65536, 768)),
    ("rmsnorm", "fwd", "bf16", (2048, 16384)),
)
"""Tokens of a training step by the hidden sizes of language models."""


def _on_gpu(kind: str, direction: Direction, dtype: str, shape: Shape) -> BenchCase:
    case = _case(kind, direction, dtype, shape, Bar())
    return on_gpu(case, case.by_hand)


GPU_CASES: tuple[BenchCase, ...] = tuple(_on_gpu(*row) for row in _GPU)
