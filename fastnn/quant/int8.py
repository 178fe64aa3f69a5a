"""The recipe of `Int8Dynamic`, and the layers it takes: torch's and fastnn's Linear, Hugging Face's Conv1D."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from .. import nn
from ..accelerate.survey import backend_for
from ..ops.linear_int8 import MAX_FEATURES
from .config import Config, Int8Dynamic, Recipe, register

OP = "linear_int8"


def is_conv1d(module: Module) -> bool:
    """Whether it is Hugging Face's Conv1D: a dense layer whose weight is (in_features, out_features)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def float_weight(module: Module) -> Tensor:
    """The weight as (out_features, in_features)."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"fastnn.quantize_: weight of {type(module).__name__} must be a Tensor")
    return weight.t() if is_conv1d(module) else weight


def _why_not(module: Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Int8Linear):
        return "is quantised already"
    if not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
        return f"Int8Dynamic takes no {kind}"
    if type(module) not in (torch.nn.Linear, nn.Linear) and not is_conv1d(module):
        return f"{kind} is a subclass of Linear, maybe with a forward of its own"
    if parametrize.is_parametrized(module) or not isinstance(module.weight, torch.nn.Parameter):
        return "its weight is computed from others at each call"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    weight = float_weight(module)
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.numel() == 0 or weight.shape[1] > MAX_FEATURES:
        return f"weight of shape {tuple(weight.shape)} (at most {MAX_FEATURES} in_features, and not empty)"
    _, reason = backend_for(OP, weight.device, weight.dtype)
    return reason or ("" if bool(weight.isfinite().all()) else "its weight has NaN or infinite values")


def _quantized(module: Module) -> Module:
    activation = module.activation if isinstance(module, nn.Linear) else None
    bias = module.bias
    if bias is not None and not isinstance(bias, torch.nn.Parameter):
        raise TypeError(f"fastnn.quantize_: bias of {type(module).__name__} must be a Parameter")
    with torch.no_grad():
        layer = nn.Int8Linear.from_float(float_weight(module), bias, activation=activation)
    return layer.train(module.training)


def _recipe(config: Config) -> Recipe:
    return Recipe(OP, nn.Int8Linear, _why_not, _quantized)


register(Int8Dynamic, _recipe)
