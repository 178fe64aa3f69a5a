"""What a model is at one time, and making it that again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..ops.packing import PackedWeight

_MEMBERS = ("_parameters", "_buffers", "_modules")


class State:
    """A model's modules with their classes, attributes and members, and which memory its tensors lie in.

    `put` may be called in any order and as often as wanted: a search goes from one state to another and back without
    a copy of the model. Modules, parameters and buffers are the same objects afterwards, as are their members' dicts.
    What is written into the tensors' memory, or into a mutable attribute, is beyond it: `copy_tensors` comes before
    whatever may write.
    """

    def __init__(self, model: Module) -> None:
        self._modules = [
            (module, type(module), dict(vars(module)), {name: dict(vars(module)[name]) for name in _MEMBERS})
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        self._tensors = [(t, t.data, t.grad) for t in tensors_of(model)]
        config = getattr(model, "config", None)
        self._config = (config, dict(vars(config))) if hasattr(config, "to_dict") else None
        """A transformers configuration, which pruning keeps true to the model."""

    def put(self) -> None:
        """Makes the model what it was."""
        for module, kind, attributes, members in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for name, entries in members.items():
                held = attributes[name]
                held.clear()
                held.update(entries)
        for tensor, data, grad in self._tensors:
            _put(tensor, data)
            tensor.grad = grad
        if self._config is not None:
            config, values = self._config
            vars(config).clear()
            vars(config).update(values)


def _put(tensor: Tensor, data: Tensor) -> None:
    if tensor.data_ptr() == data.data_ptr() and tensor.shape == data.shape and tensor.stride() == data.stride():
        return
    tensor.grad = None
    if tensor.shape != data.shape:  # as fastnn.prune.apply says: the node that gathers its gradient keeps the shape
        tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data


def tensors_of(model: Module) -> Iterator[Tensor]:
    """Parameters and buffers, each object once."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for member in ("_parameters", "_buffers"):
            for tensor in vars(module)[member].values():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def copy_tensors(model: Module) -> None:
    """Gives every tensor of the model memory of its own with the same values; what shares memory goes on sharing it."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors_of(model):
        data = tensor.data
        key = (data.data_ptr(), data.dtype, data.shape, data.stride())
        if not data.numel() or key not in copies:
            copies[key] = data.clone(memory_format=torch.preserve_format)
        tensor.data = copies[key]


def tensor_bytes(model: Module) -> int:
    """Of parameters and buffers; those that share memory once."""
    held = {(t.data_ptr(), t.shape, t.dtype): t.numel() * t.element_size() for t in tensors_of(model)}
    return sum(held.values())


def packed_bytes(model: Module) -> int:
    """Of copies of weights in the kernel's order that layers hold at present."""
    held = {id(p): p for m in model.modules() if isinstance(p := vars(m).get("packed"), PackedWeight)}
    return sum(packed.nbytes for packed in held.values())
