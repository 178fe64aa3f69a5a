"""Fused dense layer: `activation(input @ weight.T + bias)` in one pass over the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""The activations in plain PyTorch. The order is the code in csrc/params/linear.h (`Activation`)."""

ACTIVATION_CODE: dict[str | None, int] = {name: code for code, name in enumerate(ACTIVATIONS)}

_GRAD_FROM_OUTPUT = ("relu", "sigmoid", "tanh")  # f'(z) is a function of f(z): nothing more is saved
_GRAD_FROM_INPUT = ("gelu", "gelu_tanh", "silu")  # needs z = x W^T + b, which the forward kernel then writes as well

if _extension._C is not None:
    _raw = torch.ops.fastnn
    _dispatch.register("linear", "cpu", _dispatch.Kernels(_raw.linear_fwd.default, _raw.linear_bwd.default))

    @torch.library.register_fake("fastnn::linear_fwd", lib=_extension.library)
    def _(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: int,
        save_pre: bool,
        grad_handled: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*input.shape[:-1], weight.shape[0])
        return input.new_empty(shape), input.new_empty(shape) if save_pre else None

    @torch.library.register_fake("fastnn::linear_bwd", lib=_extension.library)
    def _(
        grad: Tensor,
        input: Tensor | None,
        weight: Tensor,
        slope: Tensor | None,
        activation: int,
        input_shape: list[int],
        mask: list[bool],
        grad_handled: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dx = grad.new_empty(input_shape) if mask[0] else None
        dw = weight.new_empty(weight.shape) if mask[1] else None
        db = weight.new_empty((weight.shape[0],)) if mask[2] else None
        return dx, dw, db

    @torch.library.register_fake("fastnn::linear_packed_fwd", lib=_extension.library)
    def _(
        input: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: int,
        grad_handled: bool = False,
    ) -> Tensor:
        return input.new_empty((*input.shape[:-1], out_features))


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x W^T + b) in plain PyTorch."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


class LinearFunction(torch.autograd.Function):
    """Saves input, weight and, where the activation's slope needs it, the output or the pre-activation."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
    ) -> Tensor:
        """Runs the backend's forward kernel."""
        save_pre = activation in _GRAD_FROM_INPUT
        fwd = _dispatch.KERNELS["linear"][backend].fwd
        output, pre = fwd(input, weight, bias, ACTIVATION_CODE[activation], save_pre, True)
        slope = output if activation in _GRAD_FROM_OUTPUT else pre
        # The input is read for dW, and by the reference under create_graph; a plain product with a frozen weight
        # needs neither.
        keep_input = ctx.needs_input_grad[1] or activation is not None
        ctx.save_for_backward(input if keep_input else None, weight, bias, slope)
        ctx.activation, ctx.backend = activation, backend
        ctx.input_shape = input.shape
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        input, weight, bias, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            dx, dw, db = _differentiable_backward(grad, input, weight, bias, ctx, needs)
        else:
            bwd = _dispatch.KERNELS["linear"][ctx.backend].bwd
            dx, dw, db = bwd(
                grad, input, weight, slope, ACTIVATION_CODE[ctx.activation], list(ctx.input_shape), list(needs), True
            )
        return dx, dw, db, None, None


def _differentiable_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, bias: Tensor | None, ctx: Any, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    if input is None:  # a plain product with a frozen weight: dx is linear in grad, the input does not occur
        return [grad @ weight, None, grad.flatten(0, -2).sum(0) if needs[2] else None]
    operands = [t for t, wanted in zip((input, weight, bias), needs, strict=True) if wanted and t is not None]
    output = linear_reference(input, weight, bias, ctx.activation)
    found = iter(torch.autograd.grad(output, operands, grad, create_graph=True))
    return [next(found) if wanted else None for wanted in needs]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"fastnn.linear: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise TypeError(f"fastnn.linear: {name} must be a dense tensor, got layout {tensor.layout}")
    if (activation is not None and not isinstance(activation, str)) or activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"fastnn.linear: activation must be one of {known}; got {activation!r}")
    if weight.dim() not in (1, 2):
        raise ValueError(f"fastnn.linear: weight must be (out_features, in_features), got shape {tuple(weight.shape)}")
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"fastnn.linear: input's last dimension must be in_features = {weight.shape[-1]}, "
            f"got shape {tuple(input.shape)}"
        )
    if bias is not None and weight.dim() == 2 and bias.dim() != 0 and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"fastnn.linear: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if weight.dim() == 1 and bias is not None and bias.dim() != 0:
        raise ValueError(f"fastnn.linear: bias of a one-dimensional weight must be a scalar, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            raise TypeError(
                f"fastnn.linear: {name} must have the input's dtype and device ({input.dtype}, {input.device}), "
                f"got {tensor.dtype}, {tensor.device}"
            )
    if not input.dtype.is_floating_point:
        raise TypeError(f"fastnn.linear: input must be floating point, got {input.dtype}")


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype == torch.float64 or not tensor.dtype.is_floating_point:
        return tensor
    return tensor.to(dtype)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)`, as `torch.nn.functional.linear` followed by the activation, in one pass.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernels (float32
            accumulation), other floating types on the reference.
        weight: (out_features, in_features), or (in_features,) for one output without its dimension.
        bias: (out_features,), a scalar, or None.
        activation: None, "relu", "gelu" (erf form), "gelu_tanh" (Hendrycks & Gimpel's approximation), "silu"
            (x sigmoid(x)), "sigmoid" or "tanh". The bias and activation are applied in float32, before the rounding
            to the output's type.

    Returns:
        A contiguous tensor (*, out_features). Under autocast the operands are cast to the autocast type first.

    Raises:
        TypeError: operands of differing or non-floating types or devices.
        ValueError: shapes that do not fit, an unknown activation.
        NotImplementedError: a forced backend cannot run the call.
    """
    return linear_maybe_packed(input, weight, bias, activation, None)


def linear_maybe_packed(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, packed: Tensor | None
) -> Tensor:
    """`linear`, reading the weight from `packed` (`fastnn.ops.packing`) when no gradient is wanted."""
    if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = _autocast(input, dtype), _autocast(weight, dtype), _autocast(bias, dtype)  # type: ignore[assignment]
        packed = packed if packed is not None and weight.dtype == torch.float32 == dtype else None
    _check(input, weight, bias, activation)
    if weight.dim() == 1:
        return linear_maybe_packed(input, weight.unsqueeze(0), bias, activation, None).squeeze(-1)
    backend = _dispatch.pick("linear", input)
    if backend == "reference":
        note_reference("linear_fwd")
        return linear_reference(input, weight, bias, activation)
    if bias is not None and bias.dim() == 0:
        bias = bias.expand(weight.shape[0])
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return LinearFunction.apply(input, weight, bias, activation, backend)
    if packed is not None and backend == "cpu":
        return torch.ops.fastnn.linear_packed_fwd.default(
            input, packed, bias, weight.shape[0], ACTIVATION_CODE[activation], True
        )
    fwd = _dispatch.KERNELS["linear"][backend].fwd
    return fwd(input, weight, bias, ACTIVATION_CODE[activation], False, True)[0]
