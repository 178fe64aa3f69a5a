"""Softmax and log-softmax. float32 arithmetic whatever the type."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.softmax import softmax_bwd_fake, softmax_fwd_fake
from . import tune
from .config import Rows, arch_of, cdiv, power_of_2, rows_config
from .library import narrow, register, rows_of

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def softmax_rows_fwd(
    x_ptr,
    y_ptr,
    rows,
    columns,
    x_stride,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """ROWS rows in registers; not WHOLE: one row, a second time from cache."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    x_row = x_ptr + r * x_stride
    y_row = y_ptr + r * columns
    if WHOLE:
        inside = (r < rows) & (c < columns)
        x = tl.load(x_row + c, mask=inside, other=-float("inf")).to(tl.float32)
        x = x - tl.max(x, 1)[:, None]
        e = tl.exp(x)
        total = tl.sum(e, 1)[:, None]
        if LOG:
            y = x - tl.log(total)
        else:
            y = e * (1.0 / total)
        tl.store(y_row + c, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        # One running maximum and sum for each fourth element. They start at the lowest finite number, not at -inf:
        # lanes that saw nothing else then add e^-inf = 0 and not NaN.
        WIDTH: tl.constexpr = BLOCK // 4
        fold = tl.arange(0, 4)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        top = tl.full((1, WIDTH), LOWEST, tl.float32)
        lanes = tl.zeros((1, WIDTH), tl.float32)
        for start in range(0, columns, BLOCK):
            x = tl.load(x_row + fold + start, mask=fold + start < columns, other=-float("inf")).to(tl.float32)
            new = tl.maximum(top, tl.max(x, 0)[None, :])
            lanes = lanes * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)[None, :]
            top = new
        m = tl.max(top, 1)[:, None]
        total = tl.sum(lanes * tl.exp(top - m), 1)[:, None]
        for start in range(0, columns, BLOCK):
            inside = (r < rows) & (c + start < columns)
            x = tl.load(x_row + c + start, mask=inside, other=-float("inf")).to(tl.float32) - m
            if LOG:
                y = x - tl.log(total)
            else:
                y = tl.exp(x) * (1.0 / total)
            tl.store(y_row + c + start, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_rows_bwd(
    dy_ptr,
    y_ptr,
    dx_ptr,
    rows,
    columns,
    dy_stride,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dx = y (dy - sum(dy y)); of the logarithm: dx = dy - exp(y) sum(dy)."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    dy_row = dy_ptr + r * dy_stride
    y_row = y_ptr + r * columns
    dx_row = dx_ptr + r * columns
    if WHOLE:
        inside = (r < rows) & (c < columns)
        dy = tl.load(dy_row + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_row + c, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            dx = dy - tl.exp(y) * tl.sum(dy, 1)[:, None]
        else:
            dx = y * (dy - tl.sum(dy * y, 1)[:, None])
        tl.store(dx_row + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    else:
        lanes = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, columns, BLOCK):
            inside = (r < rows) & (c + start < columns)
            dy = tl.load(dy_row + c + start, mask=inside, other=0.0).to(tl.float32)
            if LOG:
                lanes += dy
            else:
                lanes += dy * tl.load(y_row + c + start, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(lanes, 1)[:, None]
        for start in range(0, columns, BLOCK):
            inside = (r < rows) & (c + start < columns)
            dy = tl.load(dy_row + c + start, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_row + c + start, mask=inside, other=0.0).to(tl.float32)
            if LOG:
                dx = dy - tl.exp(y) * total
            else:
                dx = y * (dy - total)
            tl.store(dx_row + c + start, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_columns_fwd(
    x_ptr, y_ptr, columns, inner, blocks, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Along the middle of a contiguous [outer][columns][inner]: lanes run across neighbouring slices."""
    program = tl.program_id(0).to(tl.int64)
    base = program // blocks * columns * inner
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    j = tl.arange(0, ROWS)[:, None].to(tl.int64)
    top = tl.full((ROWS, BLOCK), LOWEST, tl.float32)
    lanes = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, ROWS):
        inside = (i < inner) & (j + start < columns)
        x = tl.load(x_ptr + base + (j + start) * inner + i, mask=inside, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, x)
        lanes = lanes * tl.exp(top - new) + tl.exp(x - new)
        top = new
    m = tl.max(top, 0)[None, :]
    total = tl.sum(lanes * tl.exp(top - m), 0)[None, :]
    for start in range(0, columns, ROWS):
        inside = (i < inner) & (j + start < columns)
        at = base + (j + start) * inner + i
        x = tl.load(x_ptr + at, mask=inside, other=-float("inf")).to(tl.float32) - m
        if LOG:
            y = x - tl.log(total)
        else:
            y = tl.exp(x) * (1.0 / total)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_columns_bwd(
    dy_ptr, y_ptr, dx_ptr, columns, inner, blocks, LOG: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The same layout as `softmax_columns_fwd`."""
    program = tl.program_id(0).to(tl.int64)
    base = program // blocks * columns * inner
    i = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    j = tl.arange(0, ROWS)[:, None].to(tl.int64)
    lanes = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, columns, ROWS):
        inside = (i < inner) & (j + start < columns)
        at = base + (j + start) * inner + i
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            lanes += dy
        else:
            lanes += dy * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(lanes, 0)[None, :]
    for start in range(0, columns, ROWS):
        inside = (i < inner) & (j + start < columns)
        at = base + (j + start) * inner + i
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            dx = dy - tl.exp(y) * total
        else:
            dx = y * (dy - total)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _extents(t: Tensor, dim: int) -> tuple[int, int, int]:
    """(outer, columns, inner) of a tensor that is not empty."""
    if t.dim() == 0:
        return 1, 1, 1
    dim %= t.dim()
    inner = 1
    for size in t.shape[dim + 1 :]:
        inner *= size
    return t.numel() // (t.shape[dim] * inner), t.shape[dim], inner


def _tall(columns: int, inner: int) -> tuple[int, int]:
    """(rows, block) of the column kernels: 64 neighbouring slices are whole lines of memory, as tall as 4096 allows."""
    block = min(power_of_2(inner, 16), 64)
    return min(power_of_2(columns), 4096 // block), block


def softmax_fwd(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """`softmax` or `log_softmax` along `dim`."""
    output = torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    outer, columns, inner = _extents(input, dim)
    if inner == 1:
        x = rows_of(input, columns)
        arch = arch_of(input.device.index)
        tile = rows_config(columns, outer, arch, narrow=narrow(columns, x))

        def launch(tile: Rows) -> None:
            softmax_rows_fwd[(cdiv(outer, tile.rows),)](
                x, output, outer, columns, x.stride(0), log, tile.rows, tile.block, tile.whole, num_warps=tile.warps
            )

        tune.run("softmax_fwd", launch, tile, x, arch, (outer, columns), (log,))
    else:
        rows, block = _tall(columns, inner)
        blocks = cdiv(inner, block)
        x = input.contiguous()
        softmax_columns_fwd[(blocks * outer,)](x, output, columns, inner, blocks, log, rows, block, num_warps=8)
    return output


def softmax_bwd(grad: Tensor, output: Tensor, dim: int, log: bool, input_dtype: torch.dtype) -> Tensor:
    """The gradient of the input."""
    dx = torch.empty(output.shape, dtype=input_dtype, device=output.device)
    if dx.numel() == 0:
        return dx
    outer, columns, inner = _extents(output, dim)
    y = output.contiguous()
    if inner == 1:
        dy = rows_of(grad, columns)
        arch = arch_of(output.device.index)
        tile = rows_config(columns, outer, arch, 8192, narrow=narrow(columns, dy))

        def launch(tile: Rows) -> None:
            softmax_rows_bwd[(cdiv(outer, tile.rows),)](
                dy, y, dx, outer, columns, dy.stride(0), log, tile.rows, tile.block, tile.whole, num_warps=tile.warps
            )

        tune.run("softmax_bwd", launch, tile, y, arch, (outer, columns), (log,))
    else:
        rows, block = _tall(columns, inner)
        blocks = cdiv(inner, block)
        dy = grad.contiguous()
        softmax_columns_bwd[(blocks * outer,)](dy, y, dx, columns, inner, blocks, log, rows, block, num_warps=8)
    return dx


register(
    "softmax",
    (
        "(Tensor input, int dim, bool log, ScalarType? dtype, bool grad_handled=False) -> Tensor",
        softmax_fwd,
        softmax_fwd_fake,
    ),
    (
        "(Tensor grad, Tensor output, int dim, bool log, ScalarType input_dtype, bool grad_handled=False) -> Tensor",
        softmax_bwd,
        softmax_bwd_fake,
    ),
)
