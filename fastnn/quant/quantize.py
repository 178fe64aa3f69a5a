"""Quantising a model in place, layer by layer, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import nn
from ..accelerate.isolate import check_model
from ..selection import FilterFn, Patterns, left_out, matching
from .calibration import Calibration, Outcome, Target, calibrate
from .casts import why_no_codes
from .config import Recipe, recipes_of
from .encoder import mind_fast_path
from .linear import is_conv1d  # and registers its recipes
from .measure import Times, compare, first_inputs
from .report import Entry, Report


@dataclass(frozen=True)
class Origin:
    """What a quantised layer was: enough to make it that again."""

    kind: type[Module]
    dtype: torch.dtype
    requires_grad: bool
    attributes: dict[str, Any]
    """Those that were overwritten; others that quantising added go again."""
    added: tuple[str, ...]


@dataclass
class _Layer:
    """One layer of the model, and what is to become of it."""

    name: str
    module: Module
    recipe: Recipe | None = None
    reason: str = ""
    """Why it is left alone."""
    remark: str = ""
    made: Module | None = None
    input: Tensor | None = None
    times: Times | None = None
    error: float | None = None
    nearest: float | None = None
    tied: list[_Layer] = field(default_factory=list)
    """The layers that share its weight, itself included, in the model's order."""


@torch.no_grad()
def quantize_(
    model: Module,
    config: object,
    filter_fn: FilterFn | None = None,
    *,
    include: Patterns = (),
    exclude: Patterns = (),
    example_inputs: Any = None,
    max_slowdown: float = 1.0,
    calibration: Iterable[Any] | Calibration | None = None,
) -> Report:
    """Quantises the model's layers in place and says of each what became of it, or why nothing did.

    Modules stay the same objects, with their hooks and their bias; their class changes, and their weight becomes a
    buffer of codes and one of scales. Layers that shared a weight share the codes. deepcopy, pickle and state_dict
    work; gradients flow through to the rest of the model. Quantise before an optimizer takes the parameters.

    Args:
        model: any module; it may be a layer itself.
        config: what to: `fastnn.Int8Dynamic()`, `Int8WeightOnly()`, `Int4WeightOnly()` or `Int4Int8Dynamic()`; or a
            mapping of patterns of paths (as in `include`) to configurations, or None, of which the first that matches
            a layer holds for it. All take torch's and fastnn's Linear and Hugging Face's Conv1D; all but Int8Dynamic
            take torch's Embedding.
        filter_fn: called with each layer and its path; False leaves it alone.
        include: patterns of paths (`*`, `?`, as in fnmatch), at least one of which must match, where any are given. A
            layer whose weight some other layer keeps needs them too (see below).
        exclude: patterns of which none may match.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. The model is run on them
            once, leaving it as it was, and each layer is measured before and after on inputs of the shapes it got.
        max_slowdown: a layer that would take more than so many times as long is left alone.
        calibration: samples, each as `example_inputs`, for configurations with `rounding` or `smooth`: the model is run
            on them, in evaluation mode, leaving it as it was, one block at a time where it has a list of blocks. A
            `fastnn.Calibration` for more options. Layers that share their codes are rounded to nearest.

    Returns:
        The report. A layer is left alone, with the reason, where it cannot be quantised, is not chosen, or would be
        slower; also one that shares its weight with a layer that stays as it is (a tied embedding), unless `include`
        names it: its weight would not become smaller but another copy.

    Raises:
        TypeError: `model` is no module, `config` no configuration.
        ValueError: a pattern that matches no layer, `max_slowdown` not above zero, a calibration that is missing, or
            that nothing asks for, or without inputs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU())
        >>> len(fastnn.quantize_(model, fastnn.Int8Dynamic()).quantized)
        1
    """
    check_model("quantize_", model)
    if not max_slowdown > 0:
        raise ValueError(f"fastnn.quantize_: max_slowdown must be above 0, got {max_slowdown}")
    layers = list(_layers(model))
    recipes = recipes_of(config)
    asked = any(recipe is not None and recipe.method is not None for _, recipe in recipes)
    if asked != (calibration is not None):
        missing = "the configuration's rounding or smooth needs calibration="
        raise ValueError(
            f"fastnn.quantize_: {missing if asked else 'nothing in the configuration asks for calibration'}"
        )
    paths = [layer.name for layer in layers]
    matching("quantize_", "config", tuple(pattern for pattern, _ in recipes if pattern != "*"), paths)
    for layer in layers:
        layer.recipe = next((recipe for pattern, recipe in recipes if fnmatchcase(layer.name, pattern)), None)
    wanted, unwanted = (matching("quantize_", *given, paths) for given in (("include", include), ("exclude", exclude)))
    chosen = _choose(layers, filter_fn, wanted, unwanted)
    if example_inputs is not None:
        inputs = first_inputs(model, [layer.module for layer in chosen], example_inputs)
        for layer in chosen:
            layer.input = inputs.get(layer.module)
    for layer in chosen:
        _prepare(layer)
    _mind_readers(model, chosen)
    chosen = [layer for layer in chosen if not layer.reason]
    _measure([layer for layer in chosen if layer.input is not None], max_slowdown)
    text = repr(dict(config) if isinstance(config, Mapping) else config)
    found = None if calibration is None else _calibrate(model, chosen, calibration, text)
    entries = tuple(_entries(layers))
    for change in found.changes if found is not None else ():
        change.commit()
    for layer in chosen:
        if layer.made is not None and not layer.reason:
            become(layer.module, layer.made)
    mind_fast_path(model)
    return Report(entries, text, "" if found is None else found.text)


def _layers(model: Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() >= 2:
            yield _Layer(name, module)


def _choose(
    layers: list[_Layer], filter_fn: FilterFn | None, include: Sequence[str], exclude: Sequence[str]
) -> list[_Layer]:
    """Notes of each layer why it is left alone; the others."""
    for layer in layers:
        if layer.recipe is None:
            layer.reason = "no pattern of the configuration matches, or it says None"
        else:
            layer.reason = layer.recipe.why_not(layer.module) or left_out(
                layer.name, layer.module, filter_fn, include, exclude
            )
    _tie(layers, bool(include))
    return [layer for layer in layers if not layer.reason]


def _tie(layers: list[_Layer], named: bool) -> None:
    """Finds the layers that share a weight; those whose weight another keeps are left alone, unless they are named."""
    by_weight: dict[int, list[_Layer]] = {}
    for layer in layers:
        by_weight.setdefault(id(layer.module.weight), []).append(layer)
    for group in by_weight.values():
        keeping = [layer for layer in group if layer.reason]
        for layer in group:
            layer.tied = [other for other in group if not other.reason]
        for layer in [] if not keeping else [one for one in group if not one.reason]:
            other = keeping[0].name or "the model"
            if named:
                layer.remark = f"no longer tied to {other}, which keeps the weight"
            else:
                layer.reason = f"shares its weight with {other}, which keeps it; name it in `include` to untie it"


def _prepare(layer: _Layer) -> None:
    """Makes the quantised layer; the codes of tied ones are the same tensors, an embedding's and its head's, too."""
    if layer.recipe is None:
        raise ValueError("fastnn.quantize_: a layer was chosen without a configuration")
    layer.made = made = layer.recipe.quantized(layer.module)
    first = layer.tied[0]
    if first is layer or first.made is None or is_conv1d(layer.module) != is_conv1d(first.module):
        return
    if isinstance(made, nn.QuantizedModule) and made.shares_codes_with(first.made):
        for name, buffer in first.made.named_buffers(recurse=False):
            setattr(made, name, buffer)


def _mind_readers(model: Module, chosen: list[_Layer]) -> None:
    """Leaves layers alone whose input would be converted to the type of their codes, tied ones all or none."""
    for layer in chosen:
        reason = why_no_codes(model, layer.name, layer.made) if isinstance(layer.made, nn.QuantizedModule) else ""
        for one in layer.tied if reason else ():
            one.reason = reason


def _calibrate(model: Module, chosen: list[_Layer], calibration: Any, config: str) -> Outcome:
    """Lets a calibration decide on the dense layers that have codes of their own, and ask for it."""
    targets: dict[Module, Target] = {}
    ready: dict[Module, Module] = {}
    for layer in chosen:
        if layer.reason or layer.made is None or layer.recipe is None:
            continue
        method, made = layer.recipe.method, layer.made
        if method is None or not isinstance(made, nn.QuantizedLinear):
            ready[layer.module] = made
        elif len(layer.tied) > 1:
            ready[layer.module], layer.remark = made, "rounded to nearest: other layers share its codes"
        else:
            targets[layer.module] = Target(layer.name, layer.module, method, layer.recipe.quantized, made)
    given = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
    found = calibrate(model, list(targets.values()), ready, given, config)
    for layer in chosen:
        target = targets.get(layer.module)
        if target is not None:
            layer.made, layer.error, layer.nearest = target.made, target.error, target.nearest
            layer.remark = "; ".join(filter(None, [layer.remark, target.remark]))
    return found


def _signature(layer: _Layer, input: Tensor) -> tuple[Any, ...]:
    module = layer.module
    bias, activation = getattr(module, "bias", None), getattr(module, "activation", None)
    weight: Any = module.weight
    return type(module), weight.shape, weight.dtype, bias is None, activation, input.shape, input.dtype, input.stride()


def _measure(layers: list[_Layer], max_slowdown: float) -> None:
    """Times each kind of layer once; those that would be slower are left alone, tied ones all or none."""
    known: dict[tuple[Any, ...], Times] = {}
    for layer in layers:
        if layer.made is None or layer.input is None:
            continue
        key = _signature(layer, layer.input)
        if key not in known:
            known[key] = compare(layer.module, layer.made, layer.input)
        layer.times = known[key]
    for layer in layers:
        timed = [one.times for one in layer.tied if one.times is not None]
        slowdown = sum(t.after for t in timed) / sum(t.before for t in timed)
        if slowdown > max_slowdown:
            for one in layer.tied:
                one.reason = f"would take {slowdown:.2f} times as long, more than max_slowdown = {max_slowdown:g}"


def _entries(layers: list[_Layer]) -> list[Entry]:
    """The report, before anything is changed."""
    counted: set[int] = set()
    found = []
    for layer in layers:
        weight = layer.module.weight
        done = layer.made is not None and not layer.reason
        before = after = 0 if id(weight) in counted else _nbytes(layer.module)
        if done and layer.made is not None:
            codes = id(layer.made.weight)
            after = 0 if codes in counted else _nbytes(layer.made)
            counted.add(codes)
        counted.add(id(weight))
        remark = layer.reason or layer.remark
        if done and layer.input is None and any(one.input is not None for one in layers):
            remark = "; ".join(filter(None, [remark, "not run by the example"]))
        times = layer.times
        found.append(
            Entry(
                name=layer.name,
                was=type(layer.module).__name__,
                became=type(layer.made).__name__ if done else None,
                reason=remark,
                bytes_before=before,
                bytes_after=after,
                input_shape=None if layer.input is None else tuple(layer.input.shape),
                ms_before=None if times is None else times.before,
                ms_after=None if times is None else times.after,
                error=layer.error,
                error_nearest=layer.nearest,
            )
        )
    return found


def _nbytes(module: Module) -> int:
    if isinstance(module, nn.QuantizedModule):
        return module.code_bytes
    weight = module.weight
    return weight.numel() * weight.element_size() if isinstance(weight, Tensor) else 0


def become(module: Module, made: Module) -> None:
    """Gives `module` the class, buffers and attributes of `made`; its hooks, bias and name stay."""
    weight, state = module._parameters.pop("weight"), vars(module)
    if weight is None:
        raise ValueError("fastnn.quantize_: a layer lost its weight meanwhile")
    every = vars(Module()).keys()
    new = {name: value for name, value in vars(made).items() if name not in every}
    old = {name: state[name] for name in new if name in state}
    packed = old.get("packed")
    if packed is not None:
        packed.drop()
    origin = Origin(type(module), weight.dtype, weight.requires_grad, old, tuple(new.keys() - old.keys()))
    module._buffers.update(made._buffers)
    state.update(new, _quantized_from=origin)
    module.__class__ = type(made)


def dequantize_(model: Module) -> tuple[str, ...]:
    """Gives the layers that `quantize_` changed a floating weight again, the one that their codes stand for, in place.

    Classes, types and the wish for a gradient are those from before; layers that shared codes share the weight. A
    layer that was made as such becomes a `fastnn.nn.Linear` with a float32 weight, or one of its bias's type, or a
    `torch.nn.Embedding`.

    Returns:
        The paths of the layers.

    Raises:
        TypeError: `model` is no module.
    """
    check_model("dequantize_", model)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.QuantizedModule)]
    shared: dict[tuple[int, bool], torch.nn.Parameter] = {}
    for _, layer in found:
        origin: Origin = vars(layer).pop("_quantized_from", None) or _origin(layer)
        transposed = not issubclass(origin.kind, (torch.nn.Linear, torch.nn.Embedding))
        key = id(layer.weight), transposed
        if key not in shared:
            weight = layer.dequantized(origin.dtype)
            shared[key] = torch.nn.Parameter(weight.t().contiguous() if transposed else weight, origin.requires_grad)
        _revert(layer, origin, shared[key])
    mind_fast_path(model)
    return tuple(name for name, _ in found)


def _origin(layer: nn.QuantizedModule) -> Origin:
    """Of one that was made as such."""
    if isinstance(layer, nn.GroupwiseEmbedding):
        blank = torch.nn.Embedding(0, 0)
        plain = {name: vars(blank)[name] for name in vars(blank).keys() - vars(torch.nn.Module()).keys()}
        kept = {name: getattr(layer, name) for name in ("num_embeddings", "embedding_dim")}
        added: tuple[str, ...] = ("in_features", "out_features", "group_size", "symmetric", "dtype")
        return Origin(torch.nn.Embedding, layer.dtype, True, {**plain, **kept}, added)
    bias = layer._parameters.get("bias")
    added = ("packed", "group_size", "symmetric", "int8_input")
    return Origin(nn.Linear, torch.float32 if bias is None else bias.dtype, True, {}, added)


def _revert(layer: nn.QuantizedModule, origin: Origin, weight: torch.nn.Parameter) -> None:
    state = vars(layer)
    for name in ("weight", *layer.scale_buffers):
        layer._buffers.pop(name, None)
    for name in origin.added:
        state.pop(name, None)
    state.update(origin.attributes)
    module: Module = layer
    module.__class__ = origin.kind
    others = dict(layer._parameters)  # the bias, where the class has one
    layer._parameters.clear()
    layer._parameters.update(weight=weight, **others)
