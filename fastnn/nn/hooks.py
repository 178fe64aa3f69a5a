"""Whether a module's call is its class's forward and nothing beside: only then may another op run in its place."""

from __future__ import annotations

from torch.nn import Module
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(vars(torch_module)["_global" + name] for name in _HOOKS)


def hooked(module: Module) -> bool:
    """Whether a call of the module runs anything beside its forward."""
    state = vars(module)
    for name in _HOOKS:
        if state[name]:
            return True
    return any(_GLOBAL_HOOKS)


def is_unchanged(layer: Module, kind: type[Module]) -> bool:
    """Whether the layer is exactly a `kind` (a linear one without an activation of its own) without hooks."""
    plain = type(layer) is kind and getattr(layer, "activation", None) is None and "forward" not in vars(layer)
    return plain and not hooked(layer)
