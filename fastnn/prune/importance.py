"""How much a model would miss each unit: by its weights, by what it says on calibration inputs, by the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ..accelerate.isolate import call, isolated
from .groups import Group, Part
from .trace import evaluating

Loss = Callable[[Module, Any], Tensor]


def norms(group: Group) -> np.ndarray:
    """L2 norm of what a unit is in each weight, relative to the mean over its units, averaged over the weights.

    The group norm of Li et al. 2017 (Pruning Filters for Efficient ConvNets), over all that is coupled (Fang et al.
    2023, DepGraph). Vectors (biases, batch normalisation) do not count unless there is nothing else.
    """
    parts = [part for part in group.parts if part.tensor.dim() > 1 and part.tensor.is_floating_point()]
    every = []
    for part in parts:
        squares = _by_unit(part, part.tensor.detach().double().square())
        every.append(_relative(np.sqrt(squares)))
    return np.mean(every, axis=0)


def _by_unit(part: Part, values: Tensor) -> np.ndarray:
    """Sums a tensor like the part's over all that belongs to a unit."""
    others = [d for d in range(values.dim()) if d != part.slot.dim]
    sums = values.sum(others) if others else values
    return sums.cpu().numpy()[part.index].sum(1)


def _relative(values: np.ndarray) -> np.ndarray:
    mean = float(values.mean())
    return values / mean if mean > 0 else values


def activations(model: Module, groups: list[Group], calibration: Iterable[Any]) -> dict[int, np.ndarray]:
    """Root mean square of a unit's contributions ||x_j|| * ||W_:j||, by group, relative to their mean.

    Wanda's measure (Sun et al. 2024) summed over what a unit feeds, over everything the calibration inputs hold. In
    evaluation; `x_j` is what the layer that uses the unit gets at index j.

    Raises:
        ValueError: no calibration inputs; a group that no layer of a known kind uses.
    """
    uses = {i: [_user(model, part) for part in group.parts if part.used] for i, group in enumerate(groups)}
    energy: dict[int, Tensor] = {}

    def listen(module: Module, dim: int) -> Callable[[Module, tuple[Any, ...]], None]:
        def note(_: Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().double()
            axis = x.dim() + dim
            found = x.square().sum([d for d in range(x.dim()) if d != axis])
            energy[id(module)] = energy[id(module)] + found if id(module) in energy else found

        return note

    wanted = {id(module): (module, dim) for users in uses.values() for module, dim in users}
    batches = 0
    with evaluating(model):
        handles = [module.register_forward_pre_hook(listen(module, dim)) for module, dim in wanted.values()]
        try:
            for batch in calibration:
                batches += 1
                call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    if not batches:
        raise ValueError('fastnn.shrink_: importance="activation" needs calibration inputs, got none')
    found = {}
    for i, group in enumerate(groups):
        total = np.zeros(group.units)
        for part, (module, _) in zip([part for part in group.parts if part.used], uses[i], strict=True):
            heard = energy.get(id(module))
            if heard is not None:
                total += _contribution(part, heard.cpu())
        found[i] = _relative(np.sqrt(total))
    return found


def _contribution(part: Part, energy: Tensor) -> np.ndarray:
    weight = part.tensor.detach().double().cpu().movedim(part.slot.dim, 0).flatten(1).square().sum(1)
    repeats = energy.numel() // weight.numel()  # groups of a convolution, which share the dimension
    per_index = energy.reshape(repeats, -1).sum(0) * weight
    return per_index.numpy()[part.index].sum(1)


def _user(model: Module, part: Part) -> tuple[Module, int]:
    """The layer that uses a part, and which dimension of its input has the units, from the end."""
    path, _, name = part.name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return module, -len(module.kernel_size) - 1
    if name.startswith("weight") and part.tensor.dim() == 2:
        return module, -1
    raise ValueError(
        f'fastnn.shrink_: importance="activation" does not know how {path} ({type(module).__name__}) works'
    )


def taylor(model: Module, groups: list[Group], calibration: Iterable[Any], loss: Loss) -> dict[int, np.ndarray]:
    """|dL/dg| of a gate g = 1 on a unit's contribution, averaged over the batches, by group.

    First order, as Molchanov et al. 2019 (Importance Estimation for Neural Network Pruning): the gate's derivative is
    the sum of weight * gradient over what uses the unit, exactly. The model runs in the mode it is in and is left as
    it was, `.grad` too.

    Raises:
        ValueError: no calibration inputs; a weight that does not require grad.
    """
    weights = {id(part.tensor): part.tensor for group in groups for part in group.parts if part.used}
    fixed = [p.name for g in groups for p in g.parts if p.used and not p.tensor.requires_grad]
    if fixed:
        raise ValueError(f'fastnn.shrink_: importance="taylor" needs gradients, {fixed[0]} does not require grad')
    totals = [np.zeros(group.units) for group in groups]
    batches = 0
    with isolated(model), torch.inference_mode(False), torch.enable_grad():
        for batch in calibration:
            batches += 1
            value = loss(model, batch)
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            slopes = {
                key: None if g is None else (g * w.detach()).double()
                for (key, w), g in zip(weights.items(), found, strict=True)
            }
            for total, group in zip(totals, groups, strict=True):
                gate = np.zeros(group.units)
                for part in group.parts:
                    slope = slopes.get(id(part.tensor)) if part.used else None
                    if slope is not None:
                        gate += _by_unit(part, slope)
                total += np.abs(gate)
    if not batches:
        raise ValueError('fastnn.shrink_: importance="taylor" needs calibration inputs, got none')
    return {i: total / batches for i, total in enumerate(totals)}
