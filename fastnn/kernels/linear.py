"""Linear layer and activation: bias and activation in the epilogue of the product; backward in two products."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.linear import linear_bwd_fake, linear_fwd_fake
from .activation import slope
from .config import arch_of, cdiv, columns_config
from .library import register
from .matmul import product
from .sums import add_parts


@triton.jit
def linear_slope(
    dy_ptr,
    s_ptr,
    dz_ptr,
    db_ptr,
    M,
    N,
    dy_row,
    dy_col,
    part_rows,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dz = dy f'(z), and of each part of the rows its sum."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    part = tl.program_id(1).to(tl.int64)
    end = tl.minimum(M, (part + 1) * part_rows)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(part * part_rows, end, ROWS):
        m = start + tl.arange(0, ROWS)[:, None]
        inside = (m < end) & (n < N)
        dz = tl.load(dy_ptr + m * dy_row + n * dy_col, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            dz *= slope(tl.load(s_ptr + m * N + n, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
            tl.store(dz_ptr + m * N + n, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        db += tl.where(inside, dz, 0.0)
    if db_ptr is not None:
        tl.store(db_ptr + part * N + n, tl.sum(db, 0)[None, :], mask=n < N)


def linear_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, save_pre: bool
) -> tuple[Tensor, Tensor | None]:
    """(activation(input @ weight^T + bias), what is in the brackets)."""
    output, pre = linear_fwd_fake(input, weight, bias, activation, save_pre)
    if output.numel():
        x = (
            input.reshape(-1, input.shape[-1])
            if input.numel()
            else input.new_empty((output.numel() // weight.shape[0], 0))
        )
        b = None if bias is None else bias.contiguous()
        product(x, weight.t(), output, b, pre, activation)
    return output, pre


def linear_bwd(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    slope: Tensor | None,
    activation: int,
    input_shape: list[int],
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, as `mask` wants them."""
    dx, dw, db = linear_bwd_fake(grad, input, weight, slope, activation, input_shape, mask)
    N, K = weight.shape
    if grad.numel() == 0:
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient.zero_()
        return dx, dw, db
    dy = grad.reshape(-1, N)
    dz = dy
    if activation or db is not None:
        M = dy.shape[0]
        cut = columns_config(N, M, arch_of(grad.device.index))
        s = None if slope is None or not activation else slope.contiguous()
        dz = grad.new_empty((M, N)) if activation else dy
        parts = None if db is None else grad.new_empty((cut.parts, N), dtype=torch.float32)
        linear_slope[(cdiv(N, cut.block), cut.parts)](
            dy, s, dz, parts, M, N, *dy.stride(), cdiv(M, cut.parts), activation, cut.rows, cut.block,
            num_warps=cut.warps,
        )  # fmt: skip
        if db is not None and parts is not None:
            add_parts(parts, db)
    if dx is not None:
        product(dz, weight, dx)
    if dw is not None and input is not None and K:
        product(dz.t(), input.reshape(-1, K), dw)
    return dx, dw, db


register(
    "linear",
    (
        "(Tensor input, Tensor weight, Tensor? bias, int activation, bool save_pre, bool grad_handled=False) -> "
        "(Tensor, Tensor?)",
        linear_fwd,
        linear_fwd_fake,
    ),
    (
        "(Tensor grad, Tensor? input, Tensor weight, Tensor? slope, int activation, SymInt[] input_shape, "
        "bool[3] mask, bool grad_handled=False) -> (Tensor?, Tensor?, Tensor?)",
        linear_bwd,
        linear_bwd_fake,
    ),
)
