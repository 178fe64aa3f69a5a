"""What torch.autocast does to the operands of an op."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Operand = TypeVar("Operand", Tensor, Tensor | None)


def active(x: Tensor) -> bool:
    """Whether torch.autocast is on for the device of `x`."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    if x.is_cuda:  # torch.compile cannot trace the question below
        return torch.is_autocast_enabled("cuda")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def cast(tensor: Operand, dtype: torch.dtype) -> Operand:
    """The operand in `dtype`; float64, integers, masks and what is no tensor at all stay as they are, as in torch."""
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.float64 or not tensor.dtype.is_floating_point:
        return tensor
    return tensor.to(dtype)
