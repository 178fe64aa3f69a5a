"""Dense layer on 4- or 8-bit codes in groups along in_features, a scale (and an offset) for each; any input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _extension
from .._record import note_reference
from . import autocast
from .autocast import cast
from .groups import (
    bits_of,
    blocks_of,
    check_tensors,
    check_weight,
    dequantize_groups,
    unpack_nibbles,
)
from .linear import ACTIVATION_CODE, ACTIVATIONS, Activation, check_activation
from .linear_int8 import quantize_rows_reference

_STRIP, _LINE = 16, 64  # csrc/params/linear_groupwise.h
OP = "linear_groupwise"


def _packed_bytes(out_features: int, in_features: int, group_size: int, bits: int, offsets: bool) -> int:
    blocks = len(blocks_of(in_features, group_size))
    longest = max((size for _, size, _ in blocks_of(in_features, group_size)), default=0)
    lines = blocks * ((longest * bits + 31) // 32) + (blocks if offsets else (blocks + 1) // 2)
    return (out_features + _STRIP - 1) // _STRIP * lines * _LINE


def linear_groupwise_pack_fake(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    bits: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_groupwise_pack` gives, without its values."""
    count = _packed_bytes(codes.shape[0], in_features, group_size, bits, offset is not None) // 4
    return scale.new_empty((count,), dtype=torch.float32)


def linear_groupwise_fwd_fake(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    bits: int,
    offsets: bool,
    int8_input: bool,
    activation: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_groupwise_fwd` gives, without its values."""
    return input.new_empty((*input.shape[:-1], out_features))


def linear_groupwise_rows_fake(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    in_features: int,
    group_size: int,
    bits: int,
    dtype: int,
    grad_handled: bool = False,
) -> Tensor:
    """What `linear_groupwise_rows` gives, without its values."""
    return scale.new_empty((*index.shape, in_features), dtype=_dispatch.KERNEL_DTYPES[dtype])


if _extension._C is not None:
    _fwd = torch.ops.fastnn.linear_groupwise_fwd.default
    _dispatch.register(OP, "cpu", _dispatch.Kernels(_fwd, _fwd))  # backward is plain PyTorch
    torch.library.register_fake("fastnn::linear_groupwise_pack", linear_groupwise_pack_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_groupwise_fwd", linear_groupwise_fwd_fake, lib=_extension.library)
    torch.library.register_fake("fastnn::linear_groupwise_rows", linear_groupwise_rows_fake, lib=_extension.library)


def _sums_of_codes(
    input: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, group_size: int, high: torch.dtype
) -> Tensor:
    """Rows rounded to int8 times 4-bit weights: exact sums of a block, scaled and added block after block."""
    rounded, row_scale = quantize_rows_reference(input)
    numbers = unpack_nibbles(codes, input.shape[-1]).double()
    total = rounded.new_zeros((*input.shape[:-1], codes.shape[0]), dtype=high)
    for first, size, group in blocks_of(input.shape[-1], group_size):
        part = slice(first, first + size)
        row, zero = rounded[..., part].double(), 8 if offset is None else 0
        total = total + F.linear(row, numbers[:, part] - zero).to(high) * scale[:, group].to(high)
        if offset is not None:
            total = total + row.sum(-1, keepdim=True).to(high) * offset[:, group].to(high)
    return total * row_scale.to(high).unsqueeze(-1)


def linear_groupwise_reference(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_input: bool,
    activation: str | None,
) -> Tensor:
    """activation(x W^T + b) with the W that the codes stand for; a row of x that is not finite gives NaN."""
    high = torch.promote_types(input.dtype, torch.float32)
    weight = dequantize_groups(codes, scale, offset, input.shape[-1], group_size, high)
    if int8_input:
        result = _sums_of_codes(input.detach(), codes, scale, offset, group_size, high)
        if torch.is_grad_enabled() and input.requires_grad:
            result = result + F.linear((input - input.detach()).to(high), weight)
    else:
        finite = input.detach().isfinite().all(-1, keepdim=True)
        result = torch.where(finite, F.linear(input.to(high), weight), torch.nan)
    if bias is not None:
        result = result + bias.to(high)
    return ACTIVATIONS[activation](result).to(input.dtype)


class LinearGroupwiseFunction(torch.autograd.Function):
    """Without activation. dx = dy W with the weight that the codes stand for; rounding inputs is the identity."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        packed: Tensor,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        group_size: int,
        int8_input: bool,
    ) -> Tensor:
        """Runs the forward kernel."""
        ctx.save_for_backward(codes, scale, offset)
        ctx.in_features, ctx.group_size = input.shape[-1], group_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run(input, packed, codes, offset, bias, group_size, int8_input, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable PyTorch, to any order."""
        codes, scale, offset = ctx.saved_tensors
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dequantize_groups(codes, scale, offset, ctx.in_features, ctx.group_size, grad.dtype)
        if ctx.needs_input_grad[5]:
            db = grad.reshape(-1, codes.shape[0]).sum(0).to(ctx.bias_dtype)
        return dx, None, None, None, None, db, None, None


def _run(
    input: Tensor,
    packed: Tensor,
    codes: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_input: bool,
    activation: str | None,
) -> Tensor:
    code, bits = ACTIVATION_CODE[activation], bits_of(codes)
    offsets = offset is not None
    found: Tensor = torch.ops.fastnn.linear_groupwise_fwd.default(
        input, packed, bias, codes.shape[0], group_size, bits, offsets, int8_input, code, True
    )
    return found


def _check(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_input: bool,
    activation: str | None,
) -> None:
    op = "fastnn.linear_groupwise"
    tensors = {"input": input, "codes": codes, "scale": scale, "offset": offset, "bias": bias}
    check_tensors(op, tensors, None)
    check_activation(op, activation)
    if not input.dtype.is_floating_point:
        raise TypeError(f"{op}: input must be floating point, got {input.dtype}")
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension, got shape ()")
    check_weight(op, codes, scale, offset, input.shape[-1], group_size)
    if int8_input and codes.dtype == torch.int8:
        raise ValueError(f"{op}: int8_input needs codes of 4 bits; fastnn.linear_int8 multiplies int8 by int8")
    if bias is not None and tuple(bias.shape) != (codes.shape[0],):
        raise ValueError(f"{op}: bias must have shape ({codes.shape[0]},), got {tuple(bias.shape)}")
    if bias is not None and bias.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"{op}: bias must be float32 or of the input's type {input.dtype}, got {bias.dtype}")


def linear_groupwise(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    int8_input: bool = False,
    activation: Activation | None = None,
) -> Tensor:
    """`activation(input @ weight.T + bias)` with a weight of 4- or 8-bit codes that share scales in groups.

    The weight is that of `fastnn.ops.quantize_groups`. Inputs become whole numbers times a power of two for each block
    of a row (a group, or a part of at most 256 of a long one): with 23 to 24 bits below the block's largest magnitude
    in float32, 15 to 16 in 16-bit types, 2^-100 the least step; or, with `int8_input`, codes of 8 bits with one scale
    for the row, as `fastnn.ops.quantize_rows` makes them. Sums of a block are exact; blocks are added in order, in
    float32. Up to an activation that is not relu the result is the same bit for bit on every instruction set, for any
    number of threads and of rows beside it. A row with NaN or an infinity gives a row of NaN and touches no other.

    Args:
        input: (*, in_features), any strides; float32, bfloat16 and float16 run on the kernel, other floating types on
            the reference.
        codes: uint8 (out_features, ceil(in_features / 2)), two codes of 4 bits to a byte, the even column's low; or
            int8 (out_features, in_features).
        scale: float16 (out_features, ceil(in_features / group_size)).
        offset: as scale, or None: then the weight is scale * (code - 8), or scale * code of int8 codes; with it,
            scale * code + offset (codes of 4 bits alone).
        bias: (out_features,), float32 or of the input's type, or None.
        group_size: columns that share a scale.
        int8_input: whether inputs are rounded to 8 bits; codes of 4 bits alone.
        activation: as `fastnn.linear`.

    Returns:
        A contiguous tensor (*, out_features) of the input's type. The input's gradient is that of the product with
        the weight that the codes stand for; codes, scale and offset have none.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit, an unknown activation, options that do not go together.
        NotImplementedError: a forced backend cannot run the call; a gradient of scale or offset is wanted.
    """
    return linear_groupwise_maybe_packed(input, codes, scale, offset, bias, group_size, int8_input, activation, None)


def linear_groupwise_maybe_packed(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    int8_input: bool,
    activation: str | None,
    packed: Tensor | None,
) -> Tensor:
    """`linear_groupwise`, reading the weight from `packed` (`fastnn.ops.packing`) where there is one."""
    if isinstance(input, Tensor) and autocast.active(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = cast(input, dtype)
        bias = bias if bias is None or bias.dtype == torch.float32 else cast(bias, dtype)
    _check(input, codes, scale, offset, bias, group_size, int8_input, activation)
    if _dispatch.pick(OP, input) == "reference":
        note_reference("linear_groupwise_fwd")
        return linear_groupwise_reference(input, codes, scale, offset, bias, group_size, int8_input, activation)
    if packed is None:
        packed = pack_groups(codes, scale.detach(), offset, input.shape[-1], group_size)
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        result = LinearGroupwiseFunction.apply(input, packed, codes, scale, offset, bias, group_size, int8_input)  # type: ignore[no-untyped-call]
        return ACTIVATIONS[activation](result)
    return _run(input, packed, codes, offset, bias, group_size, int8_input, activation)


def pack_groups(codes: Tensor, scale: Tensor, offset: Tensor | None, in_features: int, group_size: int) -> Tensor:
    """The weight in the order in which the kernel reads it."""
    parts = [t if t is None else t.detach().contiguous() for t in (codes, scale, offset)]
    found: Tensor = torch.ops.fastnn.linear_groupwise_pack.default(
        *parts, in_features, group_size, bits_of(codes), True
    )
    return found
