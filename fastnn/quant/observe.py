"""What calibration sees of a layer's inputs: the sum of their products, their largest values, where they come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module


@dataclass
class Seen:
    """Of one layer's inputs, over all rows x of all samples."""

    gram: Tensor | None = None
    """Sum of x^T x in float32, where it was asked for; None before the first call."""
    largest: Tensor | None = None
    """Largest magnitude of each column; None before the first call."""
    producers: set[Module | None] | None = None
    """The norms whose outputs the inputs are; None stands for anything else."""

    @property
    def problem(self) -> str:
        """Why this is nothing to go by, in words."""
        if self.largest is None:
            return "not run by the calibration"
        return "" if bool(self.largest.isfinite().all()) else "its inputs on the calibration have NaN or infinities"


class Watch:
    """Collects `Seen` of layers."""

    def __init__(self, layers: Iterable[Module], with_gram: Collection[Module]) -> None:
        self.seen = {layer: Seen() for layer in layers}
        self._with_gram = with_gram
        self._outputs: dict[Module, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        """An input and its gram: layers in parallel (query, key, value) have the same."""

    @contextmanager
    def on(self, root: Module) -> Iterator[None]:
        """While it lasts, calls of the layers are seen, and of the norms in `root` what they give."""
        handles = []
        try:
            for module in root.modules():
                if is_norm(module):
                    handles.append(module.register_forward_hook(self._note))
            handles += [layer.register_forward_pre_hook(self._look) for layer in self.seen]
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()
            self._last = None

    def _note(self, norm: Module, args: object, output: Any) -> None:
        weight = norm._parameters["weight"]
        if isinstance(output, Tensor) and weight is not None and output.shape[-1:] == weight.shape:
            self._outputs[norm] = output  # kept alive: nothing else can come to lie where it is

    def _look(self, layer: Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        seen, input = self.seen[layer], args[0].detach()
        rows = input.reshape(-1, input.shape[-1]).float()
        if not rows.shape[0]:
            return
        largest = rows.abs().amax(0)
        seen.largest = largest if seen.largest is None else torch.maximum(seen.largest, largest)
        if seen.producers is None:
            seen.producers = set()
        seen.producers.add(next((norm for norm, out in self._outputs.items() if _same_values(out, input)), None))
        if layer in self._with_gram:
            if self._last is None or self._last[0] is not args[0]:
                self._last = args[0], rows.t() @ rows
            gram = self._last[1]
            seen.gram = gram.clone() if seen.gram is None else seen.gram.add_(gram)


def is_norm(module: Module) -> bool:
    """Whether it looks like a norm with a weight: one vector, perhaps another, and no layers inside."""
    weight, parameters = module._parameters.get("weight"), module._parameters.keys()
    return weight is not None and weight.dim() == 1 and parameters <= {"weight", "bias"} and not module._modules


def _same_values(a: Tensor, b: Tensor) -> bool:
    same = a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.dtype == b.dtype
    return same and a.shape[-1] == b.shape[-1] and a.is_contiguous() and b.is_contiguous()
