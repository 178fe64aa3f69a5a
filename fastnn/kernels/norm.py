"""Layer norm and RMS norm, alone or of a residual sum. float32 arithmetic whatever the type.

The mean is taken, then the moments of what is left after subtracting it: a constant row gives exactly 0, and rows far
from zero keep their small differences. Rows whose squares leave float32's range are taken again at another scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.norm import norm_bwd_fake, norm_fwd_fake
from . import tune
from .config import NormBackward, Rows, arch_of, cdiv, columns_config, norm_bwd_config, rows_config
from .library import narrow, register, rows_of
from .norm_bwd import norm_bwd_columns, norm_bwd_long, norm_bwd_whole
from .sums import add_parts

# 2^-80 brings the squares of everything in range; 2^80 those of a row that nears zero, where epsilon does not hide it.
SMALL_UNIT = tl.constexpr(2.0**-80)
LARGE_UNIT = tl.constexpr(2.0**80)
LEAST_VARIANCE = tl.constexpr(2.0**-100)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _moments(x, inside, n, RMS: tl.constexpr):
    """(mean, variance) of each row of a tile that holds whole rows."""
    if RMS:
        variance = tl.sum(x * x, 1)[:, None] / n
        mean = tl.zeros_like(variance)
    else:
        first = tl.sum(x, 1)[:, None] / n
        d = tl.where(inside, x - first, 0.0)
        shift = tl.sum(d, 1)[:, None] / n
        variance = tl.sum(d * d, 1)[:, None] / n - shift * shift
        mean = first + shift
        variance = tl.where(variance < 0.0, 0.0, variance)
    return mean, variance


@triton.jit
def _unit(variance, eps):
    """By what rows with this variance must be multiplied for their squares to be in range: 1 for nearly all."""
    in_range = (variance <= LARGEST) & (variance + eps >= LEAST_VARIANCE)
    return tl.where(in_range, 1.0, tl.where(variance <= LARGEST, LARGE_UNIT, SMALL_UNIT))


@triton.jit
def norm_fwd_whole(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    stats_ptr,
    rows,
    n,
    x_stride,
    residual_stride,
    eps,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows in registers. A null pointer (None) is a part that there is not."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    inside = (r < rows) & (c < n)
    x = tl.load(x_ptr + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + r * residual_stride + c, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + r * n + c, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean, variance = _moments(x, inside, n, RMS)
    unit = _unit(variance, eps)
    if tl.min(tl.min(unit, 1), 0) != 1.0 or tl.max(tl.max(unit, 1), 0) != 1.0:
        mean, variance = _moments(x * unit, inside, n, RMS)
    rstd = 1.0 / tl.sqrt(variance + eps * unit * unit)
    y = (x * unit - mean) * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + r * n + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * r, mean / unit, mask=r < rows)
        tl.store(stats_ptr + 2 * r + 1, rstd * unit, mask=r < rows)


@triton.jit
def _long_moments(x_row, n, unit, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, variance) of one row times `unit`, read block by block."""
    c = tl.arange(0, BLOCK)[None, :]
    first = tl.zeros((1, 1), tl.float32)
    if not RMS:
        lanes = tl.zeros((1, BLOCK), tl.float32)
        for start in range(0, n, BLOCK):
            lanes += tl.load(x_row + c + start, mask=c + start < n, other=0.0).to(tl.float32) * unit
        first = tl.sum(lanes, 1)[:, None] / n
    ones = tl.zeros((1, BLOCK), tl.float32)
    squares = tl.zeros((1, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(x_row + c + start, mask=c + start < n, other=0.0).to(tl.float32) * unit
        d = tl.where(c + start < n, x - first, 0.0)
        ones += d
        squares += d * d
    shift = tl.sum(ones, 1)[:, None] / n
    square = tl.sum(squares, 1)[:, None] / n
    if RMS:
        mean = tl.zeros_like(square)
        variance = square
    else:
        mean = first + shift
        variance = square - shift * shift
        variance = tl.where(variance < 0.0, 0.0, variance)
    return mean, variance


@triton.jit
def norm_fwd_long(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    stats_ptr,
    rows,
    n,
    x_stride,
    residual_stride,
    eps,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, block by block; after the first reading it comes from cache."""
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)[None, :]
    x_row = x_ptr + r * x_stride
    if residual_ptr is not None:
        for start in range(0, n, BLOCK):
            inside = c + start < n
            x = tl.load(x_row + c + start, mask=inside, other=0.0).to(tl.float32)
            x += tl.load(residual_ptr + r * residual_stride + c + start, mask=inside, other=0.0).to(tl.float32)
            tl.store(total_ptr + r * n + c + start, x.to(x_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # what the other threads of this program wrote is read below
        x_row = total_ptr + r * n
    mean, variance = _long_moments(x_row, n, 1.0, RMS, BLOCK)
    unit = tl.max(_unit(variance, eps))
    if unit != 1.0:
        mean, variance = _long_moments(x_row, n, unit, RMS, BLOCK)
    rstd = 1.0 / tl.sqrt(variance + eps * unit * unit)
    for start in range(0, n, BLOCK):
        inside = c + start < n
        y = (tl.load(x_row + c + start, mask=inside, other=0.0).to(tl.float32) * unit - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + c + start, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c + start, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + r * n + c + start, y.to(y_ptr.dtype.element_ty), mask=inside)
    if stats_ptr is not None:
        one = tl.zeros((1, 1), tl.int64)
        tl.store(stats_ptr + 2 * r + one, mean / unit)
        tl.store(stats_ptr + 2 * r + 1 + one, rstd * unit)


def _extents(input: Tensor, dims: int) -> tuple[int, int]:
    columns = 1
    for size in input.shape[input.dim() - dims :]:
        columns *= size
    return input.numel() // columns if columns else 0, columns


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def norm_fwd(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(output, input + residual, (rows, 2) mean and 1 / standard deviation)."""
    output, total, stats = norm_fwd_fake(input, residual, weight, bias, dims, eps, rms, save_stats)
    rows, n = _extents(input, dims)
    if output.numel() == 0:
        if stats is not None:
            stats.fill_(float("nan"))
        return output, total, stats
    x = rows_of(input, n)
    added = None if residual is None else rows_of(residual, n)
    arch = arch_of(input.device.index)
    args = (x, added, _flat(weight), _flat(bias), output, total, stats, rows, n, x.stride(0))
    strides = (0 if added is None else added.stride(0), eps, rms)

    def launch(tile: Rows) -> None:
        if tile.whole:
            grid = (cdiv(rows, tile.rows),)
            norm_fwd_whole[grid](*args, *strides, tile.rows, tile.block, num_warps=tile.warps)
        else:
            norm_fwd_long[(rows,)](*args, *strides, tile.block, num_warps=tile.warps)

    has = (rms, residual is not None, weight is not None, bias is not None)
    # 16 elements a thread of 32 warps have 64 registers, too few for addresses of their own.
    largest = 8192 if narrow(n, x, added) else 16384
    tune.run("norm_fwd", launch, rows_config(n, rows, arch, largest, 4096), x, arch, (rows, n), has)
    return output, total, stats


def norm_bwd(
    grad: Tensor,
    grad_total: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dims: int,
    rms: bool,
    weight_dtype: torch.dtype,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of what is normalized, of the weight and of the bias, as `mask` wants them."""
    dx, dw, db = norm_bwd_fake(grad, grad_total, input, weight, stats, dims, rms, weight_dtype, mask)
    rows, n = _extents(input, dims)
    if input.numel() == 0:
        for sums in (dw, db):
            if sums is not None:
                sums.zero_()
        return dx, dw, db
    dy, x = rows_of(grad, n), rows_of(input, n)
    came = None if grad_total is None else rows_of(grad_total, n)
    came_stride = 0 if came is None else came.stride(0)
    w, arch = _flat(weight), arch_of(input.device.index)
    one_by_one = narrow(n, dy, x, came)
    tile = norm_bwd_config(n, rows, arch, one_by_one)
    if tile.whole:
        parts = cdiv(rows, tile.rows * tile.tiles)
        part_dw, part_db = (None if s is None else x.new_empty((parts, n), dtype=torch.float32) for s in (dw, db))

        def launch(tile: NormBackward) -> None:
            norm_bwd_whole[(parts,)](
                dy, came, x, w, stats, dx, part_dw, part_db, rows, n, dy.stride(0), came_stride, x.stride(0),
                tile.tiles, rms, tile.rows, tile.block, 2, num_warps=tile.warps,
            )  # fmt: skip

        has = (rms, came is not None, *mask)
        tune.run("norm_bwd", launch, tile, x, arch, (rows, n), has)
    else:
        if dx is not None:
            strides = (dy.stride(0), came_stride, x.stride(0))
            norm_bwd_long[(rows,)](dy, came, x, w, stats, dx, n, *strides, rms, tile.block, num_warps=tile.warps)
        cut = columns_config(n, rows, arch, narrow=one_by_one)
        part_dw, part_db = (None if s is None else x.new_empty((cut.parts, n), dtype=torch.float32) for s in (dw, db))
        if dw is not None or db is not None:
            grid = (cdiv(n, cut.block), cut.parts)
            part_rows = cdiv(rows, cut.parts)
            norm_bwd_columns[grid](
                dy, x, stats, part_dw, part_db, rows, n, dy.stride(0), x.stride(0), part_rows, cut.rows, cut.block,
                num_warps=cut.warps,
            )  # fmt: skip
    for sums, part in ((dw, part_dw), (db, part_db)):
        if sums is not None and part is not None:
            add_parts(part, sums)
    return dx, dw, db


register(
    "norm",
    (
        "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps, bool rms, "
        "bool save_stats, bool grad_handled=False) -> (Tensor, Tensor?, Tensor?)",
        norm_fwd,
        norm_fwd_fake,
    ),
    (
        "(Tensor grad, Tensor? grad_total, Tensor input, Tensor? weight, Tensor stats, int dims, bool rms, "
        "ScalarType weight_dtype, bool[3] mask, bool grad_handled=False) -> (Tensor?, Tensor?, Tensor?)",
        norm_bwd,
        norm_bwd_fake,
    ),
)
