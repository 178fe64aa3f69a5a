"""A layer's own tensors, without the search that `layer.weight` is."""

from __future__ import annotations

from typing import Any

from torch.nn import Module


def tensor_of(layer: Module, name: str) -> Any:
    """`getattr(layer, name)` of a parameter or buffer.

    `torch.nn.Module` is asked only after Python has looked for the name everywhere else, 1 us for each: as long as a
    small kernel for a few of them. What is neither (a parametrized weight, for example) is found in the usual way.
    """
    own = layer._parameters
    if name in own:
        return own[name]
    kept = layer._buffers
    return kept[name] if name in kept else getattr(layer, name)
