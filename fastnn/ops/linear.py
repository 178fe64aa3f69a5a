"""Fused dense layer: `activation(input @ weight.T + bias)` in one pass over the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import activation as _activations
from . import autocast
from .autocast import cast

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]

_FUSED = (None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {name: _activations.ACTIVATIONS[name] for name in _FUSED}
"""The activations that are fused, in plain PyTorch: the first ones of csrc/params/activation.h (`Activation`)."""

ACTIVATION_CODE: dict[str | None, int] = {name: _activations.ACTIVATION_CODE[name] for name in _FUSED}

_GRAD_FROM_OUTPUT = ("relu", "sigmoid", "tanh")  # f'(z) is a function of f(z): nothing more is saved
_GRAD_FROM_INPUT = ("gelu", "gelu_tanh", "silu")  # needs z = x W^T + b, which the forward kernel then writes as well


def linear_fwd_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    save_pre: bool,
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `linear_fwd` gives, without its values."""
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape) if save_pre else None


def linear_bwd_fake(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    slope: Tensor | None,
    activation: int,
    input_shape: list[int],
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `linear_bwd` gives, without its values."""
    dx = grad.new_empty(input_shape) if mask[0] else None
    dw = weight.new_empty(weight.shape) if mask[1] else None
    db = weight.new_empty((weight.shape[0],)) if mask[2] else None
    return dx, dw, db


def linear_packed_fwd_fake(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_packed_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], out_features))


if _extension._C is not None:
    _dispatch.register_raw("linear")
    torch.library.register_fake("fastnn::linear_fwd", linear_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_bwd", linear_bwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_packed_fwd", linear_packed_fwd_fake, lib=_extension.library)
    _packed_fwd = torch.ops.fastnn.linear_packed_fwd.default


def linear_reference(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x W^T + b) in plain PyTorch."""
    return ACTIVATIONS[activation](F.linear(input, weight, bias))


def activation_slope(slope: Tensor, activation: str | None) -> Tensor:
    """f'(z) in plain PyTorch, from f(z) for relu, sigmoid and tanh, from z for the others."""
    s = slope.float() if slope.dtype in (torch.bfloat16, torch.float16) else slope
    if activation == "relu":
        return (~(s <= 0)).to(s.dtype)  # NaN passes its gradient on, as in torch
    if activation == "sigmoid":
        return s * (1 - s)
    if activation == "tanh":
        return 1 - s * s
    if activation == "gelu":
        return torch.special.ndtr(s) + s * torch.exp(-0.5 * s * s) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        u = scale * (s + cubic * s**3)
        p = torch.sigmoid(u)
        return p + s * p * torch.sigmoid(-u) * scale * (1 + 3 * cubic * s * s)  # not 1 - p: it cancels
    p = torch.sigmoid(s)
    return p + s * p * torch.sigmoid(-s)


class LinearFunction(torch.autograd.Function):
    """Saves input and weight as wanted gradients need them, and the output or the pre-activation for the slope.

    The pre-activation, where the slope needs it, is a second output that the wrapper hides: a saved output stays
    connected to the graph, so second derivatives need nothing else to be saved.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, backend: str
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the backend's forward kernel; returns (output, pre-activation or None)."""
        fwd = _dispatch.KERNELS["linear"][backend].fwd
        output, pre = fwd(input, weight, bias, ACTIVATION_CODE[activation], activation in _GRAD_FROM_INPUT, True)
        slope = output if activation in _GRAD_FROM_OUTPUT else pre
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, slope)
        ctx.activation, ctx.backend, ctx.input_shape = activation, backend, input.shape
        ctx.set_materialize_grads(False)
        return output, pre

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_pre: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or the differentiable formula for higher derivatives."""
        input, weight, slope = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.compiler.is_compiling():
            grad_pre = None  # traced as zeros; torch.compile has no second derivatives that could make it anything else
        if grad is None and grad_pre is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() or grad is None or grad_pre is not None:
            found = linear_bwd_reference(grad, grad_pre, input, weight, slope, ctx.activation, needs)
        else:
            bwd = _dispatch.KERNELS["linear"][ctx.backend].bwd
            code = ACTIVATION_CODE[ctx.activation]
            found = bwd(grad, input, weight, slope, code, list(ctx.input_shape), list(needs), True)
        return *found, None, None


def linear_bwd_reference(
    grad: Tensor | None,
    grad_pre: Tensor | None,
    input: Tensor | None,
    weight: Tensor,
    slope: Tensor | None,
    activation: str | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz = dy f'(z) + what came for z itself; dx = dz W, dW = dz^T x, db = sum of dz over rows, in plain PyTorch."""
    parts = [] if grad_pre is None else [grad_pre]
    if grad is not None:
        parts.append(grad if slope is None else (grad * activation_slope(slope, activation)).to(grad.dtype))
    dz = sum(parts[1:], parts[0])
    rows = dz.reshape(-1, weight.shape[0])
    dx = dz @ weight if needs[0] else None
    dw = rows.t() @ input.reshape(-1, weight.shape[1]) if needs[1] and input is not None else None
    return dx, dw, rows.sum(0) if needs[2] else None


def check_activation(op: str, activation: object) -> None:
    """ValueError, in the name of `op`, unless it is a key of `ACTIVATIONS`."""
    if (activation is not None and not isinstance(activation, str)) or activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {known}; got {activation!r}")


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"fastnn.linear: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise TypeError(f"fastnn.linear: {name} must be a dense tensor, got layout {tensor.layout}")
    check_activation("fastnn.linear", activation)
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
    if packed is not None and _dispatch.is_plain("linear", input, bias) and activation in ACTIVATION_CODE:
        # Packing has checked the weight, the kernel checks the bias's type.
        n, k = weight.shape
        if input.dtype == weight.dtype and input.shape[-1] == k and (bias is None or tuple(bias.shape) == (n,)):
            result: Tensor = _packed_fwd(input, packed, bias, n, ACTIVATION_CODE[activation], True)
            return result
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = cast(input, dtype), cast(weight, dtype), cast(bias, dtype)
        packed = None  # of the weight before the cast
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
        return LinearFunction.apply(input, weight, bias, activation, backend)[0]  # type: ignore[no-untyped-call]
    if packed is not None and backend == "cpu":
        return _packed_fwd(input, packed, bias, weight.shape[0], ACTIVATION_CODE[activation], True)
    fwd = _dispatch.KERNELS["linear"][backend].fwd
    return fwd(input, weight, bias, ACTIVATION_CODE[activation], False, True)[0]
