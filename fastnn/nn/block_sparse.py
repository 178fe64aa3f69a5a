"""Dense layer on a block-sparse weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.block_sparse import (
    DEPTHS,
    OUTPUTS,
    block_sparse_linear_of_layer,
    check_blocks,
    dense_of_blocks,
    strips_of,
    values_empty,
)
from ..ops.linear import ACTIVATIONS, Activation
from .tensors import tensor_of


class BlockSparseLinear(torch.nn.Module):
    """A dense layer that keeps, and computes with, some blocks of its weight; trains, the pattern staying as it is.

    `values` (blocks, depth, 16) and `bias` are parameters, `columns` (int32 (blocks,)) and `starts` (int32
    (ceil(out_features / 16) + 1,)) are buffers; `fastnn.block_sparse_linear` says what they mean. All are in the
    `state_dict`, in the form in which the kernels read them. A new layer's weight is zero and its blocks are the first
    ones in their order: `from_dense` or `load_state_dict` fill it.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the parameters and buffers live.
        dtype: the parameters' type; the default type unless given.
        blocks: how many are kept.
        depth: columns of a block: 2, 4, 8 or 16.
        activation: as `fastnn.linear`.

    Raises:
        ValueError: sizes that do not fit, an unknown activation.
    """

    columns: Tensor
    starts: Tensor
    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        blocks: int,
        depth: int = 4,
        activation: Activation | None = None,
    ) -> None:
        name = f"fastnn.nn.{type(self).__name__}"
        if activation not in ACTIVATIONS:
            known = ", ".join(repr(one) for one in ACTIVATIONS)
            raise ValueError(f"{name}: activation must be one of {known}; got {activation!r}")
        if depth not in DEPTHS:
            raise ValueError(f"{name}: depth must be one of {', '.join(map(str, DEPTHS))}; got {depth!r}")
        strips, width = strips_of(out_features), (in_features + depth - 1) // depth
        if type(blocks) is not int or not 0 <= blocks <= strips * width:
            raise ValueError(f"{name}: blocks must be an int from 0 to {strips * width}, got {blocks!r}")
        super().__init__()
        self.in_features, self.out_features, self.depth, self.activation = in_features, out_features, depth, activation
        index = torch.arange(blocks, dtype=torch.int32, device=device)
        ends = torch.arange(strips + 1, dtype=torch.int32, device=device) * width
        self.values = torch.nn.Parameter(values_empty((blocks, depth, OUTPUTS), dtype, device).zero_())
        self.register_buffer("columns", index % max(width, 1))
        self.register_buffer("starts", ends.clamp(max=blocks))
        zeros = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: torch.nn.Parameter | None = None,
        mask: Tensor | None = None,
        *,
        depth: int = 4,
        activation: Activation | None = None,
    ) -> BlockSparseLinear:
        """The layer that keeps some blocks of `weight` (out_features, in_features).

        Args:
            weight: any strides.
            bias: becomes the layer's own, the same object.
            mask, depth: as `fastnn.sparse.to_blocks` takes them.
            activation: as in the constructor.
        """
        from ..sparse import to_blocks

        found = to_blocks(weight, mask, depth=depth)
        n, k = weight.shape
        layer = cls._of(found.values, found.columns, found.starts, k, n, activation)
        layer.bias = bias
        return layer

    @classmethod
    def _of(
        cls, values: Tensor, columns: Tensor, starts: Tensor, k: int, n: int, activation: Activation | None
    ) -> BlockSparseLinear:
        """The layer with these tensors, without bias."""
        # Of no blocks at first, and not on the meta device, whose arange imports torch's compiler: seconds.
        layer = cls(k, n, False, "cpu", values.dtype, blocks=0, depth=values.shape[1], activation=activation)
        layer.values, layer.columns, layer.starts = torch.nn.Parameter(values), columns, starts
        return layer

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the parameters and buffers."""
        return {"out_features": self.out_features, "activation": self.activation}

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> BlockSparseLinear:
        """The layer that `options` and the tensors of a file describe, with these tensors, without bias.

        Raises:
            ValueError, TypeError, KeyError: they describe none.
        """
        values, columns, starts = (tensors[name] for name in ("values", "columns", "starts"))
        k, n = options["in_features"], options["out_features"]
        check_blocks("fastnn.load", values, columns, starts, n, k)
        return cls._of(values, columns, starts, k, n, options["activation"])

    @property
    def blocks(self) -> int:
        """How many are kept."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """The part of all blocks that is kept."""
        width = (self.in_features + self.depth - 1) // self.depth
        return self.blocks / max(1, strips_of(self.out_features) * width)

    def forward(self, input: Tensor) -> Tensor:
        """`activation(input @ weight.T + bias)`; input (*, in_features), result (*, out_features)."""
        if isinstance(input, Tensor) and input.dim() and input.shape[-1] != self.in_features:
            raise ValueError(
                f"fastnn.nn.BlockSparseLinear: input's last dimension must be in_features = {self.in_features}, "
                f"got shape {tuple(input.shape)}"
            )
        return block_sparse_linear_of_layer(
            input,
            tensor_of(self, "values"),
            tensor_of(self, "columns"),
            tensor_of(self, "starts"),
            tensor_of(self, "bias"),
            self.out_features,
            self.activation,
        )

    def dense(self) -> Tensor:
        """The weight that the blocks stand for, (out_features, in_features)."""
        return dense_of_blocks(self.values, self.columns, self.starts, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{text}, blocks={self.blocks} ({self.density:.1%}), depth={self.depth}{activation}"
