"""Softmax of scaled, masked rows in one pass; a row in which nothing takes part is zeros."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .softmax import softmax_bwd_reference

MOST_DIMS = 9
"""Dimensions of an input that the kernels take beside a mask; more go to the reference."""


def masked_softmax_fwd_fake(
    input: Tensor, mask: Tensor | None, scale: float, causal: bool, grad_handled: bool = False
) -> Tensor:
    """What `masked_softmax_fwd` gives, without its values."""
    return input.new_empty(input.shape)


def masked_softmax_bwd_fake(grad: Tensor, output: Tensor, scale: float, grad_handled: bool = False) -> Tensor:
    """What `masked_softmax_bwd` gives, without its values."""
    return output.new_empty(output.shape)


if _extension._C is not None:
    _dispatch.register_raw("masked_softmax")
    torch.library.register_fake("fastnn::masked_softmax_fwd", masked_softmax_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::masked_softmax_bwd", masked_softmax_bwd_fake, lib=_extension.library)


def masked_softmax_reference(input: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """softmax(scale input + mask) along the last dimension in plain PyTorch."""
    scores = input * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    # Filled before the softmax too: its gradient is then zero and not NaN.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0).to(input.dtype)


class MaskedSoftmaxFunction(torch.autograd.Function):
    """Saves the output only, not the mask: what takes no part is 0 there, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mask: Tensor | None, scale: float, causal: bool, backend: str) -> Tensor:
        """Runs the backend's forward kernel."""
        output: Tensor = _dispatch.KERNELS["masked_softmax"][backend].fwd(input, mask, scale, causal, True)
        ctx.save_for_backward(output)
        ctx.scale, ctx.backend = scale, backend
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or the differentiable formula under create_graph."""
        (output,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx = softmax_bwd_reference(grad, output, -1, False) * ctx.scale
        else:
            dx = _dispatch.KERNELS["masked_softmax"][ctx.backend].bwd(grad, output, ctx.scale, True)
        return dx, None, None, None, None


def _check(input: Tensor, mask: Tensor | None, scale: float, causal: bool) -> None:
    name = "fastnn.masked_softmax"
    for key, tensor in (("input", input), ("mask", mask)):
        if tensor is None and key == "mask":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: {key} must be a dense tensor, got layout {tensor.layout}")
        if not (tensor.dtype.is_floating_point or (key == "mask" and tensor.dtype == torch.bool)):
            also = "boolean or " if key == "mask" else ""
            raise TypeError(f"{name}: {key} must be {also}floating point, got {tensor.dtype}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: scale must be a number, got {type(scale).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"{name}: causal must be a bool, got {type(causal).__name__}")
    if input.dim() < (2 if causal else 1):
        least = "two dimensions to be causal" if causal else "one dimension"
        raise ValueError(f"{name}: input must have at least {least}, got shape {tuple(input.shape)}")
    if mask is None:
        return
    if mask.device != input.device:
        raise ValueError(f"{name}: mask is on {mask.device}, input on {input.device}")
    sizes = zip(reversed(mask.shape), reversed(input.shape), strict=False)
    if mask.dim() > input.dim() or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{name}: mask must broadcast to the input's shape {tuple(input.shape)}, got {tuple(mask.shape)}"
        )


def _why_reference(input: Tensor, mask: Tensor | None) -> str:
    """Why a call goes to the reference though its input could run on a kernel, in words; empty where it does not."""
    if mask is None:
        return ""
    if mask.dtype != torch.bool and mask.dtype not in _dispatch.KERNEL_DTYPES:
        return f"the mask has dtype {mask.dtype}"
    if mask.requires_grad and torch.is_grad_enabled():
        return "a gradient of the mask is wanted"
    return f"the input has more than {MOST_DIMS} dimensions" if input.dim() > MOST_DIMS else ""


def masked_softmax(input: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """`softmax(scale * input + mask)` along the last dimension, zeros where nothing takes part, in one pass.

    Args:
        input: (*, columns), any strides; float32, bfloat16 and float16 run on the kernels, other floating types on the
            reference. It is never written to.
        mask: what broadcasts to the input's shape, which is not done in memory: boolean, True where an element takes
            part, or floating point and added; of float64 or with a gradient, the reference runs. None for all.
        scale: a factor of the input, before the mask.
        causal: whether of (*, rows, columns) row i sees columns 0 to i alone, beside the mask; the others are not read.

    Returns:
        A contiguous tensor of the input's shape and type, computed in float32 and rounded once. A row of which nothing
        takes part (masked, or -inf by itself) is zeros with gradient zero, where torch's softmax gives NaN. What a
        boolean mask hides may be anything, NaN too; NaN or +inf elsewhere makes its row NaN. Backward keeps the result
        and nothing else.

    Raises:
        TypeError: a tensor not of a floating type (the mask not of a boolean one either), an option of another type.
        ValueError: shapes or devices that do not fit.
        NotImplementedError: a forced backend cannot run the call.
    """
    _check(input, mask, scale, causal)
    if not input.is_cpu and autocast.active(input):  # on GPUs torch's softmax is in float32, on CPUs as given
        input = autocast.cast(input, torch.float32)
    backend = _dispatch.pick("masked_softmax", input)
    odd = _why_reference(input, mask) if backend != "reference" else ""
    if odd:
        _dispatch.refuse_if_forced("masked_softmax", odd)
    if backend == "reference" or odd:
        note_reference("masked_softmax_fwd")
        return masked_softmax_reference(input, mask, scale, causal).contiguous()
    if input.requires_grad and torch.is_grad_enabled():
        return MaskedSoftmaxFunction.apply(input, mask, scale, causal, backend)  # type: ignore[no-untyped-call]
    output: Tensor = _dispatch.KERNELS["masked_softmax"][backend].fwd(input, mask, scale, causal, True)
    return output
