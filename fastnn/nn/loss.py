"""Loss layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.cross_entropy import Reduction, cross_entropy
from ..ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    _LinearCrossEntropyLoss = torch.nn.Module
else:  # torch has it from 2.13 on
    _LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", torch.nn.Module)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` on fastnn's kernel: same constructor prefix, buffers and `state_dict` keys.

    Args:
        weight: (C,), a factor per class, or None.
        size_average: deprecated, as in torch.
        ignore_index: class index whose rows do not count.
        reduce: deprecated, as in torch.
        reduction: "mean", "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: as `fastnn.cross_entropy`.
        softcap: as `fastnn.cross_entropy`.
    """

    # Class attributes, so that a torch layer that became one (fastnn.accelerate) has them.
    z_loss: float = 0.0
    softcap: float = 0.0

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if z_loss:
            self.z_loss = z_loss
        if softcap:
            self.softcap = softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (C,), (N, C) or (N, C, d1, ...) against class indices or probabilities."""
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,  # type: ignore[arg-type]
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """torch 2.13's `torch.nn.LinearCrossEntropyLoss` on fastnn's kernel, on every torch: a linear layer and its loss.

    Same constructor prefix, and `state_dict` keys (linear.weight, linear.bias, weight). To share the weight with an
    embedding, assign it: `loss.linear.weight = embedding.weight`.

    Args:
        in_features: size of a row of the input.
        num_classes: C.
        out_features: further dimensions of the logits; with any, the reference runs.
        bias: whether the linear layer has one.
        device: of the parameters.
        dtype: of the parameters.
        reduction: "mean", "sum" or "none".
        weight: (C,), a factor per class, or None.
        ignore_index: class index whose rows do not count; None for -100.
        label_smoothing: in [0, 1].
        options: as `fastnn.linear_cross_entropy`.
        z_loss: as `fastnn.cross_entropy`.
        softcap: as `fastnn.cross_entropy`.
        shift: as `fastnn.linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        shift: bool = False,
    ) -> None:
        torch.nn.Module.__init__(self)  # all that torch's own would set follows
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction: Reduction = reduction
        self.ignore_index, self.label_smoothing, self.options = ignore_index, label_smoothing, options
        self.z_loss, self.softcap, self.shift = z_loss, softcap, shift

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of inputs (*, in_features) against class indices (*) or probabilities (*, C)."""
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            outer = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*outer, self.linear.in_features)
            linear_bias = linear_bias if linear_bias is None else linear_bias.reshape(outer)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            shift=self.shift,
        )

    def extra_repr(self) -> str:
        """The options that are not the layer's own."""
        return (
            f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction!r}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, z_loss={self.z_loss}, "
            f"softcap={self.softcap}, shift={self.shift}"
        )
