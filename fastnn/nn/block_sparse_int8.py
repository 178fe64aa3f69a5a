"""Dense layer on blocks of int8 codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.block_sparse import OUTPUTS, strips_of
from ..ops.block_sparse_int8 import (
    CODE_DEPTHS,
    OP,
    UNIT,
    block_sparse_linear_int8_maybe_packed,
    check_codes,
    dense_codes,
)
from ..ops.linear import Activation
from ..ops.linear_int8 import MAX_FEATURES, dequantize_weight
from .block_sparse import BlockSparseLinear
from .quantized import QuantizedLinear
from .tensors import tensor_of


class Int8BlockSparseLinear(QuantizedLinear):
    """A dense layer that keeps some blocks of its weight as int8 codes, and whose inputs are rounded on the way.

    `weight` (int8 codes, (blocks, depth / 4, 16, 4)), `weight_scale` (float32, (out_features,)), `columns` (int32
    (blocks,)) and `starts` (int32 (ceil(out_features / 16) + 1,)) are buffers; `fastnn.block_sparse_linear_int8` says
    what they mean. `bias` is a parameter or None. The kernel reads the codes in place; what the layer keeps beside them
    are 8 bytes for each output, in no state_dict, pickle or deepcopy, which follow the buffers. A new layer's weight is
    zero and its blocks are the first ones in their order: `from_dense`, `from_float` and `load_state_dict` fill it.

    Args:
        in_features: size of the input's last dimension, at most 131072.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the buffers and the bias live.
        dtype: the bias's type; the default type unless given.
        blocks: how many are kept.
        depth: columns of a block: 4, 8 or 16.
        activation: as `fastnn.block_sparse_linear_int8`.

    Raises:
        ValueError: sizes that do not fit, an unknown activation.
    """

    code_dtype = torch.int8
    op = OP

    columns: Tensor
    starts: Tensor

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
        if in_features > MAX_FEATURES:
            raise ValueError(f"{name}: in_features must be at most {MAX_FEATURES}, got {in_features}")
        if depth not in CODE_DEPTHS:
            known = ", ".join(map(str, CODE_DEPTHS))
            raise ValueError(f"{name}: depth must be one of {known}, whole units of {UNIT} codes; got {depth!r}")
        super().__init__(in_features, out_features, bias, device, dtype, activation)
        places = BlockSparseLinear(in_features, out_features, False, device, blocks=blocks, depth=depth)
        self.depth = depth
        self.register_buffer(
            "weight", torch.zeros(blocks, depth // UNIT, OUTPUTS, UNIT, dtype=torch.int8, device=device)
        )
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("columns", places.columns)
        self.register_buffer("starts", places.starts)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: torch.nn.Parameter | None = None,
        mask: Tensor | None = None,
        *,
        depth: int = 4,
        activation: Activation | None = None,
    ) -> Int8BlockSparseLinear:
        """The layer that keeps some blocks of `weight` (out_features, in_features), rounded.

        Args:
            weight: finite where it is kept, any strides.
            bias: becomes the layer's own, the same object.
            mask, depth: as `fastnn.sparse.to_int8_blocks` takes them.
            activation: as in the constructor.
        """
        from ..sparse import to_int8_blocks

        codes, columns, starts, scale = to_int8_blocks(weight, mask, depth=depth)
        return cls._of(codes, columns, starts, scale, weight.shape[1], bias, activation)

    @classmethod
    def from_float(cls, layer: BlockSparseLinear) -> Int8BlockSparseLinear:
        """The layer with the same blocks, rounded, and the same bias.

        Raises:
            ValueError: blocks that are 2 columns deep, values that are not finite.
        """
        from ..sparse.form import Blocks, codes_of_blocks

        blocks = Blocks(layer.values, layer.columns, layer.starts)
        codes, columns, starts, scale = codes_of_blocks(blocks, layer.out_features, layer.in_features)
        return cls._of(codes, columns, starts, scale, layer.in_features, layer.bias, layer.activation)

    @classmethod
    def _of(
        cls,
        codes: Tensor,
        columns: Tensor,
        starts: Tensor,
        scale: Tensor,
        k: int,
        bias: torch.nn.Parameter | None,
        activation: Activation | None,
    ) -> Int8BlockSparseLinear:
        # Of no blocks at first, and not on the meta device, as BlockSparseLinear.
        layer = cls(k, scale.shape[0], False, "cpu", blocks=0, depth=codes.shape[1] * UNIT, activation=activation)
        layer.weight, layer.columns, layer.starts, layer.weight_scale = codes, columns, starts, scale
        layer.bias = bias
        return layer

    @property
    def blocks(self) -> int:
        """How many are kept."""
        return self.weight.shape[0]

    @property
    def density(self) -> float:
        """The part of all blocks that is kept."""
        width = (self.in_features + self.depth - 1) // self.depth
        return self.blocks / max(1, strips_of(self.out_features) * width)

    def run(self, input: Tensor, activation: str | None) -> Tensor:
        """As in the base class."""
        if isinstance(input, Tensor) and input.dim() and input.shape[-1] != self.in_features:
            raise ValueError(
                f"fastnn.nn.Int8BlockSparseLinear: input's last dimension must be in_features = {self.in_features}, "
                f"got shape {tuple(input.shape)}"
            )
        codes, columns, starts = tensor_of(self, "weight"), tensor_of(self, "columns"), tensor_of(self, "starts")
        scale, bias = tensor_of(self, "weight_scale"), tensor_of(self, "bias")
        packed = self.packed.get_blocks(codes, starts, scale)
        return block_sparse_linear_int8_maybe_packed(input, codes, columns, starts, scale, bias, activation, packed)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the blocks of codes stand for, (out_features, in_features)."""
        dense = dense_codes(self.weight, self.columns, self.starts, self.out_features, self.in_features)
        return dequantize_weight(dense, self.weight_scale, dtype)

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers."""
        return {"out_features": self.out_features, "activation": self.activation}

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int8BlockSparseLinear:
        """As in the base class."""
        names = ("weight", "columns", "starts", "weight_scale")
        codes, columns, starts, scale = (tensors[name] for name in names)
        k, n = options["in_features"], options["out_features"]
        check_codes("fastnn.load", codes, columns, starts, n)
        if scale.dtype != torch.float32 or tuple(scale.shape) != (n,):
            raise ValueError("weight_scale must be float32, one for each output")
        return cls._of(codes, columns, starts, scale, k, None, options["activation"])

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{text}, blocks={self.blocks} ({self.density:.1%}), depth={self.depth}{activation}"
