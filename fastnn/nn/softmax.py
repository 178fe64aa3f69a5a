"""Softmax layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.softmax import log_softmax, softmax


def _implicit_dim(rank: int) -> int:
    return 0 if rank in (0, 1, 3) else 1  # torch's rule for dim=None, kept for its layers' sake


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on fastnn's kernel: `dim` as there; any input shape, result of the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Softmax along `dim`."""
        return softmax(input, _implicit_dim(input.dim()) if self.dim is None else self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on fastnn's kernel: `dim` as there; any input shape, result of the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        """Logarithm of the softmax along `dim`."""
        return log_softmax(input, _implicit_dim(input.dim()) if self.dim is None else self.dim)
