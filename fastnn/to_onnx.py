"""Models as ONNX files that onnxruntime runs without torch: `export`.

torch exports the graph of a copy in which quantised layers are ONNX's own operators: DynamicQuantizeLinear and
MatMulInteger for int8, onnxruntime's MatMulNBits for 4 bits. What has no such operator goes out with the floating
weight that its codes stand for, and the result says so.
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
from .ops.linear import ACTIVATIONS
from .quant import dequantize_

WHERE = "fastnn.export"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LEAST_BLOCK = 16

FLOAT_LIMIT, INT8_LIMIT = 1e-3, 0.1
"""The largest difference of an output from the model's, as a share of that output's largest magnitude.

Sums are in another order, and layer upon layer of it shows in the fourth digit. `Int8Linear` rounds each row of its
input by itself, DynamicQuantizeLinear all rows alike, from the least to the largest value; an `Int4Linear` with int8
inputs goes out as a floating layer, which rounds none.
"""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote and found."""

    path: Path
    nbytes: int
    """Of the file."""
    int8: tuple[str, ...]
    """Paths of layers that are DynamicQuantizeLinear and MatMulInteger."""
    int4: tuple[str, ...]
    """Paths of layers that are MatMulNBits."""
    floating: tuple[str, ...]
    """Paths of quantised layers that went out with floating weights: none of the two operators takes them."""
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
    """`codes` (in_features, out_features), a scale for each output."""

    def product(self, x: Tensor) -> Tensor:
        types = torch.uint8, torch.float32, torch.uint8
        shapes: Any = x.shape, (), ()
        several, one = torch.onnx.ops.symbolic_multi_out, torch.onnx.ops.symbolic
        rounded, step, zero = several("DynamicQuantizeLinear", (x,), dtypes=types, shapes=shapes, version=11)
        shape = (*x.shape[:-1], self.out_features)
        sums = one("MatMulInteger", (rounded, self.codes, zero), dtype=torch.int32, shape=shape, version=10)
        return sums.float() * (step * self.scale)


class _Int4(_Node):
    """`codes` (out_features, blocks, bytes of a block), a scale for each block."""

    def product(self, x: Tensor) -> Tensor:
        _, blocks, half = self.codes.shape
        sizes = {"N": self.out_features, "K": 2 * half * blocks, "bits": 4, "block_size": 2 * half}
        operands, shape = (x, self.codes, self.scale), (*x.shape[:-1], self.out_features)
        name = "com.microsoft::MatMulNBits"
        return torch.onnx.ops.symbolic(name, operands, sizes, dtype=x.dtype, shape=shape, version=1)


def _node(layer: Module) -> _Node | None:
    """The operator of a layer; None where there is none."""
    if isinstance(layer, nn.Int8Linear):
        return _Int8(layer.weight.t().contiguous(), layer.weight_scale, layer)
    if isinstance(layer, nn.Int4Linear) and layer.symmetric and not layer.int8_input:
        size, columns = layer.group_size, layer.in_features
        if size >= _LEAST_BLOCK and size & (size - 1) == 0 and columns % size == 0:
            codes = layer.weight.reshape(layer.out_features, columns // size, size // 2)
            return _Int4(codes, layer.weight_scale.float().reshape(-1), layer)
    return None


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

    Layers that `fastnn.quantize_` made `Int8Linear` become DynamicQuantizeLinear and MatMulInteger, symmetric
    `Int4Linear` without int8 inputs, in whole groups of a power of two from 16 up, MatMulNBits (an operator of
    onnxruntime's own); other quantised layers go out as floating ones, listed in the result. The model stays as it is.

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
    kinds: dict[type[Module], list[str]] = {_Int8: [], _Int4: []}
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
    return Exported(path, path.stat().st_size, tuple(kinds[_Int8]), tuple(kinds[_Int4]), floating, error)
