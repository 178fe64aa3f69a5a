"""Moving the spread of activations into the weights that take them, where both are rounded (SmoothQuant).

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, accurate and efficient post-training quantization for large language
models, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from .observe import Seen

_LEAST = 1e-5
"""Of a scale: float16 norms must hold its inverse."""


@dataclass(frozen=True)
class SmoothQuant:
    """Divides the columns of a norm's output by scales that the dense layers after it take into their weights.

    Column j's scale is largest |x_j| ^ alpha / largest |w_j| ^ (1 - alpha), over the calibration and over all layers
    that the norm feeds; the norm's weight and bias take 1 / scale. The function stays the same before rounding: that
    is tried on the first sample, and a norm whose output is used elsewhere, too, is left alone and said so.
    """

    alpha: float = 0.5
    """How much of the spread moves: 0 evens out the weights' columns, 1 the activations'."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"fastnn.SmoothQuant: alpha must be in [0, 1], got {self.alpha!r}")


def scales(inputs: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """The scale of each column: `inputs` are the largest magnitudes, weights (out_features, in_features).

    Columns that are zero in the inputs or in all weights have the scale 1.
    """
    most = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    found = inputs.float() ** alpha / most ** (1 - alpha)
    usable = (inputs > 0) & (most > 0) & found.isfinite()
    return torch.where(usable, found.clamp_min(_LEAST), 1.0)


def groups(layers: Sequence[Module], seen: dict[Module, Seen]) -> tuple[dict[Module, list[Module]], dict[Module, str]]:
    """Norm -> the layers that take its output and nothing else; of the other layers why they are in none."""
    found: dict[Module, list[Module]] = {}
    reasons: dict[Module, str] = {}
    for layer in layers:
        producers = seen[layer].producers or set()
        (norm,) = producers if len(producers) == 1 else (None,)
        if seen[layer].problem:
            reasons[layer] = seen[layer].problem
        elif norm is None:
            reasons[layer] = "its input is not a norm's output"
        else:
            found.setdefault(norm, []).append(layer)
    return found, reasons
