"""Dense layers on codes in groups: 4-bit ones, and 8-bit ones whose inputs stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.groups import dequantize_groups, groups_of, quantize_groups
from ..ops.linear import Activation
from ..ops.linear_groupwise import OP, linear_groupwise_maybe_packed
from .embedding import check_stored
from .quantized import QuantizedLinear
from .tensors import tensor_of


class GroupwiseLinear(QuantizedLinear):
    """A dense layer whose weight is codes with a float16 scale for each `group_size` of them along a row.

    `weight` (uint8 (out_features, ceil(in_features / 2)), two codes of 4 bits to a byte, or int8 (out_features,
    in_features)), `weight_scale` and, where not symmetric, `weight_offset` (float16, (out_features, groups)) are
    buffers; `bias` is a parameter or None. A new layer's weight is zero; `from_float` and `load_state_dict` fill it.
    """

    op = OP
    scale_buffers = ("weight_scale", "weight_offset")
    weight_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: Any,
        dtype: torch.dtype | None,
        group_size: int,
        symmetric: bool,
        int8_input: bool,
        activation: Activation | None,
    ) -> None:
        if type(group_size) is not int or group_size < 1:
            raise ValueError(f"fastnn.nn.{type(self).__name__}: group_size must be a positive int, got {group_size!r}")
        super().__init__(in_features, out_features, bias, device, dtype, activation)
        self.group_size, self.symmetric, self.int8_input = group_size, symmetric, int8_input
        shape = out_features, groups_of(in_features, group_size)
        columns = (in_features + 1) // 2 if self.code_dtype == torch.uint8 else in_features
        codes = torch.zeros(out_features, columns, dtype=self.code_dtype, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", torch.zeros(shape, dtype=torch.float16, device=device))
        offset = None if symmetric else torch.zeros(shape, dtype=torch.float16, device=device)
        self.register_buffer("weight_offset", offset)

    def _take(
        self, codes: Tensor, scale: Tensor, offset: Tensor | None, bias: torch.nn.Parameter | None
    ) -> GroupwiseLinear:
        self.weight, self.weight_scale, self.weight_offset, self.bias = codes, scale, offset, bias
        return self

    def run(self, input: Tensor, activation: str | None) -> Tensor:
        """As in the base class."""
        codes, scale = tensor_of(self, "weight"), tensor_of(self, "weight_scale")
        offset, bias = tensor_of(self, "weight_offset"), tensor_of(self, "bias")
        packed = self.packed.get_groups(codes, scale, offset, self.in_features, self.group_size)
        return linear_groupwise_maybe_packed(
            input, codes, scale, offset, bias, self.group_size, self.int8_input, activation, packed
        )

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, (out_features, in_features)."""
        codes, scale, offset = self.weight, self.weight_scale, self.weight_offset
        return dequantize_groups(codes, scale, offset, self.in_features, self.group_size, dtype)


class Int4Linear(GroupwiseLinear):
    """A dense layer on codes of 4 bits; see `fastnn.linear_groupwise` for what it computes.

    Buffers as `GroupwiseLinear` says; scales stay float16 under `.half()`, `.to(dtype)` and the like.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the buffers and the bias live.
        dtype: the bias's type; the default type unless given.
        group_size: columns that share a scale; the last group of a row may be shorter.
        symmetric: weight = scale * (code - 8); else weight = scale * code + offset.
        int8_input: whether inputs are rounded to 8 bits on the way, a scale for each row.
        activation: as `fastnn.linear`.
    """

    code_dtype = torch.uint8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 64,
        symmetric: bool = True,
        int8_input: bool = False,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, group_size, symmetric, int8_input, activation)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: torch.nn.Parameter | None = None,
        *,
        group_size: int = 64,
        symmetric: bool = True,
        int8_input: bool = False,
        activation: Activation | None = None,
    ) -> Int4Linear:
        """The layer of a floating weight (out_features, in_features), rounded by `fastnn.ops.quantize_groups`.

        Args:
            weight: finite, any strides.
            bias: becomes the layer's own, the same object.
            group_size, symmetric, int8_input, activation: as in the constructor.

        Raises:
            ValueError: a weight that is not finite or beyond what float16 scales stand for.
        """
        parts = quantize_groups(weight, group_size, bits=4, symmetric=symmetric)
        rows, columns = weight.shape
        layer = cls(
            columns,
            rows,
            False,
            "meta",
            group_size=group_size,
            symmetric=symmetric,
            int8_input=int8_input,
            activation=activation,
        )
        layer._take(*parts, bias)
        return layer

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers."""
        return {
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "int8_input": self.int8_input,
            "activation": self.activation,
        }

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int4Linear:
        """As in the base class."""
        kept = {name: options[name] for name in ("group_size", "symmetric", "int8_input", "activation")}
        if type(kept["int8_input"]) is not bool:
            raise ValueError("int8_input must be true or false")
        check_stored(cls.code_dtype, tensors, options["in_features"], kept["group_size"], kept["symmetric"])
        return cls(options["in_features"], tensors["weight"].shape[0], False, "meta", **kept)


class Int8WeightOnlyLinear(GroupwiseLinear):
    """A dense layer on codes of 8 bits whose inputs are not rounded to 8 bits; see `fastnn.linear_groupwise`.

    Buffers as `GroupwiseLinear` says, without offsets; scales stay float16 under `.half()`, `.to(dtype)` and the like.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the buffers and the bias live.
        dtype: the bias's type; the default type unless given.
        group_size: columns that share a scale; the last group of a row may be shorter.
        activation: as `fastnn.linear`.
    """

    code_dtype = torch.int8

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        group_size: int = 128,
        activation: Activation | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, group_size, True, False, activation)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: torch.nn.Parameter | None = None,
        *,
        group_size: int = 128,
        activation: Activation | None = None,
    ) -> Int8WeightOnlyLinear:
        """The layer of a floating weight (out_features, in_features), rounded by `fastnn.ops.quantize_groups`.

        Args:
            weight: finite, any strides.
            bias: becomes the layer's own, the same object.
            group_size, activation: as in the constructor.

        Raises:
            ValueError: a weight that is not finite or beyond what float16 scales stand for.
        """
        parts = quantize_groups(weight, group_size, bits=8)
        layer = cls(weight.shape[1], weight.shape[0], False, "meta", group_size=group_size, activation=activation)
        layer._take(*parts, bias)
        return layer

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers."""
        return {"group_size": self.group_size, "symmetric": True, "activation": self.activation}

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int8WeightOnlyLinear:
        """As in the base class."""
        kept = {name: options[name] for name in ("group_size", "activation")}
        check_stored(cls.code_dtype, tensors, options["in_features"], kept["group_size"], True)
        return cls(options["in_features"], tensors["weight"].shape[0], False, "meta", **kept)
