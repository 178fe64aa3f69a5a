"""Finding and fusing what one op can run, in the forward that calls all of it: a linear layer and the activation that
alone uses its result, a gated feed-forward block, a sum and the norm that alone uses it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import Module

from ..nn import LayerNorm, Linear, QuantizedLinear, RMSNorm
from ..nn.hooks import hooked, is_unchanged
from ..nn.mlp import packed_of
from ..ops.linear import ACTIVATIONS, linear_maybe_packed
from ..ops.mlp import Operands, mlp_maybe_packed
from . import activations
from .conv1d import _Conv1D, is_conv1d
from .purity import ABSENT, Guard
from .residual import TwoSummands, norm_and_sum
from .trace import Trace, containers, trace

LINEAR = (torch.nn.Linear, Linear)
"""The exact classes whose calls are fused with an activation, beside transformers' Conv1D and layers on codes."""

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm, LayerNorm, RMSNorm)
"""The exact classes whose calls are fused with the sum before them."""

_SUMS = (operator.add, torch.add)
_PRODUCTS = (operator.mul, torch.mul)


def is_linear(layer: Module) -> bool:
    """Whether calls of the layer are fused with an activation."""
    return type(layer) in LINEAR or isinstance(layer, QuantizedLinear) or is_conv1d(layer)


@dataclass(frozen=True)
class Pair:
    """A call of a linear layer and the call of an activation that alone uses its result."""

    linear: str
    """Path of the layer from the module that calls both."""
    act: str | None
    """Path of the activation module; None where it is a function."""
    activation: str
    """Key of `ACTIVATIONS`."""
    written: str
    """The activation as the code has it."""
    call: Node
    """The layer's call in the graph."""


@dataclass(frozen=True)
class Gated:
    """A feed-forward block `down(act(gate(x)) * up(x))`, each result of which has no other user."""

    pair: Pair
    """The gate and its activation."""
    up: str
    down: str
    """Paths of the other layers."""
    nodes: tuple[Node, ...]
    """The calls that the block stands for, the last first."""


@dataclass(frozen=True)
class Sum:
    """A sum of two tensors and the call of a norm that alone uses it."""

    norm: str
    """Path of the norm from the module that calls it."""
    call: Node
    """The norm's call in the graph."""


@dataclass
class Reading:
    """What one module's forward does with the linear layers and norms it calls."""

    traced: Trace | None
    untraced: str
    """Why the forward could not be read; empty where it was."""
    pairs: list[Pair] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    gated: list[Gated] = field(default_factory=list)
    """Blocks whose gates are among the pairs."""
    notes: list[tuple[str, str | None, str]] = field(default_factory=list)
    """(path of a linear layer, path of the activation module that follows, why this call is not fused)."""


def read(module: Module, training: bool) -> Reading:
    """The pairs and sums that a module's forward calls in training or evaluation, and the calls that are in none."""
    traced, reason = trace(module, training)
    found = Reading(traced, reason)
    for node in traced.graph.nodes if traced else ():
        if _is_norm_of_sum(module, node):
            found.sums.append(Sum(node.target, node))
        if node.op == "call_module" and is_linear(layer := module.get_submodule(node.target)):
            matches = [match for user in node.users if (match := _activation(module, user, node))]
            if not matches:
                found.notes.append((node.target, None, "no activation follows"))
                continue
            pair = Pair(node.target, *matches[0], node)
            note = _obstacle(module, pair, layer)
            if note:
                found.notes.append((node.target, pair.act, f"{pair.written} follows, but {note}"))
            else:
                found.pairs.append(pair)
                if block := _gated(module, pair):
                    found.gated.append(block)
    return found


def _gated(module: Module, pair: Pair) -> Gated | None:
    (act,) = pair.call.users
    product = _only_user(act)
    down = product and _only_user(product)
    if product is None or down is None or product.target not in _PRODUCTS or product.kwargs:
        return None
    if len(product.args) != 2 or not all(isinstance(factor, Node) for factor in product.args):
        return None
    up = product.args[1] if product.args[0] is act else product.args[0]
    (input,) = pair.call.all_input_nodes
    if not isinstance(up, Node) or up is act or up.all_input_nodes != [input] or down.all_input_nodes != [product]:
        return None
    for node in (up, down):
        if node.op != "call_module" or len(node.args) + len(node.kwargs) != 1 or (node is up and len(up.users) != 1):
            return None
        layer = module.get_submodule(str(node.target))
        if type(layer) not in LINEAR or hooked(layer) or getattr(layer, "activation", None) is not None:
            return None
    return Gated(pair, str(up.target), str(down.target), (down, product, up, act, pair.call))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _obstacle(module: Module, pair: Pair, layer: Module) -> str:
    node = pair.call
    if len(node.users) > 1:
        return f"the result has {len(node.users)} users"
    if len(node.args) + len(node.kwargs) != 1 or getattr(layer, "activation", None) is not None:
        return "this is not a plain call of a plain layer"
    if hooked(layer):
        return "the layer has hooks"
    if pair.act is not None and hooked(module.get_submodule(pair.act)):
        return "it has hooks"
    return ""


def _activation(module: Module, user: Node, node: Node) -> tuple[str | None, str, str] | None:
    """(path of the module or None, key of ACTIVATIONS, as written) where `user` is an activation of `node`."""
    if not user.args or user.args[0] is not node or user.all_input_nodes != [node]:
        return None
    rest, kwargs, target = user.args[1:], user.kwargs, user.target
    if user.op == "call_module":
        act = module.get_submodule(str(target))
        name = None if rest or kwargs else activations.of_module(act)
        return (str(target), name, type(act).__name__) if name else None
    if user.op == "call_method":
        name, written = activations.of_method(str(target), rest, kwargs), f".{target}()"
    else:
        name, written = activations.of_function(target, rest, kwargs), f"{getattr(target, '__name__', target)}()"
    return (None, name, written) if name else None


def _is_norm_of_sum(module: Module, node: Node) -> bool:
    if node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return False
    norm, (total,) = module.get_submodule(str(node.target)), node.args
    if type(norm) not in NORMS or hooked(norm) or len(vars(norm)["normalized_shape"]) != 1:
        return False
    if not isinstance(total, Node) or len(total.users) != 1:
        return False
    plain = total.op == "call_function" and total.target in _SUMS and not total.kwargs and len(total.args) == 2
    return plain and all(isinstance(summand, Node) for summand in total.args)


def norm_of_sum(norm: Module, input: Any, residual: Any) -> Any:
    """`norm(input + residual)` in one kernel, as long as the norm is still what it was and the summands are alike."""
    return norm_and_sum(norm, TwoSummands(input, residual))[0]


def linear_act(linear: Module, act: Module | None, activation: str, input: Tensor) -> Tensor:
    """`act(linear(input))` in one kernel, as long as both layers are still what they were and have no hooks."""
    if isinstance(linear, Linear) and is_unchanged(linear, Linear) and (act is None or not hooked(act)):
        weight = linear.weight
        packed = None if linear.packed is None else linear.packed.get(weight, linear.training)
        return linear_maybe_packed(input, weight, linear.bias, activation, packed)
    if isinstance(linear, QuantizedLinear) and is_unchanged(linear, type(linear)) and (act is None or not hooked(act)):
        return linear.run(input, activation)
    if isinstance(linear, _Conv1D) and is_unchanged(linear, type(linear)) and (act is None or not hooked(act)):
        found = linear.run(input, activation)
        if found is not None:
            return found
    return (ACTIVATIONS[activation] if act is None else act)(linear(input))


def gated_block(gate: Module, act: Module | None, activation: str, up: Module, down: Module, input: Tensor) -> Tensor:
    """`down(act(gate(input)) * up(input))` in one op, as long as the layers are what they were and have no biases."""
    if isinstance(gate, Linear) and isinstance(up, Linear) and isinstance(down, Linear):
        plain = all(is_unchanged(layer, Linear) and layer.bias is None for layer in (gate, up, down))
        if plain and (act is None or not hooked(act)):
            packed = None if gate.packed is None else packed_of(gate, up, down)
            operands = Operands(input, gate.weight, None, up.weight, down.weight, None)
            return mlp_maybe_packed("swiglu_mlp", operands, activation, False, packed)
    output: Tensor = down(linear_act(gate, act, activation, input) * up(input))
    return output


@dataclass(frozen=True)
class Plan:
    """The fused forward of one module in one mode, and what must hold for it to be used."""

    run: Callable[..., Any]
    positional: tuple[str, ...]
    """The original forward's parameters that can be given by position."""
    tensors: tuple[str, ...]
    """The parameters of `run`."""
    defaults: dict[str, Any]
    guards: tuple[Guard, ...]
    members: tuple[tuple[Module, tuple[Module, ...]], ...]
    """The module, then the containers looked through, each with its children."""

    def holds(self) -> bool:
        """Whether the attributes and child modules that the trace took for granted are the same objects."""
        for module, key, value in self.guards:
            if vars(module).get(key, ABSENT) is not value:
                return False
        for container, children in self.members:
            if tuple(vars(container)["_modules"].values()) != children:
                return False
        return not any(hooked(container) for container, _ in self.members[1:])

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The call's tensors in the order of `run`, or None where the call is not the one that was traced."""
        found = list(args)
        if kwargs or len(args) != len(self.tensors) or self.positional[: len(args)] != self.tensors:
            given = dict(zip(self.positional, args, strict=False))
            if len(args) > len(given) or given.keys() & kwargs.keys():
                return None
            given.update(kwargs)
            found = [given.pop(name, None) for name in self.tensors]
            for name, value in given.items():
                if value is not self.defaults.get(name, ABSENT):
                    return None
        for value in found:
            if not isinstance(value, Tensor):
                return None
        return found


def make_plan(module: Module, training: bool) -> Plan | None:
    """The module's forward with each pair and sum in one call; None where there are none in this mode."""
    reading = read(module, training)
    if reading.traced is None or not (reading.pairs or reading.sums):
        return None
    graph, guards = reading.traced.graph, list(reading.traced.guards)
    blocks = {id(block.pair): block for block in reading.gated}
    for pair in reading.pairs:
        if id(pair) in blocks:
            _rewrite_gated(graph, blocks[id(pair)])
        else:
            _rewrite(graph, pair)
        if pair.act is not None:  # the likes of nn.GELU.approximate
            act = module.get_submodule(pair.act)
            guards += [
                Guard(act, key, value) for key, value in vars(act).items() if key[0] != "_" and key != "training"
            ]
    for found in reading.sums:
        _rewrite_sum(graph, found)
    written = graph.python_code("self")
    scope = dict(written.globals)
    exec(compile(written.src, f"<{type(module).__name__}.forward, fused by fastnn>", "exec"), scope)
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    members = tuple((m, tuple(vars(m)["_modules"].values())) for m in (module, *containers(module)))
    return Plan(scope["forward"], positional, reading.traced.tensors, reading.traced.defaults, tuple(guards), members)


def _rewrite(graph: torch.fx.Graph, pair: Pair) -> None:
    (user,) = pair.call.users
    (input,) = (*pair.call.args, *pair.call.kwargs.values())
    with graph.inserting_before(user):
        layer = graph.get_attr(pair.linear)
        act = None if pair.act is None else graph.get_attr(pair.act)
        fused = graph.call_function(linear_act, (layer, act, pair.activation, input))
    user.replace_all_uses_with(fused)
    graph.erase_node(user)
    graph.erase_node(pair.call)


def _rewrite_gated(graph: torch.fx.Graph, block: Gated) -> None:
    down, pair = block.nodes[0], block.pair
    (input,) = pair.call.all_input_nodes
    with graph.inserting_before(down):
        gate, up, last = (graph.get_attr(path) for path in (pair.linear, block.up, block.down))
        act = None if pair.act is None else graph.get_attr(pair.act)
        fused = graph.call_function(gated_block, (gate, act, pair.activation, up, last, input))
    down.replace_all_uses_with(fused)
    for node in block.nodes:
        graph.erase_node(node)


def _rewrite_sum(graph: torch.fx.Graph, found: Sum) -> None:
    (total,) = found.call.all_input_nodes
    with graph.inserting_before(found.call):
        norm = graph.get_attr(found.norm)
        fused = graph.call_function(norm_of_sum, (norm, *total.args))
    found.call.replace_all_uses_with(fused)
    graph.erase_node(found.call)
    graph.erase_node(total)
