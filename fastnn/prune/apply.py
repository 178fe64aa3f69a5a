"""Taking units out of a model: smaller tensors, the numbers that modules keep of their sizes, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Module

from .groups import Group, Part

Removed = list[tuple[Group, np.ndarray]]
"""Groups and the units that go."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "num_kv_heads", "nhead")
"""Under which names modules keep a number of heads."""
_WIDTHS = ("all_head_size", "split_size", "inner_dim", "inner_size", "embed_dim", "dim")
"""Under which names the modules that split heads keep heads x width."""
_SIZES = {
    0: ("out_features", "out_channels", "num_features", "num_parameters", "num_channels"),
    1: ("in_features", "in_channels", "embedding_dim"),
}
"""Dimension of a weight -> how torch's modules call its size."""


@dataclass
class Changes:
    """What was changed, so that it can be undone."""

    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """A parameter or buffer, its values and its gradient before."""
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    """An object, the name of an attribute, its value before."""

    def resize(self, tensor: Tensor, values: Tensor) -> None:
        """Gives a tensor other values, of another shape; it stays the same object, so that ties last."""
        self.tensors.append((tensor, tensor.data, tensor.grad))
        _replace(tensor, values, None)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute."""
        self.attributes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts everything back."""
        for tensor, values, grad in reversed(self.tensors):
            _replace(tensor, values, grad)
        for owner, name, value in reversed(self.attributes):
            setattr(owner, name, value)


def _replace(tensor: Tensor, values: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    # A graph that still lives (of the last loss, say) keeps the node that gathers a parameter's gradient, and that
    # node keeps the shape; torch makes a new one where the type changes, and only there.
    tensor.data = values.new_empty(0, dtype=torch.float32 if values.dtype == torch.float64 else torch.float64)
    tensor.data = values
    tensor.grad = grad
    torch.autograd.graph.increment_version(tensor)


def gone(removed: Removed) -> dict[int, list[tuple[Part, np.ndarray]]]:
    """id of a tensor -> its parts that lose something, and the indices that they lose."""
    found: dict[int, list[tuple[Part, np.ndarray]]] = {}
    for group, units in removed:
        for part in group.parts if len(units) else ():
            found.setdefault(id(part.tensor), []).append((part, part.index[units].reshape(-1)))
    return found


def shrink(model: Module, removed: Removed) -> Changes:
    """Takes the units out of every tensor and sets the sizes that modules keep."""
    changes = Changes()
    lost = gone(removed)
    before: dict[int, tuple[int, ...]] = {}
    for key, parts in lost.items():
        tensor = parts[0][0].tensor
        values, before[key] = tensor.data, tuple(tensor.shape)
        by_dim: dict[int, list[np.ndarray]] = {}
        for part, index in parts:
            by_dim.setdefault(part.slot.dim, []).append(index)
        for dim, indices in by_dim.items():
            stay = np.setdiff1d(np.arange(values.shape[dim]), np.concatenate(indices))
            values = values.index_select(dim, torch.from_numpy(stay).to(values.device))
        changes.resize(tensor, values.contiguous(memory_format=_format(tensor)))
    for module in model.modules():
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            if held is not None and id(held) in lost and name.startswith(("weight", "running_mean")):
                _sizes(changes, module, held, before[id(held)])
    for group, units in removed:
        for path in group.splitters if len(units) else ():
            _heads(changes, model.get_submodule(path) if path in dict(model.named_modules()) else model, group, units)
    return changes


def _format(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _sizes(changes: Changes, module: Module, tensor: Tensor, before: tuple[int, ...]) -> None:
    """The sizes of its weight that a module of torch's, or transformers' Conv1D, keeps as attributes."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and before[1] == 1 and not module.transposed:  # depthwise: a group is a channel
            each = before[0] // module.groups
            _set(changes, module, "groups", tensor.shape[0] // each)
            _set(changes, module, "in_channels", tensor.shape[0] // each)
            _set(changes, module, "out_channels", tensor.shape[0])
            return
        out, into = (1, 0) if module.transposed else (0, 1)
        _set(changes, module, "out_channels", tensor.shape[out] * (module.groups if module.transposed else 1))
        _set(changes, module, "in_channels", tensor.shape[into] * (1 if module.transposed else module.groups))
        return
    for dim, size in enumerate(tensor.shape):
        for name in _SIZES.get(dim, ()):
            _set_if(changes, module, name, before[dim], size)
    if isinstance(module, nn.GroupNorm):
        _set(changes, module, "num_groups", tensor.shape[0])
    if type(module).__name__ == "Conv1D" and tensor.dim() == 2:
        _set_if(changes, module, "nx", before[0], tensor.shape[0])
        _set_if(changes, module, "nf", before[1], tensor.shape[1])


def _heads(changes: Changes, module: Module, group: Group, units: np.ndarray) -> None:
    """The numbers of heads that a module keeps: those of queries, and of keys where they share heads."""
    for part in group.parts:
        each = part.index.shape[1]
        for name in _WIDTHS:
            _set_if(changes, module, name, group.units * each, (group.units - len(units)) * each)
    counts = head_counts(module, group)
    for name in _HEADS:
        before = vars(module).get(name)
        if type(before) is int and before in counts:
            _set(changes, module, name, before - before // group.units * len(units))


def head_counts(module: Module, group: Group) -> set[int]:
    """The numbers of heads that there can be where units are shared heads of keys: multiples of the units."""
    own = [vars(module).get(name) for name in _HEADS]
    return {n for n in own if type(n) is int and n % group.units == 0}


def _set_if(changes: Changes, module: Any, name: str, before: int, after: int) -> None:
    if vars(module).get(name) == before != after:
        changes.set(module, name, after)


def _set(changes: Changes, module: Any, name: str, after: int) -> None:
    if getattr(module, name) != after:
        changes.set(module, name, after)


@contextmanager
def silenced(removed: Removed) -> Iterator[None]:
    """The model with zeros where products use the units: what it must give without them."""
    changes = Changes()
    try:
        for parts in gone(removed).values():
            used = [(part, index) for part, index in parts if part.used]
            if used:
                values = used[0][0].tensor.data.clone(memory_format=torch.preserve_format)
                for part, index in used:
                    values.index_fill_(part.slot.dim, torch.from_numpy(index).to(values.device), 0)
                changes.resize(used[0][0].tensor, values)
        yield
    finally:
        changes.undo()
