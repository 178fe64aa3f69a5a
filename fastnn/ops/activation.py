"""Activations with an optional bias, and gated linear units: one pass over memory, float32 in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference

Approximate = Literal["none", "tanh"]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
    "hardswish": F.hardswish,
}
"""The activations in plain PyTorch. The order is the code in csrc/params/activation.h (`Activation`)."""

ACTIVATION_CODE: dict[str | None, int] = {name: code for code, name in enumerate(ACTIVATIONS)}


def activation_fwd_fake(
    input: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    activation: int,
    packed: bool,
    grad_handled: bool = False,
) -> Tensor:
    """What `activation_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], input.shape[-1] // 2) if packed else input.shape)


def activation_bwd_fake(
    grad: Tensor,
    input: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    activation: int,
    packed: bool,
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `activation_bwd` gives, without its values."""
    dx = input.new_empty(input.shape) if mask[0] else None
    d_factor = input.new_empty(input.shape) if mask[1] else None
    return dx, d_factor, bias.new_empty(bias.shape) if mask[2] and bias is not None else None


if _extension._C is not None:
    _dispatch.register_raw("activation")
    torch.library.register_fake("fastnn::activation_fwd", activation_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::activation_bwd", activation_bwd_fake, lib=_extension.library)


def activation_reference(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """activation(input + bias), in plain PyTorch."""
    return ACTIVATIONS[activation](input if bias is None else input + bias).to(input.dtype)


def glu_reference(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """activation(gate) up, in plain PyTorch; without `up`, of the halves of `gate`."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


class ActivationFunction(torch.autograd.Function):
    """Saves its inputs, which backward goes back to, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        factor: Tensor | None,
        bias: Tensor | None,
        activation: str,
        packed: bool,
        backend: str,
    ) -> Tensor:
        """Runs the backend's forward kernel."""
        ctx.save_for_backward(input, factor, bias)
        ctx.activation, ctx.packed, ctx.backend = activation, packed, backend
        fwd = _dispatch.KERNELS["activation"][backend].fwd
        output: Tensor = fwd(input, factor, bias, ACTIVATION_CODE[activation], packed, True)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        input, factor, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = activation_bwd_reference(grad, (input, factor, bias), ctx.activation, ctx.packed, needs)
        else:
            bwd = _dispatch.KERNELS["activation"][ctx.backend].bwd
            found = bwd(grad, input, factor, bias, ACTIVATION_CODE[ctx.activation], ctx.packed, list(needs), True)
        return *found, None, None, None


def activation_bwd_reference(
    grad: Tensor,
    operands: tuple[Tensor, Tensor | None, Tensor | None],
    activation: str,
    packed: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of input, factor and bias by differentiating the reference."""
    input, factor, bias = operands
    is_glu = packed or factor is not None
    output = glu_reference(input, factor, activation) if is_glu else activation_reference(input, bias, activation)
    wanted = [t for t, needed in zip(operands, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


def _check_tensor(name: str, key: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fastnn.{name}: {key} must be a Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"fastnn.{name}: {key} must be a dense tensor, got layout {tensor.layout}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"fastnn.{name}: {key} must be floating point, got {tensor.dtype}")


def _check_device(name: str, key: str, tensor: Tensor, main: str, input: Tensor) -> None:
    if tensor.device != input.device:
        raise ValueError(f"fastnn.{name}: {key} is on {tensor.device}, {main} on {input.device}")


def _gelu_form(name: str, approximate: str) -> str:
    forms = {"none": "gelu", "tanh": "gelu_tanh"}
    if not isinstance(approximate, str) or approximate not in forms:
        raise ValueError(f"fastnn.{name}: approximate must be 'none' or 'tanh', got {approximate!r}")
    return forms[approximate]


def _check_bias(name: str, input: Tensor, bias: Tensor) -> None:
    _check_tensor(name, "bias", bias)
    _check_device(name, "bias", bias, "input", input)
    if tuple(bias.shape) != tuple(input.shape[-1:]) or bias.dim() == 0:
        raise ValueError(
            f"fastnn.{name}: bias must have shape (features,), the input's last dimension; got {tuple(bias.shape)} for "
            f"an input of shape {tuple(input.shape)}"
        )
    half = input.dtype in (torch.bfloat16, torch.float16)
    if bias.dtype != input.dtype and not (half and bias.dtype == torch.float32):
        also = " or be float32" if half else ""
        raise TypeError(f"fastnn.{name}: bias must have the input's type {input.dtype}{also}, got {bias.dtype}")


def _activation(name: str, activation: str, input: Tensor, bias: Tensor | None) -> Tensor:
    _check_tensor(name, "input", input)
    if bias is not None:
        _check_bias(name, input, bias)
    backend = _dispatch.pick("activation", input)
    if backend == "reference":
        note_reference("activation_fwd")
        return activation_reference(input, bias, activation).contiguous()
    return _run(input, None, bias, activation, False, backend)


def _glu(name: str, activation: str, gate: Tensor, up: Tensor | None) -> Tensor:
    _check_tensor(name, "gate", gate)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"fastnn.{name}: without up, gate holds both halves in its last dimension, whose size must be even; "
                f"got shape {tuple(gate.shape)}"
            )
    else:
        _check_tensor(name, "up", up)
        _check_device(name, "up", up, "gate", gate)
        if up.shape != gate.shape:
            raise ValueError(
                f"fastnn.{name}: up must have gate's shape {tuple(gate.shape)}, got {tuple(up.shape)}; "
                "both as one tensor (..., 2 features) go without up"
            )
        if up.dtype != gate.dtype:
            common = torch.promote_types(gate.dtype, up.dtype)
            gate, up = gate.to(common), up.to(common)
    backend = _dispatch.pick("activation", gate)
    if backend == "reference":
        note_reference("activation_fwd")
        return glu_reference(gate, up, activation).contiguous()
    return _run(gate, up, None, activation, up is None, backend)


def _run(
    input: Tensor, factor: Tensor | None, bias: Tensor | None, activation: str, packed: bool, backend: str
) -> Tensor:
    if torch.is_grad_enabled():
        for tensor in (input, factor, bias):
            if tensor is not None and tensor.requires_grad:
                found: Tensor = ActivationFunction.apply(  # type: ignore[no-untyped-call]
                    input, factor, bias, activation, packed, backend
                )
                return found
    output: Tensor = _dispatch.KERNELS["activation"][backend].fwd(
        input, factor, bias, ACTIVATION_CODE[activation], packed, True
    )
    return output


def gelu(input: Tensor, approximate: Approximate = "none", *, bias: Tensor | None = None) -> Tensor:
    """`x * normal_cdf(x)` of `x = input + bias`, as torch's `F.gelu`.

    Args:
        input: any shape and strides; float32, bfloat16 and float16 run on the kernels, other floating types on the
            reference. It is never written to.
        approximate: "none" for the erf form, "tanh" for Hendrycks & Gimpel's approximation.
        bias: (features,), added along the last dimension in the same pass, or None. The input's type, or float32
            beside half precision.

    Returns:
        A contiguous tensor of the input's shape and type, computed in float32 and rounded once. NaN and infinities as
        torch. Backward keeps the input and the bias, and nothing else.

    Raises:
        TypeError: input or bias no floating-point tensor, or types that do not fit.
        ValueError: shapes or devices that do not fit, an unknown `approximate`.
        NotImplementedError: a forced backend cannot run the call.
    """
    return _activation("gelu", _gelu_form("gelu", approximate), input, bias)


def silu(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`x * sigmoid(x)` of `x = input + bias`, as torch's `F.silu`; arguments, result and errors as `fastnn.gelu`."""
    return _activation("silu", "silu", input, bias)


def relu(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`max(x, 0)` of `x = input + bias`, as `torch.relu`; arguments, result and errors as `fastnn.gelu`."""
    return _activation("relu", "relu", input, bias)


def relu2(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`max(x, 0)^2` of `x = input + bias` (So et al., Primer); arguments, result and errors as `fastnn.gelu`."""
    return _activation("relu2", "relu2", input, bias)


def sigmoid(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`1 / (1 + exp(-x))` of `x = input + bias`, as `torch.sigmoid`; arguments, result and errors as `fastnn.gelu`."""
    return _activation("sigmoid", "sigmoid", input, bias)


def tanh(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Hyperbolic tangent of `input + bias`, as `torch.tanh`; arguments, result and errors as `fastnn.gelu`."""
    return _activation("tanh", "tanh", input, bias)


def hardswish(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`x * min(max(x + 3, 0), 6) / 6` of `x = input + bias`, as torch's `F.hardswish`; the rest as `fastnn.gelu`."""
    return _activation("hardswish", "hardswish", input, bias)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` (Shazeer, GLU variants), from one pass over memory.

    Args:
        gate: (*, features), any strides; types as `fastnn.gelu`. Without `up`, (*, 2 features): gate and up side by
            side, as one linear layer gives them; its gradient is then one tensor as well, written in place.
        up: of gate's shape, or None. Of another floating type, both become what torch's product would make them.

    Returns:
        A contiguous tensor (*, features) of gate's type, computed in float32 and rounded once. Backward keeps gate and
        up, and nothing else.

    Raises:
        TypeError: an operand is no floating-point tensor.
        ValueError: shapes or devices that do not fit; without `up`, an odd last dimension.
        NotImplementedError: a forced backend cannot run the call.
    """
    return _glu("swiglu", "silu", gate, up)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: Approximate = "none") -> Tensor:
    """`gelu(gate, approximate) * up`; `approximate` as `fastnn.gelu`, the rest as `fastnn.swiglu`."""
    return _glu("geglu", _gelu_form("geglu", approximate), gate, up)


def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`relu(gate) * up`; arguments, result and errors as `fastnn.swiglu`."""
    return _glu("reglu", "relu", gate, up)
