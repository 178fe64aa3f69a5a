"""The recipes of the configurations: torch's and fastnn's Linear, Hugging Face's Conv1D, and torch's Embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from .. import nn
from ..accelerate.survey import backend_for
from ..ops.groups import LARGEST
from ..ops.linear_int8 import MAX_FEATURES
from .config import Config, Int4Int8Dynamic, Int4WeightOnly, Int8Dynamic, Int8WeightOnly, Recipe, register


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


def _why_not(
    made: type[nn.QuantizedLinear], table: type[nn.GroupwiseEmbedding] | None, name: str, module: Module
) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.QuantizedModule):
        return "is quantised already"
    embeds = table is not None and isinstance(module, torch.nn.Embedding)
    if not embeds and not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
        return f"{name} takes no {kind}"
    if type(module) not in (torch.nn.Linear, nn.Linear, torch.nn.Embedding) and not is_conv1d(module):
        return f"{kind} is a subclass of {'Embedding' if embeds else 'Linear'}, maybe with a forward of its own"
    if parametrize.is_parametrized(module) or not isinstance(module.weight, torch.nn.Parameter):
        return "its weight is computed from others at each call"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if embeds and module.max_norm is not None:
        return "its max_norm changes the weight at each call"
    weight = float_weight(module)
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.numel() == 0 or (made is nn.Int8Linear and weight.shape[1] > MAX_FEATURES):
        return f"weight of shape {tuple(weight.shape)} (at most {MAX_FEATURES} in_features, and not empty)"
    return _why_not_rounded(made, weight)


def _why_not_rounded(made: type[nn.QuantizedLinear], weight: Tensor) -> str:
    _, reason = backend_for(made.op, weight.device, weight.dtype)
    if reason:
        return reason
    if not bool(weight.isfinite().all()):
        return "its weight has NaN or infinite values"
    if made is not nn.Int8Linear and float(weight.detach().abs().max()) > LARGEST:
        return f"its weight has values above {LARGEST:g}, beyond what float16 scales stand for"
    return ""


def _dense(make: Callable[..., nn.QuantizedLinear], module: Module) -> Module:
    activation = module.activation if isinstance(module, nn.Linear) else None
    bias = module.bias
    if bias is not None and not isinstance(bias, torch.nn.Parameter):
        raise TypeError(f"fastnn.quantize_: bias of {type(module).__name__} must be a Parameter")
    return make(float_weight(module), bias, activation=activation)


def _recipe(
    made: Any,
    table: Any,
    options: Callable[[Any], dict[str, Any]],
    shared: Callable[[Any], dict[str, Any]],
    config: Config,
) -> Recipe:
    """`options` are those of the dense layer, `shared` those that a table has, too."""
    make = partial(made.from_float, **options(config))

    def quantized(module: Module) -> Module:
        with torch.no_grad():
            if isinstance(module, torch.nn.Embedding):
                layer: Module = table.from_float(float_weight(module), **shared(config))
            else:
                layer = _dense(make, module)
        return layer.train(module.training)

    method = getattr(config, "smooth", None) or getattr(config, "rounding", None)
    return Recipe(partial(_why_not, made, table, type(config).__name__), quantized, method)


def _none(config: Config) -> dict[str, Any]:
    return {}


def _group(config: Int8WeightOnly) -> dict[str, Any]:
    return {"group_size": config.group_size}


def _groups(config: Int4WeightOnly | Int4Int8Dynamic) -> dict[str, Any]:
    return {"group_size": config.group_size, "symmetric": config.symmetric}


def _int4(config: Int4WeightOnly | Int4Int8Dynamic) -> dict[str, Any]:
    return {**_groups(config), "int8_input": isinstance(config, Int4Int8Dynamic)}


register(Int8Dynamic, partial(_recipe, nn.Int8Linear, None, _none, _none))
register(Int8WeightOnly, partial(_recipe, nn.Int8WeightOnlyLinear, nn.Int8Embedding, _group, _group))
register(Int4WeightOnly, partial(_recipe, nn.Int4Linear, nn.Int4Embedding, _int4, _groups))
register(Int4Int8Dynamic, partial(_recipe, nn.Int4Linear, nn.Int4Embedding, _int4, _groups))
