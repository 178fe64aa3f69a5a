"""A model's list of blocks, each of which takes what the one before gave, so that one can be run at a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from ..accelerate.isolate import call
from ..ops.packing import state_of
from .fold import agree

_PLAIN = (Tensor, bool, int, float, complex, str, torch.dtype, torch.device, type(None))
"""What a block's arguments may hold: a cache, say, would change by each call."""


@dataclass
class _Call:
    """One call of one block."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: list[Any]
    """Of the tensors among the arguments: writing to one changes it."""
    output: Any = None


@dataclass(frozen=True)
class Arguments:
    """A block's arguments for one sample, but for what the block before gives."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str
    """Where that goes: a position or a name."""

    def run(self, block: Module, state: Tensor) -> Any:
        """The block's output."""
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], state, *self.args[self.slot + 1 :])
            return block(*args, **self.kwargs)
        return block(*self.args, **{**self.kwargs, self.slot: state})


def carried(output: Any) -> Any:
    """What the next block takes: the output, or its first item."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def lists_of_blocks(model: Module, layers: Iterable[Module]) -> Iterator[tuple[str, list[Module]]]:
    """(path, blocks) of the model's lists with a layer in them, the one with the most parameters first."""
    wanted = set(layers)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1:
            if any(inner in wanted for inner in module.modules()):
                found.append((sum(p.numel() for p in module.parameters()), name, list(module)))
    for _, name, blocks in sorted(found, key=lambda entry: -entry[0]):
        yield name, blocks


class Chain:
    """Blocks, and for each sample what each of them is given."""

    def __init__(self, blocks: Sequence[Module]) -> None:
        self.blocks = list(blocks)
        self.states: list[Tensor] = []
        """Of each sample: what the next block takes."""
        self.arguments: list[list[Arguments]] = []
        """Of each sample, block by block."""

    def record(self, model: Module, inputs: Any) -> str:
        """Runs the model on a sample; why its blocks are no chain, in words, or nothing."""
        calls: list[_Call] = []

        def before(index: int, _: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(_Call(index, args, kwargs, _states(args, kwargs)))

        def after(index: int, _: Module, args: object, output: Any) -> None:
            calls[-1].output = output

        handles = []
        try:
            for i, block in enumerate(self.blocks):
                handles.append(block.register_forward_pre_hook(partial(before, i), with_kwargs=True))
                handles.append(block.register_forward_hook(partial(after, i)))
            result = run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        reason = self._take(calls)
        if reason or len(self.states) > 1:
            return reason
        with self.replaced(calls[-1].output):
            return "" if agree(result, run(model, inputs)) else "what a block gives is used elsewhere, too"

    def _take(self, calls: list[_Call]) -> str:
        if [one.index for one in calls] != list(range(len(self.blocks))):
            return "its blocks do not run once each, in their order"
        slots = {_slot(one, carried(before.output)) for before, one in pairwise(calls)}
        (slot,) = slots if len(slots) == 1 else (None,)
        if slot is None:
            return "a block does not take what the one before gave"
        first = calls[0].args[slot : slot + 1] if isinstance(slot, int) else [calls[0].kwargs.get(slot)]
        if len(first) != 1 or not isinstance(first[0], Tensor):
            return "the first block takes its input in another place than the others"
        given = []
        for one in calls:
            if None in one.states:
                return "a block is given an inference tensor, of which torch does not count the changes"
            if one.states != _states(one.args, one.kwargs):
                return "a block writes to what it is given"
            args = tuple(None if i == slot else value for i, value in enumerate(one.args))
            kwargs = {name: value for name, value in one.kwargs.items() if name != slot}
            strangers = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, _PLAIN)]
            if strangers:
                return f"a block is given a {type(strangers[0]).__name__}, which its call may change"
            given.append(Arguments(args, kwargs, slot))
        self.states.append(first[0])
        self.arguments.append(given)
        return ""

    @contextmanager
    def replaced(self, output: Any) -> Iterator[None]:
        """Calls of the blocks give `output` and compute nothing."""
        try:
            for block in self.blocks:
                vars(block)["forward"] = lambda *args, **kwargs: output
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


def _states(args: Any, kwargs: Any) -> list[Any]:
    return [state_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _slot(one: _Call, state: Any) -> int | str | None:
    """Where a call has `state`."""
    if not isinstance(state, Tensor):
        return None
    for i, value in enumerate(one.args):
        if value is state:
            return i
    return next((name for name, value in one.kwargs.items() if value is state), None)


def run(model: Module, inputs: Any) -> Any:
    """The model on a sample. Models of transformers are told to keep no cache, unless the sample says otherwise."""
    told = isinstance(inputs, Mapping) and "use_cache" in inputs
    if hasattr(getattr(model, "config", None), "use_cache") and not told:
        if "use_cache" in inspect.signature(model.forward).parameters:
            return call(partial(model, use_cache=False), inputs)
    return call(model, inputs)
