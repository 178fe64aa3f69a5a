"""Which units stay: what each is worth, and the ranking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import call, isolated
from ..ops.block_sparse import OUTPUTS
from .config import Sparsify
from .form import block_grid

_GONE = -1.0
"""What a unit is worth that a mask has taken: less than any other."""


@torch.inference_mode(False)
@torch.no_grad()
def input_energy(model: Module, layers: Iterable[Module], calibration: Iterable[Any]) -> Mapping[Module, Tensor]:
    """Sum of squares of each column of the layers' inputs, float64, over all rows of all calibration inputs.

    The model runs in evaluation, every layer as it is, and stays as it was. Layers that are not run are not in it.

    Raises:
        ValueError: there are no inputs.
    """
    found: dict[Module, Tensor] = {}

    def note(module: Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            energy = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
            found[module] = found[module] + energy if module in found else energy

    samples = 0
    with isolated(model):
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                vars(module)["training"] = False
        handles = [layer.register_forward_pre_hook(note) for layer in layers]
        try:
            for sample in calibration:
                samples += 1
                call(model, sample)
        finally:
            for handle in handles:
                handle.remove()
    if not samples:
        raise ValueError("fastnn.sparsify_: calibration has no inputs")
    return found


def worth(config: Sparsify, weight: Tensor, alive: Tensor | None, energy: Tensor | None) -> Tensor:
    """What each unit is worth: (out_features, in_features), or that of `block_grid`.

    Args:
        config: which units, and how they are judged.
        weight: (out_features, in_features), zero where a mask has taken it.
        alive: what such masks leave, of the same shape; None for all.
        energy: (in_features,), for importance "wanda".
    """
    found = weight.abs().float()
    if energy is not None:
        found *= energy.sqrt().float()
    if config.unit == "block":
        found = torch.linalg.vector_norm(in_blocks(found, config.depth), dim=(1, 3), dtype=torch.float64)
        alive = None if alive is None else in_blocks(alive, config.depth).any(3).any(1)
    return found if alive is None else found.masked_fill(~alive, _GONE)


def in_blocks(weight: Tensor, depth: int) -> Tensor:
    """(strips, 16, width, depth) of what has a weight's shape; zero, or False, beyond it."""
    n, k = weight.shape
    strips, width = block_grid(n, k, depth)
    return F.pad(weight, (0, width * depth - k, 0, strips * OUTPUTS - n)).reshape(strips, OUTPUTS, width, depth)


def of_weights(kept: Tensor, config: Sparsify, shape: torch.Size) -> Tensor:
    """A mask of units as one of single weights."""
    if config.unit == "weight":
        return kept
    return kept.repeat_interleave(OUTPUTS, 0).repeat_interleave(config.depth, 1)[: shape[0], : shape[1]]


def kept_units(config: Sparsify, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of layers that one configuration is for: bool, which units stay. Each ranked set keeps at least its best unit.

    Args:
        config: amount and scope.
        layers: path -> what the layer's units are worth.

    Raises:
        ValueError: a count that is not below the number of units.
    """
    if config.scope == "layer":
        return {name: _ranked(one.reshape(1, -1), config, name).view_as(one) for name, one in layers.items()}
    if config.scope == "output":
        return {name: _ranked(one, config, f"an output of {name}") for name, one in layers.items()}
    every = []
    for one in layers.values():
        flat = one.flatten().cpu().clone()
        flat[flat.argmax()] = torch.inf  # no layer is left with nothing
        every.append(flat)
    ranked = _ranked(torch.cat(every)[None], config, "all layers", len(every))[0]
    kept = torch.split(ranked, [flat.numel() for flat in every])
    return {
        name: mask.view_as(one).to(one.device) & (one != _GONE)
        for (name, one), mask in zip(layers.items(), kept, strict=True)
    }


def _ranked(rows: Tensor, config: Sparsify, name: str, least: int = 1) -> Tensor:
    """Which of each row stay, at least so many."""
    units = rows.shape[1]
    if isinstance(config.amount, float):
        count = min(round(config.amount * units), units - least)
    else:
        count = config.amount
    if count > units - least:
        raise ValueError(
            f"fastnn.sparsify_: cannot take {count} of the {units} {config.unit}s of {name}, {least} of which must stay"
        )
    kept = rows != _GONE
    if count:
        kept.scatter_(1, rows.topk(count, 1, largest=False, sorted=False).indices, False)
    return kept
