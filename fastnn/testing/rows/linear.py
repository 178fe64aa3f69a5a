"""Rows of linear with its activations: the public ones, and a sweep of shapes between and beyond them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import nn
from ...ops.linear import linear, linear_reference
from ..bench_cases import Bar, BenchCase, Direction, Node, Ours, Results, Work, forward_backward, on_gpu
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int]
"""(M, K, N)."""

_PUBLIC: tuple[tuple[str, Shape, tuple[float, str], tuple[float, str]], ...] = (
    ("none", (1, 4096, 4096), (1.01, "openvino"), (1.38, "openvino")),
    ("gelu_tanh", (1, 4096, 4096), (1.20, "openvino"), (1.53, "openvino")),
    ("none", (32, 768, 3072), (1.07, "openvino"), (1.00, "openvino")),
    ("gelu_tanh", (32, 768, 3072), (1.23, "openvino"), (1.00, "openvino")),
    ("none", (128, 768, 3072), (1.03, "openvino"), (1.03, "openvino")),
    ("gelu_tanh", (128, 768, 3072), (1.06, "openvino"), (1.21, "openvino")),
    ("gelu_erf", (128, 768, 3072), (1.09, "onnxruntime"), (1.23, "openvino")),
    ("relu", (128, 768, 3072), (1.10, "onnxruntime"), (1.09, "openvino")),
    ("silu", (128, 768, 3072), (1.06, "onnxruntime"), (1.15, "openvino")),
    ("none", (2048, 768, 3072), (1.02, "openvino"), (1.14, "eager")),
    ("gelu_tanh", (2048, 768, 3072), (1.19, "openvino"), (1.23, "openvino")),
)
"""Activation, shape, and the bars of packed weights in float32 and bfloat16, with the contender that set them."""

_ROW_COUNTS = (1, 2, 5, 16, 31, 64, 127, 256, 509, 1024)
_FEATURES = ((768, 768), (1024, 4096), (3072, 768), (509, 1021), (100, 10), (1000, 3001))
_SWEEP: tuple[Shape, ...] = tuple((m, k, n) for k, n in _FEATURES for m in _ROW_COUNTS)
"""Every number of rows from a token to a batch, with layers of transformers, primes and a classifier's head."""

_WANTED = ("input", "weight", "bias")

_FUNCTION: dict[str, str | None] = {"none": None, "gelu_erf": "gelu"}
"""Names of activations that differ from fastnn's."""

_ONNX: dict[str, tuple[Node, ...]] = {
    "none": (),
    "relu": (Node("Relu", ("y",)),),
    "gelu_erf": (Node("Gelu", ("y",)),),
    "gelu_tanh": (Node("Gelu", ("y",), {"approximate": "tanh"}),),
    "silu": (Node("Sigmoid", ("y",), output="gate"), Node("Mul", ("y", "gate"))),
}


def _make(shape: Shape, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    m, k, n = shape
    found = {
        "input": torch.randn(m, k, generator=generator).to(dtype),
        "weight": (torch.randn(n, k, generator=generator) / k**0.5).to(dtype),
        "bias": torch.randn(n, generator=generator).to(dtype),
    }
    if direction == "fb":
        found["grad"] = torch.randn(m, n, generator=generator).to(dtype)
    return found


def _torch_linear(activation: str | None, inputs: Inputs) -> Tensor:
    return linear_reference(inputs["input"], inputs["weight"], inputs["bias"], activation)


def _our_linear(activation: Any, inputs: Inputs) -> Tensor:
    return linear(inputs["input"], inputs["weight"], inputs["bias"], activation=activation)


def _prepare(activation: Any, direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    call = partial(_our_linear, activation)
    if direction == "fb":
        return lambda: forward_backward(call, _WANTED, inputs)
    return lambda: (call(inputs),)


def _prepare_packed(activation: Any, inputs: Inputs) -> Callable[[], Results]:
    """A frozen layer, whose weight is packed by its first call."""
    weight, bias = inputs["weight"], inputs["bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], True, "meta", weight.dtype, activation=activation)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer.freeze().eval()
    return lambda: (layer(inputs["input"]),)


def _work(shape: Shape, dtype: str, direction: Direction) -> Work:
    m, k, n = shape
    size = DTYPES[dtype].itemsize
    unit = "bf16" if dtype == "bf16" else "fp32"
    if direction == "fwd":
        return Work((m * k + n * k + n) * size, m * n * size, 2 * m * n * k, unit)
    # Backward reads input, weight and the result's gradient, and writes the gradients of input, weight and bias.
    read, written = 2 * (m * k + n * k) + n + m * n, m * n + m * k + n * k + n
    return Work(read * size, written * size, 6 * m * n * k, unit)


def _case(
    name: str, shape: Shape, dtype: str, direction: Direction, bar: Bar | None = None, sweep: bool = False
) -> BenchCase:
    activation = _FUNCTION.get(name, name)
    backward = direction == "fb"
    ours = [Ours("", partial(_prepare, activation, direction), "linear_bwd" if backward else "linear_fwd")]
    if not backward:
        ours.append(
            Ours("packed", partial(_prepare_packed, activation), "linear_packed_fwd", bar or Bar(), frozen=True)
        )
    return BenchCase(
        family="linear",
        name=f"linear+{name}" + ("_fb" if backward else ""),
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(shape, dtype, direction),
        make=partial(_make, shape, direction),
        torch_call=partial(_torch_linear, activation),
        out_call=_torch_out if name == "none" and not backward else None,
        ours=tuple(ours),
        wanted=_WANTED if backward else (),
        constants=("weight", "bias"),
        onnx=(Node("Gemm", ("input", "weight", "bias"), {"transB": 1}), *_ONNX[name]) if not backward else (),
        sweep=sweep,
    )


def _torch_out(inputs: Inputs, out: Tensor) -> object:
    return torch.addmm(inputs["bias"], inputs["input"], inputs["weight"].t(), out=out)


def _cases() -> Iterator[BenchCase]:
    for name, shape, fp32, bf16 in _PUBLIC:
        for dtype, (bar, holder) in (("fp32", fp32), ("bf16", bf16)):
            yield _case(name, shape, dtype, "fwd", Bar(bar, holder=holder))
    activations = ("none", "gelu_tanh", "relu", "silu")
    for i, shape in enumerate(_SWEEP):
        for dtype in ("fp32", "bf16"):
            yield _case(activations[i % len(activations)], shape, dtype, "fwd", sweep=True)
            yield _case("gelu_tanh", shape, dtype, "fb", sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

_GPU: tuple[tuple[str, Shape, str, Direction], ...] = (
    ("none", (4096, 4096, 14336), "bf16", "fwd"),
    ("gelu_tanh", (4096, 4096, 14336), "bf16", "fwd"),
    ("silu", (4096, 4096, 14336), "bf16", "fwd"),
    ("relu", (2048, 768, 3072), "bf16", "fwd"),
    ("gelu_tanh", (2048, 768, 3072), "bf16", "fwd"),
    ("none", (16, 4096, 14336), "bf16", "fwd"),
    ("none", (1, 4096, 4096), "bf16", "fwd"),
    ("gelu_tanh", (4096, 4096, 4096), "fp32", "fwd"),
    ("gelu_tanh", (4096, 4096, 14336), "bf16", "fb"),
    ("none", (4096, 4096, 4096), "bf16", "fb"),
)
"""Layers of language models: a batch of tokens in training, few of them in decoding; a sentence encoder's layer."""


def _fused_by_torch(name: str, inputs: Inputs) -> Tensor:
    """cuBLASLt's own fused epilogue, which torch has for two activations: what an expert would call."""
    x, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=name == "gelu_tanh")


def _on_gpu(name: str, shape: Shape, dtype: str, direction: Direction) -> BenchCase:
    fused = name in ("relu", "gelu_tanh") and direction == "fwd"
    case = _case(name, shape, dtype, direction)
    return on_gpu(case, partial(_fused_by_torch, name) if fused else None, out_call=False)


GPU_CASES: tuple[BenchCase, ...] = tuple(_on_gpu(*row) for row in _GPU)
