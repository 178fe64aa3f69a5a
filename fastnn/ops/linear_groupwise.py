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
from .linear import ACTIVATION_CODE, ACTIVATIONS, Activation
from .linear_int8 import quantize_rows_reference

_STRIP, _LINE, _MOST_BLOCK = 16, 64, 256  # csrc/params/linear_groupwise.h
LARGEST = 65504.0
"""Scales and offsets are float16."""

OP = "linear_groupwise"


def bits_of(codes: Tensor) -> int:
    """4 for uint8 (two codes to a byte), 8 for int8."""
    return 4 if codes.dtype == torch.uint8 else 8


def groups_of(in_features: int, group_size: int) -> int:
    """How many groups a row has; the last may be shorter."""
    return (in_features + group_size - 1) // group_size


def blocks_of(in_features: int, group_size: int) -> list[tuple[int, int, int]]:
    """(first, size, group) of what is summed exactly before it is scaled: a group, or equal parts of a long one."""
    group_size = min(group_size, in_features) if in_features else group_size
    parts = (group_size + _MOST_BLOCK - 1) // _MOST_BLOCK
    size = (group_size + parts - 1) // parts
    found = []
    for first in range(0, in_features, group_size):
        end = min(first + group_size, in_features)
        found += [(k, min(size, end - k), first // group_size) for k in range(first, end, size)]
    return found


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


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 (*, columns) to bytes (*, ceil(columns / 2)): the even column's in the low half."""
    even, odd = codes[..., 0::2], codes[..., 1::2]
    return (even | (F.pad(odd, (0, even.shape[-1] - odd.shape[-1])) << 4)).contiguous()


def unpack_nibbles(packed: Tensor, columns: int) -> Tensor:
    """The way back: uint8 codes 0..15 (*, columns)."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]


def quantize_groups(
    weight: Tensor, group_size: int, *, bits: int = 4, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rounds each group of `group_size` neighbours in a row to codes times a scale, all in float32.

    - 4 bits, symmetric: scale = (the value of the largest magnitude) / -8, so it may be negative;
      weight = scale * (code - 8). GGUF's Q4_0.
    - 4 bits, not symmetric: scale = (max - min) / 15, offset = min; weight = scale * code + offset. GGUF's Q4_1.
    - 8 bits: scale = largest magnitude / 127; weight = scale * code, code in [-127, 127]. GGUF's Q8_0.

    Scale and offset are rounded to float16 before the codes are taken, so they make up for it as far as they reach.
    Codes are the nearest integers (ties to even); a scale of zero has the code of zero.

    Args:
        weight: (out_features, in_features), any strides, finite, of a floating type.
        group_size: at least 1; the last group of a row may be shorter, and one longer than a row is the row.
        bits: 4 or 8.
        symmetric: whether there is no offset; 8 bits have none.

    Returns:
        codes: uint8 (out_features, ceil(in_features / 2)), two to a byte, the even one low; int8
        (out_features, in_features) for 8 bits. scale and offset: float16 (out_features, groups); offset is None where
        symmetric.

    Raises:
        ValueError: NaN, infinities, or values whose scale float16 cannot hold; wrong options.
    """
    if weight.dim() != 2 or group_size < 1 or bits not in (4, 8) or (bits == 8 and not symmetric):
        raise ValueError(
            "fastnn.ops.quantize_groups: weight must have 2 dimensions, group_size be at least 1, bits be 4, or 8 and "
            f"symmetric; got {tuple(weight.shape)}, {group_size}, {bits}, symmetric={symmetric}"
        )
    rows, columns = weight.shape
    size = min(group_size, max(columns, 1))
    groups = groups_of(columns, size)
    values = weight.detach().float()
    tail = groups * size - columns
    if tail:  # repeats the last value: no other extremes
        values = torch.cat((values, values[:, -1:].expand(rows, tail)), 1)
    grouped = values.reshape(rows, groups, size)
    if not bool(grouped.isfinite().all()):
        raise ValueError("fastnn.ops.quantize_groups: weight has NaN or infinite values")
    offset = None
    if not grouped.numel():
        scale = grouped.new_zeros(rows, groups)
        offset = None if symmetric else scale.half()
    elif not symmetric:
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale, offset = ((high - low) / 15).half(), low.half()
    elif bits == 8:
        scale = (grouped.abs().amax(-1) / 127).half()
    else:
        extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = (extreme / -8).half()
    scale = scale.half()
    if not bool(scale.isfinite().all()) or (offset is not None and not bool(offset.isfinite().all())):
        raise ValueError("fastnn.ops.quantize_groups: weight has values beyond what float16 scales can stand for")
    steps = scale.float().unsqueeze(-1)
    from_zero = grouped if offset is None else grouped - offset.float().unsqueeze(-1)
    codes = torch.where(steps != 0, from_zero / steps, 0.0).round()
    lowest, highest = (0, 15) if offset is not None else (-8, 7) if bits == 4 else (-127, 127)
    codes = codes.clamp_(lowest, highest).reshape(rows, groups * size)[:, :columns]
    if bits == 8:
        return codes.to(torch.int8).contiguous(), scale, None
    return pack_nibbles((codes if offset is not None else codes + 8).to(torch.uint8)), scale, offset


def dequantize_groups(
    codes: Tensor, scale: Tensor, offset: Tensor | None, in_features: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight (out_features, in_features) that codes stand for; in float32, or float64 where that is asked for."""
    high = torch.promote_types(dtype, torch.float32)
    numbers = codes if codes.dtype == torch.int8 else unpack_nibbles(codes, in_features)
    each = torch.arange(in_features, device=codes.device) // min(group_size, max(in_features, 1))
    steps = scale.to(high)[:, each]
    if offset is not None:
        return (numbers.to(high) * steps + offset.to(high)[:, each]).to(dtype)
    zero = 8 if codes.dtype == torch.uint8 else 0
    return ((numbers.to(high) - zero) * steps).to(dtype)


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


def _check_tensors(op: str, tensors: dict[str, Tensor | None], device: torch.device | None) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (name in ("bias", "offset") and tensor is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(tensor).__name__}")
        if tensor is None:
            continue
        device = device or tensor.device
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.device != device:
            raise TypeError(f"{op}: {name} must be on the input's device {device}, got {tensor.device}")


def check_weight(
    op: str, codes: Tensor, scale: Tensor, offset: Tensor | None, in_features: int, group_size: int
) -> None:
    """Raises TypeError or ValueError where codes, scale and offset are not a weight with so many in_features."""
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"{op}: group_size must be a positive int, got {group_size!r}")
    if codes.dtype not in (torch.uint8, torch.int8):
        raise TypeError(f"{op}: codes must be uint8 (two of 4 bits to a byte) or int8, got {codes.dtype}")
    columns = (in_features + 1) // 2 if codes.dtype == torch.uint8 else in_features
    if codes.dim() != 2 or codes.shape[1] != columns:
        raise ValueError(
            f"{op}: codes for in_features = {in_features} must have shape (out_features, {columns}), "
            f"got {tuple(codes.shape)}"
        )
    wanted = codes.shape[0], groups_of(in_features, group_size)
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float16:
            raise TypeError(f"{op}: {name} must be float16, got {tensor.dtype}")
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{op}: {name} requires grad, and there is no gradient of it: detach it")
    if offset is not None and codes.dtype == torch.int8:
        raise ValueError(f"{op}: codes of 8 bits have no offset")


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
    _check_tensors(op, tensors, None)
    if (activation is not None and not isinstance(activation, str)) or activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {known}; got {activation!r}")
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


def embedding_groupwise(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    in_features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows of a table of codes in groups, as values: `dequantize_groups(...)[index]` without the rest of the table.

    A value is scale * (code - 8), exact in float32, or scale * code + offset, rounded once, and then rounded to
    `dtype`: the same bits on every instruction set.

    Args:
        index: integers (*), each in [0, rows).
        codes, scale, offset: as `linear_groupwise`'s, (rows, ...).
        in_features: columns of the table.
        group_size: columns that share a scale.
        dtype: of the result; float32, bfloat16 and float16 run on the kernel, other floating types on the reference.

    Returns:
        A contiguous tensor (*, in_features). No gradient goes through.

    Raises:
        TypeError: types or devices that do not fit.
        ValueError: shapes that do not fit.
        IndexError: an index out of range.
    """
    op = "fastnn.ops.embedding_groupwise"
    _check_tensors(op, {"index": index, "codes": codes, "scale": scale, "offset": offset}, None)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: index must be int64 or int32, got {index.dtype}")
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    check_weight(op, codes, scale, offset, in_features, group_size)
    index = index.long().contiguous()
    if _dispatch.pick(OP, scale) == "reference" or dtype not in _dispatch.KERNEL_DTYPES:
        note_reference("linear_groupwise_rows")
        rows = codes.shape[0]
        if index.numel() and not bool(((index >= 0) & (index < rows)).all()):
            raise IndexError(f"{op}: index out of range for {rows} rows")
        flat = index.reshape(-1)
        picked = codes[flat], scale[flat], None if offset is None else offset[flat]
        return dequantize_groups(*picked, in_features, group_size, dtype).reshape(*index.shape, in_features)
    parts = [t if t is None else t.detach().contiguous() for t in (codes, scale, offset)]
    options = in_features, group_size, bits_of(codes), _dispatch.KERNEL_DTYPES.index(dtype)
    found: Tensor = torch.ops.fastnn.linear_groupwise_rows.default(index, *parts, *options, True)
    return found
