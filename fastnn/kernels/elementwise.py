"""Activations of a sum with a bias, and products with an activation (GLU). float32 arithmetic whatever the type."""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.activation import activation_bwd_fake, activation_fwd_fake
from . import tune
from .activation import activate, through
from .config import Tile, arch_of, cdiv, elementwise_config
from .library import register, rows_of
from .sums import slope_and_sum


@triton.jit
def _tile(rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows, columns and mask of this program's tile; tiles of one row of tiles are neighbours."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(n, BLOCK)
    r = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    c = program % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    return r, c, (r < rows) & (c < n)


@triton.jit
def activation_fwd_tile(
    x_ptr,
    factor_ptr,
    bias_ptr,
    y_ptr,
    rows,
    n,
    x_stride,
    factor_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile. A null pointer (None) is a part that there is not."""
    r, c, inside = _tile(rows, n, ROWS, BLOCK)
    z = tl.load(x_ptr + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    y = activate(z, ACTIVATION)
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + r * factor_stride + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + r * n + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_bwd_tile(
    dy_ptr,
    x_ptr,
    factor_ptr,
    bias_ptr,
    dx_ptr,
    d_factor_ptr,
    rows,
    n,
    dy_stride,
    x_stride,
    factor_stride,
    d_stride,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the gradients that are wanted."""
    r, c, inside = _tile(rows, n, ROWS, BLOCK)
    g = tl.load(dy_ptr + r * dy_stride + c, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + r * x_stride + c, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c, mask=c < n, other=0.0).to(tl.float32)
    if d_factor_ptr is not None:
        d_factor = g * activate(z, ACTIVATION)
        tl.store(d_factor_ptr + r * d_stride + c, d_factor.to(d_factor_ptr.dtype.element_ty), mask=inside)
    if dx_ptr is not None:
        if factor_ptr is not None:
            g *= tl.load(factor_ptr + r * factor_stride + c, mask=inside, other=0.0).to(tl.float32)
        dx = through(g, z, ACTIVATION, False)
        tl.store(dx_ptr + r * d_stride + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _halves(t: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The halves of the rows of a packed tensor, as views."""
    rows = rows_of(t, 2 * n)
    return rows[:, :n], rows[:, n:]


def _operands(input: Tensor, factor: Tensor | None, packed: bool, n: int) -> tuple[Tensor, Tensor | None]:
    if packed:
        return _halves(input, n)
    return rows_of(input, n), None if factor is None else rows_of(factor, n)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _extents(operands: tuple[Tensor | None, ...], bias: Tensor | None, rows: int, n: int) -> tuple[int, int]:
    """Rows and columns; one long row where nothing lies between the rows of any operand."""
    flat = bias is None and all(t is None or t.stride(0) == n for t in operands)
    return (1, rows * n) if flat else (rows, n)


def activation_fwd(input: Tensor, factor: Tensor | None, bias: Tensor | None, activation: int, packed: bool) -> Tensor:
    """activation(input + bias), or activation(input) factor; packed: of the halves of input."""
    output = activation_fwd_fake(input, factor, bias, activation, packed)
    if output.numel() == 0:
        return output
    n = output.shape[-1] if output.dim() else 1
    x, f = _operands(input, factor, packed, n)
    b = None if bias is None else bias.contiguous()
    rows, columns = _extents((x, f), bias, output.numel() // n, n)
    arch = arch_of(input.device.index)

    def launch(tile: Tile) -> None:
        grid = (cdiv(rows, tile.rows) * cdiv(columns, tile.block),)
        activation_fwd_tile[grid](
            x, f, b, output, rows, columns, x.stride(0), _stride(f), activation, tile.rows, tile.block,
            num_warps=tile.warps,
        )  # fmt: skip

    has = (activation, f is not None, b is not None, packed)
    tune.run("activation_fwd", launch, elementwise_config(columns, rows, arch), x, arch, (rows, columns), has)
    return output


def activation_bwd(
    grad: Tensor,
    input: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    activation: int,
    packed: bool,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, factor and bias, as `mask` wants them; of a packed input, one of both halves."""
    dx, d_factor, db = activation_bwd_fake(grad, input, factor, bias, activation, packed, mask)
    if grad.numel() == 0:
        if db is not None:
            db.zero_()
        return dx, d_factor, db
    n = grad.shape[-1] if grad.dim() else 1
    x, f = _operands(input, factor, packed, n)
    dy, b = rows_of(grad, n), None if bias is None else bias.contiguous()
    rows = grad.numel() // n
    if db is not None:
        slope_and_sum(dy, x, b, dx, db, activation, saved=False)
        return dx, d_factor, db
    to_x, to_factor = dx, d_factor
    if packed and dx is not None:
        to_x, to_factor = _halves(dx, n)
    d_stride = 2 * n if packed else n
    rows, columns = (rows, n) if packed else _extents((dy, x, f), bias, rows, n)
    arch = arch_of(input.device.index)

    def launch(tile: Tile) -> None:
        grid = (cdiv(rows, tile.rows) * cdiv(columns, tile.block),)
        activation_bwd_tile[grid](
            dy, x, f, b, to_x, to_factor, rows, columns, dy.stride(0), x.stride(0), _stride(f), d_stride, activation,
            tile.rows, tile.block, num_warps=tile.warps,
        )  # fmt: skip

    has = (activation, f is not None, b is not None, packed, to_x is not None, to_factor is not None)
    tune.run("activation_bwd", launch, elementwise_config(columns, rows, arch), x, arch, (rows, columns), has)
    return dx, d_factor, db


register(
    "activation",
    (
        "(Tensor input, Tensor? factor, Tensor? bias, int activation, bool packed, bool grad_handled=False) -> Tensor",
        activation_fwd,
        activation_fwd_fake,
    ),
    (
        "(Tensor grad, Tensor input, Tensor? factor, Tensor? bias, int activation, bool packed, bool[3] mask, "
        "bool grad_handled=False) -> (Tensor?, Tensor?, Tensor?)",
        activation_bwd,
        activation_bwd_fake,
    ),
)
