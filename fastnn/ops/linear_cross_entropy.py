"""Linear projection onto classes and cross-entropy in one: the logits of all rows are never in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast
from .cross_entropy import LossOptions, Reduction, check_options, check_tensors, cross_entropy_reference

IGNORED = -100
"""What ignore_index is where none is given, as in torch."""


def linear_cross_entropy_fwd_fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `linear_cross_entropy_fwd` gives, without its values."""
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == 0 else (), dtype=torch.float32)
    return loss, input.new_empty((rows, 2), dtype=torch.float32), *_fake_gradients(input, linear_weight, mask)


def linear_cross_entropy_bwd_fake(
    grad: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `linear_cross_entropy_bwd` gives, without its values."""
    mask = next(one for one in rest if isinstance(one, list | tuple))
    return _fake_gradients(input, linear_weight, mask)


def _fake_gradients(
    input: Tensor, linear_weight: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    dx, dw, db = (input.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, mask, strict=True))
    return dx, dw, db


if _extension._C is not None:
    _dispatch.register_raw("linear_cross_entropy")
    for _name, _fake in (("fwd", linear_cross_entropy_fwd_fake), ("bwd", linear_cross_entropy_bwd_fake)):
        torch.library.register_fake(f"fastnn::linear_cross_entropy_{_name}", _fake, lib=_extension.library)


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    loss_dtype: torch.dtype,
) -> Tensor:
    """The loss of `F.linear`'s logits (rows, classes, ...), in plain PyTorch."""
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return cross_entropy_reference(logits.to(loss_dtype), target, weight, options)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Forward takes the gradients too, while a chunk of logits is there; backward scales them and gives them away.

    Backward on a graph that was retained finds them again. It computes them itself, from the saved maximum and log-sum
    of each row, where forward cannot: of unreduced losses, whose rows are scaled apart, and in float16, where they
    would underflow before a loss scale reaches them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        backend: str,
    ) -> Tensor:
        """Runs the backend's forward kernel on (rows, in_features); the loss is float32."""
        at_once = options.reduction != "none" and input.dtype != torch.float16
        mask = [needed and at_once for needed in ctx.needs_input_grad[:3]]
        fwd = _dispatch.KERNELS["linear_cross_entropy"][backend].fwd
        loss, stats, *found = fwd(input, linear_weight, linear_bias, target, weight, *options.raw(), mask, True)
        ctx.options, ctx.backend, ctx.at_once = options, backend, at_once
        ctx.traced = torch.compiler.is_compiling()
        ctx.found = None if ctx.traced else found
        kept = found if ctx.traced else (None, None, None)  # a trace has no state: they are saved as operands are
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, stats, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what forward found, runs the backend's backward kernel, or differentiates the reference."""
        *operands, stats, dx, dw, db = ctx.saved_tensors
        kernels = _dispatch.KERNELS["linear_cross_entropy"][ctx.backend]
        mask, found = list(ctx.needs_input_grad[:3]), ctx.found
        if torch.is_grad_enabled():
            found = _differentiable(ctx, grad, *operands)
        elif not ctx.at_once:
            found = kernels.bwd(grad, *operands, stats, *ctx.options.raw(), mask, True)
        elif ctx.traced:
            found = [None if one is None else one * grad for one in (dx, dw, db)]
        else:
            if found is None:
                found = kernels.fwd(*operands, *ctx.options.raw(), mask, True)[2:]
            ctx.found = None
            if float(grad) != 1.0:
                found = [None if one is None else one.mul_(grad) for one in found]
        return *found, None, None, None, None


def _differentiable(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
) -> list[Tensor | None]:
    operands = (input, linear_weight, linear_bias)
    wanted = [one for one, needed in zip(operands, ctx.needs_input_grad, strict=False) if needed and one is not None]
    weight = None if weight is None else weight.float()
    loss = linear_cross_entropy_reference(input, linear_weight, target, linear_bias, weight, ctx.options, torch.float32)
    found = iter(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _check(input: Tensor, linear_weight: Tensor, target: Tensor, rest: dict[str, Tensor | None]) -> None:
    required = {"input": input, "linear_weight": linear_weight, "target": target}
    check_tensors("linear_cross_entropy", required, rest)
    if not input.dtype.is_floating_point:
        raise TypeError(f"fastnn.linear_cross_entropy: input must be floating point, got {input.dtype}")
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", rest["linear_bias"])):
        if tensor is not None and tensor.dtype != input.dtype:
            raise TypeError(
                f"fastnn.linear_cross_entropy: {name} must have the input's dtype {input.dtype}, got {tensor.dtype}"
            )
    if input.dim() == 0:
        raise ValueError("fastnn.linear_cross_entropy: input must have a dimension of features, got a scalar")
    if linear_weight.dim() < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"fastnn.linear_cross_entropy: linear_weight must be (classes, in_features = {input.shape[-1]}), "
            f"got {tuple(linear_weight.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() != 2:
        raise ValueError(
            f"fastnn.linear_cross_entropy: linear_weight of shape {tuple(linear_weight.shape)} needs an input "
            f"(rows, in_features), got {tuple(input.shape)}"
        )


def _check_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    loss_dtype: torch.dtype,
) -> None:
    classes, *outer = linear_weight.shape[:-1]
    if linear_bias is not None and tuple(linear_bias.shape) != (classes, *outer):
        raise ValueError(
            f"fastnn.linear_cross_entropy: linear_bias must have shape {(classes, *outer)}, "
            f"got {tuple(linear_bias.shape)}"
        )
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype != loss_dtype):
        raise ValueError(
            f"fastnn.linear_cross_entropy: weight must have shape ({classes},) and the loss's type {loss_dtype}, "
            f"got {tuple(weight.shape)}, {weight.dtype}"
        )
    if not target.dtype.is_floating_point and target.dtype not in (torch.long, torch.uint8):
        raise TypeError(
            "fastnn.linear_cross_entropy: target must hold class indices (int64, uint8) or probabilities (floating "
            f"point), got {target.dtype}"
        )
    expected = (*input.shape[:-1], *((classes,) if target.dtype.is_floating_point else ()), *outer)
    if tuple(target.shape) != expected:
        kind = "probabilities" if target.dtype.is_floating_point else "class indices"
        raise ValueError(
            f"fastnn.linear_cross_entropy: target {kind} must have shape {expected}, got {tuple(target.shape)}"
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    shift: bool = False,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)` without the logits in memory.

    The signature is torch 2.13's `torch.nn.functional.linear_cross_entropy`, on every torch. On the CPU the gradients
    of input, linear_weight and linear_bias are found in the same pass where they are wanted.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernels, other floating types on
            the reference.
        linear_weight: (C, in_features), or (C, d1, ..., in_features) with an input (N, in_features): the reference.
        target: class indices (int64 or uint8) of shape (*), (N, d1, ...), or probabilities (*, C), (N, C, d1, ...): the
            reference.
        linear_bias: (C,) or (C, d1, ...), or None.
        weight: (C,), a factor per class, of the input's type (under autocast of any), or None.
        reduction: "mean" (over the targets' weights), "sum" or "none".
        ignore_index: rows with this class index count neither in the loss nor in the mean, and are not read; None for
            -100.
        label_smoothing: in [0, 1].
        options: torch's `LinearCrossEntropyOptions`, accepted and not needed: chunks are chosen by the kernel.
        z_loss: as `fastnn.cross_entropy`.
        softcap: as `fastnn.cross_entropy`.
        shift: input (*, length, in_features) predicts the next target: position i is held against target i + 1, and
            the last against none.

    Returns:
        A scalar, or for "none" the losses in target's shape of class indices, (*, length - 1) with shift; of the
        input's type, under autocast float32.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        TypeError, ValueError: types, shapes or options that do not fit.
        NotImplementedError: a forced backend cannot run the call.
    """
    loss_dtype = input.dtype if isinstance(input, Tensor) else torch.float32
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight, linear_bias = cast(input, dtype), cast(linear_weight, dtype), cast(linear_bias, dtype)
        target, weight = cast(target, torch.float32), cast(weight, torch.float32)
        loss_dtype = input.dtype if input.dtype == torch.float64 else torch.float32
    _check(input, linear_weight, target, {"linear_bias": linear_bias, "weight": weight})
    _check_loss(input, linear_weight, target, linear_bias, weight, loss_dtype)
    asked = LossOptions(reduction, IGNORED if ignore_index is None else ignore_index, label_smoothing, z_loss, softcap)
    check_options("linear_cross_entropy", asked)
    if target.dtype.is_floating_point and ignore_index is not None:
        raise ValueError("fastnn.linear_cross_entropy: ignore_index does not apply to target probabilities")
    if shift:
        input, target = _shifted(input, linear_weight, target, asked.ignore_index)
    loss = _flat(input, linear_weight, target, linear_bias, weight, asked, loss_dtype)
    if reduction != "none" or target.dtype.is_floating_point or linear_weight.dim() > 2:
        return loss
    loss = loss if loss.shape == target.shape else loss.reshape(target.shape)
    return loss[..., :-1].contiguous() if shift else loss


def _shifted(input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Input and target so that neighbours in memory belong together: class indices move, not the input."""
    if input.dim() < 2 or linear_weight.dim() > 2 or input.shape[-2] == 0:
        raise ValueError(
            "fastnn.linear_cross_entropy: shift needs an input (*, length, in_features) and a weight (classes, "
            f"in_features), got {tuple(input.shape)}, {tuple(linear_weight.shape)}"
        )
    if target.dtype.is_floating_point:
        return input[..., :-1, :], target[..., 1:, :]
    shifted = target.long().roll(-1, -1)  # a tensor of its own
    shifted[..., -1] = ignore_index
    return input, shifted


def _flat(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    options: LossOptions,
    loss_dtype: torch.dtype,
) -> Tensor:
    """The loss of rows, by whatever may compute it."""
    target = target.long() if target.dtype == torch.uint8 else target
    backend = _dispatch.pick("linear_cross_entropy", input)
    plain = ""
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        plain = "target or weight requires grad, which the reference computes"
    elif target.dtype.is_floating_point:
        plain = "target holds probabilities, which are as large as the logits"
    elif linear_weight.dim() > 2:
        plain = "linear_weight has more than two dimensions"
    if plain:
        _dispatch.refuse_if_forced("linear_cross_entropy", plain)
    if linear_weight.dim() == 2:
        rows = math.prod(input.shape[:-1])
        input = input.reshape(rows, input.shape[-1])
        target = target.reshape(rows, *target.shape[-1:]) if target.dtype.is_floating_point else target.reshape(rows)
    if backend == "reference" or plain:
        note_reference("linear_cross_entropy_fwd")
        return linear_cross_entropy_reference(input, linear_weight, target, linear_bias, weight, options, loss_dtype)
    operands = (input, linear_weight, linear_bias)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands):
        loss = LinearCrossEntropyFunction.apply(*operands, target, weight, options, backend)  # type: ignore[no-untyped-call]
    else:
        fwd = _dispatch.KERNELS["linear_cross_entropy"][backend].fwd
        loss = fwd(*operands, target, weight, *options.raw(), [False] * 3, True)[0]
    return loss.to(loss_dtype)
