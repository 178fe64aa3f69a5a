"""What the caller's measure says of a model, and what the clock and the memory say."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import Attempt, kept_random_state
from ..quant.chain import run
from .state import State, packed_bytes, tensor_bytes

Metrics = dict[str, float]

_SECONDS = 0.02
"""Of one round of one state at least: shorter calls are repeated."""
_LEAST_CALLS = 3


class CompressError(ValueError):
    """Nothing could be compressed, or something failed; the message says what. The model is as it was."""

    report: Any = None
    """What was tried until then (`fastnn.compression.Report`); None where nothing was."""


class Judge:
    """Calls the caller's `evaluate`, always with the same random state and without gradients.

    Args:
        evaluate: gives a number, or a mapping of them; larger is better.
        metric: which of the mapping's counts; the first one unless named.
    """

    def __init__(self, evaluate: Callable[[Module], Any], metric: str | None) -> None:
        self._evaluate, self.metric = evaluate, metric
        self._names: set[str] | None = None

    def __call__(self, model: Module, what: str) -> Metrics:
        """The metrics of a model that is `what`.

        Raises:
            CompressError: `evaluate` fails, or gives something else than numbers.
        """
        with kept_random_state(), torch.no_grad():
            torch.manual_seed(0)
            with Attempt() as attempt:
                given = self._evaluate(model)
        if attempt.error is not None:
            raise CompressError(f"fastnn.compress: evaluate failed on {what}: {attempt.failure}") from attempt.error
        every = given if isinstance(given, Mapping) else {self.metric or "metric": given}
        try:
            found = {str(name): _number(value) for name, value in every.items()}
        except (TypeError, ValueError, RuntimeError):
            text = f"evaluate must give a number or a mapping to them, got {given!r:.200}"
            raise CompressError(f"fastnn.compress: {text}") from None
        if self.metric is None and found:
            self.metric = next(iter(found))
        if self.metric not in found or self._names not in (None, set(found)):
            raise CompressError(f"fastnn.compress: evaluate gave {sorted(found)}, wanted is {self.metric!r} every time")
        self._names = set(found)
        return found

    def drop(self, before: Metrics, after: Metrics) -> float:
        """By how much the metric is smaller; infinite where it is NaN."""
        lost = before[str(self.metric)] - after[str(self.metric)]
        return math.inf if math.isnan(lost) else lost


def _number(value: Any) -> float:
    if isinstance(value, (str, bool)):
        raise TypeError
    return float(value)


def milliseconds(model: Module, states: list[State], example_inputs: Any, rounds: int) -> list[list[float]]:
    """Of each state in turns, a value per round: the median of so many calls as last a while, after one to warm up.

    The model is in the last state afterwards.
    """
    times: list[list[float]] = [[] for _ in states]
    with torch.no_grad():
        for _ in range(rounds):
            for state, found in zip(states, times, strict=True):
                state.put()
                run(model, example_inputs)
                each: list[float] = []
                stop = time.perf_counter() + _SECONDS
                while len(each) < _LEAST_CALLS or time.perf_counter() < stop:
                    start = time.perf_counter()
                    run(model, example_inputs)
                    each.append(1e3 * (time.perf_counter() - start))
                found.append(statistics.median(each))
    return times


def ratio_of(times: list[list[float]]) -> tuple[float, float, float]:
    """Of two states' rounds: the median of first / second, the smallest, the largest."""
    ratios = sorted(a / b for a, b in zip(*times, strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def memory(model: Module, state: State, example_inputs: Any) -> int | None:
    """Bytes that a call needs at most: tensors, packed copies, and by how much the process grows; None if unknown."""
    from ..bench.worker import extra_memory

    state.put()
    with torch.no_grad():
        run(model, example_inputs)
        grown = extra_memory(lambda: run(model, example_inputs))
    return None if grown is None else tensor_bytes(model) + packed_bytes(model) + grown


def check_devices(model: Module, named: Mapping[str, Any], tensors: Callable[[Any], list[Tensor]]) -> None:
    """Raises CompressError where the model or an input is not on the CPU, whose clock and memory are measured."""
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if held.device.type != "cpu":
            raise CompressError(f"fastnn.compress: compresses models on the CPU; {name} is on {held.device}")
    for name, inputs in named.items():
        for tensor in tensors(inputs):
            if tensor.device.type != "cpu":
                raise CompressError(f"fastnn.compress: the model is on the CPU, a tensor of {name} on {tensor.device}")
