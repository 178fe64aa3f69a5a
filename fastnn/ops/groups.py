"""Codes of 4 or 8 bits in groups along a row: how weights become such codes, and values again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_BLOCK = 256  # csrc/params/linear_groupwise.h
LARGEST = 65504.0
"""Scales and offsets are float16."""


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


def check_tensors(op: str, tensors: dict[str, Tensor | None], device: torch.device | None) -> None:
    """Raises TypeError where one is no dense tensor or on another device than the first."""
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
