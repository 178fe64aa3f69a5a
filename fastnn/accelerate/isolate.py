"""Running a stranger's model, or a part of it, and leaving it exactly as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from ..nn import QuantizedModule

_MEMBERS = ("_parameters", "_buffers", "_modules")


class Attempt:
    """A block of somebody else's code, whose failure is an answer: `failure` says what it raised, else is empty.

    A forward that is run on symbols, in another type or by a patched layer may raise anything, also exceptions that
    derive from Exception alone (type checkers do). Exits and interrupts pass.
    """

    def __init__(self) -> None:
        self.failure = ""
        self.error: BaseException | None = None
        """What it raised."""

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.error = error
        text = str(error).strip()
        first = text.splitlines()[0].partition(". ")[0][:160] if text else ""
        self.failure = f"{kind.__name__}: {first}" if first else kind.__name__
        return True


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores the state of torch's, Python's and numpy's global random generators at the end."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


@contextmanager
def isolated(model: Module) -> Iterator[None]:
    """Whatever runs inside sees copies of the buffers; attributes, membership and random state are put back.

    The original buffer tensors, `__dict__` entries and membership dicts come back by identity, so that nothing (a
    version counter, a tie, a hook) can tell that the model ran. Values held inside mutable attributes (a list that
    the model appends to) are beyond its reach.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    saved = [(m, dict(vars(m))) for m in modules]
    copies: dict[int, Tensor] = {}
    for module in modules:
        for member in _MEMBERS:
            vars(module)[member] = dict(vars(module)[member])
        if isinstance(module, QuantizedModule):
            continue  # no forward writes to codes, and the packed copy is of these
        buffers = vars(module)["_buffers"]
        for name, buffer in buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                buffers[name] = copies[id(buffer)]
    try:
        with kept_random_state():
            yield
    finally:
        for module, attributes in saved:
            vars(module).clear()
            vars(module).update(attributes)


def call(model: Callable[..., Any], example_inputs: Any) -> Any:
    """`model(x)`; a tuple is passed as positional arguments, a mapping as keyword arguments."""
    inputs = pytree.tree_map_only(Tensor, _copy, plain_inputs(example_inputs))
    if isinstance(inputs, dict):
        return model(**inputs)
    if type(inputs) is tuple:
        return model(*inputs)
    return model(inputs)


def plain_inputs(example_inputs: Any) -> Any:
    """A mapping (a tokenizer's output, say) as a dict, which is what pytree looks into."""
    return dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs


def _copy(tensor: Tensor) -> Tensor:
    """A leaf of its own: a model may write to its input."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a nested output, in pytree's order; objects that pytree does not know are skipped."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def check_model(function: str, model: object, changes_weights: bool = False) -> None:
    """Raises TypeError or ValueError where `model` is nothing that can be run and patched, or its weights changed."""
    if not isinstance(model, Module):
        raise TypeError(f"fastnn.{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    lazy = [name for name, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"fastnn.{function}: model has parameters without a shape yet ({lazy[0]}, {len(lazy)} in all): run it once "
            "first"
        )
    held = (*model.named_parameters(), *model.named_buffers()) if changes_weights else ()
    fixed = [name for name, t in held if t.is_inference()]
    if fixed:
        raise ValueError(
            f"fastnn.{function}: model was created in torch.inference_mode, outside of which torch lets nobody change "
            f"its tensors ({fixed[0]}, {len(fixed)} in all); create it under torch.no_grad() instead"
        )
