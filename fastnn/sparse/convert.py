"""Changing a dense layer into a block-sparse one, the object staying."""

from __future__ import annotations

from torch.nn import Module

from ..nn import BlockSparseLinear, Int8BlockSparseLinear
from .masks import drop_mask, hook_of


def become(module: Module, made: BlockSparseLinear | Int8BlockSparseLinear) -> None:
    """Gives `module` the class, parameters, buffers and attributes of `made`; its hooks and name stay."""
    if hook_of(module) is not None:
        drop_mask(module)
    module._parameters.pop("weight", None)
    module._parameters.update(made._parameters)
    module._buffers.update(made._buffers)
    state, every = vars(module), vars(Module()).keys()
    packed = state.pop("packed", None)
    if packed is not None:
        packed.drop()
    state.update({name: value for name, value in vars(made).items() if name not in every})
    module.__class__ = type(made)
