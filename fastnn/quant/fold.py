"""Scales that go from a norm into the layers after it, tried on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from ..accelerate.isolate import tensors
from .linear import is_conv1d

_NEAR = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far outputs may be from those before, norm over norm: rounding, while a scale used twice shows at once."""


class Change:
    """Scales folded into a norm and into the layers after it, which can be taken back."""

    def __init__(self, norm: Module, layers: Sequence[Module], scale: Tensor) -> None:
        self.norm, self.scale, self.layers = norm, scale, list(layers)
        self._before: list[tuple[Module, str, Parameter]] = []

    def apply(self) -> None:
        """New parameters in place of the old ones, which stay as they are."""
        for name in ("weight", "bias"):
            self._replace(self.norm, name, 1 / self.scale)
        for layer in self.layers:
            self._replace(layer, "weight", self.scale.unsqueeze(-1) if is_conv1d(layer) else self.scale)

    def _replace(self, module: Module, name: str, factor: Tensor) -> None:
        old = module._parameters.get(name)
        if old is None:
            return
        self._before.append((module, name, old))
        module._parameters[name] = Parameter((old.detach().float() * factor).to(old.dtype), False)

    def commit(self) -> None:
        """Writes the norm's new values into the parameters it has; the layers' weights are codes by then."""
        with torch.no_grad():
            for name in ("weight", "bias"):
                held = self.norm._parameters.get(name)
                if held is not None:
                    held.copy_((held.float() * (1 / self.scale)).to(held.dtype))

    def undo(self) -> None:
        """The old parameters again."""
        for module, name, old in self._before:
            module._parameters[name] = old
        self._before.clear()


def agree(before: Any, after: Any) -> bool:
    """Whether two outputs are the same up to rounding."""
    ours, theirs = ([t for t in tensors(tree) if t.dtype.is_floating_point] for tree in (before, after))
    for a, b in zip(ours, theirs, strict=True):
        bound = _NEAR.get(a.dtype, 1e-6)
        if not float((a.double() - b.double()).norm()) <= bound * float(a.double().norm()):
            return False
    return bool(ours)
