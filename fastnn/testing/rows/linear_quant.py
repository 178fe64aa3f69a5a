"""Rows of dense layers on codes: int8 rows times int8 weights, 4-bit weights times int8 rows, 4-bit weights alone.

The plain call is the float layer that was quantised. Errors of rows whose inputs are rounded are measured against the
definition in plain torch, those of weights alone against the float layer with the weight that the codes stand for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import nn
from ...ops.groups import quantize_groups
from ...ops.linear_groupwise import linear_groupwise_reference
from ...ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from ..bench_cases import Bar, BenchCase, Ours, Results, Work
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int]
"""(M, K, N)."""

GROUP = 32
"""Columns that share a scale of 4-bit codes; the least common one, which every contender has."""

_PUBLIC: tuple[tuple[str, str, Shape, Bar], ...] = (
    ("linear_int8", "fp32", (1, 4096, 4096), Bar()),
    ("linear_int8", "fp32", (16, 4096, 4096), Bar(1.3, holder="torch.ao")),
    ("linear_int8", "fp32", (128, 4096, 4096), Bar(1.05, holder="onnxruntime")),
    ("linear_int8", "fp32", (1, 4096, 11008), Bar(1.35, holder="torch.ao")),
    ("linear_int8", "fp32", (1, 4096, 22016), Bar(1.35, holder="torch.ao")),
    ("linear_int8", "fp32", (16, 4096, 11008), Bar(1.3, holder="torch.ao")),
    ("linear_int8", "fp32", (128, 4096, 11008), Bar(1.05, holder="onnxruntime")),
    ("linear_int4_int8", "fp32", (1, 4096, 4096), Bar()),
    ("linear_int4_int8", "fp32", (16, 4096, 4096), Bar(1.0, holder="openvino")),
    ("linear_int4_int8", "fp32", (128, 4096, 4096), Bar()),
    ("linear_int4_int8", "fp32", (1, 4096, 22016), Bar(1.4, holder="llama.cpp")),
    ("linear_int4", "fp32", (1, 4096, 22016), Bar()),
    ("linear_int4", "fp32", (16, 4096, 4096), Bar()),
    ("linear_int4", "bf16", (1, 4096, 22016), Bar()),
    ("linear_int4", "bf16", (16, 4096, 4096), Bar()),
)
"""Row, type of the inputs, shape and the bar of the performance page; (1, 4096, 22016) is gate and up of a model of
7 billion weights in one, whose codes no cache here holds. The bars of one row are of weights from memory: those of
(1, 4096, 4096) stay in the last level cache."""

_FEATURES = ((576, 1536), (1536, 576), (768, 3072), (3072, 768), (2048, 2048), (1000, 3001))
_SWEEP: tuple[Shape, ...] = tuple((m, k, n) for k, n in _FEATURES for m in (1, 2, 4, 7, 16, 31, 64, 127, 256, 1024))
"""Layers of sentence encoders and small language models, from a token to a batch."""


def _make(name: str, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    """The weight is one that codes stand for, in float32, each scale's extreme among them: rounded again it stays."""
    m, k, n = shape
    group, low, high = (k, -127, 127) if name == "linear_int8" else (GROUP, -8, 7)
    codes = torch.randint(low, high + 1, (n, k), generator=generator)
    codes[:, ::group] = low
    scale = (0.5 + torch.rand(n, (k + group - 1) // group, generator=generator)).half() / (-low * k**0.5)
    return {
        "input": torch.randn(m, k, generator=generator).to(dtype),
        "weight": codes * scale.half().float().repeat_interleave(group, 1)[:, :k],
        "bias": torch.randn(n, generator=generator).to(dtype),
    }


def _float_layer(inputs: Inputs) -> Tensor:
    x, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    return F.linear(x, weight.to(x.dtype), bias)


def _definition(name: str, inputs: Inputs) -> Tensor:
    """The row in plain torch, with the inputs rounded."""
    x, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    if name == "linear_int8":
        return linear_int8_reference(x, *quantize_rows_reference(weight), bias, None)
    return linear_groupwise_reference(x, *quantize_groups(weight, GROUP), bias, GROUP, True, None)


def _layer(name: str, inputs: Inputs) -> torch.nn.Module:
    weight, bias = inputs["weight"], torch.nn.Parameter(inputs["bias"], requires_grad=False)
    if name == "linear_int8":
        return nn.Int8Linear.from_float(weight, bias).eval()
    return nn.Int4Linear.from_float(weight, bias, group_size=GROUP, int8_input=name == "linear_int4_int8").eval()


def _prepare(name: str, inputs: Inputs) -> Callable[[], Results]:
    x, layer = inputs["input"], _layer(name, inputs)
    return lambda: (layer(x),)


def _exported(name: str, inputs: Inputs) -> bytes:
    """The layer as `fastnn.export` writes it: ONNX's operators on the same codes.

    4-bit weights are one operator, whether inputs are rounded is the engine's affair: OpenVINO does, onnxruntime not.
    """
    from ...to_onnx import export  # needs onnx, onnxscript and onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        export(_layer("linear_int8" if name == "linear_int8" else "linear_int4", inputs), path, inputs["input"])
        return path.read_bytes()


def _torch_int8(inputs: Inputs, threads: int) -> Callable[[], Results]:
    """torch.ao's dynamic layer: one scale and zero point for all inputs, eight bits of them."""
    x, weight, bias = inputs["input"], inputs["weight"], inputs["bias"]
    codes, scale = quantize_rows_reference(weight)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(codes, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, bias.float())
    return lambda: (torch.ops.quantized.linear_dynamic(x, packed, False),)


def _torch_int4(inputs: Inputs, threads: int) -> Callable[[], Results]:
    """torch's kernel for 4-bit weights; it has no bias."""
    x, bias = inputs["input"], inputs["bias"]
    codes, scale, _ = quantize_groups(inputs["weight"], GROUP)
    columns = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(columns, 1)
    steps = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).to(x.dtype).contiguous()
    return lambda: (torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, steps).add_(bias),)


def _ggml_int4(inputs: Inputs, threads: int) -> Callable[[], Results]:
    """ggml's Q4_0, repacked for this machine; inputs get a scale for each block of 32, the result its own memory."""
    from ...bench.ggml import Q4Layer  # needs llama-cpp-python

    x = inputs["input"]
    if x.dtype is not torch.float32:
        raise ValueError(f"ggml takes float32 inputs, not {x.dtype}")
    codes, scale, _ = quantize_groups(inputs["weight"], GROUP)
    columns = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    layer = Q4Layer(columns, scale, inputs["bias"], x.shape[0], threads)
    return lambda: (layer(x),)


_SPECIAL: dict[str, dict[str, Any]] = {
    "linear_int8": {"torch.ao": _torch_int8},  # of float32 inputs alone: it says so
    "linear_int4": {"torch.ao": _torch_int4},
    "linear_int4_int8": {"llama.cpp": _ggml_int4},
}


def _work(name: str, shape: Shape, dtype: str) -> Work:
    m, k, n = shape
    size = DTYPES[dtype].itemsize
    weight = n * k + 4 * n if name == "linear_int8" else n * (k // 2 + 2 * ((k + GROUP - 1) // GROUP))
    return Work(m * k * size + weight + n * size, m * n * size, 2 * m * n * k, "int8")


def _case(name: str, dtype: str, shape: Shape, bar: Bar, sweep: bool = False) -> BenchCase:
    kernel = "linear_int8_fwd" if name == "linear_int8" else "linear_groupwise_fwd"
    return BenchCase(
        family="linear_quant",
        name=name,
        direction="fwd",
        shape=shape,
        dtype=dtype,
        work=_work(name, shape, dtype),
        make=partial(_make, name, shape),
        torch_call=_float_layer,
        measured_by=None if name == "linear_int4" else partial(_definition, name),
        ours=(Ours("", partial(_prepare, name), kernel, bar, frozen=True),),
        constants=("weight", "bias"),
        onnx_file=partial(_exported, name) if dtype == "fp32" else None,
        special=_SPECIAL[name],
        sweep=sweep,
    )


def _cases() -> Iterator[BenchCase]:
    for row in _PUBLIC:
        yield _case(*row)
    for i, shape in enumerate(_SWEEP):
        for dtype in ("fp32", "bf16"):
            yield _case(tuple(_SPECIAL)[i % len(_SPECIAL)], dtype, shape, Bar(), sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

GPU_CASES: tuple[BenchCase, ...] = ()
