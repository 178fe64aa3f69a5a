"""What each candidate would do to one unit, apart from all others: to the outputs, to its time, to its bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate import accelerate
from ..accelerate.isolate import Attempt, tensors
from ..prune.apply import Removed, shrink, silenced
from ..prune.groups import Group, owner
from ..quant.chain import run
from ..quant.checkpoint import digest
from ..quant.config import Config
from ..quant.measure import first_inputs, medians
from ..sparse.config import Sparsify
from .memo import Memo
from .state import State, tensor_bytes
from .units import Option, Unit, convert

_REMEMBERED = ("became", "reason", "error", "ms_before", "ms_after", "bytes_before", "bytes_after")


@dataclass(frozen=True)
class _Call:
    """A layer on an input of its own, past its hooks, in the form that `medians` takes."""

    layer: Module
    input: Tensor

    def __call__(self, _: Tensor) -> object:
        return self.layer.forward(self.input)

    def signature(self) -> str:
        """The same where it takes the same time."""
        held = (*self.layer.named_parameters(), *self.layer.named_buffers())
        x, tensors = self.input, [(name, t.shape, t.dtype) for name, t in held]
        return repr((type(self.layer), self.layer, tensors, x.shape, x.dtype, x.stride()))


class Look:
    """Looks at options.

    Args:
        model: is in any state, afterwards too.
        plain: the model as it was given, in evaluation mode, its tensors in memory that may be written to.
        base: the same accelerated, where it is to be; what layers are compared with.
        calib: the samples whose outputs count.
        example_inputs: what times are taken on.
        accelerated: whether layers that stay floating run on fastnn's kernels.
        worth: what an option gains by its time and bytes; where that is nothing, the model is not run for it.
        memo: what is known already.
    """

    def __init__(
        self,
        model: Module,
        plain: State,
        base: State,
        calib: list[Any],
        example_inputs: Any,
        accelerated: bool,
        worth: Callable[[Option], float],
        memo: Memo,
    ) -> None:
        self._model, self._plain, self._base, self._memo = model, plain, base, memo
        self._calib, self._example, self._accelerated, self._worth = calib, example_inputs, accelerated, worth
        plain.put()
        self._true = self._outputs()
        base.put()
        self._inputs: dict[Module, Tensor] = {}
        self._bytes = tensor_bytes(model)

    def prepare(self, units: Iterable[Unit]) -> None:
        """Sees what the example gives the layers."""
        self._base.put()
        self._inputs = first_inputs(self._model, [module for unit in units for module in unit.modules], self._example)

    def at(self, unit: Unit) -> None:
        """Fills in what is measured of a unit's options; the model is in any state afterwards."""
        options = [option for option in unit.options if not option.reason]

        def find() -> list[dict[str, Any]]:
            if unit.group is None:
                self._layers(unit, options)
            else:
                self._structure(unit.group, options)
            return [{name: getattr(option, name) for name in _REMEMBERED} for option in options]

        found = self._memo.get(f"{unit.key}: {[option.config for option in options]}", find) if options else []
        for option, values in zip(options, found, strict=True):
            for name, value in values.items():
                setattr(option, name, value)

    def _layers(self, unit: Unit, options: list[Option]) -> None:
        self._base.put()
        timed = [(module, self._inputs[module]) for module in unit.modules if module in self._inputs]
        calls = [[_Call(copy.deepcopy(module), input)] for module, input in timed]
        nbytes = int(unit.modules[0].weight.nbytes)  # type: ignore[arg-type]
        made: list[tuple[Option, State]] = []
        for option in options:
            self._base.put()
            done = convert(self._model, {unit.key: (unit, option)}, self._calib, Sparsify, Config)
            for name in unit.names:
                if done[name].became is None:
                    option.reason = done[name].reason if name == unit.name else f"{name}: {done[name].reason}"
                    break
            else:
                option.became = str(done[unit.name].became)
                option.bytes_before, option.bytes_after = nbytes, nbytes + tensor_bytes(self._model) - self._bytes
                made.append((option, State(self._model)))
                for each, (module, input) in zip(calls, timed, strict=True):
                    each.append(_Call(copy.deepcopy(module), input))
        self._time([option for option, _ in made], calls)
        for option, state in made:
            if self._worth(option) > 0:
                state.put()
                option.error = self._error()

    def _structure(self, group: Group, options: list[Option]) -> None:
        self._plain.put()
        held = {id(part.tensor): part.tensor for part in group.parts}
        paths = {owner(part.name): None for part in group.parts if part.tensor.dim() > 1}
        layers = [self._model.get_submodule(path) for path in paths]
        inputs = self._first_inputs(layers)
        calls = {layer: [_Call(copy.deepcopy(layer), input)] for layer, input in inputs.items()}
        plans: list[tuple[Option, Removed]] = []
        for option in options:
            plan: Removed = [(group, np.empty(0, np.int64) if option.gone is None else option.gone)]
            option.bytes_before = sum(tensor.nbytes for tensor in held.values())
            shrink(self._model, plan)
            option.bytes_after = sum(tensor.nbytes for tensor in held.values())
            with Attempt() as attempt:
                smaller = self._first_inputs(layers)
            if attempt.failure:
                option.reason = f"its shape is fixed by code: {attempt.failure}"
            else:
                plans.append((option, plan))
                for layer, input in smaller.items():
                    calls[layer].append(_Call(copy.deepcopy(layer), input))
            self._plain.put()
        for each in calls.values():
            for one in each if self._accelerated else []:
                accelerate(one.layer, freeze=True)
        self._time([option for option, _ in plans], list(calls.values()))
        for option, plan in plans:
            if self._worth(option) > 0:
                with silenced(plan):
                    option.error = self._error()

    def _first_inputs(self, layers: list[Module]) -> dict[Module, Tensor]:
        return first_inputs(self._model, layers, self._example)

    def _time(self, options: list[Option], calls: list[list[_Call]]) -> None:
        """Times a unit's layers: of each as it is and as each option would have it, in turns; what is alike once."""
        times = []
        for each in calls if options else []:
            key = f"ms {digest([one.signature() for one in each])}"
            times.append(self._memo.get(key, lambda each=each: list(medians(each, each[0].input))))  # type: ignore[misc]
        for i, option in enumerate(options if times else []):
            option.ms_before = sum(each[0] for each in times)
            option.ms_after = sum(each[i + 1] for each in times)

    @torch.no_grad()
    def _outputs(self) -> list[list[Tensor]]:
        found = []
        for i, sample in enumerate(self._calib):
            with Attempt() as attempt:
                every = [t.detach() for t in tensors(run(self._model, sample)) if t.is_floating_point()]
            if attempt.failure:
                raise ValueError(f"fastnn.compress: the model does not run on calib[{i}]: {attempt.failure}")
            if not every:
                raise ValueError(f"fastnn.compress: the model gives no floating tensors for calib[{i}]")
            found.append(every)
        return found

    def _error(self) -> float:
        """Root of the mean over output tensors of |y - true|^2 / |true|^2; infinite where something is not finite."""
        lost, whole = [0.0] * len(self._true[0]), [0.0] * len(self._true[0])
        for ours, true in zip(self._outputs(), self._true, strict=True):
            for i, (a, b) in enumerate(zip(ours, true, strict=True)):
                lost[i] += float((a.double() - b.double()).square().sum())
                whole[i] += float(b.double().square().sum())
        found = [a / b if b else float(a > 0) for a, b in zip(lost, whole, strict=True)]
        error = math.sqrt(sum(found) / len(found))
        return error if math.isfinite(error) else math.inf
