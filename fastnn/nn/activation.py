"""Activation layers, without parameters. `inplace` is refused: fastnn never writes to a caller's tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import activation as ops


def _refuse_inplace(name: str, inplace: bool) -> None:
    if inplace:
        raise ValueError(f"fastnn.nn.{name}: inplace must be False, got {inplace!r}: the result is always a new tensor")


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` on fastnn's kernel: `approximate` as there."""

    def forward(self, input: Tensor) -> Tensor:
        """GELU of every element."""
        return ops.gelu(input, self.approximate)  # type: ignore[arg-type]


class SiLU(torch.nn.SiLU):
    """`torch.nn.SiLU` on fastnn's kernel, never in place."""

    def __init__(self, inplace: bool = False) -> None:
        _refuse_inplace("SiLU", inplace)
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """SiLU of every element."""
        return ops.silu(input)


class ReLU(torch.nn.ReLU):
    """`torch.nn.ReLU` on fastnn's kernel, never in place."""

    def __init__(self, inplace: bool = False) -> None:
        _refuse_inplace("ReLU", inplace)
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """ReLU of every element."""
        return ops.relu(input)


class Hardswish(torch.nn.Hardswish):
    """`torch.nn.Hardswish` on fastnn's kernel, never in place."""

    def __init__(self, inplace: bool = False) -> None:
        _refuse_inplace("Hardswish", inplace)
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        """Hardswish of every element."""
        return ops.hardswish(input)


class Sigmoid(torch.nn.Sigmoid):
    """`torch.nn.Sigmoid` on fastnn's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Sigmoid of every element."""
        return ops.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """`torch.nn.Tanh` on fastnn's kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Hyperbolic tangent of every element."""
        return ops.tanh(input)
