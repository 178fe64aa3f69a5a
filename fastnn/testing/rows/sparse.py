"""Rows of dense layers with a block-sparse weight: blocks of 16 outputs x 4 columns, equally many in each strip.

Rows of int8 codes are held against the definition in plain torch, and beside the blocks and the dense layer of codes
they show the same blocks of floating values. The plain forward call is the float layer with the same weight, zeros and
all. Backward rows are plain too: torch has no layer whose pattern stays, so its weight is made dense from the values
that train, and the gradient gathered again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import nn
from ...ops.block_sparse import OUTPUTS, block_sparse_linear, block_sparse_linear_reference, dense_of_blocks, strips_of
from ...ops.linear_int8 import linear_int8_reference, quantize_rows_reference
from ..bench_cases import Bar, BenchCase, Direction, Ours, Results, Work, forward_backward
from ..cases import DTYPES, Inputs

Shape = tuple[int, int, int]
"""(M, K, N)."""

DEPTH = 4
"""Columns of a block."""
_SPARSITIES = (80, 90)
_BARS = {1: 5.0, 16: 4.0, 128: 3.0}
"""Rows -> over the best sparse product that there is."""
_SPARSE = ("torch.csr", "torch.bsr", "scipy")
_OVER_DENSE = 2.0
"""Over our own packed product of the whole weight, from 16 rows on; in bfloat16 there is no sparse one to compare with.
"""
_PUBLIC: tuple[Shape, ...] = tuple((m, k, n) for k, n in ((4096, 4096), (768, 3072)) for m in _BARS)
_FEATURES = ((768, 768), (1024, 1024), (3072, 768), (2048, 2048), (509, 1021), (1000, 3001))
_SWEEP: tuple[Shape, ...] = tuple((m, k, n) for k, n in _FEATURES for m in (1, 2, 4, 7, 16, 31, 64, 127, 256, 512))
_WANTED = ("input", "values", "bias")


def _kept(shape: Shape, sparsity: int) -> int:
    """Blocks of a strip."""
    width = (shape[1] + DEPTH - 1) // DEPTH
    return round(width * (100 - sparsity) / 100)


def _make(shape: Shape, sparsity: int, direction: Direction, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    m, k, n = shape
    strips, width, kept = strips_of(n), (k + DEPTH - 1) // DEPTH, _kept(shape, sparsity)
    order = torch.rand(strips, width, generator=generator).argsort(1)[:, :kept]
    found = {"input": torch.randn(m, k, generator=generator).to(dtype)}
    values = (torch.randn(strips * kept, DEPTH, OUTPUTS, generator=generator) / (k * kept / width) ** 0.5).to(dtype)
    columns = order.sort(1).values.flatten().int()
    starts = torch.arange(strips + 1, dtype=torch.int32) * kept
    if direction == "fb":
        found |= {"values": values, "columns": columns, "starts": starts}
    else:
        found["weight"] = dense_of_blocks(values, columns, starts, n, k).contiguous()
    found["bias"] = torch.randn(n, generator=generator).to(dtype)
    if direction == "fb":
        found["grad"] = torch.randn(m, n, generator=generator).to(dtype)
    return found


def _float_layer(inputs: Inputs) -> Tensor:
    return F.linear(inputs["input"], inputs["weight"], inputs["bias"])


def _float_training(i: Inputs) -> Tensor:
    bias = i["bias"]
    return block_sparse_linear_reference(i["input"], i["values"], i["columns"], i["starts"], bias, len(bias), None)


def _our_training(i: Inputs) -> Tensor:
    bias = i["bias"]
    return block_sparse_linear(i["input"], i["values"], i["columns"], i["starts"], bias, out_features=len(bias))


def _prepare_training(inputs: Inputs) -> Callable[[], Results]:
    return lambda: forward_backward(_our_training, _WANTED, inputs)


def _bias_of(inputs: Inputs) -> torch.nn.Parameter:
    return torch.nn.Parameter(inputs["bias"], requires_grad=False)


def _prepare(inputs: Inputs) -> Callable[[], Results]:
    x = inputs["input"]
    layer = nn.BlockSparseLinear.from_dense(inputs["weight"], _bias_of(inputs), depth=DEPTH).requires_grad_(False)
    return lambda: (layer(x),)


def _packed_dense(inputs: Inputs, threads: int) -> Callable[[], Results]:
    """Our own packed layer, which multiplies the zeros."""
    x, weight = inputs["input"], inputs["weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], True, "meta", weight.dtype)
    layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), _bias_of(inputs)
    layer.freeze().eval()
    return lambda: (layer(x),)


def _prepare_codes(inputs: Inputs) -> Callable[[], Results]:
    x = inputs["input"]
    layer = nn.Int8BlockSparseLinear.from_dense(inputs["weight"], _bias_of(inputs), depth=DEPTH)
    return lambda: (layer(x),)


def _prepare_dense_codes(inputs: Inputs) -> Callable[[], Results]:
    x = inputs["input"]
    layer = nn.Int8Linear.from_float(inputs["weight"], _bias_of(inputs))
    return lambda: (layer(x),)


def _truth_of_codes(inputs: Inputs) -> Tensor:
    """The definition: the weight rounded in float32, whatever its type is here."""
    codes, scale = quantize_rows_reference(inputs["weight"])
    return linear_int8_reference(inputs["input"], codes, scale, inputs["bias"], None)


def _torch_sparse(layout: str, inputs: Inputs, threads: int) -> Callable[[], Results]:
    """torch's products with compressed rows, and with square blocks of them (others it refuses)."""
    weight, bias = inputs["weight"], inputs["bias"].unsqueeze(1)
    rows = weight.to_sparse_csr() if layout == "csr" else weight.to_sparse_bsr((DEPTH, DEPTH))
    turned = inputs["input"].t().contiguous()  # what it multiplies fastest
    return lambda: ((rows @ turned).add_(bias).t(),)


def _scipy(inputs: Inputs, threads: int) -> Callable[[], Results]:
    scipy_sparse = importlib.import_module("scipy.sparse")  # no stubs

    rows = scipy_sparse.csr_matrix(inputs["weight"].numpy())
    turned, bias = inputs["input"].numpy().T.copy(), inputs["bias"].numpy()[:, None]
    return lambda: (torch.from_numpy((rows @ turned + bias).T),)


def _work(shape: Shape, sparsity: int, dtype: str, direction: Direction) -> Work:
    m, k, n = shape
    size, unit = DTYPES[dtype].itemsize, "bf16" if dtype == "bf16" else "fp32"
    blocks = strips_of(n) * _kept(shape, sparsity)
    values, indices = blocks * DEPTH * OUTPUTS, 4 * (blocks + strips_of(n) + 1)
    if direction == "fwd":
        return Work((m * k + values + n) * size + indices, m * n * size, 2 * m * values, unit)
    read, written = 2 * (m * k + values) + n + m * n, m * n + m * k + values + n
    return Work(read * size + 2 * indices, written * size, 6 * m * values, unit)


def _case(
    shape: Shape, sparsity: int, dtype: str, direction: Direction, bar: Bar | None = None, sweep: bool = False
) -> BenchCase:
    special: dict[str, Any] = {"packed dense": _packed_dense} if direction == "fwd" else {}
    if direction == "fwd" and dtype == "fp32":  # theirs of bfloat16 are slower than dense ones, or missing
        special |= {"torch.csr": partial(_torch_sparse, "csr"), "torch.bsr": partial(_torch_sparse, "bsr")}
        special["scipy"] = _scipy
    if direction == "fb":
        ours: tuple[Ours, ...] = (Ours("", _prepare_training, "linear_block_sparse_bwd"),)
    else:
        ours = (Ours("", _prepare, "linear_block_sparse_fwd", bar or Bar(), frozen=True),)
    return BenchCase(
        family="sparse",
        name=f"block_sparse_{sparsity}" + ("_fb" if direction == "fb" else ""),
        direction=direction,
        shape=shape,
        dtype=dtype,
        work=_work(shape, sparsity, dtype, direction),
        make=partial(_make, shape, sparsity, direction),
        torch_call=_float_training if direction == "fb" else _float_layer,
        ours=ours,
        wanted=_WANTED if direction == "fb" else (),
        constants=("weight", "bias") if direction == "fwd" else (),
        special=special,
        sweep=sweep,
    )


def _case_of_codes(shape: Shape, sparsity: int) -> BenchCase:
    m, k, n = shape
    blocks = strips_of(n) * _kept(shape, sparsity)
    codes, beside = blocks * DEPTH * OUTPUTS, 4 * (blocks + strips_of(n) + 1) + 4 * n
    return BenchCase(
        family="sparse",
        name=f"block_sparse_int8_{sparsity}",
        direction="fwd",
        shape=shape,
        dtype="fp32",
        work=Work((m * k + n) * 4 + codes + beside, m * n * 4, 2 * m * codes, "int8"),
        make=partial(_make, shape, sparsity, "fwd"),
        torch_call=_float_layer,
        measured_by=_truth_of_codes,
        ours=(
            Ours("", _prepare_codes, "linear_block_sparse_int8_fwd", frozen=True),
            Ours("floats", _prepare, "linear_block_sparse_fwd", frozen=True),
            Ours("dense", _prepare_dense_codes, "linear_int8_fwd", frozen=True),
        ),
        constants=("weight", "bias"),
    )


def _cases() -> Iterator[BenchCase]:
    for shape in _PUBLIC:
        for sparsity in _SPARSITIES:
            yield _case(shape, sparsity, "fp32", "fwd", Bar(_BARS[shape[0]], holder="torch.bsr", against=_SPARSE))
        over_dense = Bar(_OVER_DENSE, against=("packed dense",)) if shape[0] > 1 else Bar()
        yield _case(shape, 80, "bf16", "fwd", over_dense)
    for m in _BARS:
        yield _case_of_codes((m, 4096, 4096), 80)
    for dtype in ("fp32", "bf16"):
        yield _case((128, 768, 3072), 80, dtype, "fb")
    for i, shape in enumerate(_SWEEP):
        for dtype in ("fp32", "bf16"):
            yield _case(shape, (50, 80, 90)[i % 3], dtype, "fwd", sweep=True)
            yield _case(shape, (50, 80, 90)[i % 3], dtype, "fb", sweep=True)


CASES: tuple[BenchCase, ...] = tuple(_cases())

GPU_CASES: tuple[BenchCase, ...] = ()
