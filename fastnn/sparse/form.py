"""Block-sparse weights: from a dense weight and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.block_sparse import DEPTHS, OUTPUTS, blocks_of_dense, check_blocks, dense_of_blocks, strips_of, values_empty
from ..ops.block_sparse_int8 import CODE_DEPTHS, UNIT, check_codes, codes_of_values, dense_codes
from ..ops.linear_int8 import dequantize_weight, quantize_rows

__all__ = ["Blocks", "Int8Blocks", "block_grid", "to_blocks", "to_dense", "to_int8_blocks"]


class Blocks(NamedTuple):
    """A block-sparse weight, as `fastnn.block_sparse_linear` takes it."""

    values: Tensor
    columns: Tensor
    starts: Tensor


class Int8Blocks(NamedTuple):
    """A block-sparse weight of int8 codes, as `fastnn.block_sparse_linear_int8` takes it."""

    codes: Tensor
    columns: Tensor
    starts: Tensor
    scale: Tensor


def _check_dense(op: str, weight: Tensor, depth: int) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"{op}: weight must be floating (out_features, in_features), got {tuple(weight.shape)}")
    if depth not in DEPTHS:
        raise ValueError(f"{op}: depth must be one of {', '.join(map(str, DEPTHS))}; got {depth!r}")


def block_grid(out_features: int, in_features: int, depth: int = 4) -> tuple[int, int]:
    """How many blocks a weight has from top to bottom and from left to right: the shape of a mask of blocks."""
    if depth not in DEPTHS:
        raise ValueError(f"fastnn.sparse.block_grid: depth must be one of {', '.join(map(str, DEPTHS))}; got {depth!r}")
    return strips_of(out_features), (in_features + depth - 1) // depth


def to_blocks(weight: Tensor, mask: Tensor | None = None, *, depth: int = 4) -> Blocks:
    """The blocks of a dense weight that are kept.

    Args:
        weight: (out_features, in_features), any strides.
        mask: what is kept; bool of the shape of `block_grid` (a value for each block) or of the weight (a block is
            kept where any of its weights is, and the others in it become zero). None: the blocks with a weight that is
            not zero.
        depth: columns of a block: 2, 4, 8 or 16. Fewer lose less accuracy at the same sparsity; each block costs an
            index of 4 bytes.

    Returns:
        values (blocks, depth, 16) of the weight's type, columns int32 (blocks,), starts int32 (strips + 1,).

    Raises:
        TypeError, ValueError: a weight, a mask or a depth that does not fit.
    """
    op = "fastnn.sparse.to_blocks"
    _check_dense(op, weight, depth)
    n, k = weight.shape
    grid = block_grid(n, k, depth)
    weight = weight.detach()
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {mask.dtype}")
    if mask is None or tuple(mask.shape) == (n, k):
        weight = weight if mask is None else weight.masked_fill(~mask, 0)
        there = torch.nn.functional.pad(weight != 0, (0, grid[1] * depth - k, 0, grid[0] * OUTPUTS - n))
        mask = there.reshape(grid[0], OUTPUTS, grid[1], depth).any(3).any(1)
    elif tuple(mask.shape) != grid:
        raise ValueError(
            f"{op}: mask must have the weight's shape {(n, k)} or that of its blocks, {grid}; got {tuple(mask.shape)}"
        )
    columns = mask.nonzero()[:, 1].int()
    starts = torch.zeros(grid[0] + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = mask.sum(1).cumsum(0)
    values = values_empty((len(columns), depth, OUTPUTS), weight.dtype, weight.device)
    return Blocks(values.copy_(blocks_of_dense(weight, columns, starts, depth)), columns, starts)


def codes_of_blocks(blocks: Blocks, out_features: int, in_features: int) -> Int8Blocks:
    """The same blocks, rounded to codes: each output by the largest magnitude that is kept of it.

    Raises:
        ValueError: blocks that are no whole units of codes, values that are not finite.
    """
    op, depth = "fastnn.sparse.to_int8_blocks", blocks.values.shape[1]
    if depth not in CODE_DEPTHS:
        known = ", ".join(map(str, CODE_DEPTHS))
        raise ValueError(f"{op}: depth must be one of {known}, whole units of {UNIT} codes; got {depth}")
    values, columns, starts = blocks
    codes, scale = quantize_rows(dense_of_blocks(values.detach(), columns, starts, out_features, in_features))
    if bool(scale.isnan().any()):
        raise ValueError(f"{op}: weight has NaN or infinite values in blocks that are kept")
    found = codes_of_values(blocks_of_dense(codes, columns, starts, depth))
    kept = values_empty(tuple(found.shape), torch.int8, codes.device)
    return Int8Blocks(kept.copy_(found), columns, starts, scale)


def to_int8_blocks(weight: Tensor, mask: Tensor | None = None, *, depth: int = 4) -> Int8Blocks:
    """The blocks of a dense weight that are kept, rounded to int8 codes with a scale for each output.

    An output's scale is the largest magnitude that is kept of it / 127 (`fastnn.ops.quantize_rows`).

    Args:
        weight, mask: as `to_blocks` takes them.
        depth: columns of a block: 4, 8 or 16, whole units of 4 codes.

    Returns:
        codes int8 (blocks, depth / 4, 16, 4), columns int32 (blocks,), starts int32 (strips + 1,), scale float32
        (out_features,).

    Raises:
        TypeError, ValueError: a weight, a mask or a depth that does not fit; NaN or infinities in what is kept.
    """
    return codes_of_blocks(to_blocks(weight, mask, depth=depth), *weight.shape)


def to_dense(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    out_features: int,
    in_features: int,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """The weight (out_features, in_features) that blocks stand for, zero where there is none; differentiable.

    Args:
        values, columns, starts: as `to_blocks` gives them; or codes in place of values.
        out_features, in_features: the weight's sizes.
        scale: float32 (out_features,), of codes: the weight is float32 then.

    Raises:
        TypeError, ValueError: shapes or types that are not those of such a weight's blocks.
    """
    if scale is not None:
        op = "fastnn.sparse.to_dense"
        check_codes(op, values, columns, starts, out_features)
        if tuple(scale.shape) != (out_features,):
            raise ValueError(f"{op}: scale must have shape ({out_features},), got {tuple(scale.shape)}")
        return dequantize_weight(dense_codes(values, columns, starts, out_features, in_features), scale, scale.dtype)
    check_blocks("fastnn.sparse.to_dense", values, columns, starts, out_features, in_features)
    return dense_of_blocks(values, columns, starts, out_features, in_features)
