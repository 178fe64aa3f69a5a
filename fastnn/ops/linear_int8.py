"""Dense layer on int8 codes: weights rounded once, one scale per output; inputs rounded on the way, one per row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast
from .linear import ACTIVATION_CODE, ACTIVATIONS, Activation, check_activation

MAX_CODE = 127
"""Codes are in [-127, 127]."""

LEAST_SCALE = 2.0**-126
"""A row of zeros has this scale; its reciprocal is still finite."""

MAX_FEATURES = 1 << 17
"""Sums of more products of two codes may not fit 32 bits."""

_STRIP, _UNIT = 16, 4  # columns of a strip of the packed copy; codes of a unit


def linear_int8_quantize_fake(input: Tensor, grad_handled: bool = False) -> tuple[Tensor, Tensor]:
    """What `linear_int8_quantize` gives, without its values."""
    scale = input.new_empty(input.shape[:-1], dtype=torch.float32)
    return input.new_empty(input.shape, dtype=torch.int8), scale


def linear_int8_pack_fake(codes: Tensor, scale: Tensor, grad_handled: bool = False) -> Tensor:
    """What `linear_int8_pack` gives, without its values."""
    columns = (codes.shape[0] + _STRIP - 1) // _STRIP * _STRIP
    return scale.new_empty((columns * ((codes.shape[1] + _UNIT - 1) // _UNIT + 2),))


def linear_int8_fwd_fake(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_int8_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], out_features))


if _extension._C is not None:
    _fwd = torch.ops.fastnn.linear_int8_fwd.default
    _dispatch.register("linear_int8", "cpu", _dispatch.Kernels(_fwd, _fwd))  # backward is plain PyTorch
    torch.library.register_fake("fastnn::linear_int8_quantize", linear_int8_quantize_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_int8_pack", linear_int8_pack_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_int8_fwd", linear_int8_fwd_fake, lib=_extension.library)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of each row (last dimension) and its scale, in plain PyTorch; computed in float32 whatever x's type."""
    values = x.detach().float()
    largest = values.abs().amax(-1) if x.shape[-1] else values.new_zeros(x.shape[:-1])
    scale = (largest / MAX_CODE).clamp_min(LEAST_SCALE)
    finite = largest.isfinite()
    codes = torch.where(finite.unsqueeze(-1), (values * scale.reciprocal().unsqueeze(-1)).round(), 0.0)
    return codes.to(torch.int8), torch.where(finite, scale, torch.nan)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row (last dimension) of `x` to int8 codes times one scale.

    The scale is the row's largest magnitude / 127, codes are the nearest integers (ties to even) to value / scale,
    both computed in float32: the same bits on every instruction set, and in plain PyTorch. A row of zeros has codes
    of zero and the scale 2^-126. A row with NaN or an infinity has codes of zero and the scale NaN.

    Args:
        x: (*, columns), any strides; a floating type.

    Returns:
        int8 codes of x's shape and float32 scales (*,), both contiguous. No gradient goes through.
    """
    if _dispatch.pick("linear_int8", x) == "reference":
        note_reference("linear_int8_quantize")
        return quantize_rows_reference(x)
    found: tuple[Tensor, Tensor] = torch.ops.fastnn.linear_int8_quantize.default(x.detach(), True)
    return found


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that codes (out_features, in_features) and scale (out_features,) stand for."""
    return (codes.to(scale.dtype) * scale.unsqueeze(-1)).to(dtype)


def linear_int8_reference(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """activation(x W^T + b) of the rounded x and W in plain PyTorch; the gradient of x is that of x W^T."""
    high = torch.promote_types(input.dtype, torch.float32)
    rounded, row_scale = quantize_rows_reference(input)
    sums = F.linear(rounded.double(), codes.double()).to(high)  # integers below 2^31: exact in float64
    result = sums * (row_scale.to(high).unsqueeze(-1) * scale.to(high))
    if torch.is_grad_enabled() and input.requires_grad:
        result = result + F.linear((input - input.detach()).to(high), dequantize_weight(codes, scale, high))
    if bias is not None:
        result = result + bias.to(high)
    return ACTIVATIONS[activation](result).to(input.dtype)


class LinearInt8Function(torch.autograd.Function):
    """Without activation. Rounding counts as the identity: dx = dy W with the weight that the codes stand for."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, packed: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Runs the forward kernel."""
        ctx.save_for_backward(codes, scale)
        ctx.input_dtype, ctx.bias_dtype = input.dtype, None if bias is None else bias.dtype
        result: Tensor = _fwd(input, packed, bias, codes.shape[0], 0, True)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable PyTorch, to any order."""
        codes, scale = ctx.saved_tensors
        dx = grad @ dequantize_weight(codes, scale, grad.dtype) if ctx.needs_input_grad[0] else None
        db = grad.reshape(-1, codes.shape[0]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, db


def _check(input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None) -> None:
    op = "fastnn.linear_int8"
    for name, tensor in (("input", input), ("codes", codes), ("scale", scale), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        if tensor is not None and tensor.device != input.device:
            raise TypeError(f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}")
    check_activation(op, activation)
    if not input.dtype.is_floating_point:
        raise TypeError(f"{op}: input must be floating point, got {input.dtype}")
    if codes.dtype != torch.int8:
        raise TypeError(f"{op}: codes must be int8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] > MAX_FEATURES:
        raise ValueError(
            f"{op}: codes must be (out_features, in_features) with at most {MAX_FEATURES} in_features, "
            f"got shape {tuple(codes.shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"{op}: input's last dimension must be in_features = {codes.shape[1]}, got shape {tuple(input.shape)}"
        )
    check_vectors(op, input, codes.shape[0], scale, bias)


def check_vectors(op: str, input: Tensor, out_features: int, scale: Tensor, bias: Tensor | None) -> None:
    """TypeError, ValueError or NotImplementedError, in the name of `op`, unless scale and bias fit."""
    if not scale.dtype.is_floating_point or (scale.dtype != torch.float32 and input.dtype != torch.float64):
        raise TypeError(f"{op}: scale must be float32, got {scale.dtype}")
    if scale.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: scale requires grad, and there is no gradient of it: detach it")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (out_features,):
            raise ValueError(f"{op}: {name} must have shape ({out_features},), got {tuple(tensor.shape)}")
    if bias is not None and bias.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"{op}: bias must be float32 or of the input's type {input.dtype}, got {bias.dtype}")


def linear_int8(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None
) -> Tensor:
    """`activation(input @ weight.T + bias)` with int8 weights and with inputs that are rounded to int8 on the way.

    Each row of the input is rounded by `quantize_rows`; the products of codes are summed in int32, exactly; sum x
    row's scale x output's scale, bias and activation follow in float32. Up to an activation that is not relu the result
    is the same bit for bit on every instruction set and for any number of threads. A row with NaN or an infinity
    gives a row of NaN and touches no other. `fastnn.nn.Int8Linear` keeps the weight in the order the kernel reads;
    here it is brought into it by each call.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernel, other floating types on
            the reference. in_features is at most 131072.
        codes: int8 (out_features, in_features), in [-127, 127].
        scale: float32 (out_features,): the weight is codes * scale[:, None].
        bias: (out_features,), float32 or of the input's type, or None.
        activation: as `fastnn.linear`.

    Returns:
        A contiguous tensor (*, out_features) of the input's type. The input's gradient is that of the product with
        the weight that the codes stand for (rounding counts as the identity); codes and scale have none.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit, an unknown activation.
        NotImplementedError: a forced backend cannot run the call; a gradient of `scale` is wanted.
    """
    return linear_int8_maybe_packed(input, codes, scale, bias, activation, None)


def linear_int8_maybe_packed(
    input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None, packed: Tensor | None
) -> Tensor:
    """`linear_int8`, reading the weight from `packed` (`fastnn.ops.packing`) where there is one."""
    plain = packed is not None and activation in ACTIVATION_CODE and _dispatch.is_plain("linear_int8", input, bias)
    if packed is not None and plain and input.shape[-1] == codes.shape[1]:
        # The kernel checks the bias's type and shape, packing has checked codes and scale.
        result: Tensor = _fwd(input, packed, bias, codes.shape[0], ACTIVATION_CODE[activation], True)
        return result
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = cast(input, dtype)
        bias = bias if bias is None or bias.dtype == torch.float32 else cast(bias, dtype)
    _check(input, codes, scale, bias, activation)
    if _dispatch.pick("linear_int8", input) == "reference":
        note_reference("linear_int8_fwd")
        return linear_int8_reference(input, codes, scale, bias, activation)
    if packed is None:
        packed = torch.ops.fastnn.linear_int8_pack.default(codes, scale.detach(), True)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        result = LinearInt8Function.apply(input, packed, codes, scale, bias)  # type: ignore[no-untyped-call]
        return ACTIVATIONS[activation](result)
    code = ACTIVATION_CODE[activation]
    found: Tensor = _fwd(input, packed, bias, codes.shape[0], code, True)
    return found
