"""Softmax and log-softmax along any dimension, one kernel pass over the input, float32 accumulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast


def softmax_fwd_fake(
    input: Tensor, dim: int, log: bool, dtype: torch.dtype | None, grad_handled: bool = False
) -> Tensor:
    """What `softmax_fwd` gives, without its values."""
    return torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)


def softmax_bwd_fake(
    grad: Tensor, output: Tensor, dim: int, log: bool, input_dtype: torch.dtype, grad_handled: bool = False
) -> Tensor:
    """What `softmax_bwd` gives, without its values."""
    return torch.empty(output.shape, dtype=input_dtype, device=output.device)


if _extension._C is not None:
    _dispatch.register_raw("softmax")
    torch.library.register_fake("fastnn::softmax_fwd", softmax_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::softmax_bwd", softmax_bwd_fake, lib=_extension.library)


def softmax_reference(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) along `dim`, in plain PyTorch."""
    return torch.softmax(input, dim, dtype=dtype)


def log_softmax_reference(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """(x - max) - log(sum(exp(x - max))) along `dim`, in plain PyTorch."""
    return torch.log_softmax(input, dim, dtype=dtype)


def softmax_bwd_reference(grad: Tensor, output: Tensor, dim: int, log: bool) -> Tensor:
    """dx = y (dy - sum(dy y)); of the logarithm: dx = dy - exp(y) sum(dy)."""
    if log:
        return grad - output.exp() * grad.sum(dim, keepdim=True)
    return output * (grad - (grad * output).sum(dim, keepdim=True))


class SoftmaxFunction(torch.autograd.Function):
    """Saves the output only; differentiates the reference formula when a second derivative may be wanted."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, log: bool, dtype: torch.dtype | None, backend: str) -> Tensor:
        """Runs the backend's forward kernel."""
        output = _dispatch.KERNELS["softmax"][backend].fwd(input, dim, log, dtype, True)
        ctx.save_for_backward(output)
        ctx.dim, ctx.log, ctx.input_dtype, ctx.backend = dim, log, input.dtype, backend
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or the differentiable formula under create_graph."""
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = softmax_bwd_reference(grad, output, ctx.dim, ctx.log).to(ctx.input_dtype)
        else:
            bwd = _dispatch.KERNELS["softmax"][ctx.backend].bwd
            dx = bwd(grad, output, ctx.dim, ctx.log, ctx.input_dtype, True)
        return dx, None, None, None, None


def _softmax(name: str, log: bool, input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"fastnn.{name}: input must be a Tensor, got {type(input).__name__}")
    if input.layout is not torch.strided:
        raise TypeError(f"fastnn.{name}: input must be a dense tensor, got layout {input.layout}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"fastnn.{name}: dim must be an int, got {type(dim).__name__}")
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(f"fastnn.{name}: dim must be in [{-rank}, {rank - 1}], got {dim}")
    if dtype is None and not input.is_cpu and input.dtype != torch.float64 and autocast.active(input):
        dtype = torch.float32
    if dtype is not None and dtype != input.dtype:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"fastnn.{name}: dtype must be a floating-point torch.dtype, got {dtype!r}")
        if dtype != torch.float32 or input.dtype not in _dispatch.KERNEL_DTYPES:
            input = input.to(dtype)  # only half precision in, float32 out is fused
    elif not input.dtype.is_floating_point:
        raise TypeError(f"fastnn.{name}: input must be floating point, got {input.dtype}; give dtype= to convert it")
    backend = _dispatch.pick("softmax", input)
    if backend == "reference":
        note_reference("softmax_fwd")
        return (log_softmax_reference if log else softmax_reference)(input, dim, dtype)
    if input.requires_grad and torch.is_grad_enabled():
        return SoftmaxFunction.apply(input, dim, log, dtype, backend)  # type: ignore[no-untyped-call]
    return _dispatch.KERNELS["softmax"][backend].fwd(input, dim, log, dtype, True)


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax along `dim`: `exp(x - max) / sum(exp(x - max))`, as `torch.softmax`.

    Args:
        input: any shape and strides; float32, bfloat16 and float16 run on the kernels, other floating types on
            the reference. It is never written to.
        dim: the dimension that sums to one, in [-input.dim(), input.dim()).
        dtype: result type; the input counts as converted to it first (half precision to float32 is fused). Under
            autocast on a GPU float32 unless given, as torch's.

    Returns:
        A contiguous tensor of the input's shape. Maximum, sum and exponential are computed in float32.
        NaN and infinities as torch: a slice with NaN or +inf, or of -inf alone, becomes NaN.

    Raises:
        TypeError: input not a floating-point tensor (and no `dtype` given), `dim` not an int.
        IndexError: `dim` out of range.
        NotImplementedError: a forced backend cannot run the call.
    """
    return _softmax("softmax", False, input, dim, dtype)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Logarithm of the softmax along `dim`: `(x - max) - log(sum(exp(x - max)))`, as `torch.log_softmax`.

    Arguments, result and errors as `fastnn.softmax`.
    """
    return _softmax("log_softmax", True, input, dim, dtype)
