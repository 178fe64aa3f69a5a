"""torch's encoder layer, whose inference fast path reads its dense layers' weights past their forward."""

from __future__ import annotations

from torch.nn import Module, TransformerEncoderLayer

from ..nn import BlockSparseLinear, QuantizedModule

_KEPT = "_fastnn_fast_path"


def mind_fast_path(model: Module) -> None:
    """Keeps encoder layers with codes or blocks inside off the fast path, and gives it back to those without."""
    for module in model.modules():
        if not isinstance(module, TransformerEncoderLayer):
            continue
        state = vars(module)
        if any(isinstance(layer, QuantizedModule | BlockSparseLinear) for layer in (module.linear1, module.linear2)):
            state.setdefault(_KEPT, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        elif _KEPT in state:
            module.activation_relu_or_gelu = state.pop(_KEPT)
