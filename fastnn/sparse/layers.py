"""The layers of a model that is made sparse: which are taken, what becomes of each, and the change itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import parametrize

from .. import nn
from ..accelerate.survey import backend_for
from ..ops.block_sparse import OP
from ..ops.block_sparse_int8 import OP as CODES_OP
from ..ops.linear_int8 import MAX_FEATURES
from ..quant.casts import why_no_codes
from ..quant.encoder import mind_fast_path
from ..quant.linear import is_conv1d
from ..quant.measure import medians
from ..selection import FilterFn, Patterns, left_out, matching
from .breakeven import packed_dense
from .config import Sparsify, configs_of
from .convert import become
from .masks import add_mask, mask_of, masked_weight, parameter_of, strip
from .report import Entry
from .select import in_blocks, input_energy, kept_units, of_weights, worth

Made = nn.BlockSparseLinear | nn.Int8BlockSparseLinear


@dataclass
class Layer:
    """One layer of the model, and what is to become of it."""

    name: str
    module: Module
    config: Sparsify | None = None
    reason: str = ""
    """Why it is left alone."""
    elsewhere: str = ""
    """Path of a parameter that is its weight, too, but no layer's."""
    remarks: list[str] = field(default_factory=list)
    kept: Tensor | None = None
    """Which of its units stay; None where they were not looked at."""
    made: Made | None = None
    became: str = ""
    permanent: bool = False
    """Whether single weights become plain zeros, without a mask."""
    input: Tensor | None = None
    times: tuple[float, ...] | None = None
    """Milliseconds as it is, of a packed dense layer, and of what it is to become."""
    tied: list[Layer] = field(default_factory=list)
    """The layers that share its weight and are treated alike, itself included, in the model's order."""

    @property
    def wanted(self) -> Sparsify:
        """The configuration, where there is one."""
        if self.config is None:
            raise ValueError("fastnn.sparsify_: a layer was chosen without a configuration")
        return self.config

    def turned(self, weight: Tensor) -> Tensor:
        """What is laid out as the layer's weight, as (out_features, in_features); and back."""
        return weight.t() if is_conv1d(self.module) else weight

    def alive(self) -> Tensor | None:
        """What a mask leaves of the weight (out_features, in_features); None where there is no mask."""
        mask = mask_of(self.module)
        return None if mask is None else self.turned(mask)


def layers_of(model: Module, config: object) -> list[Layer]:
    """Every module with a weight of two or more dimensions, with what the configuration says of it."""
    configs = configs_of(config)
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.BlockSparseLinear) or (isinstance(weight, Tensor) and weight.dim() >= 2):
            one = next((one for pattern, one in configs if fnmatchcase(name, pattern)), None)
            found.append(Layer(name, module, one))
    named = tuple(pattern for pattern, _ in configs if pattern != "*")
    matching("sparsify_", "config", named, [layer.name for layer in found])
    weights = {id(parameter_of(layer.module)): layer for layer in found}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        if id(parameter) in weights and parameter is not parameter_of(owner):
            weights[id(parameter)].elsewhere = name
    return found


def choose(layers: list[Layer], filter_fn: FilterFn | None, include: Patterns, exclude: Patterns) -> None:
    """Notes of each layer why it is left alone, where it is."""
    paths = [layer.name for layer in layers]
    wanted, unwanted = (matching("sparsify_", *given, paths) for given in (("include", include), ("exclude", exclude)))
    for layer in layers:
        if layer.config is None:
            layer.reason = "no pattern of the configuration matches, or it says None"
        else:
            layer.reason = _why_not(layer.module, layer.config) or left_out(
                layer.name, layer.module, filter_fn, wanted, unwanted
            )
    _tie(layers, bool(include))


def _why_not(module: Module, config: Sparsify) -> str:
    kind = type(module).__name__
    if isinstance(module, Made):
        return "is block-sparse already"
    if isinstance(module, nn.QuantizedModule):
        return "is quantised: make it sparse first"
    if not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
        return f"Sparsify takes no {kind}"
    parameter, bias = parameter_of(module), getattr(module, "bias", None)
    if parametrize.is_parametrized(module) or parameter is None:
        return "its weight is computed from others at each call"
    if type(module) not in (torch.nn.Linear, nn.Linear) and not is_conv1d(module):
        return f"{kind} is a subclass of Linear, maybe with a forward of its own"
    if config.unit == "block" and bias is not None and not isinstance(bias, Parameter):
        return "its bias is computed from others at each call"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parameter.is_meta or parameter.numel() == 0 or not parameter.dtype.is_floating_point:
        return f"its weight is {parameter.dtype} of shape {tuple(parameter.shape)} on {parameter.device}"
    if config.unit == "block":
        op = OP if config.values == "float" else CODES_OP
        _, reason = backend_for(op, parameter.device, parameter.dtype)
        if reason:
            return reason
    if config.values == "int8":
        features = parameter.shape[0 if is_conv1d(module) else 1]
        if features > MAX_FEATURES:
            return f"sums of {features} products of codes may not fit 32 bits"
    return "" if bool(parameter.isfinite().all()) else "its weight has NaN or infinite values"


def _tie(layers: list[Layer], named: bool) -> None:
    """Finds the layers that share a weight; those whose weight another keeps are left alone, unless they are named.

    Raises ValueError where they are to be treated differently.
    """
    by_weight: dict[int, list[Layer]] = {}
    for layer in layers:
        parameter = parameter_of(layer.module)
        by_weight.setdefault(id(layer if parameter is None else parameter), []).append(layer)
    for group in by_weight.values():
        keeping = [layer.name or "the model" for layer in group if layer.reason]
        keeping += [layer.elsewhere for layer in group if layer.elsewhere]
        chosen = [layer for layer in group if not layer.reason]
        for layer in chosen:
            first = chosen[0]
            if layer.config != first.config:
                raise ValueError(
                    f"fastnn.sparsify_: {first.name} and {layer.name} share a weight, but not a configuration"
                )
            if not _alike(first, layer):
                first.reason = layer.reason = f"{first.name} and {layer.name} share a weight, transposed or masked"
            elif keeping and not named:
                layer.reason = f"shares its weight with {keeping[0]}, which keeps it; name it in `include` to untie it"
            elif keeping:
                layer.remarks.append(f"no longer tied to {keeping[0]}, which keeps the weight")
        for layer in chosen:
            layer.reason = layer.reason or chosen[0].reason
            layer.tied = chosen


def _alike(a: Layer, b: Layer) -> bool:
    """Whether the weight that they share is the same in both."""
    first, second = mask_of(a.module), mask_of(b.module)
    if first is None or second is None:
        same = first is second
    else:
        same = torch.equal(first, second)
    return same and is_conv1d(a.module) == is_conv1d(b.module)


def decide(model: Module, layers: Sequence[Layer], calibration: Iterable[Any] | None) -> None:
    """Says of each layer that is not left alone which of its units stay.

    Raises:
        ValueError: an amount that leaves nothing; a calibration missing, asked for by nothing, or without inputs.
    """
    energies = _energies(model, layers, calibration)
    by_config: dict[Sparsify, dict[str, Tensor]] = {}
    for layer in layers:
        if not layer.reason and layer is layer.tied[0]:
            weight, energy = layer.turned(masked_weight(layer.module)), energies.get(layer.module)
            of_same = by_config.setdefault(layer.wanted, {})
            of_same[layer.name] = worth(layer.wanted, weight, layer.alive(), energy)
    kept: dict[str, Tensor] = {}
    for config, worths in by_config.items():
        kept |= kept_units(config, worths)
    for layer in layers:
        if not layer.reason:
            layer.kept = kept[layer.tied[0].name]
            if bool(layer.kept.all()):
                layer.reason = "the amount takes nothing of it"


def _energies(model: Module, layers: Sequence[Layer], calibration: Iterable[Any] | None) -> dict[Module, Tensor]:
    """Those of the inputs of layers that are judged by them, of all that share a weight together."""
    asked = any(layer.config is not None and layer.config.importance == "wanda" for layer in layers)
    if asked != (calibration is not None):
        missing = 'importance="wanda" needs calibration='
        raise ValueError(
            f"fastnn.sparsify_: {missing if asked else 'nothing in the configuration asks for calibration'}"
        )
    asking = [layer for layer in layers if not layer.reason and layer.wanted.importance == "wanda"]
    if calibration is None or not asking:
        return {}
    seen = input_energy(model, [layer.module for layer in asking], calibration)
    found: dict[Module, Tensor] = {}
    for layer in asking:
        every = [seen[one.module] for one in layer.tied if one.module in seen]
        if not every:
            layer.reason = "not run by the calibration"
            continue
        found[layer.module] = total = torch.stack(every).sum(0)
        if not bool(total.isfinite().all()):
            layer.reason = "its inputs on the calibration have NaN or infinities"
    return found


def prepare(layers: Sequence[Layer]) -> None:
    """Makes what layers are to become; the values of tied ones are the same parameter."""
    run = any(layer.input is not None for layer in layers)
    for layer in layers:
        if layer.reason or layer.kept is None:
            continue
        if layer.wanted.unit == "weight":
            kind = type(layer.module).__name__
            layer.became = f"{kind}, zeros" if layer.permanent else f"{kind}, masked"
            layer.remarks.append("zeros in a dense weight: no faster, no smaller")
            if not layer.permanent and getattr(layer.module, "packed", None) is not None:
                layer.remarks.append("packed anew at each call until fastnn.strip_")
            continue
        layer.made = _block_sparse(layer, layer.kept)
        layer.became = type(layer.made).__name__
        if layer.input is None:
            layer.remarks.append("not run by the example" if run else "speed not measured: no example_inputs")


@torch.no_grad()
def _block_sparse(layer: Layer, kept: Tensor) -> Made:
    module, alive, depth = layer.module, layer.alive(), layer.wanted.depth
    weight, bias = layer.turned(masked_weight(module)), module.bias
    if bias is not None and not isinstance(bias, Parameter):
        raise TypeError(f"fastnn.sparsify_: bias of {type(module).__name__} must be a Parameter")
    activation = module.activation if isinstance(module, nn.Linear) else None
    kind = nn.BlockSparseLinear if layer.wanted.values == "float" else nn.Int8BlockSparseLinear
    made: Made = kind.from_dense(weight, bias, kept, depth=depth, activation=activation)
    first, parameter = layer.tied[0].made, parameter_of(module)
    if first is not None:
        for name in ("values", "weight", "weight_scale", "columns", "starts"):
            if hasattr(first, name):
                setattr(made, name, getattr(first, name))
    elif parameter is not None and isinstance(made, nn.BlockSparseLinear):
        made.values.requires_grad_(parameter.requires_grad)
    if alive is not None:
        inside = int((in_blocks(~alive, depth) & kept[:, None, :, None]).sum())
        if inside:
            then = ", and may train" if isinstance(made, nn.BlockSparseLinear) else ""
            layer.remarks.append(f"{inside} weights that a mask had taken are zeros of blocks that stay{then}")
    return made.train(module.training)


def mind_readers(model: Module, layers: Sequence[Layer]) -> None:
    """Leaves layers alone whose input would be converted to the type of their codes, tied ones all or none."""
    for layer in layers:
        if isinstance(layer.made, nn.QuantizedModule) and (reason := why_no_codes(model, layer.name, layer.made)):
            for one in layer.tied:
                one.reason = reason


def measure(layers: Sequence[Layer], max_slowdown: float) -> None:
    """Times each kind of block-sparse layer once; those that would be slower are left alone, tied ones all or none."""
    known: dict[tuple[Any, ...], tuple[float, ...]] = {}
    for layer in layers:
        if layer.made is None or layer.input is None or layer.reason:
            continue
        key = _signature(layer, layer.made, layer.input)
        if key not in known:
            weight, made = layer.turned(masked_weight(layer.module)), layer.made
            dense = packed_dense(weight, made.bias, made.activation)
            known[key] = medians((layer.module.forward, dense.forward, made.forward), layer.input)
        layer.times = known[key]
    for layer in layers:
        timed = [one.times for one in layer.tied if one.times is not None]
        if not timed or layer.reason:
            continue
        before, packed, after = (sum(times) for times in zip(*timed, strict=True))
        if after / before > max_slowdown:
            layer.reason = f"would take {after / before:.2f} times as long, more than max_slowdown = {max_slowdown:g}"
        elif after > packed:
            layer.remarks.append("fastnn's packed dense layer is faster")


def _signature(layer: Layer, made: Made, input: Tensor) -> tuple[Any, ...]:
    packed = getattr(layer.module, "packed", None) is not None
    form = type(layer.module), packed, made.in_features, made.out_features, made.blocks, made.depth, made.activation
    weight = masked_weight(layer.module).dtype
    return (*form, type(made), made.bias is None, weight, input.shape, input.dtype, input.stride())


def entries_of(layers: Sequence[Layer]) -> tuple[Entry, ...]:
    """The report, before anything is changed."""
    counted: set[int] = set()
    found = []
    for layer in layers:
        before, done = _bytes(layer.module, counted), layer.became and not layer.reason
        if done and layer.made is not None:
            after = _bytes(layer.made, counted)
        else:
            mask, parameter = layer.module._buffers.get("weight_mask"), parameter_of(layer.module)
            after = before - (mask.nbytes if mask is not None and (done or layer.permanent) else 0)
            after += parameter.nbytes if parameter is not None and done and not layer.permanent else 0  # a mask's
        ms_before, ms_packed, ms_after = layer.times or (None, None, None)
        found.append(
            Entry(
                name=layer.name,
                was=type(layer.module).__name__,
                became=layer.became if done else None,
                reason=layer.reason or "; ".join(layer.remarks),
                units=0 if layer.kept is None else layer.kept.numel(),
                kept=0 if layer.kept is None else int(layer.kept.sum()),
                bytes_before=before,
                bytes_after=after,
                input_shape=None if layer.input is None else tuple(layer.input.shape),
                ms_before=ms_before,
                ms_packed=ms_packed,
                ms_after=ms_after,
            )
        )
    return tuple(found)


def _bytes(module: Module, counted: set[int]) -> int:
    """Of the weight, and of what is beside it, where it has not been counted yet."""
    held: list[Any] = [parameter_of(module), module._buffers.get("weight_mask")]
    if isinstance(module, nn.BlockSparseLinear):
        held = [module.values, module.columns, module.starts]
    elif isinstance(module, nn.QuantizedModule):
        held = list(module._buffers.values())
    total = 0
    for tensor in held:
        if isinstance(tensor, Tensor) and id(tensor) not in counted:
            counted.add(id(tensor))
            total += tensor.nbytes
    return total


def commit(model: Module, layers: Sequence[Layer]) -> None:
    """The change itself."""
    permanent = []
    for layer in layers:
        if layer.reason or layer.kept is None:
            continue
        if layer.made is not None:
            become(layer.module, layer.made)
        else:
            shape = layer.turned(masked_weight(layer.module)).shape
            add_mask(layer.module, layer.turned(of_weights(layer.kept, layer.wanted, shape)))
            permanent += [layer.module] if layer.permanent else []
    strip(model, permanent)
    mind_fast_path(model)
