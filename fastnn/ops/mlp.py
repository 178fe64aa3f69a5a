"""Feed-forward blocks, plain and gated, as one op: their wide middle is kept where backward reads it, or not at all."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .activation import ACTIVATION_CODE, ACTIVATIONS, _glu
from .autocast import cast
from .linear import ACTIVATIONS as LINEAR_ACTIVATIONS
from .linear import linear

MlpActivation = Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2", "hardswish"]


class Operands(NamedTuple):
    """What a block computes with: h = activation(x w_in^T + b_in) (x w_factor^T), y = h w_out^T + b_out."""

    input: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_factor: Tensor | None
    w_out: Tensor
    b_out: Tensor | None


Packed = tuple[Tensor, Tensor | None, Tensor]
"""Packed copies (`fastnn.ops.packing`) of w_in, w_factor and w_out."""


def mlp_fwd_fake(
    input: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_factor: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: int,
    save: bool,
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `mlp_fwd` gives, without its values."""
    middle = (*input.shape[:-1], w_in.shape[0])
    z = input.new_empty(middle) if save else None
    factor = input.new_empty(middle) if save and w_factor is not None else None
    return input.new_empty((*input.shape[:-1], w_out.shape[0])), z, factor


def mlp_bwd_fake(
    grad: Tensor,
    input: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_factor: Tensor | None,
    w_out: Tensor,
    z: Tensor | None,
    factor: Tensor | None,
    activation: int,
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, ...]:
    """What `mlp_bwd` gives, without its values."""
    hidden, features = w_in.shape
    out = w_out.shape[0]
    shapes = (input.shape, (hidden, features), (hidden,), (hidden, features), (out, hidden), (out,))
    return tuple(input.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, mask, strict=True))


def mlp_packed_fwd_fake(
    input: Tensor,
    packed_in: Tensor,
    b_in: Tensor | None,
    packed_factor: Tensor | None,
    packed_out: Tensor,
    b_out: Tensor | None,
    hidden: int,
    out_features: int,
    activation: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `mlp_packed_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], out_features))


if _extension._C is not None:
    _dispatch.register_raw("mlp")
    torch.library.register_fake("fastnn::mlp_fwd", mlp_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::mlp_bwd", mlp_bwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::mlp_packed_fwd", mlp_packed_fwd_fake, lib=_extension.library)


def mlp_reference(
    input: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_factor: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """The block in plain PyTorch."""
    hidden = ACTIVATIONS[activation](F.linear(input, w_in, b_in))
    if w_factor is not None:
        hidden = hidden * F.linear(input, w_factor)
    return F.linear(hidden, w_out, b_out)


class MlpFunction(torch.autograd.Function):
    """Saves its operands and, without recompute, what the activation is applied to and what the gate multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_factor: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        activation: str,
        recompute: bool,
        backend: str,
    ) -> Tensor:
        """Runs the backend's forward kernel."""
        operands = (input, w_in, b_in, w_factor, w_out, b_out)
        save = not recompute and any(ctx.needs_input_grad[:5])
        fwd = _dispatch.KERNELS["mlp"][backend].fwd
        output, z, factor = fwd(*operands, ACTIVATION_CODE[activation], save, True)
        ctx.save_for_backward(*operands, z, factor)
        ctx.activation, ctx.backend = activation, backend
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        *operands, z, factor = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            found = mlp_bwd_reference(grad, Operands(*operands), ctx.activation, needs)
        else:
            bwd = _dispatch.KERNELS["mlp"][ctx.backend].bwd
            found = bwd(grad, *operands[:5], z, factor, ACTIVATION_CODE[ctx.activation], list(needs), True)
        return *found, None, None, None


def mlp_bwd_reference(
    grad: Tensor, operands: Operands, activation: str, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the operands by differentiating the reference."""
    wanted = [t for t, needed in zip(operands, needs, strict=True) if needed and t is not None]
    output = mlp_reference(*operands, activation)
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


_NAMES = {
    "mlp": ("input", "w1", "b1", "", "w2", "b2"),
    "swiglu_mlp": ("input", "w_gate", "b_gate", "w_up", "w_down", "b_down"),
}
"""Function -> what it calls the operands."""


def _check(name: str, operands: Operands, activation: object, recompute: object) -> None:
    names = _NAMES[name]
    for key, tensor in zip(names, operands, strict=True):
        if tensor is None and key[:1] in ("", "b"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fastnn.{name}: {key} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"fastnn.{name}: {key} must be a dense tensor, got layout {tensor.layout}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"fastnn.{name}: {key} must be floating point, got {tensor.dtype}")
        if tensor.dtype != operands.input.dtype or tensor.device != operands.input.device:
            raise TypeError(
                f"fastnn.{name}: {key} must have the input's dtype and device ({operands.input.dtype}, "
                f"{operands.input.device}), got {tensor.dtype}, {tensor.device}"
            )
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(repr(key) for key in ACTIVATIONS if key)
        raise ValueError(f"fastnn.{name}: activation must be one of {known}; got {activation!r}")
    if not isinstance(recompute, bool):
        raise TypeError(f"fastnn.{name}: recompute must be a bool, got {type(recompute).__name__}")
    _check_shapes(name, names, operands)


def _check_shapes(name: str, names: tuple[str, ...], operands: Operands) -> None:
    input, w_in, _, _, w_out, _ = operands
    for key, weight in ((names[1], w_in), (names[4], w_out)):
        if weight.dim() != 2:
            raise ValueError(f"fastnn.{name}: {key} must be (out_features, in_features), got {tuple(weight.shape)}")
    hidden, features = w_in.shape
    if input.dim() == 0 or input.shape[-1] != features:
        raise ValueError(
            f"fastnn.{name}: input's last dimension must be {names[1]}'s in_features = {features}, got shape "
            f"{tuple(input.shape)}"
        )
    out = w_out.shape[0]
    shapes = (input.shape, (hidden, features), (hidden,), (hidden, features), (out, hidden), (out,))
    for key, tensor, shape in zip(names, operands, shapes, strict=True):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"fastnn.{name}: {key} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def mlp(
    input: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: MlpActivation = "gelu",
    *,
    recompute: bool = False,
) -> Tensor:
    """`linear(activation(linear(input, w1, b1)), w2, b2)`: the feed-forward block of BERT and GPT-2.

    Args:
        input: (*, features), any strides; float32, bfloat16 and float16 run on the kernels (float32 accumulation),
            other floating types on the reference.
        w1: (hidden, features).
        b1: (hidden,), or None.
        w2: (out_features, hidden).
        b2: (out_features,), or None.
        activation: "relu", "gelu" (erf form), "gelu_tanh", "silu", "sigmoid", "tanh", "relu2" or "hardswish".
        recompute: keep nothing of size (*, hidden) for backward, which then multiplies by `w1` once more: 7 products
            instead of 6 in a training step. Neither pass holds the middle whole. For calls on the reference it means
            nothing.

    Returns:
        A contiguous tensor (*, out_features). Backward keeps the operands and, without `recompute`, one tensor
        (*, hidden). Under autocast the operands are cast to the autocast type first.

    Raises:
        TypeError: operands of differing or non-floating types or devices, `recompute` no bool.
        ValueError: shapes that do not fit, an unknown activation.
        NotImplementedError: a forced backend cannot run the call.
    """
    return mlp_maybe_packed("mlp", Operands(input, w1, b1, None, w2, b2), activation, recompute, None)


def swiglu_mlp(
    input: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: MlpActivation = "silu",
    recompute: bool = False,
) -> Tensor:
    """`linear(activation(linear(input, w_gate)) * linear(input, w_up), w_down)` (Shazeer, GLU variants; Llama).

    Args:
        input: (*, features); types as `fastnn.mlp`.
        w_gate: (hidden, features).
        w_up: (hidden, features).
        w_down: (out_features, hidden).
        activation: as `fastnn.mlp`; "gelu" or "gelu_tanh" make it GEGLU, "relu" ReGLU.
        recompute: as `fastnn.mlp`; 11 products instead of 9.

    Returns:
        A contiguous tensor (*, out_features). Backward keeps the operands and, without `recompute`, two tensors
        (*, hidden); the rest and the errors as `fastnn.mlp`.
    """
    operands = Operands(input, w_gate, None, w_up, w_down, None)
    return mlp_maybe_packed("swiglu_mlp", operands, activation, recompute, None)


def mlp_maybe_packed(name: str, operands: Operands, activation: str, recompute: bool, packed: Packed | None) -> Tensor:
    """The block, reading its weights from `packed` when no gradient is wanted; `name` is what errors call it."""
    if isinstance(operands.input, Tensor) and autocast.active(operands.input):
        dtype = torch.get_autocast_dtype(operands.input.device.type)
        operands = Operands(*(cast(t, dtype) for t in operands))  # type: ignore[arg-type]
        packed = None  # of the weights before the cast
    _check(name, operands, activation, recompute)
    if operands.input.is_cuda and _dispatch.backend_in_force() != "reference" and not _dispatch.transformed():
        return _composed(operands, activation)
    backend = _dispatch.pick("mlp", operands.input)
    if backend == "reference":
        note_reference("mlp_fwd")
        return mlp_reference(*operands, activation).contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands):
        found: Tensor = MlpFunction.apply(*operands, activation, recompute, backend)  # type: ignore[no-untyped-call]
        return found
    code = ACTIVATION_CODE[activation]
    if packed is not None and backend == "cpu":
        output: Tensor = torch.ops.fastnn.mlp_packed_fwd.default(
            operands.input,
            packed[0],
            operands.b_in,
            packed[1],
            packed[2],
            operands.b_out,
            operands.w_in.shape[0],
            operands.w_out.shape[0],
            code,
            True,
        )
        return output
    output = _dispatch.KERNELS["mlp"][backend].fwd(*operands, code, False, True)[0]
    return output


def _composed(operands: Operands, activation: str) -> Tensor:
    """The block of the ops that it is made of: GPUs have kernels of those."""
    input, w_in, b_in, w_factor, w_out, b_out = operands
    if w_factor is not None:
        hidden = _glu("swiglu_mlp", activation, linear(input, w_in), linear(input, w_factor))
    elif activation in LINEAR_ACTIVATIONS:
        hidden = linear(input, w_in, b_in, activation=activation)  # type: ignore[arg-type]
    else:
        hidden = ACTIVATIONS[activation](linear(input, w_in, b_in))
    return linear(hidden, w_out, b_out)
