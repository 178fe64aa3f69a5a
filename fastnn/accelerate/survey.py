"""What could be accelerated in a model, layer by layer: looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.nn.utils import parametrize

from .. import _dispatch, _extension
from ..nn import (
    BlockSparseLinear,
    CrossEntropyLoss,
    Int4Linear,
    Int8BlockSparseLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    LayerNorm,
    Linear,
    LogSoftmax,
    MultiheadAttention,
    QuantizedLinear,
    RMSNorm,
    Softmax,
)
from . import activations, attention
from .conv1d import is_conv1d, ours
from .fuse import LINEAR, NORMS, Pair, Reading, is_linear, read
from .fused import STATE, Fusion, fused_class, why_not_fused
from .llama import TheirRMSNorm, calls_rotary, is_their_norm, why_not_our_norm
from .report import Patch
from .residual import Summing, sums_of
from .standin import stand_in
from .trace import Fused, containers

_SWAPPED: dict[type[Module], tuple[type[Module], str]] = {
    nn.Softmax: (Softmax, "softmax"),
    nn.LogSoftmax: (LogSoftmax, "softmax"),
    nn.CrossEntropyLoss: (CrossEntropyLoss, "cross_entropy"),
    nn.MultiheadAttention: (MultiheadAttention, "attention"),
    nn.LayerNorm: (LayerNorm, "norm"),
    nn.RMSNorm: (RMSNorm, "norm"),
}
"""Layers that only change their class, and the op that runs them."""
FASTNN = (
    Linear,
    BlockSparseLinear,
    Int4Linear,
    Int8BlockSparseLinear,
    Int8Linear,
    Int8WeightOnlyLinear,
    *(ours for ours, _ in _SWAPPED.values()),
)
"""The classes that run on fastnn's kernels."""


@dataclass
class Finding:
    """One linear, softmax, norm, attention, loss or activation layer: what can be done with it, or why nothing."""

    name: str
    module: Module
    was: str
    op: str = ""
    """The op that runs it; empty for an activation."""
    backend: str = ""
    """Where the op would run; empty where it cannot."""
    patch: Patch | None = None
    """The change of the layer itself."""
    fusion: Patch | None = None
    """The change of the module whose forward calls it together with its partner."""
    activation: str | None = None
    """Key of `ACTIVATIONS`: what a linear layer is fused with, or what an activation layer computes."""
    partner: str = ""
    """What it is fused with, as the parent's forward has it."""
    where: str = ""
    """The forward in which it is fused."""
    feeder: Finding | None = None
    """Of a fused activation layer: the linear layer."""
    reason: str = ""
    """Why nothing can be done."""
    note: str = ""
    """Of a linear layer: why it is not fused."""
    block: Patch | None = None
    """Of a linear layer in a feed-forward block that runs as one op: the change of the module that calls it."""


@dataclass
class Survey:
    """A model's findings in the model's order, and the changes of parents that fuse them."""

    findings: list[Finding]
    fusions: list[Patch] = field(default_factory=list)


def backend_for(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that would run `op` there, and why there is none, in words.

    "reference" for what a kernel would run, where the extension is missing or the reference is forced.
    """
    forced = _dispatch.backend_in_force()
    asked = _dispatch.order(op, device.type) if forced in (None, "reference") else (forced,)
    reasons = [_dispatch.why_not(op, backend, device, dtype) for backend in asked]
    if "" in reasons:
        return "reference" if forced == "reference" else asked[reasons.index("")], ""
    if _extension.missing in reasons and device.type in asked and dtype in _dispatch.KERNEL_DTYPES:
        return "reference", ""
    return "", "; ".join(reasons)


def survey(model: Module, freeze: bool = False) -> Survey:
    """Looks at every module of the model once, however often it occurs."""
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    findings: dict[Module, Finding] = {}
    modules = list(model.named_modules())
    for name, module in modules:
        found = _layer(name, module, sample, freeze)
        if found is not None:
            findings[module] = found
    fusions = []
    for _, module in reversed(modules):  # inner ones first: a pair belongs to the smallest module that calls both
        if _calls(module, True):
            fusion = _look_for_pairs(module, findings)
            if fusion is not None:
                fusions.append(fusion)
    fused = {id(patch.module) for patch in fusions}
    for _, module in modules:
        if id(module) not in fused and (fusion := _sums_kept(module, findings)) is not None:
            fusions.append(fusion)
    return Survey(list(findings.values()), fusions)


def _layer(name: str, module: Module, sample: Tensor, freeze: bool) -> Finding | None:
    was = type(module).__name__
    if isinstance(module, nn.Linear):
        return _linear(Finding(name, module, was, "linear"), module, freeze)
    if isinstance(module, QuantizedLinear):
        backend, reason = backend_for(module.op, module.weight.device, sample.dtype)
        return Finding(name, module, was, module.op, backend, reason=reason or "is fastnn's already")
    if isinstance(module, BlockSparseLinear):
        backend, reason = backend_for("linear_block_sparse", module.values.device, module.values.dtype)
        return Finding(name, module, was, "linear_block_sparse", backend, reason=reason or "is fastnn's already")
    if is_conv1d(module):
        return _conv1d(Finding(name, module, was, "linear"), freeze)
    for theirs, (_, op) in _SWAPPED.items():
        if isinstance(module, theirs):
            return _swapped(Finding(name, module, was, op), sample)
    if is_their_norm(module):
        return _their_norm(Finding(name, module, was, "norm"))
    implementation = attention.implementation(module)
    if implementation is not None:
        return _transformers(Finding(name, module, was, "attention"), implementation, sample)
    if attention.generates(module):
        return _generating(Finding(name, module, was, "attention_cache"), sample)
    if type(module) is nn.TransformerEncoderLayer and attention.takes_attention(module):
        return _encoder_layer(Finding(name, module, was, "attention"), module, sample)
    activation = activations.of_module(module)
    if activation is not None:
        return Finding(name, module, was, activation=activation, reason="no linear layer is seen to feed it alone")
    if activations.is_torch_activation(module):
        return Finding(name, module, was, reason=f"no fastnn kernel for {was} yet")
    return None


def _linear(found: Finding, module: nn.Linear, freeze: bool) -> Finding:
    already = type(module) is Linear
    taken = set() if already else {"activation", "packed"} & vars(module).keys()
    if parametrize.is_parametrized(module):
        found.reason = "its parameters are computed (torch.nn.utils.parametrize)"
    elif type(module) not in LINEAR:
        found.reason = f"{type(module).__name__} is a subclass of Linear, maybe with a forward of its own"
    elif "forward" in vars(module):
        found.reason = "its forward was replaced on the instance"
    elif taken:
        found.reason = f"its attribute {min(taken)!r} would be overwritten"
    else:
        found.backend, found.reason = backend_for("linear", module.weight.device, module.weight.dtype)
    if found.reason:
        return found
    owns_weight = isinstance(module.weight, nn.Parameter)  # weight_norm's hook makes a new one at each call
    freeze = freeze and owns_weight and vars(module).get("packed") is None
    if freeze and module.weight.device.type != "cpu":
        freeze, found.note = False, f"not frozen: packed weights are for the CPU, this one is on {module.weight.device}"
    if freeze or not already:
        found.patch = Patch(module, Linear, {} if already else {"activation": None}, freeze)
    else:
        found.reason = "is fastnn's already"
    return found


def _conv1d(found: Finding, freeze: bool) -> Finding:
    module, weight = found.module, found.module.get_parameter("weight")
    found.backend, found.reason = backend_for("linear", weight.device, weight.dtype)
    already = type(module) is ours()
    freeze = freeze and vars(module).get("packed") is None and weight.device.type == "cpu"
    if "forward" in vars(module):
        found.reason = "its forward was replaced on the instance"
    elif not found.reason and (freeze or not already):
        found.patch = Patch(module, ours(), {}, freeze)
    elif not found.reason:
        found.reason = "is fastnn's already"
    return found


def _swapped(found: Finding, sample: Tensor) -> Finding:
    module = found.module
    found.backend, found.reason = backend_for(found.op, sample.device, sample.dtype)
    if type(module) in FASTNN:
        found.reason = "is fastnn's already"
    elif type(module) not in _SWAPPED:
        found.reason = f"{type(module).__name__} is a subclass of torch's, maybe with a forward of its own"
    elif "forward" in vars(module):
        found.reason = "its forward was replaced on the instance"
    elif not found.reason:
        found.patch = Patch(module, _SWAPPED[type(module)][0], {})
    return found


def _their_norm(found: Finding) -> Finding:
    module, weight = found.module, getattr(found.module, "weight", torch.empty(0))
    found.backend, found.reason = backend_for("norm", weight.device, weight.dtype)
    if isinstance(module, TheirRMSNorm):
        found.reason = "is fastnn's already"
    elif "forward" in vars(module):
        found.reason = "its forward was replaced on the instance"
    elif not found.reason:
        found.reason = why_not_our_norm(module)
        if not found.reason:
            found.patch = Patch(module, stand_in(TheirRMSNorm, type(module)), {})
    return found


def _transformers(found: Finding, implementation: str, sample: Tensor) -> Finding:
    found.backend, found.reason = backend_for("attention", sample.device, sample.dtype)
    if implementation == attention.INTERFACE:
        found.reason = "is fastnn's already"
    elif implementation != "sdpa":
        found.reason = f"its attention implementation is {implementation!r}; fastnn takes the place of 'sdpa'"
    elif not found.reason:
        rotating = calls_rotary(found.module) and bool(backend_for("rope", sample.device, sample.dtype)[0])
        found.patch = attention.transformers_patch(found.module, rotating)
        found.note = "attention interface 'fastnn'" + (" and rope" if rotating else "")
    return found


def _generating(found: Finding, sample: Tensor) -> Finding:
    found.backend, found.reason = backend_for("attention_cache", sample.device, sample.dtype)
    if not found.reason:
        found.patch = attention.cache_patch(found.module)
        found.note = "generate keeps keys and values in fastnn.KVCache"
        found.reason = "" if found.patch is not None else "is fastnn's already"
    return found


def _encoder_layer(found: Finding, layer: nn.TransformerEncoderLayer, sample: Tensor) -> Finding:
    found.backend, found.reason = backend_for("attention", sample.device, sample.dtype)
    if layer.activation_relu_or_gelu == 0:
        found.reason = "is off torch's inference fast path already"
    elif not found.reason:
        found.patch = attention.encoder_layer_patch(layer)
        found.note = "off torch's inference fast path"
    return found


def _calls(module: Module, norms: bool = False) -> bool:
    """Whether the module has a forward, and reaches a linear layer (or a norm) through containers alone."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, *LINEAR)):
        return False
    return any(is_linear(child) or (norms and type(child) in NORMS) for child in _reached(module))


def _reached(module: Module) -> Iterator[Module]:
    for owner in (module, *containers(module)):
        yield from owner.children()


def _look_for_pairs(parent: Module, findings: dict[Module, Finding]) -> Patch | None:
    """Notes what `parent`'s forward does with linear layers and norms; the change of `parent` where it fuses some."""
    reading = read(parent, parent.training)
    kind = type(parent).__name__
    where = f"{kind}.forward"
    if reading.untraced:
        for found in filter(None, map(findings.get, _reached(parent))):
            if found.op == "linear":
                found.note = found.note or f"{kind}: {reading.untraced}"
            elif not found.op and found.activation and not found.fusion and _calls(parent):
                found.reason = f"{kind}: {reading.untraced}"
        return None
    for path, follower, note in reading.notes:
        layer = findings[parent.get_submodule(path)]
        layer.note = layer.note or note
        if follower is not None:
            findings[parent.get_submodule(follower)].reason = f"after {path}: {note}"
    crossing = [pair for pair in reading.pairs if not _inside_a_container(parent, pair)]
    obstacle = "is fused already" if isinstance(parent, Fused) else why_not_fused(parent)
    patch = None
    for pair in crossing:
        layer = findings[parent.get_submodule(pair.linear)]
        act = Finding("", parent, "") if pair.act is None else findings[parent.get_submodule(pair.act)]
        if obstacle or not layer.backend:
            layer.note = obstacle
            act.reason = obstacle or f"{pair.linear}, which feeds it, is left alone"
            continue
        patch = patch or Patch(parent, fused_class(type(parent)), {STATE: Fusion()})
        layer.fusion, layer.activation, layer.partner, layer.where = patch, pair.activation, pair.written, where
        act.fusion, act.feeder, act.partner, act.where = patch, layer, pair.linear, where
    for block in reading.gated:
        layers = [findings[parent.get_submodule(path)] for path in (block.pair.linear, block.up, block.down)]
        if layers[0].fusion is not None and layers[0].fusion is patch and all(layer.backend for layer in layers):
            for layer in layers:
                layer.block = patch
                layer.note = f"in one op with {block.pair.linear}"
    for norm in [] if obstacle else _norms_of_sums(parent, reading, findings):
        patch = patch or Patch(parent, fused_class(type(parent)), {STATE: Fusion()})
        norm.fusion, norm.partner, norm.where = patch, "the sum before it", where
    return patch


def _sums_kept(parent: Module, findings: dict[Module, Finding]) -> Patch | None:
    """The change of a decoder layer whose sums go into its norms; notes which."""
    norms = [findings.get(getattr(parent, name)) for name in sums_of(parent)]
    ours = [norm for norm in norms if norm is not None and norm.fusion is None and _runs_on_ours(norm)]
    if not ours:
        return None
    patch = Patch(parent, stand_in(Summing, type(parent)), {})
    for norm in ours:
        norm.fusion, norm.partner, norm.where = patch, "the sum before it", f"{type(parent).__name__}.forward"
    return patch


def _norms_of_sums(parent: Module, reading: Reading, findings: dict[Module, Finding]) -> list[Finding]:
    """The norms that a kernel will run together with a sum; those that fastnn leaves alone are not among them."""
    return [n for n in (findings[parent.get_submodule(found.norm)] for found in reading.sums) if _runs_on_ours(n)]


def _runs_on_ours(norm: Finding) -> bool:
    return norm.patch is not None or bool(
        norm.backend and (type(norm.module) in FASTNN or isinstance(norm.module, TheirRMSNorm))
    )


def _inside_a_container(parent: Module, pair: Pair) -> bool:
    """Whether a Sequential below `parent` calls both of the pair and has fused them itself."""
    if pair.act is None:
        return False
    for i, (a, b) in enumerate(zip(pair.linear.split("."), pair.act.split("."), strict=False)):
        if a != b:
            return False
        if isinstance(parent.get_submodule(".".join(pair.linear.split(".")[: i + 1])), nn.Sequential):
            return True
    return False
