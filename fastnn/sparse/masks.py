"""Masks over dense weights, in the form of `torch.nn.utils.prune`, so that its tools and ours see each other's.

A masked layer has the parameter `weight_orig`, the buffer `weight_mask` and a hook that multiplies them before each
forward. The parameter is the object that was `weight`: an optimizer that has it keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import prune

from ..accelerate.isolate import check_model


def hook_of(module: Module, name: str = "weight") -> prune.BasePruningMethod | None:
    """The hook that masks a parameter; None where it has no mask."""
    hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod))
    return next((hook for hook in hooks if hook._tensor_name == name), None)


def parameter_of(module: Module) -> Parameter | None:
    """The parameter that the weight is made of."""
    return module._parameters.get("weight_orig" if hook_of(module) else "weight")


def mask_of(module: Module) -> Tensor | None:
    """What a mask leaves of the weight, bool of its shape; None where there is no mask."""
    mask = module._buffers.get("weight_mask") if hook_of(module) else None
    return None if mask is None else mask != 0


def masked_weight(module: Module) -> Tensor:
    """The weight that the layer multiplies by, from the parameter as it is now."""
    hook, weight = hook_of(module), module.weight
    found = weight if hook is None else hook.apply_mask(module)  # type: ignore[no-untyped-call]
    if not isinstance(found, Tensor):
        raise TypeError(f"fastnn.sparsify_: weight of {type(module).__name__} must be a Tensor")
    return found.detach()


@torch.no_grad()
def add_mask(module: Module, kept: Tensor) -> None:
    """Masks a weight, on top of the mask that it may have."""
    hook, mask = hook_of(module), module._buffers.get("weight_mask")
    if hook is None or mask is None:
        prune.custom_from_mask(module, "weight", kept)  # type: ignore[no-untyped-call]
    else:
        module._buffers["weight_mask"] = mask * kept  # a new tensor: a graph that lives may hold the old one
        vars(module)["weight"] = hook.apply_mask(module)  # type: ignore[no-untyped-call]


def drop_mask(module: Module, name: str = "weight") -> Parameter:
    """Takes hook, mask and parameter out of a module, which has no such parameter then; the parameter, unmasked."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == name:
            del module._forward_pre_hooks[key]
    vars(module).pop(name, None)
    del module._buffers[f"{name}_mask"]
    parameter = module._parameters.pop(f"{name}_orig")
    if parameter is None:
        raise ValueError(f"fastnn.strip_: {name} of {type(module).__name__} was lost meanwhile")
    return parameter


@torch.inference_mode(False)
@torch.no_grad()
def strip_(model: Module) -> tuple[str, ...]:
    """Makes masks permanent: what they took becomes plain zeros, and hooks and masks go, in place.

    Of every parameter that `torch.nn.utils.prune` or `fastnn.sparsify_` has masked. Parameters stay the same objects,
    except one that is used elsewhere without the mask, too (a tied embedding): there the masked layer gets its own.

    Returns:
        The paths of the parameters.

    Raises:
        TypeError: `model` is no module.
    """
    check_model("strip_", model, changes_weights=True)
    return strip(model, model.modules())


def strip(model: Module, modules: Iterable[Module]) -> tuple[str, ...]:
    """The same of some of the model's modules."""
    wanted = set(modules)
    found = [
        (path, module, hook._tensor_name)
        for path, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if module in wanted and isinstance(hook, prune.BasePruningMethod)
    ]
    users = _users(model)
    plan = []
    for _, module, name in found:
        parameter, mask = module._parameters[f"{name}_orig"], module._buffers[f"{name}_mask"]
        if parameter is None or mask is None:
            raise ValueError(f"fastnn.strip_: {name} of {type(module).__name__} has lost its mask")
        alone = all(other is not None and torch.equal(other, mask) for other in users[id(parameter)])
        plan.append((module, name, parameter.detach() * mask.to(parameter.dtype), alone))
    for module, name, values, alone in plan:
        parameter = drop_mask(module, name)
        if alone:
            parameter.data = values
        else:
            parameter = Parameter(values, parameter.requires_grad)
        module._parameters[name] = parameter
    return tuple(f"{path}.{name}" if path else name for path, _, name in found)


def _users(model: Module) -> dict[int, list[Tensor | None]]:
    """By the id of a parameter, the masks under which it is used, None for none."""
    found: dict[int, list[Tensor | None]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            base = name.removesuffix("_orig")
            masked = name != base and hook_of(module, base) is not None
            found.setdefault(id(parameter), []).append(module._buffers[f"{base}_mask"] if masked else None)
    return found
