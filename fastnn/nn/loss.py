"""Loss layers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.cross_entropy import Reduction, cross_entropy


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
