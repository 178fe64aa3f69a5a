"""Layer norm and RMS norm over the last dimensions, alone or of a residual sum, float32 inside a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast


class NormOptions(NamedTuple):
    """What a call was asked for beside its tensors."""

    dims: int
    """How many of the last dimensions are normalized."""
    eps: float | None
    rms: bool


def norm_fwd_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    rms: bool,
    save_stats: bool,
    grad_handled: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `norm_fwd` gives, without its values."""
    rows = 1
    for size in input.shape[: input.dim() - dims]:
        rows *= size
    output = input.new_empty(input.shape)
    total = None if residual is None else torch.empty_like(output)
    return output, total, input.new_empty((rows, 2), dtype=torch.float32) if save_stats else None


def norm_bwd_fake(
    grad: Tensor,
    grad_total: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    dims: int,
    rms: bool,
    weight_dtype: torch.dtype,
    mask: list[bool],
    grad_handled: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `norm_bwd` gives, without its values."""
    row = input.shape[input.dim() - dims :]
    dx = input.new_empty(input.shape) if mask[0] else None
    dw = input.new_empty(row, dtype=weight_dtype) if mask[1] else None
    db = input.new_empty(row, dtype=weight_dtype) if mask[2] else None
    return dx, dw, db


if _extension._C is not None:
    _dispatch.register_raw("norm")
    torch.library.register_fake("fastnn::norm_fwd", norm_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::norm_bwd", norm_bwd_fake, lib=_extension.library)


def layer_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in plain PyTorch."""
    parameter = bias if weight is None else weight
    if not input.is_cpu and parameter is not None and parameter.dtype != input.dtype:  # torch mixes types on CPUs only
        return layer_norm_reference(input.float(), normalized_shape, weight, bias, eps).to(input.dtype)
    if weight is None and bias is not None:  # together torch has no second derivative
        return (F.layer_norm(input, list(normalized_shape), None, None, eps) + bias).to(input.dtype)
    return F.layer_norm(input, list(normalized_shape), weight, bias, eps)


def rms_norm_reference(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight, in plain PyTorch."""
    return F.rms_norm(input, list(normalized_shape), weight, eps)


def norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """The norm that `options` says, in plain PyTorch."""
    shape = x.shape[x.dim() - options.dims :]
    if options.rms:
        return rms_norm_reference(x, shape, weight, options.eps)
    return layer_norm_reference(x, shape, weight, bias, 0.0 if options.eps is None else options.eps)


class NormFunction(torch.autograd.Function):
    """Saves the rows that are normalized, the weight, and each row's mean and 1 / standard deviation in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        options: NormOptions,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the backend's forward kernel; returns (output, input + residual or None)."""
        fwd = _dispatch.KERNELS["norm"][backend].fwd
        output, total, stats = fwd(input, residual, weight, bias, *options, True, True)
        ctx.save_for_backward(input if total is None else total, weight, stats)
        parameter = bias if weight is None else weight
        ctx.weight_dtype = input.dtype if parameter is None else parameter.dtype
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return output, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the backend's backward kernel, or differentiates the reference under create_graph."""
        x, weight, stats = ctx.saved_tensors
        of_input, of_residual, *of_parameters = ctx.needs_input_grad[:4]
        needs = (of_input or of_residual, *of_parameters)
        if grad is None:
            dx, dw, db = grad_total, None, None
        elif torch.is_grad_enabled():
            dx, dw, db = norm_bwd_reference(grad, grad_total, x, weight, ctx.options, ctx.weight_dtype, needs)
        else:
            bwd = _dispatch.KERNELS["norm"][ctx.backend].bwd
            dims, _, rms = ctx.options
            dx, dw, db = bwd(grad, grad_total, x, weight, stats, dims, rms, ctx.weight_dtype, list(needs), True)
        return dx if of_input else None, dx if of_residual else None, dw, db, None, None


def norm_bwd_reference(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    options: NormOptions,
    weight_dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias by differentiating the reference; of x, plus what came for x itself."""
    wanted = [t for t, needed in zip((x, weight), needs, strict=False) if needed and t is not None]
    found = []
    if wanted:
        found = list(torch.autograd.grad(norm_reference(x, weight, None, options), wanted, grad, create_graph=True))
    dx = found.pop(0) if needs[0] else None
    if dx is not None and grad_total is not None:
        dx = dx + grad_total
    leading = list(range(x.dim() - options.dims))
    db = None
    if needs[2]:
        db = grad.to(weight_dtype).sum(leading) if leading else grad.to(weight_dtype)
    return dx, found.pop(0) if found else None, db


def _check(name: str, tensors: dict[str, Tensor | None], normalized_shape: Sequence[int], eps: object) -> None:
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or key in ("input", "residual")):
            raise TypeError(f"fastnn.{name}: {key} must be a Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise TypeError(f"fastnn.{name}: {key} must be a dense tensor, got layout {tensor.layout}")
    if not isinstance(normalized_shape, (list, tuple)):
        kind = type(normalized_shape).__name__
        raise TypeError(f"fastnn.{name}: normalized_shape must be a list or tuple of ints, got {kind}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"fastnn.{name}: eps must be a number, got {type(eps).__name__}")
    for key, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"fastnn.{name}: {key} must be floating point, got {tensor.dtype}")
    _check_shapes(name, tensors, tuple(normalized_shape))


def _check_shapes(name: str, tensors: dict[str, Any], row: tuple[int, ...]) -> None:
    input: Tensor = tensors["input"]
    if not row or tuple(input.shape[-len(row) :]) != row:
        raise ValueError(
            f"fastnn.{name}: normalized_shape must be the input's last dimensions, at least one; got {row} for an "
            f"input of shape {tuple(input.shape)}"
        )
    for key, tensor in tensors.items():
        if tensor is None or tensor is input:
            continue
        if tensor.device != input.device:
            raise ValueError(f"fastnn.{name}: {key} is on {tensor.device}, input on {input.device}")
        shape = tuple(input.shape) if key == "residual" else row
        if tuple(tensor.shape) != shape:
            raise ValueError(f"fastnn.{name}: {key} must have shape {shape}, got {tuple(tensor.shape)}")


def _odd_parameter(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """In words, the parameter whose type the kernels do not take; empty where they take both."""
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        half = input.dtype in (torch.bfloat16, torch.float16)
        if tensor.dtype != input.dtype and not (half and tensor.dtype == torch.float32):
            return (
                f"{key} must have the input's type {input.dtype}{' or be float32' if half else ''}, got {tensor.dtype}"
            )
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"bias must have the weight's type {weight.dtype}, got {bias.dtype}"
    return ""


def _norm(
    name: str, input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, options: NormOptions
) -> tuple[Tensor, Tensor | None]:
    """(output, input + residual or None) of checked tensors."""
    if not input.is_cpu and autocast.active(input):  # on GPUs torch normalizes in float32, on CPUs as given
        if residual is not None:
            summed = input + residual
            return _norm(name, summed, None, weight, bias, options)[0], summed
        cast = autocast.cast
        input, weight, bias = cast(input, torch.float32), cast(weight, torch.float32), cast(bias, torch.float32)
    backend = _dispatch.pick("norm", input)
    odd = _odd_parameter(input, weight, bias)
    if odd and not options.rms:  # torch's layer norm refuses them too, its RMS norm does not
        raise TypeError(f"fastnn.{name}: {odd}")
    if odd:
        _dispatch.refuse_if_forced("norm", odd)
    if backend == "reference" or odd:
        note_reference("norm_fwd")
        total = None if residual is None else input + residual
        return norm_reference(input if total is None else total, weight, bias, options), total
    if options.eps is None:
        eps = torch.finfo(torch.float32).eps  # of the type that torch computes in
        options = NormOptions(options.dims, eps, options.rms)
    if torch.is_grad_enabled():
        for tensor in (input, residual, weight, bias):
            if tensor is not None and tensor.requires_grad:
                return NormFunction.apply(input, residual, weight, bias, options, backend)  # type: ignore[no-untyped-call]
    output, total, _ = _dispatch.KERNELS["norm"][backend].fwd(input, residual, weight, bias, *options, False, True)
    return output, total


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimensions, as torch's `F.layer_norm`.

    Args:
        input: (*, *normalized_shape), any strides; float32, bfloat16 and float16 run on the kernels, other floating
            types on the reference. It is never written to.
        normalized_shape: the sizes of the last dimensions, over all of which mean and variance are taken.
        weight: of shape normalized_shape, or None for ones. The input's type, or float32 beside half precision.
        bias: the same, or None for zeros; of the weight's type.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and type. Moments and result are computed in float32 and rounded once;
        rows far from zero (1e4 and small differences) and squares beyond float32's range lose nothing, and a constant
        row gives the bias. NaN or an infinity makes its row NaN.

    Raises:
        TypeError: a tensor not of a floating type or of a type that does not fit, `eps` no number.
        ValueError: shapes or devices that do not fit.
        NotImplementedError: a forced backend cannot run the call.
    """
    _check("layer_norm", {"input": input, "weight": weight, "bias": bias}, normalized_shape, eps)
    options = NormOptions(len(normalized_shape), float(eps), False)
    return _norm("layer_norm", input, None, weight, bias, options)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`x / sqrt(mean of x^2 + eps) * weight` over the last dimensions, as torch's `F.rms_norm`.

    Args:
        input: as `fastnn.layer_norm`.
        normalized_shape: as there.
        weight: of shape normalized_shape, or None for ones; of another type than there, the reference runs.
        eps: added to the mean square; None for the machine epsilon of the type computed in, as in torch: float32's
            for float32, bfloat16 and float16, float64's for float64.

    Returns:
        As `fastnn.layer_norm`.

    Raises:
        As `fastnn.layer_norm`.
    """
    _check("rms_norm", {"input": input, "weight": weight}, normalized_shape, 0.0 if eps is None else eps)
    options = NormOptions(len(normalized_shape), None if eps is None else float(eps), True)
    return _norm("rms_norm", input, None, weight, None, options)[0]


def _add_norm(
    name: str, input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, rms: bool
) -> tuple[Tensor, Tensor]:
    tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
    row = input.shape[-1:] if isinstance(input, Tensor) else ()
    _check(name, tensors, tuple(row), 0.0 if eps is None and rms else eps)
    if input.dtype != residual.dtype:
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    options = NormOptions(1, None if eps is None else float(eps), rms)
    output, total = _norm(name, input, residual, weight, bias, options)
    return output, total  # type: ignore[return-value]  # there is a residual


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`(layer_norm(input + residual), input + residual)` over the last dimension, from one pass over memory.

    Args:
        input: (*, features), any strides; types as `fastnn.layer_norm`.
        residual: of the input's shape. Of another floating type, both become what torch's addition would make them.
        weight: (features,), or None for ones; types as `fastnn.layer_norm`.
        bias: (features,), or None for zeros.
        eps: added to the variance.

    Returns:
        (output, sum). The sum is rounded to its type, and the norm is of the rounded sum: both are what
        `s = input + residual; layer_norm(s)` gives.

    Raises:
        As `fastnn.layer_norm`.
    """
    return _add_norm("add_layer_norm", input, residual, weight, bias, eps, False)


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """`(rms_norm(input + residual), input + residual)` over the last dimension, from one pass over memory.

    Arguments, result and errors as `fastnn.add_layer_norm`; `eps` as `fastnn.rms_norm`.
    """
    return _add_norm("add_rms_norm", input, residual, weight, None, eps, True)
