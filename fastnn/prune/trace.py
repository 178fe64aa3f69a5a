"""Running a model once on an example and following its channels through every operator.

A TorchDispatchMode sees the ATen operators that a forward comes down to, whatever Python led to them: caches, control
flow on data and outputs of any class are no obstacle, which they are to torch.fx's symbolic trace and torch.export.
What the forward wrote as numbers, a trace of no kind can see; `apply.py` therefore checks every result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _dispatch
from ..accelerate.isolate import call, isolated, tensors
from .labels import Atoms, Labels, Relation, Solution
from .registry import rule_of


@dataclass(frozen=True)
class Product:
    """Multiply-adds of one call, and the labelled dimensions whose sizes are factors of them."""

    macs: int
    dims: tuple[Atoms, ...]


@dataclass(frozen=True)
class Held:
    """A parameter or buffer of the model, once, however many modules hold it."""

    tensor: Tensor
    names: tuple[str, ...]


class Tracer(TorchDispatchMode):
    """Labels of every tensor that is alive, and the relation between them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.relation = Relation()
        self.products: list[Product] = []
        self.stack: list[str] = []
        self._labels = WeakTensorKeyDictionary()
        self._weights = WeakTensorKeyDictionary()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import all of dynamo to wrap `__torch_dispatch__`, seconds for nothing."""
        return False

    @property
    def where(self) -> str:
        """The module that runs, in words."""
        return next((name for name in reversed(self.stack) if name), "the model's forward")

    def labels(self, tensor: Tensor) -> Labels:
        """Of a tensor; nothing where none were given."""
        return self._labels.get(tensor) or (None,) * tensor.dim()  # type: ignore[no-untyped-call]

    def give(self, tensor: Any, labels: Labels) -> None:
        """Labels a result."""
        if isinstance(tensor, Tensor) and len(labels) == tensor.dim() and any(one is not None for one in labels):
            self._labels[tensor] = labels

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or made of nothing else: its labels are then its own and not some input's."""
        return tensor in self._weights

    def start(self, tensor: Tensor, labels: Labels) -> None:
        """Labels a parameter or buffer."""
        self.give(tensor, labels)
        self._weights[tensor] = True

    @staticmethod
    def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among an operator's arguments, those in lists too."""
        return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def tie(self, a: Atoms | None, b: Atoms | None, what: str) -> None:
        """Ties two dimensions; `what` they are in, for the reason where one cannot be pruned."""
        if a is not b:
            self.relation.tie(a, b, f"{what} in {self.where} meets a width that is fixed")

    def freeze(self, atoms: Atoms | None, why: str) -> None:
        """Freezes one dimension."""
        self.relation.freeze(atoms, f"{why} in {self.where}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule_of(func)(self, func, args, kwargs or {}, out)
        given = self.tensors_of(args, kwargs or {})
        if given and all(map(self.is_weight, given)):
            for made in self.tensors_of((out,), {}):
                self._weights[made] = True
        return out


@dataclass(frozen=True)
class Trace:
    """What one run told."""

    held: tuple[Held, ...]
    relation: Relation
    solution: Solution
    products: tuple[Product, ...]


def holdings(model: Module) -> tuple[Held, ...]:
    """The model's floating parameters and buffers."""
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
            found[id(tensor)] = tensor
    return tuple(Held(tensor, tuple(names[key])) for key, tensor in found.items())


def trace(model: Module, example_inputs: Any) -> Trace:
    """Runs the model on the example in evaluation and leaves it as it was.

    Raises:
        whatever the model raises.
    """
    held = holdings(model)
    tracer = Tracer()
    given = [tracer.relation.new(i, one.tensor.shape) for i, one in enumerate(held)]
    with evaluating(model), _paths(model, tracer.stack):
        copies = dict(model.named_buffers(remove_duplicate=False))  # what runs inside `isolated`
        for one, labels in zip(held, given, strict=True):
            tracer.start(copies.get(one.names[0], one.tensor), labels)
        with tracer:
            output = call(model, example_inputs)
        for tensor in tensors(output):
            for atoms in tracer.labels(tensor):
                tracer.relation.freeze(atoms, "it is an output of the model")
    return Trace(held, tracer.relation, tracer.relation.solve(), tuple(tracer.products))


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """Runs what is inside in evaluation, on plain PyTorch, without gradients; the model stays as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer says nothing of its inside
    try:
        with isolated(model), torch.inference_mode(False), torch.no_grad(), _dispatch.use_backend("reference"):
            for module in model.modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    module.training = False
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _paths(model: Module, stack: list[str]) -> Iterator[None]:
    """Keeps on `stack` the paths of the modules that run."""

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
