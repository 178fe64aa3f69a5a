"""Cross-entropy over logits: all of torch's options, z-loss and softcap, no probabilities materialised."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast

Reduction = Literal["none", "mean", "sum"]
REDUCTION_CODE = {"none": 0, "mean": 1, "sum": 2}


class LossOptions(NamedTuple):
    """What a call of `cross_entropy` was asked for beside its tensors."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float

    def raw(self) -> tuple[int, int, float, float, float]:
        """The same as the raw operators take it."""
        return REDUCTION_CODE[self.reduction], *self[1:]


def cross_entropy_fwd_fake(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What `cross_entropy_fwd` gives, without its values."""
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == 0 else ())
    return loss, input.new_empty((rows, 2), dtype=torch.float32), input.new_empty((2,), dtype=torch.float32)


def cross_entropy_bwd_fake(grad: Tensor, input: Tensor, *rest: Any) -> Tensor:
    """What `cross_entropy_bwd` gives, without its values."""
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


if _extension._C is not None:
    _dispatch.register_raw("cross_entropy")
    torch.library.register_fake("fastnn::cross_entropy_fwd", cross_entropy_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::cross_entropy_bwd", cross_entropy_bwd_fake, lib=_extension.library)


def cross_entropy_reference(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """F.cross_entropy of the softcapped logits, plus z_loss * logsumexp^2 of the rows that count, in plain PyTorch."""
    reduction, ignore_index, label_smoothing, z_loss, softcap = options
    x = softcap * torch.tanh(input / softcap) if softcap else input
    loss = F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if not z_loss:
        return loss
    z = z_loss * torch.logsumexp(x, 1 if x.dim() > 1 else 0).square()
    if target.dtype == torch.long:
        counts = target != ignore_index
        z = torch.where(counts, z, 0.0)
        return loss + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / counts.sum())
    return loss + (z if reduction == "none" else getattr(z, reduction)())


class CrossEntropyFunction(torch.autograd.Function):
    """Saves the logits and 8 bytes a row (maximum and log-sum); backward recomputes the softmax from them."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: str
    ) -> Tensor:
        """Runs the backend's forward kernel on (rows, classes)."""
        fwd = _dispatch.KERNELS["cross_entropy"][backend].fwd
        loss, stats, divisors = fwd(input, target, weight, *options.raw(), True)
        ctx.save_for_backward(input, target, weight, stats, divisors)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        input, target, weight, stats, divisors = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = cross_entropy_reference(input, target, weight, ctx.options)
            (dx,) = torch.autograd.grad(loss, input, grad, create_graph=True)
        else:
            bwd = _dispatch.KERNELS["cross_entropy"][ctx.backend].bwd
            dx = bwd(grad, input, target, weight, stats, divisors, *ctx.options.raw(), True)
        return dx, None, None, None, None


def check_tensors(op: str, required: dict[str, Tensor], optional: dict[str, Tensor | None]) -> None:
    """Whether the tensors of a loss are dense and on the device of the first; by name, each None only if optional."""
    device = None
    for name, tensor in {**required, **optional}.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fastnn.{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"fastnn.{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"fastnn.{op}: {name} is on {tensor.device}, input on {device}")


def check_options(op: str, options: LossOptions) -> None:
    """Whether the options of a loss are in their ranges."""
    if options.reduction not in REDUCTION_CODE:
        raise ValueError(f"fastnn.{op}: reduction must be 'none', 'mean' or 'sum', got {options.reduction!r}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"fastnn.{op}: label_smoothing must be in [0, 1], got {options.label_smoothing}")
    if not options.softcap >= 0.0:
        raise ValueError(f"fastnn.{op}: softcap must not be negative, got {options.softcap}")


def _check(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    check_tensors("cross_entropy", {"input": input, "target": target}, {"weight": weight})
    check_options("cross_entropy", options)
    if not input.dtype.is_floating_point:
        raise TypeError(f"fastnn.cross_entropy: input must be floating point, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("fastnn.cross_entropy: input must have a class dimension, got a scalar")
    _check_target(input, target, options)
    classes = input.shape[1 if input.dim() > 1 else 0]
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype != input.dtype):
        raise ValueError(
            f"fastnn.cross_entropy: weight must have shape ({classes},) and the input's type {input.dtype}, "
            f"got {tuple(weight.shape)}, {weight.dtype}"
        )


def _check_target(input: Tensor, target: Tensor, options: LossOptions) -> None:
    indices_shape = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.dtype.is_floating_point:
        if target.shape != input.shape:
            raise ValueError(
                f"fastnn.cross_entropy: target probabilities must have the input's shape {tuple(input.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if options.ignore_index >= 0:
            raise ValueError("fastnn.cross_entropy: ignore_index does not apply to target probabilities")
    elif target.dtype not in (torch.long, torch.uint8):
        raise TypeError(
            "fastnn.cross_entropy: target must hold class indices (int64, uint8) or probabilities (floating point), "
            f"got {target.dtype}"
        )
    elif tuple(target.shape) != indices_shape:
        raise ValueError(
            f"fastnn.cross_entropy: target class indices must have shape {indices_shape}, got {tuple(target.shape)}"
        )


def _legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and targets, as `torch.nn.functional.cross_entropy`, from one reading of the logits.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float32, bfloat16 and float16 run on the kernels, other
            floating types on the reference. Never written to; its gradient is a tensor of its own.
        target: class indices (int64 or uint8) of shape (), (N,), (N, d1, ...), or probabilities of the input's shape.
        weight: (C,), a factor per class, or None.
        size_average: deprecated, as in torch.
        ignore_index: rows with this class index count neither in the loss nor in the mean.
        reduce: deprecated, as in torch.
        reduction: "mean" (over the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        z_loss: factor of logsumexp(logits)^2, added per row (Chowdhery et al. 2022, PaLM, section 5); under "mean" its
            mean is over the rows that count, whatever their weight.
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2); 0 for none.

    Returns:
        A scalar, or one loss per row for "none", of the input's type; under autocast float32, as torch's.
        Sums are float32 within a row and float64 over rows.

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index.
        TypeError, ValueError: types, shapes or options that do not fit.
        NotImplementedError: a forced backend cannot run the call.
    """
    options = LossOptions(
        _legacy_reduction(size_average, reduce, reduction), ignore_index, label_smoothing, z_loss, softcap
    )
    if isinstance(input, Tensor) and autocast.active(input):
        input, target, weight = cast(input, torch.float32), cast(target, torch.float32), cast(weight, torch.float32)
    _check(input, target, weight, options)
    if target.dtype == torch.uint8:
        target = target.long()
    backend = _dispatch.pick("cross_entropy", input)
    # Gradients of probabilities and class weights, and probabilities of another type: plain PyTorch has them.
    plain = ""
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        plain = "target or weight requires grad, which the reference computes"
    elif target.dtype.is_floating_point and target.dtype != input.dtype:
        plain = f"target is {target.dtype}, input {input.dtype}"
    if plain:
        _dispatch.refuse_if_forced("cross_entropy", plain)
    if backend == "reference" or plain:
        note_reference("cross_entropy_fwd")
        return cross_entropy_reference(input, target, weight, options)
    return _on_rows(input, target, weight, options, backend)


def _on_rows(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: str) -> Tensor:
    per_row_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    class_dim = 1 if input.dim() > 1 else 0
    if target.dtype.is_floating_point:
        target = target.movedim(class_dim, -1).reshape(-1, input.shape[class_dim])
    else:
        target = target.reshape(-1)
    rows = input if input.dim() == 2 else input.movedim(class_dim, -1).reshape(-1, input.shape[class_dim])
    if rows.requires_grad and torch.is_grad_enabled():
        loss = CrossEntropyFunction.apply(rows, target, weight, options, backend)  # type: ignore[no-untyped-call]
    else:
        fwd = _dispatch.KERNELS["cross_entropy"][backend].fwd
        loss = fwd(rows, target, weight, *options.raw(), True)[0]
    return loss.reshape(per_row_shape) if options.reduction == "none" else loss
