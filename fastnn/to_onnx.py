"""Models as ONNX files that onnxruntime runs without torch: `export`.

torch exports the graph of a copy in which quantised layers are operators of ONNX or onnxruntime: QuantizeLinear and
MatMulInteger for int8, MatMulNBits and GatherBlockQuantized for codes in groups. What has no such operator goes out
with the floating weight that its codes stand for, and the result says so.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import nn
from ._dispatch import use_backend
from .accelerate.isolate import check_model
from .cli import MissingExtra
from .ops.groups import bits_of
from .ops.linear import ACTIVATIONS
from .quant import dequantize_

WHERE = "fastnn.export"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LEAST_BLOCK = 16
_INT8_INPUTS = 4
"""MatMulNBits: the least accuracy that will do is that of inputs rounded to int8, of each group by itself."""

FLOAT_LIMIT, INT8_LIMIT = 1e-3, 0.1
"""The largest difference of an output from the model's, as a share of that output's largest magnitude.

Sums are in another order, and layer upon layer of it shows in the fourth digit. Where inputs are rounded to int8, a
difference in the last digit before becomes one of a whole step now and then; MatMulNBits rounds each group of a row by
itself, an `Int4Linear` the whole row.
"""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote and found."""

    path: Path
    nbytes: int
    """Of the file."""
    int8: tuple[str, ...]
    """Paths of layers that are QuantizeLinear and MatMulInteger."""
    grouped: tuple[str, ...]
    """Paths of layers that are MatMulNBits, and of embeddings that are GatherBlockQuantized."""
    floating: tuple[str, ...]
    """Paths of quantised layers that went out with floating weights: none of these operators takes them."""
    error: float
    """The largest difference from the model on the example, as a share of the output's largest magnitude."""


# ---- quantised layers as operators


class _Node(Module):
    """Stands in for a quantised layer: outside of an export it computes nothing."""

    codes: Tensor
    scale: Tensor
    bias: torch.nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, layer: Any) -> None:
        super().__init__()
        self.out_features, self.activation = layer.out_features, ACTIVATIONS[layer.activation]
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", layer.bias)

    def product(self, x: Tensor) -> Tensor:
        """x W^T."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        found = self.product(x)
        return self.activation(found if self.bias is None else found + self.bias)


class _Int8(_Node):
    """`codes` (in_features, out_features), a scale for each output.

    Each row of the input is rounded as `fastnn.ops.quantize_rows` says, so the numbers are the layer's own. With
    DynamicQuantizeLinear, one scale for all rows, one outlier would cost every row its digits. Codes go in plus 128:
    onnxruntime multiplies unsigned by signed bytes fast, signed by signed ones 15 times as slowly.
    """

    one: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Int8Linear) -> None:
        super().__init__(layer.weight.t().contiguous(), layer.weight_scale, layer)
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(128, dtype=torch.uint8))

    def product(self, x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(2.0**-126)
        operator = torch.onnx.ops.symbolic
        numbers = x * step.reciprocal()
        rounded = operator(
            "QuantizeLinear", (numbers, self.one, self.zero), dtype=torch.uint8, shape=x.shape, version=13
        )
        shape = (*x.shape[:-1], self.out_features)
        sums = operator("MatMulInteger", (rounded, self.codes, self.zero), dtype=torch.int32, shape=shape, version=10)
        # An outer product: a Mul of scales here is fused by onnxruntime (MatMulIntegerToFloat) as if it were one scale.
        return sums.float() * (step @ self.scale[None])


class _Groups(_Node):
    """MatMulNBits: `codes` (out_features, groups, bytes of a group), a scale and perhaps a zero for each group."""

    zeros: Tensor | None

    def __init__(self, layer: nn.GroupwiseLinear, codes: Tensor, zeros: Tensor | None) -> None:
        super().__init__(codes.reshape(layer.out_features, -1, codes.shape[1] // layer.weight_scale.shape[1]),
                         layer.weight_scale.float(), layer)  # fmt: skip
        self.register_buffer("zeros", zeros)
        sizes = {"N": layer.out_features, "K": layer.in_features, "bits": _bits(layer), "block_size": layer.group_size}
        self.options: dict[str, Any] = {**sizes, **({"accuracy_level": _INT8_INPUTS} if layer.int8_input else {})}

    def product(self, x: Tensor) -> Tensor:
        parts = (x, self.codes, self.scale) if self.zeros is None else (x, self.codes, self.scale, self.zeros)
        shape, name = (*x.shape[:-1], self.out_features), "com.microsoft::MatMulNBits"
        return torch.onnx.ops.symbolic(name, parts, self.options, dtype=x.dtype, shape=shape, version=1)


class _Table(Module):
    """GatherBlockQuantized: rows of codes."""

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.GroupwiseEmbedding, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", layer.weight_scale.float())
        self.width = layer.embedding_dim
        kept = {"bits": _bits(layer), "block_size": layer.group_size}
        self.options: dict[str, Any] = {**kept, "gather_axis": 0, "quantize_axis": 1}

    def forward(self, ids: Tensor) -> Tensor:
        parts, shape, name = (
            (self.codes, ids, self.scale),
            (*ids.shape, self.width),
            "com.microsoft::GatherBlockQuantized",
        )
        return torch.onnx.ops.symbolic(name, parts, self.options, dtype=torch.float32, shape=shape, version=1)


def _bits(layer: nn.GroupwiseLinear | nn.GroupwiseEmbedding) -> int:
    return bits_of(layer.weight)


def _node(layer: Module) -> _Int8 | _Groups | _Table | None:
    """The operator of a layer; None where there is none."""
    if isinstance(layer, nn.Int8Linear):
        return _Int8(layer)
    if not isinstance(layer, (nn.GroupwiseLinear, nn.GroupwiseEmbedding)):
        return None
    size = layer.group_size
    if size < _LEAST_BLOCK or size & (size - 1) or layer.in_features % size:
        return None
    codes = (
        layer.weight if _bits(layer) == 4 else layer.weight.view(torch.uint8) ^ 128
    )  # both have their zero in the middle
    if isinstance(layer, nn.GroupwiseEmbedding):
        return _Table(layer, codes) if layer.symmetric and layer.dtype == torch.float32 else None
    if layer.weight_offset is None:
        return _Groups(layer, codes, None)
    scale, offset = layer.weight_scale.float(), layer.weight_offset.float()
    if bool(((scale == 0) & (offset != 0)).any()):
        return None  # scale x (code - zero) has no zero for it
    return _Groups(layer, codes, -offset / scale.where(scale != 0, 1.0))


# ---- the file


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    return ((), dict(example)) if isinstance(example, Mapping) else (tuple(example), {})


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of what a model gives, in order."""
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _run(path: str, inputs: list[Tensor]) -> list[Tensor]:
    """What onnxruntime gives."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    if len(names) != len(inputs):
        raise RuntimeError(f"{WHERE}: the file takes {len(names)} inputs, the example has {len(inputs)} tensors")
    given = {name: t.detach().numpy() for name, t in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest magnitude; infinite where shapes differ or NaN comes."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            share = (one.double() - other.detach().double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
            worst = max(worst, float("inf") if bool(share.isnan()) else float(share))
    return worst


def check_installed() -> None:
    """Raises MissingExtra, an ImportError, where something that an export needs is not there."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{WHERE}: needs {', '.join(missing)}; install with:  pip install 'fastnn[onnx]'")


def export(model: Module, path: str | os.PathLike[str], example_inputs: Any, *, dynamic_shapes: Any = None) -> Exported:
    """Writes the model as an ONNX file, runs the file by onnxruntime on the example, and compares.

    Layers that `fastnn.quantize_` made `Int8Linear` become QuantizeLinear and MatMulInteger, with a scale for each row
    of the input as they have it. Dense layers and embeddings on codes in groups, whole ones of a power of two from 16
    up, become MatMulNBits and, without offsets, GatherBlockQuantized (operators of onnxruntime's own). Other quantised
    layers go out as floating ones, listed in the result. The model stays as it is.

    Args:
        model: any module that `torch.export` can read, in float32 on the CPU.
        path: the file; its folder exists. It is replaced as a whole, after the comparison.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        dynamic_shapes: as `torch.onnx.export` takes them; None for the example's shapes alone.

    Returns:
        What was written, and the largest difference found.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing: `pip install 'fastnn[onnx]'`.
        RuntimeError: the file gives other numbers than the model: more than 1e-3 of an output's largest magnitude, or
            0.1 where layers round their inputs to int8. Nothing is written then.
        TypeError: `model` is no module.
        OSError: the file cannot be written.
    """
    check_model("export", model)
    check_installed()
    path = Path(path)
    args, kwargs = _split(example_inputs)
    shadow = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = _tensors(shadow(*args, **kwargs))
    rounds = any(isinstance(m, nn.Int8Linear) or getattr(m, "int8_input", False) for m in shadow.modules())
    kinds: dict[type[Module], list[str]] = {_Int8: [], _Groups: [], _Table: []}
    for name, layer in list(shadow.named_modules()):
        node = _node(layer)
        if node is not None:
            kinds[type(node)].append(name)
            if name:
                parent, _, leaf = name.rpartition(".")
                setattr(shadow.get_submodule(parent), leaf, node)
            else:
                shadow = node
    floating = dequantize_(shadow)
    with use_backend("reference"), torch.no_grad():
        program: Any = torch.onnx.export(
            shadow.eval(),
            args,
            kwargs=kwargs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=dynamic_shapes,
        )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        program.save(temporary)
        error = _error(_run(temporary, _tensors((args, kwargs))), expected)
        limit = INT8_LIMIT if rounds else FLOAT_LIMIT
        if not error <= limit:
            raise RuntimeError(
                f"{WHERE}: onnxruntime's result is off by {error:.2g} of its largest magnitude, more than {limit:g}"
            )
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    grouped = (*kinds[_Groups], *kinds[_Table])
    return Exported(path, path.stat().st_size, tuple(kinds[_Int8]), grouped, floating, error)
