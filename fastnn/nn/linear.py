"""Dense layer with a fused activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.linear import ACTIVATIONS, Activation, linear_maybe_packed
from ..ops.packing import PackedWeight
from .tensors import tensor_of


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with the activation fused: same constructor prefix, parameters and `state_dict` keys.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the parameters live.
        dtype: their type.
        activation: as `fastnn.linear`.
    """

    activation: Activation | None
    packed: PackedWeight | None = None  # set by freeze()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
    ) -> None:
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"fastnn.nn.Linear: activation must be one of {known}; got {activation!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def freeze(self) -> Linear:
        """Lets the layer keep a packed copy of its weight while it does not train (`PackedWeight` has the rule)."""
        self.packed = PackedWeight()
        return self

    def forward(self, input: Tensor) -> Tensor:
        """`activation(input @ weight.T + bias)`; input (*, in_features), result (*, out_features)."""
        weight, bias = tensor_of(self, "weight"), tensor_of(self, "bias")
        packed = None if self.packed is None else self.packed.get(weight, self.training)
        return linear_maybe_packed(input, weight, bias, self.activation, packed)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return super().extra_repr() + activation
