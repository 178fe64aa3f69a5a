"""transformers' Conv1D, the linear layer of GPT-2, whose weight is transposed: (in_features, out_features)."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.nn import Module

from ..ops.linear import linear_maybe_packed
from ..ops.packing import PackedWeight

_SOURCE = "transformers.pytorch_utils"
_FEW_ROWS = 128
"""Up to here a product that packs its weight on the way is no faster than torch's."""

_made: type[Module] | None = None


def theirs() -> type[Module] | None:
    """The class; None as long as transformers has not been imported."""
    found: type[Module] | None = getattr(sys.modules.get(_SOURCE), "Conv1D", None)
    return found


def is_conv1d(module: Module) -> bool:
    """Whether the module is exactly one, theirs or ours."""
    base = theirs()
    return base is not None and type(module) in (base, _made)


def ours() -> type[Module]:
    """A subclass of theirs that runs on fastnn's linear kernel."""
    global _made
    if _made is None:
        base = theirs()
        if base is None:
            raise AttributeError(f"fastnn: {_SOURCE} is not imported")
        _made = type("Conv1D", (_Conv1D, base), {"__module__": __name__, "__doc__": _Conv1D.__doc__})
    return _made


def __getattr__(name: str) -> Any:
    """Finds the class by its name, for pickle."""
    if name != "Conv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    __import__(_SOURCE)
    return ours()


class _Conv1D:
    """Conv1D on fastnn's kernel; torch's own product for few rows, unless the layer is frozen."""

    packed: PackedWeight | None = None
    activation = None
    weight: Tensor
    bias: Tensor
    training: bool

    def freeze(self) -> None:
        """As `fastnn.nn.Linear.freeze`."""
        self.packed = PackedWeight()

    def pack(self) -> Tensor | None:
        """The packed copy, where the layer is frozen and its copy may be used."""
        return None if self.packed is None else self.packed.get(self.weight.t(), self.training)

    def run(self, input: Tensor, activation: str | None) -> Tensor | None:
        """activation(input weight + bias); None where torch's product is the better."""
        packed = self.pack()
        if packed is None and input.numel() <= _FEW_ROWS * self.weight.shape[0]:
            return None
        return linear_maybe_packed(input, self.weight.t(), self.bias, activation, packed)

    def forward(self, x: Tensor) -> Tensor:
        """Input (*, in_features), result (*, out_features)."""
        found = self.run(x, None)
        return super().forward(x) if found is None else found  # type: ignore[misc]
