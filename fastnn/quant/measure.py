"""What a layer's quantised form gains at the shapes that a model calls it with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import call, isolated

_SECONDS = 0.02
"""Of running each of them, in turns."""
_LEAST_RUNS = 5


@dataclass(frozen=True)
class Times:
    """Median milliseconds of a layer as it is and of its quantised form."""

    before: float
    after: float


def first_inputs(model: Module, layers: Iterable[Module], example_inputs: Any) -> dict[Module, Tensor]:
    """Each layer's first input when the model runs on the example; the model stays as it was."""
    found: dict[Module, Tensor] = {}

    def note(module: Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            found.setdefault(module, inputs[0].detach())

    with isolated(model), torch.no_grad():
        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            call(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found


def compare(before: Module, after: Module, input: Tensor) -> Times:
    """Both on `input`, in turns, without gradients and past their hooks."""
    return Times(*medians((before.forward, after.forward), input))


def medians(calls: Sequence[Callable[[Tensor], object]], input: Tensor) -> tuple[float, ...]:
    """Median milliseconds of each on `input`, in turns, without gradients."""
    runs: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        for one in calls:  # weights are packed, memory is there
            one(input)
            one(input)
        stop = time.perf_counter() + len(calls) * _SECONDS
        while len(runs[0]) < _LEAST_RUNS or time.perf_counter() < stop:
            for one, times in zip(calls, runs, strict=True):
                start = time.perf_counter()
                one(input)
                times.append(time.perf_counter() - start)
    return tuple(statistics.median(times) * 1e3 for times in runs)
