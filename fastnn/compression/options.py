"""What `fastnn.compress` is told, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import Module

from .. import __version__, _extension
from ..accelerate.isolate import plain_inputs
from ..prune import Shrink
from ..quant.checkpoint import digest
from ..quant.config import Config, Int4Int8Dynamic, Int8Dynamic, Int8WeightOnly
from ..selection import FilterFn, Patterns
from ..sparse.config import Sparsify
from .moves import Target

CANDIDATES = (
    Int8Dynamic(),
    Int8WeightOnly(),
    Int4Int8Dynamic(),
    Sparsify(0.5, importance="wanda"),
    Shrink(0.25, importance="activation", multiple_of=16),
)
"""What is tried unless something else is named."""


@dataclass(frozen=True)
class Options:
    """What `compress` was told beside the model, `evaluate` and files to go on from."""

    calib: list[Any]
    example_inputs: Any
    max_drop: float
    reserve: float
    target: Target
    candidates: tuple[Any, ...]
    filter_fn: FilterFn | None
    include: Patterns
    exclude: Patterns
    recover: Callable[[Module], object] | None
    accelerate: bool
    max_evaluations: int
    save: Path | None

    @property
    def allowed(self) -> float:
        """By how much the metric may fall for a plan: of many that are tried, the one that just fits is a lucky one."""
        return self.max_drop * (1 - self.reserve)

    def check(self) -> None:
        """Raises TypeError or ValueError where they cannot be meant."""
        if not self.max_drop >= 0 or math.isinf(self.max_drop):
            raise ValueError(f"fastnn.compress: max_drop must be a number of at least 0, got {self.max_drop}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"fastnn.compress: reserve must be in [0, 1), got {self.reserve}")
        if self.target not in get_args(Target):
            raise ValueError(f"fastnn.compress: target must be one of {get_args(Target)}, got {self.target!r}")
        if type(self.max_evaluations) is not int or self.max_evaluations < 1:
            raise ValueError(f"fastnn.compress: max_evaluations must be a positive int, got {self.max_evaluations!r}")
        if not self.calib:
            raise ValueError("fastnn.compress: calib has no inputs")
        for one in self.candidates:
            _check_candidate(one)

    def fingerprint(self, model: Module, metric: str | None) -> str:
        """Of all that measurements depend on, but for the code of `evaluate`, `recover` and `filter_fn`."""
        held = [[name, t.detach()] for name, t in model.state_dict().items() if isinstance(t, Tensor)]
        isa = "" if _extension._C is None else _extension._C.isa()
        told = [repr(self.candidates), self.target, self.max_drop, self.reserve, metric, self.include, self.exclude]
        called = [self.accelerate, self.filter_fn is None, self.recover is None, self.max_evaluations]
        where = [__version__, torch.__version__, isa, torch.get_num_threads()]
        kinds = [[name, type(m).__qualname__] for name, m in model.named_modules()]
        return digest(where, told, called, kinds, held, self.calib, plain_inputs(self.example_inputs))


def _check_candidate(one: object) -> None:
    if not isinstance(one, (Config, Sparsify, Shrink)):
        got = one.__name__ if isinstance(one, type) else type(one).__name__
        raise TypeError(f"fastnn.compress: candidates are configurations such as fastnn.Int8Dynamic(), got {got}")
    if getattr(one, "smooth", None) is not None:
        raise ValueError("fastnn.compress: SmoothQuant changes other layers, too, and is no candidate for one")
    if isinstance(one, Shrink) and (one.importance == "taylor" or one.scope == "global"):
        raise ValueError('fastnn.compress: Shrink must have scope="layer" and an importance other than "taylor"')
    if isinstance(one, Sparsify) and (one.unit != "block" or one.scope == "global"):
        raise ValueError('fastnn.compress: Sparsify must have unit="block", and a scope within the layer')
