"""Feed-forward blocks, and the projection of queries, keys and values as one layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module

from ..ops.activation import ACTIVATIONS, _glu
from ..ops.mlp import MlpActivation, Operands, Packed, mlp_maybe_packed
from .hooks import is_unchanged
from .linear import Linear


def packed_of(*layers: Linear | None) -> Packed | None:
    """The packed copies of a block's layers, where each of them is frozen and its copy may be used."""
    copies = [
        None if layer is None or layer.packed is None else layer.packed.get(layer.weight, layer.training)
        for layer in layers
    ]
    if any(copy is None and layer is not None for copy, layer in zip(copies, layers, strict=True)):
        return None
    return cast(Packed, tuple(copies))


def _check_activation(name: str, activation: object) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = ", ".join(repr(key) for key in ACTIVATIONS if key)
        raise ValueError(f"fastnn.nn.{name}: activation must be one of {known}; got {activation!r}")


class MLP(Module):
    """`fc2(activation(fc1(input)))` as one op, `fastnn.mlp`.

    Where a layer was replaced (quantised, say) or has hooks, the layers run one by one.

    Args:
        in_features: size of the input's last dimension.
        hidden_features: size between the layers.
        out_features: size of the output's last dimension; `in_features` where it is None.
        activation: as `fastnn.mlp`.
        bias: whether both layers have one.
        recompute: as `fastnn.mlp`.
        device: where the parameters live.
        dtype: their type.
    """

    fc1: Linear
    fc2: Linear

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: MlpActivation = "gelu",
        bias: bool = True,
        *,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation("MLP", activation)
        self.fc1 = Linear(in_features, hidden_features, bias, device, dtype)
        self.fc2 = Linear(hidden_features, in_features if out_features is None else out_features, bias, device, dtype)
        self.activation, self.recompute = activation, recompute

    def freeze(self) -> MLP:
        """Lets the layers keep packed copies of their weights, as `fastnn.nn.Linear.freeze`."""
        for layer in (self.fc1, self.fc2):
            layer.freeze()
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Input (*, in_features), result (*, out_features)."""
        fc1, fc2 = self.fc1, self.fc2
        if not (is_unchanged(fc1, Linear) and is_unchanged(fc2, Linear)):
            output: Tensor = fc2(ACTIVATIONS[self.activation](fc1(input)))
            return output
        operands = Operands(input, fc1.weight, fc1.bias, None, fc2.weight, fc2.bias)
        packed = None if fc1.packed is None else packed_of(fc1, None, fc2)
        return mlp_maybe_packed("mlp", operands, self.activation, self.recompute, packed)

    def extra_repr(self) -> str:
        """The constructor's arguments that the layers do not show."""
        return f"activation={self.activation!r}, recompute={self.recompute}"


class SwiGLU(Module):
    """`down_proj(activation(gate_proj(input)) * up_proj(input))` as one op, `fastnn.swiglu_mlp`; no biases.

    The layers have the names that Llama gives them. Replaced or hooked ones as in `MLP`.

    Args:
        in_features: size of the input's and, unless `out_features` is given, the output's last dimension.
        hidden_features: size of the middle.
        out_features: size of the output's last dimension.
        activation: of the gate, as `fastnn.mlp`.
        recompute: as `fastnn.mlp`.
        device: where the parameters live.
        dtype: their type.
    """

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: MlpActivation = "silu",
        *,
        recompute: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation("SwiGLU", activation)
        out = in_features if out_features is None else out_features
        self.gate_proj = Linear(in_features, hidden_features, False, device, dtype)
        self.up_proj = Linear(in_features, hidden_features, False, device, dtype)
        self.down_proj = Linear(hidden_features, out, False, device, dtype)
        self.activation, self.recompute = activation, recompute

    def freeze(self) -> SwiGLU:
        """Lets the layers keep packed copies of their weights, as `fastnn.nn.Linear.freeze`."""
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            layer.freeze()
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Input (*, in_features), result (*, out_features)."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not all(is_unchanged(layer, Linear) for layer in (gate, up, down)):
            output: Tensor = down(_glu("nn.SwiGLU", self.activation, gate(input), up(input)))
            return output
        operands = Operands(input, gate.weight, None, up.weight, down.weight, None)
        packed = None if gate.packed is None else packed_of(gate, up, down)
        return mlp_maybe_packed("swiglu_mlp", operands, self.activation, self.recompute, packed)

    def extra_repr(self) -> str:
        """The constructor's arguments that the layers do not show."""
        return f"activation={self.activation!r}, recompute={self.recompute}"


class QKVLinear(Linear):
    """Queries, keys and values from one product: three linear layers that read the same input, side by side.

    Args:
        embed_dim: size of the input's last dimension.
        num_heads: of the queries.
        num_kv_heads: of keys and values (grouped queries); `num_heads` where it is None.
        head_dim: size of a head; `embed_dim // num_heads` where it is None.
        bias: whether there is one.
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"fastnn.nn.QKVLinear: num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}"
            )
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"fastnn.nn.QKVLinear: without head_dim, embed_dim must be a multiple of num_heads, got {embed_dim} "
                f"and {num_heads}"
            )
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        super().__init__(embed_dim, (num_heads + 2 * kv_heads) * self.head_dim, bias, device, dtype)

    @classmethod
    def from_layers(
        cls, query: torch.nn.Linear, key: torch.nn.Linear, value: torch.nn.Linear, head_dim: int
    ) -> QKVLinear:
        """One layer with copies of the parameters of three, which must agree in input size, biases, type and device.

        Raises:
            ValueError: they do not, or their sizes are no multiples of `head_dim`.
        """
        layers = (query, key, value)
        kinds = {(x.in_features, x.bias is None, x.weight.dtype, x.weight.device) for x in layers}
        sizes = [x.out_features for x in layers]
        if len(kinds) > 1 or sizes[1] != sizes[2] or any(size % head_dim for size in sizes):
            raise ValueError(
                "fastnn.nn.QKVLinear: the layers must agree in in_features, bias, type and device, key and value in "
                f"out_features, and those must be multiples of head_dim = {head_dim}; got {', '.join(map(str, layers))}"
            )
        heads, kv_heads = sizes[0] // head_dim, sizes[1] // head_dim
        weight, biased = query.weight, query.bias is not None
        made = cls(query.in_features, heads, kv_heads, head_dim, biased, weight.device, weight.dtype)
        with torch.no_grad():
            made.weight.copy_(torch.cat([x.weight for x in layers]))
            if biased:
                made.bias.copy_(torch.cat([x.bias for x in layers]))
        return made.train(query.training)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Input (*, embed_dim); views (*, num_heads, head_dim) and twice (*, num_kv_heads, head_dim) of one result."""
        features = super().forward(input)
        heads = self.num_heads + 2 * self.num_kv_heads
        all_heads = features.reshape(*features.shape[:-1], heads, self.head_dim)
        query, key, value = torch.split(all_heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], -2)
        return query, key, value

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        heads = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"embed_dim={self.in_features}, {heads}, bias={self.bias is not None}"
