"""Column sums in a fixed order: no atomic operation, the same bits in every run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tune
from .activation import through
from .config import Columns, arch_of, cdiv, columns_config
from .library import narrow


@triton.jit
def sum_parts(parts_ptr, out_ptr, parts, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column sums of a contiguous float32 (parts, n), in a fixed order."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    lanes = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, parts, ROWS):
        r = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        lanes += tl.load(parts_ptr + r * n + c, mask=(r < parts) & (c < n), other=0.0)
    tl.store(out_ptr + c, tl.sum(lanes, 0)[None, :].to(out_ptr.dtype.element_ty), mask=c < n)


def add_parts(parts: Tensor, out: Tensor) -> None:
    """`out` = the sum of `parts` (parts, n) float32 over its first dimension."""
    n = out.numel()
    sum_parts[(cdiv(n, 32),)](parts, out, parts.shape[0], n, 64, 32, num_warps=4)


@triton.jit
def slope_columns(
    dy_ptr,
    z_ptr,
    bias_ptr,
    dz_ptr,
    db_ptr,
    rows,
    n,
    dy_row,
    dy_column,
    z_row,
    part_rows,
    ACTIVATION: tl.constexpr,
    SAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = dy f'(z + bias) and its sum over one part of the rows, BLOCK columns of each that is wanted (not None)."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum(rows, (part + 1) * part_rows)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * part_rows, end, ROWS):
        r = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (r < end) & (c < n)
        dz = tl.load(dy_ptr + r * dy_row + c * dy_column, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            z = tl.load(z_ptr + r * z_row + c, mask=inside, other=0.0).to(tl.float32)
            if bias_ptr is not None:
                z += bias
            dz = through(dz, z, ACTIVATION, SAVED)
        if dz_ptr is not None:
            tl.store(dz_ptr + r * n + c, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        db += tl.where(inside, dz, 0.0)
    if db_ptr is not None:
        tl.store(db_ptr + part * n + c, tl.sum(db, 0)[None, :], mask=c < n)


def slope_and_sum(
    dy: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    dz: Tensor | None,
    db: Tensor | None,
    activation: int,
    saved: bool,
) -> None:
    """dz = dy f'(z + bias) and db = the sums of its columns, before rounding.

    Args:
        dy: (rows, n) of any strides, not empty.
        z: (rows, n), neighbouring columns; None where `activation` is 0. `saved`: as linear saves it, f(z) for relu,
            sigmoid and tanh.
        bias: (n,) contiguous, or None.
        dz: (rows, n) contiguous, where wanted.
        db: (n,), where wanted.
        activation: as in csrc/params/activation.h.
        saved: what z is.
    """
    rows, n = dy.shape
    arch = arch_of(dy.device.index)
    # 8 elements a thread are a load of 16 bytes of each operand in half precision. With 32 an activation's slope took
    # up to 250 registers, two programs a multiprocessor, and spilled on sm_120, with 16 it spilled on sm_100,
    # and with 8 that are not aligned on sm_120.
    cut = columns_config(n, rows, arch, tall=8 if narrow(n, dy, z) else 16, warps=8)
    parts = None if db is None else dy.new_empty((cut.parts, n), dtype=torch.float32)
    strides = (*dy.stride(), 0 if z is None else z.stride(0), cdiv(rows, cut.parts))

    def launch(cut: Columns) -> None:
        grid = (cdiv(n, cut.block), cut.parts)
        slope_columns[grid](
            dy, z, bias, dz, parts, rows, n, *strides, activation, saved, cut.rows, cut.block, num_warps=cut.warps
        )

    has = (dy.stride(1) == 1, activation, saved, bias is not None, dz is not None, db is not None)
    tune.run("slope_columns", launch, cut, dy, arch, (rows, n), has)
    if db is not None and parts is not None:
        add_parts(parts, db)
