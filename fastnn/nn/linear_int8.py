"""Dense layer on int8 codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.linear import Activation
from ..ops.linear_int8 import MAX_FEATURES, dequantize_weight, linear_int8_maybe_packed, quantize_rows
from .quantized import QuantizedLinear
from .tensors import tensor_of


class Int8Linear(QuantizedLinear):
    """A dense layer whose weight is int8 codes with a scale for each output, and whose inputs are rounded on the way.

    `weight` (int8, (out_features, in_features)) and `weight_scale` (float32, (out_features,)) are buffers; `bias` is a
    parameter or None. The scale stays float32 under `.half()`, `.to(dtype)` and the like. The copy in the order that
    the kernel reads belongs to the layer: it is in no state_dict, pickle or deepcopy, and follows the buffers.
    A new layer's weight is zero; `from_float` and `load_state_dict` fill it.

    Args:
        in_features: size of the input's last dimension, at most 131072.
        out_features: size of the output's last dimension.
        bias: whether there is one.
        device: where the buffers and the bias live.
        dtype: the bias's type; the default type unless given.
        activation: as `fastnn.linear_int8`.
    """

    code_dtype = torch.int8
    op = "linear_int8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation | None = None,
    ) -> None:
        if in_features > MAX_FEATURES:
            raise ValueError(f"fastnn.nn.Int8Linear: in_features must be at most {MAX_FEATURES}, got {in_features}")
        super().__init__(in_features, out_features, bias, device, dtype, activation)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))

    @classmethod
    def from_float(
        cls, weight: Tensor, bias: torch.nn.Parameter | None = None, *, activation: Activation | None = None
    ) -> Int8Linear:
        """The layer of a floating weight (out_features, in_features), rounded by `fastnn.ops.quantize_rows`.

        Args:
            weight: finite, any strides.
            bias: becomes the layer's own, the same object.
            activation: as in the constructor.

        Raises:
            ValueError: a weight that is not finite.
        """
        codes, scale = quantize_rows(weight.detach())
        if bool(scale.isnan().any()):
            raise ValueError("fastnn.nn.Int8Linear: weight has NaN or infinite values")
        layer = cls(weight.shape[1], weight.shape[0], False, "meta", activation=activation)
        layer.weight, layer.weight_scale, layer.bias = codes, scale, bias
        return layer

    def run(self, input: Tensor, activation: str | None) -> Tensor:
        """As in the base class."""
        codes, scale = tensor_of(self, "weight"), tensor_of(self, "weight_scale")
        packed = self.packed.get_codes(codes, scale)
        return linear_int8_maybe_packed(input, codes, scale, tensor_of(self, "bias"), activation, packed)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, (out_features, in_features)."""
        return dequantize_weight(self.weight, self.weight_scale, dtype)

    def options(self) -> dict[str, Any]:
        """What a file keeps beside the buffers."""
        return {"activation": self.activation}

    @classmethod
    def stored(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Int8Linear:
        """As in the base class."""
        codes, scale = tensors["weight"], tensors["weight_scale"]
        if codes.dtype != torch.int8 or codes.dim() != 2:
            raise ValueError("weight must be int8 codes with 2 dimensions")
        if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
            raise ValueError("weight_scale must be float32, one for each output")
        return cls(codes.shape[1], codes.shape[0], False, "meta", activation=options["activation"])
