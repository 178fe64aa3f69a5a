"""Rows of gated linear units and activations: the public ones, and a sweep of tokens and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.activation import gelu, swiglu
from ..bench_cases import (
    EXP_OPERATIONS,
    Bar,
    BenchCase,
    Direction,
    Node,
    Ours,
    Results,
    Work,
    forward_backward,
    on_gpu,
)
from ..cases import DTYPES, Inputs

Shape = tuple[int, int]
"""(rows, features) of the result."""

_PUBLIC: dict[tuple[Direction, str], Bar] = {
    ("fwd", "fp32"): Bar(4.3, 1.4, holder="compile"),
    ("fb", "fp32"): Bar(5.0, 1.05, holder="compile"),
    ("fwd", "bf16"): Bar(3.6, holder="compile"),
    ("fb", "bf16"): Bar(4.3, holder="compile"),
}
"""The rows of the performance page, at (2048, 11008), with their bars."""

_KINDS = {"swiglu": ("gate", "up"), "swiglu_packed": ("gate",), "gelu": ("input",), "bias_gelu": ("input", "bias")}
"""What is called -> its inputs."""

_FORWARD = EXP_OPERATIONS + 4
"""For each element: an exponential, the sum and quotient of the sigmoid, two products."""
_BACKWARD = EXP_OPERATIONS + 12
"""The same, the slope, and the products of both gradients."""

_SWEEP: tuple[Shape, ...] = tuple(
    (rows, features)
    for rows in (1, 8, 61, 128, 512, 1024)
    for features in (64, 256, 768, 1021, 2048, 3072, 4096, 5504, 11008, 14336)
)
"""The inner widths of transformers from a token to a batch, a prime among them."""

_ONNX = (
    Node("Sigmoid", ("gate",), output="s"),
    Node("Mul", ("gate", "s"), output="a"),
    Node("Mul", ("a", "up")),
)


def _make(kind: str, shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    rows, features = shape
    sizes = {"bias": (features,), "gate": (rows, 2 * features) if kind == "swiglu_packed" else shape}
    names = (*_KINDS[kind], "grad") if direction == "fb" else _KINDS[kind]
    return {name: torch.randn(sizes.get(name, shape), generator=generator).to(dtype) for name in names}


def _torch_call(kind: str, inputs: Inputs) -> Tensor:
    if kind == "gelu":
        return F.gelu(inputs["input"])
    if kind == "bias_gelu":
        return F.gelu(inputs["input"] + inputs["bias"])
    gate, up = inputs["gate"].chunk(2, -1) if kind == "swiglu_packed" else (inputs["gate"], inputs["up"])
    return F.silu(gate) * up


def _our_call(kind: str, inputs: Inputs) -> Tensor:
    if kind in ("gelu", "bias_gelu"):
        return gelu(inputs["input"], bias=inputs.get("bias"))
    return swiglu(inputs["gate"], inputs.get("up"))


def _prepare(kind: str, direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    call = partial(_our_call, kind)
    if direction == "fb":
        return lambda: forward_backward(call, _KINDS[kind], inputs)
    return lambda: (call(inputs),)


def _work(kind: str, shape: Shape, dtype: str, direction: Direction) -> Work:
    result, size = shape[0] * shape[1], DTYPES[dtype].itemsize
    given = (2 if kind.startswith("swiglu") else 1) * result + (shape[1] if kind == "bias_gelu" else 0)
    if direction == "fwd":
        return Work(given * size, result * size, result * _FORWARD)
    return Work((2 * given + result) * size, (result + given) * size, result * (_FORWARD + _BACKWARD))


def _case(kind: str, direction: Direction, dtype: str, shape: Shape, bar: Bar, sweep: bool = False) -> BenchCase:
    backward = direction == "fb"
    kernel = "activation_bwd" if backward else "activation_fwd"
    return BenchCase(
        family="glu",
        name=f"{kind}_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(kind, shape, dtype, direction),
        make=partial(_make, kind, shape, direction),
        torch_call=partial(_torch_call, kind),
        ours=(Ours("", partial(_prepare, kind, direction), kernel, bar),),
        wanted=_KINDS[kind] if backward else (),
        onnx=_ONNX if kind == "swiglu" and not backward else (),
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for (direction, dtype), bar in _PUBLIC.items():
        yield _case("swiglu", direction, dtype, (2048, 11008), bar)
    for shape in _SWEEP:
        for dtype in ("fp32", "bf16"):
            for kind in ("swiglu", "swiglu_packed", "gelu"):
                yield _case(kind, "fwd", dtype, shape, Bar(), sweep=True)
                yield _case(kind, "fb", dtype, shape, Bar(), sweep=True)
            yield _case("bias_gelu", "fwd", dtype, shape, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

_GPU: tuple[tuple[str, Direction, str, Shape], ...] = (
    *((kind, "fwd", "bf16", (8192, 11008)) for kind in ("swiglu", "swiglu_packed", "gelu", "bias_gelu")),
    *((kind, "fb", "bf16", (8192, 11008)) for kind in ("swiglu", "swiglu_packed", "gelu")),
    ("swiglu", "fwd", "fp32", (8192, 11008)),
)
"""Tokens of a training step by the inner width of a language model of 7 thousand million parameters."""


GPU_CASES: tuple[BenchCase, ...] = tuple(on_gpu(_case(*row, Bar())) for row in _GPU)
