"""Rows of a table of codes in groups."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._record import note_reference
from .groups import bits_of, check_tensors, check_weight, dequantize_groups
from .linear_groupwise import OP


def embedding_groupwise(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a table of codes in groups, as values: `dequantize_groups(...)[index]` without the rest of the table.

    A value is scale * (code - 8), exact in float32, or scale * code + offset, rounded once, and then rounded to
    `dtype`: the same bits on every instruction set.

    Args:
        index: integers (*), each in [0, rows).
        codes, scale, offset: as `linear_groupwise`'s, (rows, ...).
        in_features: columns of the table.
        group_size: columns that share a scale.
        dtype: of the result; float32, bfloat16 and float16 run on the kernel, other floating types on the reference.

    Returns:
        A contiguous tensor (*, in_features). No gradient goes through.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit.
        IndexError: an index out of range.
    """
    op = "fastnn.ops.embedding_groupwise"
    check_tensors(op, {"index": index, "codes": codes, "scale": scale, "offset": offset}, None)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: index must be int64 or int32, got {index.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    check_weight(op, codes, scale, offset, in_features, group_size)
    index = index.long().contiguous()
    if _dispatch.pick(OP, scale) == "reference" or dtype not in _dispatch.KERNEL_DTYPES:
        note_reference("linear_groupwise_rows")
        rows = codes.shape[0]
        if index.numel() and not bool(((index >= 0) & (index < rows)).all()):
            raise IndexError(f"{op}: index out of range for {rows} rows")
        flat = index.reshape(-1)
        picked = codes[flat], scale[flat], None if offset is None else offset[flat]
        return dequantize_groups(*picked, in_features, group_size, dtype).reshape(*index.shape, in_features)
    parts = [t if t is None else t.detach().contiguous() for t in (codes, scale, offset)]
    options = in_features, group_size, bits_of(codes), _dispatch.KERNEL_DTYPES.index(dtype)
    found: Tensor = torch.ops.fastnn.linear_groupwise_rows.default(index, *parts, *options, True)
    return found
