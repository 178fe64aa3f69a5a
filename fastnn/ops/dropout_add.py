"""Dropout and the sum after it in one pass, the mask computed and never stored."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from .attention import dropout_mask


def dropout_add_fwd_fake(
    input: Tensor, residual: Tensor, seed: Tensor | None, p: float, grad_handled: bool = False
) -> Tensor:
    """What `dropout_add_fwd` gives, without its values."""
    return input.new_empty(input.shape)


def dropout_add_bwd_fake(grad: Tensor, seed: Tensor | None, p: float, grad_handled: bool = False) -> Tensor:
    """What `dropout_add_bwd` gives, without its values."""
    return grad.new_empty(grad.shape)


if _extension._C is not None:
    _dispatch.register_raw("dropout_add")
    torch.library.register_fake("fastnn::dropout_add_fwd", dropout_add_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::dropout_add_bwd", dropout_add_bwd_fake, lib=_extension.library)


def dropout_reference(input: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """input / (1 - p) where an element is kept, else 0, in plain PyTorch: which, depends on seed and position alone."""
    if seed is None:
        return input
    kept = dropout_mask(tuple(input.shape) or (1,), seed, p, input.device).reshape(input.shape)
    return torch.where(
        kept, input / (1 - p) if p < 1 else input, torch.zeros((), dtype=input.dtype, device=input.device)
    )


def dropout_add_reference(input: Tensor, residual: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout of input, plus residual, in plain PyTorch."""
    return dropout_reference(input, seed, p) + residual


class DropoutAddFunction(torch.autograd.Function):
    """Saves the seed, 8 bytes: backward computes the mask again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor, seed: Tensor | None, p: float, backend: str) -> Tensor:
        """Runs the backend's forward kernel."""
        ctx.save_for_backward(seed)
        ctx.p, ctx.backend = p, backend
        output: Tensor = _dispatch.KERNELS["dropout_add"][backend].fwd(input, residual, seed, p, True)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or the differentiable formula under create_graph."""
        (seed,) = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            if seed is None or torch.is_grad_enabled():
                dx = dropout_reference(grad, seed, ctx.p)
            else:
                dx = _dispatch.KERNELS["dropout_add"][ctx.backend].bwd(grad, seed, ctx.p, True)
        return dx, grad if ctx.needs_input_grad[1] else None, None, None, None


def _check(input: Tensor, residual: Tensor, p: float, training: bool) -> None:
    name = "fastnn.dropout_add"
    for key, tensor in (("input", input), ("residual", residual)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {key} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: {key} must be a dense tensor, got layout {tensor.layout}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: {key} must be floating point, got {tensor.dtype}")
    if residual.device != input.device:
        raise ValueError(f"{name}: residual is on {residual.device}, input on {input.device}")
    if residual.shape != input.shape:
        raise ValueError(
            f"{name}: residual must have the input's shape {tuple(input.shape)}, got {tuple(residual.shape)}"
        )
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: p must be a number, got {type(p).__name__}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: p must be in [0, 1], got {p}")
    if not isinstance(training, bool):
        raise TypeError(f"{name}: training must be a bool, got {type(training).__name__}")


def dropout_add(input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`residual + dropout(input, p)`, from one pass over memory and without a mask in it.

    Args:
        input: any shape and strides; float32, bfloat16 and float16 run on the kernels, other floating types on the
            reference. It is never written to.
        residual: of the input's shape. Of another floating type, both become what torch's addition would make them.
        p: the probability of an element of `input` to become 0; the others are divided by 1 - p.
        training: whether anything is dropped; without, the sum.

    Returns:
        A contiguous tensor of the input's shape and type, computed in float32 and rounded once. What is dropped is 0
        whatever it held. Which elements are, is a function of a seed drawn from torch's generator and of the position:
        the same for any number of threads and on every backend, and again in backward, which keeps the seed and
        nothing else. The mask is not that of torch's dropout.

    Raises:
        TypeError: input or residual no floating-point tensor, `p` no number, `training` no bool.
        ValueError: shapes or devices that do not fit, `p` not in [0, 1].
        NotImplementedError: a forced backend cannot run the call.
    """
    _check(input, residual, p, training)
    if residual.dtype != input.dtype:
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    backend = _dispatch.pick("dropout_add", input)
    p = float(p) if training else 0.0
    if backend == "reference" and _dispatch.transformed():  # vmap's rules for randomness are those of torch's dropout
        note_reference("dropout_add_fwd")
        return F.dropout(input, p) + residual
    seed = torch.randint(0, 2**62, ()) if p > 0 else None
    if backend == "reference":
        note_reference("dropout_add_fwd")
        return dropout_add_reference(input, residual, seed, p).contiguous()
    if torch.is_grad_enabled() and (input.requires_grad or residual.requires_grad):
        return DropoutAddFunction.apply(input, residual, seed, p, backend)  # type: ignore[no-untyped-call]
    output: Tensor = _dispatch.KERNELS["dropout_add"][backend].fwd(input, residual, seed, p, True)
    return output
