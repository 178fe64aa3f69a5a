"""Rows of softmax: the public ones, and a sweep of lengths and counts between and beyond them, masked ones too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ... import _dispatch
from ...ops.masked_softmax import masked_softmax
from ...ops.softmax import softmax, softmax_reference
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
    public_and_sweep,
)
from ..cases import DTYPES, Inputs

_PUBLIC: dict[tuple[Direction, str, tuple[int, int]], Bar] = {
    ("fwd", "fp32", (64, 32000)): Bar(1.0, holder="onnxruntime"),
    ("bwd", "fp32", (64, 32000)): Bar(1.1, holder="eager"),
    ("fwd", "bf16", (64, 32000)): Bar(1.8, holder="eager_out"),
    ("bwd", "bf16", (64, 32000)): Bar(2.7, holder="eager"),
    ("fwd", "fp32", (49152, 512)): Bar(1.1, 1.35, holder="onnxruntime"),
    ("bwd", "fp32", (49152, 512)): Bar(4.2, 1.0, holder="eager"),
    ("fwd", "bf16", (49152, 512)): Bar(1.9, holder="eager_out"),
    ("bwd", "bf16", (49152, 512)): Bar(4.2, holder="eager"),
}
"""The rows of the performance page with their bars."""

_ELEMENTS = 1 << 20
_LENGTHS = (
    1,
    3,
    8,
    17,
    31,
    64,
    100,
    127,
    256,
    384,
    509,
    768,
    1000,
    1024,
    2048,
    4093,
    8192,
    12289,
    16381,
    50257,
    128256,
)
_ROWS = (1, 7, 64, 509)
_SWEEP = tuple(
    dict.fromkeys(
        [(max(_ELEMENTS // length, 1), length) for length in _LENGTHS]
        + [(rows, length) for rows in _ROWS for length in (16, 128, 509, 1000, 2048, 8191, 30000, 65537, 100003)]
    )
)
"""A million elements in rows of any length, and few rows of each length: primes, vocabularies, powers of two."""


def _make_forward(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"input": torch.randn(shape, generator=generator).to(dtype)}


def _make_backward(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    output = torch.softmax(torch.randn(shape, generator=generator), -1).to(dtype)
    return {"grad": torch.randn(shape, generator=generator).to(dtype), "output": output}


def _make_both(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {**_make_forward(shape, dtype, generator), "grad": torch.randn(shape, generator=generator).to(dtype)}


def _torch_forward(inputs: Inputs) -> Tensor:
    return softmax_reference(inputs["input"], -1)


def _torch_out(inputs: Inputs, out: Tensor) -> object:
    return torch.softmax(inputs["input"], -1, out=out)


def _torch_backward(inputs: Inputs) -> Tensor:
    grad, output = inputs["grad"], inputs["output"]
    return torch.ops.aten._softmax_backward_data.default(grad, output, 1, output.dtype)


def _our_forward(inputs: Inputs) -> Tensor:
    return softmax(inputs["input"], -1)


def _prepare_backward(inputs: Inputs) -> Callable[[], Results]:
    """The kernel of the backend that is in force now."""
    grad, output = inputs["grad"], inputs["output"]
    backward = _dispatch.KERNELS["softmax"][_dispatch.pick("softmax", grad)].bwd
    return lambda: (backward(grad, output, 1, False, output.dtype, True),)


def _prepare(direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    if direction == "fb":
        return lambda: forward_backward(_our_forward, ["input"], inputs)
    if direction == "bwd":
        return _prepare_backward(inputs)
    return lambda: (_our_forward(inputs),)


_MAKE = {"fwd": _make_forward, "bwd": _make_backward, "fb": _make_both}
_TENSORS = {"fwd": (1, 1), "bwd": (2, 1), "fb": (3, 2)}
"""Tensors of the input's size that must be read and written."""


def _case(direction: Direction, dtype: str, shape: tuple[int, int], bar: Bar, sweep: bool) -> BenchCase:
    elements = shape[0] * shape[1]
    size = elements * DTYPES[dtype].itemsize
    read, written = _TENSORS[direction]
    exps = 0 if direction == "bwd" else elements
    return BenchCase(
        family="softmax",
        name=f"softmax_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=Work(read * size, written * size, exps * EXP_OPERATIONS),
        make=partial(_MAKE[direction], shape),
        torch_call=_torch_backward if direction == "bwd" else _torch_forward,
        out_call=_torch_out if direction == "fwd" else None,
        ours=(Ours("", partial(_prepare, direction), "softmax_fwd" if direction == "fwd" else "softmax_bwd", bar),),
        wanted=("input",) if direction == "fb" else (),
        onnx=(Node("Softmax", ("input",), {"axis": -1}),) if direction == "fwd" else (),
        sweep=sweep,
    )


_SCALE = 0.125


def _make_masked(
    shape: tuple[int, int], direction: Direction, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[:, 0] = True  # in every row something takes part: torch's has no zeros for the others
    found = {**_make_forward(shape, dtype, generator), "mask": mask}
    return {**found, "grad": torch.randn(shape, generator=generator).to(dtype)} if direction == "fb" else found


def _torch_masked(inputs: Inputs) -> Tensor:
    return torch.softmax((inputs["input"] * _SCALE).masked_fill(~inputs["mask"], -1e4), -1)


def _our_masked(inputs: Inputs) -> Tensor:
    return masked_softmax(inputs["input"], inputs["mask"], _SCALE)


def _prepare_masked(direction: Direction, inputs: Inputs) -> Callable[[], Results]:
    if direction == "fb":
        return lambda: forward_backward(_our_masked, ["input"], inputs)
    return lambda: (_our_masked(inputs),)


def _masked_case(direction: Direction, dtype: str, shape: tuple[int, int]) -> BenchCase:
    elements = shape[0] * shape[1]
    size = elements * DTYPES[dtype].itemsize
    read, written = _TENSORS[direction]
    return BenchCase(
        family="softmax",
        name=f"masked_softmax_{direction}",
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=Work(read * size + elements, written * size, elements * EXP_OPERATIONS),
        make=partial(_make_masked, shape, direction),
        torch_call=_torch_masked,
        ours=(
            Ours("", partial(_prepare_masked, direction), f"masked_softmax_{'bwd' if direction == 'fb' else 'fwd'}"),
        ),
        wanted=("input",) if direction == "fb" else (),
        sweep=True,
    )


CASES: tuple[BenchCase, ...] = (
    *public_and_sweep(_case, _PUBLIC, _SWEEP),
    *(_masked_case("fwd", dtype, shape) for shape in _SWEEP if shape[1] >= 8 for dtype in ("fp32", "bf16")),
    *(_masked_case("fb", dtype, shape) for shape in _SWEEP if shape[1] >= 8 for dtype in ("fp32", "bf16")),
)

_GPU: dict[tuple[Direction, str], tuple[tuple[int, int], ...]] = {
    ("fwd", "bf16"): ((49152, 512), (8192, 4096), (4096, 32000), (2048, 128256)),
    ("fwd", "fp32"): ((49152, 512), (4096, 32000)),
    ("bwd", "bf16"): ((49152, 512), (4096, 32000)),
    ("bwd", "fp32"): ((49152, 512),),
    ("fb", "bf16"): ((8192, 4096),),
}
"""Rows that fill a GPU: attention scores and vocabularies."""

GPU_CASES: tuple[BenchCase, ...] = tuple(
    on_gpu(_case(direction, dtype, shape, Bar(), False))
    for (direction, dtype), shapes in _GPU.items()
    for shape in shapes
)
