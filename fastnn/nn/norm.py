"""Norm layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.norm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on fastnn's kernel: same constructor, parameters and `state_dict` keys."""

    def forward(self, input: Tensor) -> Tensor:
        """Layer norm over the last dimensions, whose sizes are `normalized_shape`."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on fastnn's kernel: same constructor, parameter and `state_dict` keys."""

    def forward(self, x: Tensor) -> Tensor:
        """RMS norm over the last dimensions, whose sizes are `normalized_shape`."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)
