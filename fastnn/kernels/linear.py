"""Linear layer and activation: bias and activation in the epilogue of the product; backward in two products."""

from torch import Tensor

from ..ops.linear import linear_bwd_fake, linear_fwd_fake
from .library import register
from .matmul import product
from .sums import slope_and_sum


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
        s = None if slope is None or not activation else slope.contiguous().view(-1, N)
        dz = grad.new_empty(dy.shape) if activation else dy
        slope_and_sum(dy, s, None, dz if activation else None, db, activation, saved=True)
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
